"""The authors' numbers, through the benchmark that prints them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity.py"


@pytest.fixture(scope="module")
def fidelity():
    spec = importlib.util.spec_from_file_location("fidelity", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fidelity"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["v1", "std002"])
def test_every_error_is_within_its_limit_in_both_modes(shared, fidelity, folder):
    errors = fidelity.run(shared / "golden" / folder)
    assert [f"{e.mode} {e.what}: {e.error} {e.where}" for e in errors if not e.passed] == []
    compared = {(error.mode, error.kind) for error in errors}
    for kind in ("weights", "loss", "logits", "routing", "gradients", "AdamW losses", "greedy tokens"):
        assert {("default", kind), ("compat", kind)} <= compared


def test_an_error_over_its_limit_ends_in_exit_code_1(shared, fidelity, monkeypatch):
    monkeypatch.setattr(fidelity, "run", lambda path: [fidelity.Error("default", "loss", "loss", float("nan"), "x")])
    app = fidelity.typer.Typer()
    app.command()(fidelity.main)
    result = CliRunner().invoke(app, [str(shared / "golden" / "v1"), "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["passed"] is False

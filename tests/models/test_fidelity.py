"""The authors' numbers, through the benchmark that prints them."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from lavin_ds.config import ModelConfig
from lavin_ds.models.lavin import Lavin

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


# Nothing as in v1: three samples, the text first, other sizes, temperature, scale and limit, grouped key/value heads.
OTHER = {
    "dim": 96,
    "n_layers": 3,
    "n_heads": 6,
    "vocab_size": 157,
    "norm_eps": 1e-5,
    "max_seq_len": 43,
    "hidden_proj": 12,
    "adapter_dim": 4,
    "adapter_scale": 0.5,
    "temperature": 3.0,
    "adapter_type": "attn",
    "visual_adapter_type": "router",
    "vision_width": 64,
    "vision_layers": 8,
    "vision_patch": 7,
    "image_size": 28,
}
INDICATORS, PREFIX_IMAGE, PREFIX_TEXT, VISUAL_TOKENS = [0, 1, 1], [5, 6], [5, 7, 8], 2


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, fidelity):
    """A folder with the numbers of this very model: what is tested is that the script takes any sizes."""
    folder = tmp_path_factory.mktemp("other")
    adapter = {"kind": "mm", "dim": 4, "groups": 4, "scale": 0.5, "dropout": 0.0, "temperature": 3.0}
    model_config = ModelConfig.model_validate(
        {
            "llm": {"dim": 96, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 160, "vocab_size": 157}
            | {"norm_eps": 1e-5},
            "vision": {"width": 64, "layers": 8, "heads": 1, "patch_size": 7, "image_size": 28},
            "llm_adapter": adapter,
            "vision_adapter": adapter,
            "neck": {"dim": 12},
            "frozen_dtype": "fp32",
        }
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 3, 28, 28)).astype(np.float32)
    images[0] = 0
    ids, labels = np.zeros((3, 43), dtype=np.int64), np.zeros((3, 43), dtype=np.int64)
    for row, length in enumerate((17, 43, 30)):
        ids[row, :length] = [2, *rng.integers(9, 157, length - 1)]
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    prompts = [rng.integers(9, 157, length).tolist() for length in (9, 5, 12)]
    inputs = {"ids": ids, "labels": labels, "indicators": np.array(INDICATORS), "images": images}
    np.savez(folder / "inputs.npz", **inputs, prefix_img=np.array(PREFIX_IMAGE), prefix_nonimg=np.array(PREFIX_TEXT))
    optimizer = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0}
    settings = {"config": OTHER, "rule": "v1", "optimizer": optimizer | {"schedule": "constant"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "gen.json").write_text(json.dumps({"prompts": prompts, "indicators": [1, 0, 1]}))

    def built(compat):
        model, parameters = Lavin(model_config, compat).eval(), []
        for name, parameter in model.named_parameters():
            official = fidelity.theirs(name)
            shape = [*parameter.shape, 1] if fidelity.is_convolution(official) else list(parameter.shape)
            values = fidelity.fill(official, shape, "v1")
            parameter.data.copy_(values.view_as(parameter))
            facts = {"trainable": name in model.trainable(), "decay": parameter.ndim > 1}
            parameters.append({"name": official, "shape": shape, "sum": values.double().sum().item(), **facts})
        (folder / "params.json").write_text(json.dumps(parameters))
        return model

    np.savez(folder / "train_cls.npz", vit_cls=np.zeros((3, VISUAL_TOKENS, 64)))  # for Golden.visual_tokens, meanwhile
    for name, compat in (("train_cls", False), ("train_reference", True)):
        model = built(compat)
        golden = fidelity.Golden.read(folder)
        batch = fidelity.batch_of(golden, [0, 1, 2])
        assert batch.ids_BT.shape == (3, 42) and batch.ids_BT[1, :5].tolist() == [2, 5, 6, 0, 0]
        with fidelity.watched(model) as seen:
            loss = fidelity.mean_loss(model, batch)
        loss.backward()
        modality = torch.tensor(INDICATORS)
        hidden = torch.cat([seen["h_out"][:2][modality][:, None], seen["h_out"][2:].unflatten(0, (3, 42))], dim=1)
        logits = model.llm.logits(model.llm.norm(hidden)).detach()
        whole = {key: np.zeros((3, *seen[key].shape[1:])) for key in ("vit_cls", "image_embeds")}
        for key, array in whole.items():
            array[1:] = seen[key][-2:]
        gradients = {fidelity.theirs(n): p.grad for n, p in model.trainable().items()}
        expected = {
            "loss_f64": np.array(loss.item()),
            "logits_slice": logits[:, ::4, :64],
            "logits_lse": logits.double().logsumexp(-1),
            "logits_sum": logits.double().sum(-1),
            "h_out": hidden[..., :8],
            "grad_names": np.array(list(gradients)),
            "grad_norms": np.array([g.double().norm().item() for g in gradients.values()]),
            "adamw_losses_torch": np.array([loss.item()]),
        }
        expected |= {f"route_llm.{k}": seen[f"route_llm.{k}"][modality] for k in range(3)}
        expected |= {f"route_vit.{k}": seen[f"route_vit.{k}"] for k in range(8)} if compat else {}
        expected |= {f"grad8/{n}": g.flatten()[:8] for n, g in gradients.items()}
        np.savez(folder / f"{name}.npz", **{k: np.asarray(v) for k, v in (expected | whole).items()})
        if compat:
            np.savez(folder / "grads_full.npz", **{n: g.numpy() for n, g in gradients.items()})
        prompt_batch = fidelity.prompts_of(golden, {"prompts": prompts, "indicators": [1, 0, 1]})
        assert prompt_batch.lengths_B.tolist() == [14, 9, 17]
    # A token a call behind the shortest prompt, uncached; longer prompts prescribe theirs.
    model, lengths, calls = built(True), prompt_batch.lengths_B, 11
    for name, shift in (("gen_rope_fixed", 99), ("gen_reference", 9)):
        ids_BT = F.pad(prompt_batch.ids_BT, (0, calls))
        arrays = {"logits": [], "argmax": [], "lse": []}
        for n in range(9, 9 + calls):
            index = torch.arange(n)
            now = replace(prompt_batch, ids_BT=ids_BT[:, :n], labels_BT=torch.full((3, n), -100))
            with torch.no_grad():
                positions = index + (index < shift).long()
                logits = model.llm.logits(model.hidden(now, positions=positions))[:, -1].double()
            ids_BT[:, n] = torch.where(n < lengths, ids_BT[:, n], logits.argmax(-1))
            for key, value in zip(arrays, (logits[:, :100], logits.argmax(-1), logits.logsumexp(-1)), strict=True):
                arrays[key].append(value.numpy())
        np.savez(folder / f"{name}.npz", **{key: np.stack(value) for key, value in arrays.items()})
    return folder


def test_a_folder_of_other_sizes_needs_no_change_of_the_script(fidelity, other_folder):
    errors = fidelity.run(other_folder)
    assert [f"{e.mode} {e.what}: {e.error} {e.where}" for e in errors if not e.passed] == []
    assert {"visual tokens", "routing", "gradients", "greedy tokens", "AdamW losses"} <= {e.kind for e in errors}


@pytest.mark.parametrize(
    "file", ["config.json", "params.json", "inputs.npz", "train_cls.npz", "grads_full.npz", "gen.json"]
)
def test_a_file_that_is_missing_or_damaged_is_named(fidelity, other_folder, tmp_path, file):
    folder = shutil.copytree(other_folder, tmp_path / "golden")
    app = fidelity.typer.Typer()
    app.command()(fidelity.main)
    (folder / file).write_bytes(b"{}" if file == "config.json" else b"x")
    damaged = CliRunner().invoke(app, [str(folder)])
    (folder / file).unlink()
    absent = CliRunner().invoke(app, [str(folder)])
    assert damaged.exit_code == absent.exit_code == 2, (damaged.output, absent.output)
    assert file in absent.output and (file in damaged.output or "lacks 'config'" in damaged.output)

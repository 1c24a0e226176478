import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_helpers import CONFIG, export, filled, same_trainables, write_clip, write_meta

from lavin_ds import __version__
from lavin_ds.config import RunConfig
from lavin_ds.errors import UserError
from lavin_ds.models.adapters import KINDS
from lavin_ds.models.lavin import Lavin
from lavin_ds.weights.adapter import base_warning, load_adapter, read_record, record_file, save_adapter
from lavin_ds.weights.base import build_model, check_inputs


@pytest.fixture
def saved(tmp_path, files):
    """A model with its adapter file, and the files of its base."""
    model, llama, clip = files
    save_adapter(tmp_path / "adapter.safetensors", model.trainable(), CONFIG, llama, clip)
    return model, tmp_path / "adapter.safetensors", llama, clip


def test_an_adapter_file_fills_another_model_and_says_what_it_belongs_to(saved):
    model, file, llama, clip = saved
    other = filled(seed=1)
    load_adapter(other, file)
    assert same_trainables(model, other)
    record = read_record(file)
    assert record.lavin_ds == __version__ and record.recipe == "small" and record.config == CONFIG
    assert record.trainable_parameters == sum(p.numel() for p in model.trainable().values())
    assert record.bytes == file.stat().st_size
    assert record.tensors == {name: list(p.shape) for name, p in model.trainable().items()}
    assert record.base.llama.bytes_of == {p.name: p.stat().st_size for p in llama.glob("*.pth")}
    assert record.base.clip.bytes_of == {clip.name: clip.stat().st_size}
    assert not list(file.parent.glob(".*tmp"))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"mm"}))
def test_adapters_of_every_kind_go_through_a_file(tmp_path, files, kind):
    vision = "rep" if kind == "lora" else kind
    raw = CONFIG.model_dump()
    adapter = {"kind": kind, "dim": 4, "at": KINDS[kind].points[:1]}
    raw["model"] |= {"llm_adapter": adapter, "vision_adapter": {"kind": vision, "dim": 4}}
    config = RunConfig.model_validate(raw)
    source, other = filled(config=config), filled(seed=1, config=config)
    _, llama, clip = files
    record = save_adapter(tmp_path / "adapter.safetensors", source.trainable(), config, llama, clip)
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert same_trainables(source, other) and record.config == config
    with pytest.raises(UserError, match="does not fit the recipe"):
        load_adapter(filled(), tmp_path / "adapter.safetensors")


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named_and_nothing_is_filled(saved):
    model, file, *_ = saved
    metadata = {"format": "pt", "lavin_ds_adapter": "1"}
    tensors = load_file(file)
    other = filled(seed=1)
    before = {name: p.clone() for name, p in other.trainable().items()}
    name = "modality.weight"
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != name}, f"lacks {name}"),
        (tensors | {"neck.extra": torch.zeros(1)}, "has unexpected neck.extra"),
        (tensors | {name: torch.zeros(2, 31)}, rf"{name} has shape \[2, 31\], but must have \[2, 32\]"),
    ]:
        save_file(changed, file, metadata)
        with pytest.raises(UserError, match=message):
            load_adapter(other, file)
    assert all(torch.equal(p, before[n]) for n, p in other.trainable().items())


def test_another_base_than_the_adapter_was_trained_on_is_told_in_a_sentence(saved, tmp_path):
    model, file, llama, clip = saved
    assert base_warning(file, llama, clip) is None and base_warning(file, llama, None) is None
    elsewhere = shutil.copytree(llama, tmp_path / "copy")
    assert base_warning(file, elsewhere, clip) is None
    write_meta(tmp_path / "tuned", filled(seed=1), shards=2)  # as large, file by file
    assert f"was trained on {llama}, but the files of --llama {tmp_path / 'tuned'} differ" in base_warning(
        file, tmp_path / "tuned", clip
    )
    other = write_clip(tmp_path / "other.safetensors", model)
    assert f"the files of --clip {other} differ" in base_warning(file, llama, other)
    record_file(file).unlink()
    assert base_warning(file, tmp_path / "tuned", clip) is None


def test_other_files_are_not_taken_for_adapters(tmp_path, saved):
    with pytest.raises(UserError, match="No adapter at"):
        load_adapter(filled(), tmp_path / "absent.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not an adapter of this version"):
        load_adapter(filled(), tmp_path / "a.safetensors")
    _, file, *_ = saved
    file.with_name(file.name + ".json").unlink()
    with pytest.raises(UserError, match="adapter.safetensors.json is missing"):
        read_record(file)


def test_build_model_loads_everything_and_reports_on_the_way(saved):
    model, file, llama, clip = saved
    stages = []
    built = build_model(CONFIG, llama, clip, file, on_progress=lambda *a: stages.append(a))
    assert not built.training
    for name, parameter in model.named_parameters():
        assert torch.equal(built.get_parameter(name), parameter), name
    assert {name for name, *_ in stages} == {"LLaMA", "CLIP"} and stages[-1][1] == stages[-1][2]
    fresh = build_model(CONFIG, llama, clip)
    assert torch.equal(fresh.llm.norm.weight, model.llm.norm.weight)
    want = Lavin(CONFIG.model)
    want.reset_trainable(CONFIG.training.seed)
    assert same_trainables(fresh, want)


def test_inputs_that_contradict_the_recipe_are_refused_before_anything_is_built(files):
    _, llama, clip = files
    with pytest.raises(UserError, match="give a CLIP file with --clip"):
        check_inputs(CONFIG, llama, None)
    blind = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"vision": None})})
    check_inputs(blind, llama, None)
    with pytest.raises(UserError, match="leave --clip out"):
        check_inputs(blind, llama, clip)


def test_export_writes_a_file_that_stands_alone(run, tmp_path, files):
    out = tmp_path / "lavin.safetensors"
    result = export("--run", run, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["parameters"] == sum(p.numel() for p in files[0].trainable().values())
    assert summary["bytes"] == out.stat().st_size and summary["recipe"] == "small"
    other = filled(seed=1)
    load_adapter(other, out)
    assert same_trainables(files[0], other)
    assert RunConfig.model_validate(json.loads((tmp_path / "lavin.safetensors.json").read_text())["config"]) == CONFIG
    table = export("--run", run, "--out", out)
    assert f"{summary['bytes']:,}" in table.stdout


def test_export_refuses_what_it_cannot_do_and_leaves_nothing(run, tmp_path):
    for arguments, message in [
        (("--run", tmp_path, "--out", tmp_path / "a.safetensors"), "is not a run directory"),
        (("--run", run, "--out", tmp_path / "a.pth"), "must end in .safetensors"),
        (("--run", run, "--out", tmp_path / "no" / "a.safetensors"), "there is no folder"),
    ]:
        result = export(*arguments)
        assert isinstance(result.exception, UserError) and message in str(result.exception)
    (run / "adapter.safetensors").unlink()
    result = export("--run", run, "--out", tmp_path / "a.safetensors")
    assert "not complete" in str(result.exception)
    assert not list(tmp_path.glob("a.*"))

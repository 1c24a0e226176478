import argparse
import json

import pytest
import torch
from weights_helpers import CONFIG, export, filled, same_trainables

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, RunConfig, VisionConfig
from lavin_ds.errors import UserError
from lavin_ds.models.adapters import KINDS
from lavin_ds.models.lavin import Lavin
from lavin_ds.weights.official import import_official, official_bytes, official_name


@pytest.fixture
def golden(shared) -> tuple[RunConfig, object, list[dict]]:
    """The recipe of golden/v1, its checkpoint, and what its params.json says."""
    folder = shared / "golden" / "v1"
    adapter = AdapterConfig(kind="mm", temperature=10)
    model = ModelConfig(
        llm=LlamaConfig(dim=128, n_layers=4, n_heads=4, ffn_dim=352, vocab_size=1000),
        vision=VisionConfig(width=128, layers=12, heads=2, patch_size=14, image_size=56),
        llm_adapter=adapter,
        vision_adapter=adapter,
        neck={"dim": 16},
        frozen_dtype="fp32",
    )
    parameters = json.loads((folder / "params.json").read_text())
    return RunConfig(name="golden", model=model), folder / "checkpoint-19.pth", parameters


def test_the_authors_checkpoint_goes_in_and_comes_out_the_same(golden, tmp_path):
    config, file, parameters = golden
    model = Lavin(config.model)
    arguments = import_official(model, file)
    assert arguments.epochs == 20
    sums = {p["name"]: p["sum"] for p in parameters if p["trainable"]}
    assert {official_name(name) for name in model.trainable()} == set(sums)
    for name, parameter in model.trainable().items():
        assert parameter.double().sum().item() == pytest.approx(sums[official_name(name)], rel=1e-9)

    exported = tmp_path / "checkpoint-0.pth"
    exported.write_bytes(official_bytes(model.trainable(), config))
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs, ours = (torch.load(f, weights_only=True)["model"] for f in (file, exported))
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def write(file, model, **changes):
    content = {"model": changes.pop("tensors", {}), "args": argparse.Namespace(**changes)}
    if not content["model"]:
        with torch.serialization.safe_globals([argparse.Namespace]):
            file.write_bytes(official_bytes(model.trainable(), CONFIG))
            content["model"] = torch.load(file, weights_only=True)["model"]
    torch.save(content, file)
    return file


def test_arguments_that_no_shape_tells_are_compared_with_the_recipe(tmp_path):
    file = write(tmp_path / "checkpoint-1.pth", filled(), temperature=10.0)
    with pytest.raises(UserError, match="temperature 10.0, but the recipe's model.llm_adapter.temperature is 5.0"):
        import_official(filled(), file)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = {"module.layers.0.adapter_attn.conv_A.weight": torch.zeros(4, 32, 1), "adapter_other": torch.zeros(1)}
    file = write(tmp_path / "checkpoint-1.pth", filled(), tensors=tensors)
    with pytest.raises(UserError, match=r"lacks llm.layers.0.adapters.attention.down_bias.*unexpected adapter_other"):
        import_official(filled(), file)


def test_nothing_but_tensors_and_a_namespace_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"model": {"a": torch.zeros(1)}, "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not a tensor"):
        import_official(filled(), tmp_path / "evil.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no key 'model'"):
        import_official(filled(), tmp_path / "other.pth")


def changed(**adapters):
    """CONFIG with other adapters."""
    return RunConfig.model_validate(CONFIG.model_dump() | {"model": CONFIG.model.model_dump() | adapters})


def test_adapters_before_the_feed_forward_go_out_as_adapter_mlp_and_come_back(tmp_path):
    both = {"kind": "mm", "dim": 4, "temperature": 5.0, "at": ["attention", "ffn"]}
    config = changed(llm_adapter=both, vision_adapter=both)
    source, model = filled(config=config), filled(seed=1, config=config)
    file = tmp_path / "checkpoint-0.pth"
    file.write_bytes(official_bytes(source.trainable(), config))
    arguments = import_official(model, file)
    assert same_trainables(source, model)
    assert (arguments.adapter_type, arguments.visual_adapter_type) == ("block", "router_block")
    assert official_name("llm.layers.1.adapters.ffn.up_bias_1") == "layers.1.adapter_mlp.conv_D.bias"
    name = official_name("vision.blocks.2.adapters.ffn.router_weight")
    assert name == "backbone.visual.transformer.resblocks.2.adapter_mlp.expert_weights.weight"
    with pytest.raises(UserError, match="has unexpected layers.0.adapter_mlp"):
        import_official(filled(), file)


@pytest.mark.parametrize("kind", ["concat", "bottleneck_weighted", "loha", "loha_mm", "loha_silu", "lora"])
def test_what_the_authors_layout_has_no_place_for_is_refused(kind, tmp_path):
    config = changed(llm_adapter={"kind": kind, "dim": 4, "at": KINDS[kind].points[:1]})
    with pytest.raises(UserError, match=f"no place for adapters of kind {kind}"):
        official_bytes(Lavin(config.model).trainable(), config)
    with pytest.raises(UserError, match=f"no place for adapters of kind {kind}"):
        import_official(Lavin(config.model), tmp_path / "absent.pth")
    with pytest.raises(UserError, match="no place for llm.layers.0.adapters.projections.down_weight_q"):
        official_name("llm.layers.0.adapters.projections.down_weight_q")


def test_a_run_exports_to_the_authors_layout(run, tmp_path, files):
    out = tmp_path / "checkpoint-19.pth"
    result = export("--run", run, "--out", out, "--layout", "official")
    assert result.exit_code == 0, result.output
    model = filled(seed=1)
    import_official(model, out)
    assert same_trainables(files[0], model)

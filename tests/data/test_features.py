"""Cached features are the live ones: as values, in a training step, and in generation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import record, small_config, write_scienceqa
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from typer.testing import CliRunner

from lavin_ds.cli.main import app
from lavin_ds.config import RunConfig, load_recipe, parse_config
from lavin_ds.data.collate import collate
from lavin_ds.data.schema import check_manifest, load_manifest, manifest_sha256
from lavin_ds.data.shards import ShardReader
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep import features
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.errors import UserError
from lavin_ds.generation.engine import Engine
from lavin_ds.generation.request import Request
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.vision import VisionTower
from lavin_ds.parallel import initialize_single_process
from lavin_ds.weights.base import check_inputs
from lavin_ds.weights.clip import load_clip

IMAGES = 7
TINY = Path(features.__file__).parents[1] / "lavin_ds" / "assets" / "tiny"


def config_with(**model) -> RunConfig:
    raw = small_config().model_dump()
    raw["model"] |= {"frozen_dtype": "fp32", "llm_adapter": {"kind": "mm", "dropout": 0.0}, **model}
    return parse_config(raw, "the test")


LIVE, CACHED = config_with(), config_with(vision_source="cached")


def write_clip(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    shape = {key: getattr(LIVE.model.vision, key) for key in ("width", "layers", "heads", "patch_size", "image_size")}
    vit = VisionTransformer(**shape, mlp_ratio=4.0, output_dim=8, act_layer=QuickGELU)
    save_file({f"visual.{k}": v.contiguous() for k, v in vit.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "vit.safetensors", seed=0)


@pytest.fixture
def shards(tmp_path, tokenizer_file, monkeypatch) -> Path:
    """IMAGES records with a picture and one without; features go into files of 3 in batches of 2."""
    monkeypatch.setattr(features, "FILE_ROWS", 3)
    monkeypatch.setattr(features, "BATCH", 2)
    problems = {str(i): record(image="image.png" if i < IMAGES else None) for i in range(IMAGES + 1)}
    source = write_scienceqa(tmp_path / "source", problems)
    prepare(ScienceQA(source), tokenizer_file, tmp_path / "shards", LIVE)
    return tmp_path / "shards"


def cache(shards: Path, clip: Path, config: RunConfig = CACHED, ranks: int = 1, **options) -> dict[str, bytes]:
    """Runs the job as `ranks` ranks one after another; returns the files it made."""
    job = features.plan(shards, clip, config, **options)
    for rank in range(ranks):
        features.extract(job, rank=rank, ranks=ranks)
    features.finish(job)
    return {path.name: path.read_bytes() for path in sorted(shards.glob("features-*"))}


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_features_are_what_the_live_vit_sees(shards, clip, dtype, tolerance):
    cache(shards, clip, config_with(frozen_dtype=dtype))
    reader = ShardReader(shards, "train")
    tower = VisionTower(LIVE.model.vision)
    load_clip(tower, clip)
    live = tower(torch.from_numpy(np.stack([reader.image(i) for i in range(IMAGES)]))).detach().numpy()
    cached = np.stack([reader.features(i) for i in range(IMAGES)])
    assert cached.shape == (IMAGES, 2, 16) and cached.dtype == np.float32
    np.testing.assert_allclose(cached, live, rtol=tolerance, atol=tolerance)
    assert [reader.image_origin(i)[1] for i in range(IMAGES)] == [f"images/train/{i}/image.png" for i in range(IMAGES)]
    reader.verify()


def test_the_bytes_do_not_depend_on_the_number_of_ranks_or_on_being_stopped(shards, clip):
    alone = cache(shards, clip)
    assert len(alone) == 3 and [f.name for f in load_manifest(shards).features.files] == list(alone)
    manifest = (shards / "manifest.json").read_bytes()
    first, *others = (shards / name for name in alone)
    for path in others:
        path.unlink()
    (shards / ".features-0-00001.arrow.part").write_bytes(b"a killed job leaves this")
    kept = first.stat().st_mtime_ns
    job = features.plan(shards, clip, CACHED)
    assert [features.extract(job, rank=rank, ranks=2) for rank in range(2)] == [1, 3]  # file 0 is there already
    features.finish(job)
    assert {path.name: path.read_bytes() for path in shards.glob("*features-*")} == alone
    assert first.stat().st_mtime_ns == kept
    assert (shards / "manifest.json").read_bytes() == manifest


def test_inspect_shows_what_is_cached(shards, clip):
    cache(shards, clip)
    shown = CliRunner().invoke(app, ["prep", "inspect", "--data", str(shards)])
    assert shown.exit_code == 0, shown.output
    assert "2 x 16 an image, computed in fp32" in shown.stdout


def test_adding_features_makes_other_data_only_for_who_reads_them(shards, clip):
    pixels, cached = manifest_sha256(shards, "pixels"), manifest_sha256(shards, "cached")
    cache(shards, clip)
    assert manifest_sha256(shards, "pixels") == pixels and manifest_sha256(shards, "cached") != cached


def test_features_of_another_kind_are_replaced_only_on_demand(shards, clip, tmp_path):
    before = cache(shards, clip)
    assert features.plan(shards, clip, CACHED).done
    other = write_clip(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UserError, match="features of another kind .*--overwrite"):
        features.plan(shards, other, CACHED)
    after = cache(shards, other, overwrite=True)
    assert not set(before) & set(after)
    old = load_manifest(shards).features.clip_sha256
    assert check_manifest(load_manifest(shards), CACHED, clip_sha256=old) == []
    (clause,) = check_manifest(load_manifest(shards), CACHED, clip_sha256="0" * 64)
    assert f"CLIP of the features: SHA-256 {old[:12]}.. in the shards, 000000000000.." in clause


def test_every_disagreement_with_the_recipe_is_named(shards, clip):
    assert "shards hold none" in check_manifest(load_manifest(shards), CACHED)[0]
    cache(shards, clip)
    manifest = load_manifest(shards)
    vision = CACHED.model.vision.model_dump()
    other = config_with(vision_source="cached", vision=vision | {"readout": {"every": 2}, "width": 32})
    assert check_manifest(manifest, other)[:2] == [
        "rows (F) of an image's features: shards 2, recipe 4",
        "width (W) of the features: shards 16, recipe 32",
    ]
    gelu = config_with(vision_source="cached", vision=vision | {"quick_gelu": False})
    assert check_manifest(manifest, gelu) == ["model.vision.quick_gelu: shards True, recipe False"]


def test_adapters_in_the_vit_refuse_cached_features_and_say_why(shards, clip):
    adapted = {"vision_adapter": {"kind": "mm"}}
    with pytest.raises(UserError, match="would change them at every step"):
        config_with(vision_source="cached", **adapted)
    with pytest.raises(UserError, match="change the features at every training step"):
        features.plan(shards, clip, config_with(**adapted))


def test_training_on_cached_features_takes_no_clip():
    overrides = ["model.vision_adapter.kind=none", "model.vision_source=cached"]
    config = load_recipe("tiny", overrides)
    check_inputs(config, TINY / "llama", None)
    with pytest.raises(UserError, match="runs no ViT: leave --clip out"):
        check_inputs(config, TINY / "llama", TINY / "vit.safetensors")


def test_a_training_step_and_an_answer_are_those_of_the_live_vit(shards, clip):
    cache(shards, clip)
    initialize_single_process()
    reader = ShardReader(shards, "train")
    generator = torch.Generator().manual_seed(0)
    live, cached = Lavin(LIVE.model), Lavin(CACHED.model)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        load_clip(live.vision, clip)
        for name, parameter in cached.named_parameters():
            parameter.copy_(live.get_parameter(name))
    assert cached.vision is None and set(cached.trainable()) == set(live.trainable())
    rows = [reader.row(i) for i in range(len(reader))]
    found = []
    for model, config in ((live, LIVE), (cached, CACHED)):
        visual_input = reader.visual_input(config.model.vision_source)
        loss, _ = model.train()(collate(rows, visual_input, reader.frame, 2))
        loss.backward()
        requests = [
            Request(row.id, row.prompt_ids, visual_input(row.image) if row.image >= 0 else None, 8) for row in rows
        ]
        engine = Engine(model, Tokenizer(reader.directory / reader.manifest.tokenizer.file), slots=4, capacity=200)
        answers = {answer.id: answer.ids for answer in engine.run(requests)}
        found.append((loss.item(), {n: p.grad for n, p in model.trainable().items()}, answers))
    (loss, gradients, answers), (cached_loss, cached_gradients, cached_answers) = found
    assert cached_loss == pytest.approx(loss, rel=1e-5) and cached_answers == answers
    for name, gradient in gradients.items():
        assert (cached_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-3), name
    text = collate(rows[-1:], visual_input, reader.frame, 2)  # a rank without images still trains every module
    cached.zero_grad()
    cached(text)[0].backward()
    assert all(p.grad is not None for p in cached.trainable().values())

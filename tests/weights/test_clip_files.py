import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from weights_helpers import CONFIG, filled, write_clip

from lavin_ds.config import Readout, load_recipe
from lavin_ds.errors import UserError
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.trainable import trainable_parameters
from lavin_ds.models.vision import VisionTower
from lavin_ds.weights.clip import _open_clip_parts, check_clip, load_clip
from lavin_ds.weights.torchscript import TorchScriptFile

VISION = CONFIG.model.vision


def frozen(model: Lavin) -> dict[str, torch.Tensor]:
    learning = trainable_parameters(model.vision)
    return {name: p.detach() for name, p in model.vision.named_parameters() if name not in learning}


def write_torchscript(file, model):
    """A traced module with the tower's parameters under the names of OpenAI's archive."""
    write_clip(file.with_suffix(".bin"), model)
    tree = nn.Module()
    for name, tensor in torch.load(file.with_suffix(".bin")).items():
        node = tree
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = getattr(node, parent)
        node.register_parameter(last, nn.Parameter(tensor.half()))
    tree.forward = lambda x: x
    torch.jit.save(torch.jit.trace(tree, torch.zeros(1)), file)
    return file


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.bin", "clip.pt"])
def test_open_clips_state_dicts_load_without_what_nobody_would_read(tmp_path, name):
    source, model = filled(), filled(seed=1)
    adapters = {n: p.clone() for n, p in trainable_parameters(model.vision).items()}
    load_clip(model.vision, write_clip(tmp_path / name, source))
    for key, tensor in frozen(source).items():
        assert torch.equal(frozen(model)[key], tensor), key
    for key, tensor in adapters.items():
        assert torch.equal(trainable_parameters(model.vision)[key], tensor)


HF_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}


def write_hugging_face(folder, whole, act="quick_gelu"):
    """transformers' own model, saved by transformers; `whole` with the text tower."""
    torch.manual_seed(0)
    vision = HF_SHAPE | {"intermediate_size": 128, "hidden_act": act}
    if whole:
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, **ids}
        theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config=text | {"vocab_size": 30}))
    else:
        theirs = CLIPVisionModel(CLIPVisionConfig(**vision))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("whole, old", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_hugging_faces_clip_gives_its_cls_tokens(tmp_path, whole, old, act):
    theirs = write_hugging_face(tmp_path, whole, act)
    file = tmp_path / "model.safetensors"
    if old:  # before transformers 5 a CLIPVisionModel's names began with vision_model.
        save_file({f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    config = VISION.model_copy(update={"quick_gelu": act == "quick_gelu"})
    tower = VisionTower(config).eval()
    load_clip(tower, file)
    pixels = torch.randn(2, 3, 16, 16)
    vision = theirs.vision_model if whole else theirs
    hidden = vision(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), hidden[2][:, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows, taken", [("cls", slice(0, 1)), ("patches", slice(1, None)), ("all", slice(None))])
@pytest.mark.parametrize("block", [1, 2, 3])
@torch.no_grad()
def test_rows_after_any_block_are_transformers_hidden_states(tmp_path, block, rows, taken, norm):
    theirs = write_hugging_face(tmp_path, whole=False)
    config = VISION.model_copy(update={"readout": Readout(rows=rows, block=block, norm=norm)})
    tower = VisionTower(config).eval()
    load_clip(tower, tmp_path / "model.safetensors")
    assert len(tower.blocks) == block and (tower.ln_post is not None) == norm
    pixels = torch.randn(2, 3, 16, 16)
    want = theirs(pixels, output_hidden_states=True).hidden_states[block][:, taken]
    want = getattr(theirs, "vision_model", theirs).post_layernorm(want) if norm else want
    got = tower(pixels)
    assert got.shape[1] == config.rows
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_hugging_faces_config_says_what_no_tensor_does(tmp_path):
    write_hugging_face(tmp_path, whole=True)
    file = tmp_path / "model.safetensors"
    check_clip(file, VISION)
    with pytest.raises(UserError, match="model.vision.heads is 2, but .* has 4"):
        check_clip(file, VISION.model_copy(update={"heads": 2}))
    with pytest.raises(UserError, match="model.vision.quick_gelu is 0, but .* has 1"):
        check_clip(file, VISION.model_copy(update={"quick_gelu": False}))
    with pytest.raises(UserError, match="is a folder: give the file in it"):
        check_clip(tmp_path, VISION)
    (tmp_path / "config.json").unlink()  # then the recipe's word counts
    check_clip(file, VISION.model_copy(update={"quick_gelu": False}))


# What the vision tower of facebookresearch/diht's model is made of, as its state dict names it.
DIHT = {f"visual.{name}" for name in ("class_embedding", "positional_embedding", "conv1.weight")}
DIHT |= {f"visual.ln_pre.{kind}" for kind in ("weight", "bias")}
DIHT_PARTS = ("attn.in_proj_", "attn.out_proj.", "ln_1.", "ln_2.", "mlp.c_fc.", "mlp.c_proj.")


def test_the_bottlenecks_tower_takes_what_dihts_file_has():
    config = load_recipe("bottleneck-7b").model.vision
    with torch.device("meta"):
        tower = VisionTower(config)
    names = DIHT | {
        f"visual.transformer.resblocks.{n}.{part}{kind}"
        for n in range(24)
        for part in DIHT_PARTS
        for kind in ("weight", "bias")
    }
    # Only their values are not there.
    parts = _open_clip_parts(dict.fromkeys(names))
    assert set(parts) == {name for name, _ in tower.named_parameters()}
    assert tower.positional_embedding.shape == (24 * 24 + 1, 1024) and not config.quick_gelu


def test_a_ckpt_with_a_text_tower_loads(tmp_path):
    source, model = filled(), filled(seed=1)
    file = write_clip(tmp_path / "diht.ckpt", source)
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones([])}
    torch.save(torch.load(file) | text, file)
    load_clip(model.vision, file)
    for key, tensor in frozen(source).items():
        assert torch.equal(frozen(model)[key], tensor), key


@pytest.mark.parametrize(
    "extra", ["transformer.resblocks.1.ls_1.gamma", "conv1.bias", "attn_pool.query", "transformer.resblocks.0.mlp.w3"]
)
def test_a_tensor_of_the_tower_that_it_would_not_use_is_refused_by_name(tmp_path, extra):
    file = write_clip(tmp_path / "clip.safetensors", filled())
    save_file(load_file(file) | {f"visual.{extra}": torch.ones(4)}, file)
    with pytest.raises(UserError, match=f"1 tensors .* does not use: visual.{extra}"):
        check_clip(file, VISION)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("extra", ["encoder.layers.0.self_attn.q_norm.weight", "embeddings.patch_embedding.bias"])
def test_a_tensor_of_hugging_faces_tower_that_ours_would_not_use_is_refused_by_name(tmp_path, whole, extra):
    write_hugging_face(tmp_path, whole)
    file = tmp_path / "model.safetensors"
    name = f"vision_model.{extra}" if whole else extra
    save_file(load_file(file) | {name: torch.ones(4)}, file)
    with pytest.raises(UserError, match=f"does not use: {name}"):
        check_clip(file, VISION)


@pytest.mark.filterwarnings("ignore")
def test_openais_torchscript_archive_is_read_without_running_it(tmp_path):
    source, model = filled(), filled(seed=1)
    load_clip(model.vision, write_torchscript(tmp_path / "ViT.pt", source))
    for key, tensor in frozen(source).items():
        assert torch.equal(frozen(model)[key], tensor.half().float()), key


def test_a_torchscript_pickle_may_build_nothing_but_modules_and_tensors(tmp_path):
    pickled = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "owned") + b"'\ntR."
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickled)
        archive.writestr("evil/code/a.py", "")
    with pytest.raises(UserError, match="asks for os.system"):
        TorchScriptFile(tmp_path / "evil.pt")
    with pytest.raises(UserError, match="asks for os.system"):
        check_clip(tmp_path / "evil.pt", VISION)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("width", 64, "64.*has 32.*model.vision.width=32"),
        ("patch_size", 4, "4.*has 8.*model.vision.patch_size=8"),
        ("image_size", 32, "32.*has 16.*model.vision.image_size=16"),
        ("layers", 2, "2.*has 3.*model.vision.layers=3"),
        ("mlp_ratio", 2.0, "2.*has 4.*model.vision.mlp_ratio=4"),
    ],
)
def test_a_number_that_contradicts_the_recipe_is_named_with_both_values(tmp_path, key, value, named):
    file = write_clip(tmp_path / "clip.safetensors", filled())
    with pytest.raises(UserError, match=named):
        check_clip(file, VISION.model_copy(update={key: value}))


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path):
    file = write_clip(tmp_path / "clip.bin", filled())
    name = "visual.transformer.resblocks.1.attn.in_proj_bias"
    torch.save(torch.load(file) | {name: torch.zeros(95)}, file)
    with pytest.raises(UserError, match=rf"{name} is \[95\].*\[96\]"):
        check_clip(file, VISION)


def test_files_that_hold_no_clip_say_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="absent.pt does not exist"):
        check_clip(tmp_path / "absent.pt", VISION)
    torch.save({"model.embed_tokens.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no CLIP vision transformer"):
        check_clip(tmp_path / "other.pt", VISION)
    (tmp_path / "clip.txt").write_text("")
    with pytest.raises(UserError, match="neither .safetensors nor"):
        check_clip(tmp_path / "clip.txt", VISION)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"PK\x03\x04 and then nothing", "is cut short"),
        (b"\x80\x02 a pickle", "before torch 1.6"),
        (bytes(range(200)), "is it the right file"),
    ],
)
def test_a_file_of_something_else_is_told_by_what_it_is(tmp_path, content, said):
    file = tmp_path / "ViT-L-14.pt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"ViT-L-14.pt .*{said}"):
        check_clip(file, VISION)
    other = file.rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors (cannot be read as safetensors|is )"):
        check_clip(other, VISION)


def test_a_folder_in_place_of_the_file_is_told_with_a_file_of_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a folder: .* such as .*model.safetensors"):
        check_clip(tmp_path, VISION)

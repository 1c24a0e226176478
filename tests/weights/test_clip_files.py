import os
import zipfile

import pytest
import torch
from torch import nn
from weights_helpers import CONFIG, filled, write_clip

from lavin_ds.errors import UserError
from lavin_ds.models.adapters import trainable_parameters
from lavin_ds.models.lavin import Lavin
from lavin_ds.weights.clip import check_clip, load_clip
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
    report = load_clip(model.vision, write_clip(tmp_path / name, source))
    for key, tensor in frozen(source).items():
        assert torch.equal(frozen(model)[key], tensor), key
    assert "visual.proj" in report.unexpected and "visual.transformer.resblocks.2.ln_1.weight" in report.unexpected
    for key, tensor in adapters.items():
        assert torch.equal(trainable_parameters(model.vision)[key], tensor)


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

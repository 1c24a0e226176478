import subprocess
import sys

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from lavin_ds.config import AdapterConfig, VisionConfig
from lavin_ds.data.images import CLIP_MEAN, CLIP_STD, normalise
from lavin_ds.models.trainable import trainable_parameters
from lavin_ds.models.vision import VisionTower
from lavin_ds.profiling.tracker import Tracker
from lavin_ds.weights.clip import load_clip

SHAPE = {"image_size": 56, "layers": 9, "width": 128, "patch_size": 14}


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_cls_tokens_are_those_of_open_clip_with_adapters_at_their_start(tmp_path, quick_gelu):
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(
        embed_dim=32, vision_cfg={**SHAPE, "head_width": 64}, text_cfg=text, quick_gelu=quick_gelu
    ).eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    config = VisionConfig(**SHAPE, heads=2, quick_gelu=quick_gelu)
    tower = VisionTower(config, AdapterConfig(kind="mm", at=("attention", "ffn"))).eval()
    for block in tower.blocks:
        for adapter in block.adapters.values():
            adapter.reset(torch.Generator().manual_seed(0))
    load_clip(tower, tmp_path / "clip.safetensors")

    images = torch.randint(0, 256, (3, 56, 56, 3), dtype=torch.uint8)
    pixels = normalise(images, CLIP_MEAN, CLIP_STD)
    theirs = clip.visual.forward_intermediates(pixels, indices=[3, 7], output_fmt="NLC", output_extra_tokens=True)
    want = torch.stack([prefix[:, 0] for prefix in theirs["image_intermediates_prefix"]], dim=1)
    assert want.shape == (3, 2, 128)
    torch.testing.assert_close(tower(images), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower(pixels), want, rtol=1e-5, atol=1e-5)


def test_without_images_every_module_still_takes_part(fill):
    config = VisionConfig(**SHAPE, heads=2)
    tower = fill(VisionTower(config, AdapterConfig(kind="mm")))
    tower.requires_grad_(False)
    learning = trainable_parameters(tower)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    tokens = tower(torch.empty(0, 56, 56, 3, dtype=torch.uint8))
    assert tokens.shape == (0, 2, 128)
    tokens.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in learning.values())


def test_building_a_tower_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    VisionTower(VisionConfig(**SHAPE, heads=2))
    assert torch.equal(torch.rand(3), want)


def test_frozen_attention_projects_all_images_in_one_product():
    """And not in one a position, as torch does where its input lies image by image."""
    tower = VisionTower(VisionConfig(**SHAPE, heads=2), AdapterConfig(kind="mm")).train()
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("adapters" in name)
    with Tracker() as tracker:
        tower(torch.zeros(3, 56, 56, 3, dtype=torch.uint8)).sum().backward()
    assert "bmm" not in {operation.name for operation in tracker.operations}


def test_the_model_needs_no_library_of_models():
    """open_clip and torchvision double the seconds that every rank and every command take to import."""
    code = (
        "import sys; import lavin_ds.models.lavin, lavin_ds.weights.base, lavin_ds.evaluation.answer\n"
        "print({'open_clip', 'torchvision', 'transformers'} & set(sys.modules) or '')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""

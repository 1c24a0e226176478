"""Builds a model from a recipe and weight files. The files are checked first, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lavin_ds.config import RunConfig
from lavin_ds.errors import UserError
from lavin_ds.weights.adapter import load_adapter
from lavin_ds.weights.clip import check_clip, load_clip
from lavin_ds.weights.llama import check_llama, load_llama

if TYPE_CHECKING:  # torch and the model take seconds to import, and checking files does not need them
    import torch

    from lavin_ds.models.lavin import Lavin

Progress = Callable[[str, int, int], None]  # what is being loaded, tensors done, total tensors


def check_inputs(config: RunConfig, llama: Path, clip: Path | None) -> None:
    """Compares the weight files with the recipe. It reads only headers, which takes well under a second.

    Raises:
        UserError: a file is missing, cannot be read or contradicts the recipe; or `clip` is given although the recipe
            is text-only or uses cached features; or it is not given although the recipe needs it.
    """
    check_llama(llama, config.model.llm)
    check_vision(config, clip)


def check_vision(config: RunConfig, clip: Path | None) -> None:
    """The part of check_inputs that is about CLIP."""
    if config.model.has_vit and clip is None:
        raise UserError(f"Recipe {config.name} sees images: give a CLIP file with --clip.")
    if clip is not None and not config.model.vision:
        raise UserError(f"Recipe {config.name} is text-only (it has no model.vision): leave --clip out.")
    if clip is not None and not config.model.has_vit:
        raise UserError(
            f"Recipe {config.name} reads cached features (model.vision_source) and runs no ViT: leave --clip out."
        )
    if config.model.has_vit:
        check_clip(clip, config.model.vision)


def build_model(
    config: RunConfig,
    llama: Path,
    clip: Path | None,
    adapter: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Lavin:
    """Builds a LaVIN with its frozen weights loaded, in evaluation mode, on `device`.

    Its adapters come from `adapter` (our .safetensors, or a .pth of the LaVIN authors). Without `adapter` they are
    initialised from the recipe's seed. Process groups must exist (lavin_ds.parallel). Each tensor-parallel rank loads
    only its slices.

    Frozen weights are copied from the mapped files to `device` a few rows at a time. On a GPU, no frozen weight is ever
    whole in host memory.

    Raises:
        UserError: see check_inputs, load_adapter and import_official.
    """
    from lavin_ds.models.meta import allocate, build_on_meta
    from lavin_ds.models.trainable import frozen_parameters
    from lavin_ds.weights.official import import_official

    check_inputs(config, llama, clip)
    model = build_on_meta(config)
    # Adapters are loaded first: they are small, so one that does not fit is refused in seconds. New values are drawn on
    # the CPU, where they are the same on every machine.
    allocate(model, model.trainable(), "cpu")
    if adapter is None:
        model.reset_trainable(config.training.seed)
    elif adapter.suffix == ".pth":
        import_official(model, adapter)
    else:
        load_adapter(model, adapter)
    allocate(model, frozen_parameters(model), device)
    load_llama(model.llm, llama, _stage(on_progress, "LLaMA"))
    if model.vision is not None:
        load_clip(model.vision, clip, _stage(on_progress, "CLIP"))
    return model.to(device).eval()


def _stage(on_progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return (lambda done, total: on_progress(name, done, total)) if on_progress else None

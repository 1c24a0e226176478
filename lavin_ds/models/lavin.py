"""LaVIN: a frozen LLaMA and a frozen CLIP ViT, joined by a visual neck and adapters (paper 1, section 3.2).

Dimensions: B samples, I samples with an image, T tokens, D model width, P visual tokens per image, F rows that the ViT
returns per image, V vocabulary. In a packed batch all samples lie in one row: ids and hidden states are [1, T] and
[1, T, D], while tensors with suffix _B still have one entry per sample.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn

from lavin_ds.config import Checkpointing, ModelConfig, recomputed_layers
from lavin_ds.data.collate import Batch
from lavin_ds.models.adapters import KINDS
from lavin_ds.models.adapters.modality import ModalityEmbedding
from lavin_ds.models.cache import Reads
from lavin_ds.models.linear import STORAGES
from lavin_ds.models.llama import Llama
from lavin_ds.models.necks.base import build_neck
from lavin_ds.models.trainable import Trainable, trainable_parameters
from lavin_ds.models.vision import VisionTower


class Lavin(nn.Module):
    """Runs Z = [t_m, X', Y] (text and image) or [t_m, Y] (text only) through the LLM (paper 1, eq. 7).

    A new model is uninitialised: lavin_ds.weights loads the frozen weights, and `reset_trainable` or a load fills the
    trainable ones.
    """

    def __init__(self, config: ModelConfig, compat: bool = False, activation_checkpointing: Checkpointing = False):
        """activation_checkpointing: see TrainingConfig."""
        super().__init__()
        self.config = config
        self.compat = compat
        # The authors' behaviour where it changes numbers (reference.md, section 11), one switch per point. The third
        # switch, mean and deviation of the pixels, is in VisionTower.
        self.batch_routed_vision = compat
        self.shifted_decoding = compat
        storage = STORAGES[config.frozen_dtype]
        llm, vision = config.llm, config.vision
        recompute_vision = activation_checkpointing is not False
        self.llm = Llama(llm, config.llm_adapter, storage, recomputed_layers(activation_checkpointing, llm.n_layers))
        self.vision = self.neck = self.modality = None
        if config.has_vit:
            self.vision = VisionTower(vision, config.vision_adapter, storage, recompute_vision, compat)
        if vision:
            self.neck = build_neck(config.neck, vision, llm.dim)
        if config.llm_adapter.kind != "none" and KINDS[config.llm_adapter.kind].load().routed:
            self.modality = ModalityEmbedding(llm.dim)
        trainable = set(map(id, self.trainable().values()))
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trainable)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name: adapters, neck and E_m."""
        return trainable_parameters(self)

    def reset_trainable(self, seed: int) -> None:
        """Initialises every trainable module from (seed, its name), so the values do not depend on the build order."""
        for owner, module in self.named_modules():
            if isinstance(module, Trainable):
                # One checksum of both, because torch's CPU generator uses only the low 32 bits of its seed.
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {owner}".encode()))
                with torch.no_grad():
                    module.reset(generator)

    def embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Token embeddings [B, T, D] with the visual tokens inserted, and the modality [B] (1: image, 0: text)."""
        x_BTD = self.llm.embed(batch.ids_BT)
        if self.neck is None:
            return x_BTD, torch.zeros_like(batch.image_B)
        # A batch without images runs this too, with zero rows: ZeRO's collectives would hang if a trainable module
        # took no part in a step on some rank.
        visual_IPD = self.neck(self._features(batch)).to(x_BTD.dtype)
        slot_IP = batch.visual_I[:, None] + torch.arange(visual_IPD.shape[1], device=x_BTD.device)
        x_ND = x_BTD.flatten(0, 1).clone()
        x_ND[slot_IP] = visual_IPD
        return x_ND.view_as(x_BTD), (batch.image_B >= 0).long()

    def _features(self, batch: Batch) -> torch.Tensor:
        """The rows that the ViT returns for every sample with an image, [I, F, vision width]."""
        image_I = batch.image_B[batch.illustrated_I]
        if self.vision is None:
            features_NFW = batch.features_NFW
            if features_NFW is None:
                shape = (0, self.config.vision.rows, self.config.vision.width)
                features_NFW = torch.empty(shape, device=batch.ids_BT.device)
            return features_NFW[image_I]
        images = batch.images_NHWC
        if images is None:
            size = self.config.vision.image_size
            images = torch.empty(0, size, size, 3, dtype=torch.uint8, device=batch.ids_BT.device)
        if self.batch_routed_vision:
            # The authors run a zero image through the ViT for every text-only sample. It may route the other images.
            pixels = self.vision.pixels(images)
            everyone = pixels.new_zeros(len(batch.image_B), *pixels.shape[1:])
            everyone[batch.illustrated_I] = pixels[image_I]
            return self.vision(everyone)[batch.illustrated_I]
        return self.vision(images)[image_I]

    def hidden(self, batch: Batch, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [B, T, D] before the output projection."""
        x_BTD, modality_B = self.embed(batch)
        if batch.packed:
            how = {name: getattr(batch, name) for name in ("packed", "sample_N", "place_N", "cu_seqlens")}
            return self._through_llm(x_BTD, modality_B, positions=positions, **how)
        return self._through_llm(x_BTD, modality_B, positions=positions)

    def _through_llm(self, x_BTD, modality_B, **how):
        modality_MD = self.modality() if self.modality is not None else None
        return self.llm(x_BTD, modality_MD, modality_B, **how)

    def forward(
        self, batch: Batch, probe_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int] | tuple[torch.Tensor, int, torch.Tensor]:
        """Sum of the labelled tokens' cross-entropies (fp32 scalar), and their number (paper 1, eq. 5).

        probe_B: one index per sample into the flattened ids_BT. If given, the logits [B, V] that predict these tokens
        are returned, too.
        """
        h_ND = self.hidden(batch).flatten(0, 1)
        loss_sum = self.llm.token_loss(h_ND.index_select(0, batch.predicting_L), batch.target_L)
        labels = len(batch.target_L)
        if probe_B is None:
            return loss_sum, labels
        return loss_sum, labels, self.llm.logits(h_ND[probe_B - 1])

    @property
    def sees(self) -> bool:
        """Whether the model reads images."""
        return self.neck is not None

    @property
    def visual_count(self) -> int:
        """P, the number of visual tokens per image."""
        return self.config.visual_tokens

    def visual_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Visual tokens [N, P, D] of images: uint8 pixels [N, S, S, 3], or features if the recipe uses cached ones."""
        return self.neck(images if self.vision is None else self.vision(images))

    def read(
        self,
        ids_N: torch.Tensor,
        modality_B: torch.Tensor,
        reads: Reads,
        visual_row: torch.Tensor | None = None,
        visual_ND: torch.Tensor | None = None,
        positions_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [N, D] of tokens that continue the sequences in a cache. The tokens are appended to the cache.

        modality_B: 1 for a sequence with an image, else 0. visual_row: indices of the visual tokens among the ids;
        visual_ND are their embeddings. positions_N: RoPE positions, if they differ from those of training.
        """
        x_ND = self.llm.embed(ids_N)
        if visual_ND is not None:
            x_ND[visual_row] = visual_ND.to(x_ND.dtype)
        return self._through_llm(x_ND[None], modality_B, positions=positions_N, reads=reads)[0]

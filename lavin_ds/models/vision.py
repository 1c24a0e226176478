"""CLIP's vision transformer with adapters. Parameters have open_clip's names.

Dimensions: B images, S = 1 + patches tokens per image, W vision width, F rows returned per image.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavin_ds.config import AdapterConfig, VisionConfig
from lavin_ds.data.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalise
from lavin_ds.models.adapters.base import build_adapters
from lavin_ds.models.linear import STORAGES, FrozenLinear, Storage
from lavin_ds.models.llama import default_dtype
from lavin_ds.models.recompute_ops import QuickGELU

ROWS = {"cls": slice(0, 1), "patches": slice(1, None), "all": slice(None)}  # of the S tokens, by VisionConfig.readout


class PatchEmbedding(nn.Module):
    """One row per patch: a convolution whose stride is its width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        # Not a Conv2d, which would draw random initial values; frozen weights are always loaded.
        self.weight = nn.Parameter(torch.empty(config.width, 3, config.patch_size, config.patch_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, side, side] to [B, W, side / patch, side / patch]."""
        return F.conv2d(pixels, self.weight, stride=self.weight.shape[-1])


class VisionAttention(nn.Module):
    """Self-attention of the ViT.

    nn.MultiheadAttention has two drawbacks here. It checks whether query, key and value are the same tensor; under the
    hooks of ZeRO-3 they are not, so it splits the gathered weight into three views, which keep the whole weight in
    memory until backward. And it works on [S, B, W], where the product with a frozen weight becomes S small ones.
    """

    def __init__(self, width: int, heads: int, storage: Storage):
        super().__init__()
        self.heads = heads
        self.in_proj = FrozenLinear(width, 3 * width, storage)
        self.out_proj = FrozenLinear(width, width, storage)

    def qkv(self, z_BSW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [B, S, heads, W / heads]."""
        return self.in_proj(z_BSW).unflatten(-1, (3, self.heads, -1)).unbind(2)

    def forward(self, z_BSW: torch.Tensor) -> torch.Tensor:
        q_BHSK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in self.qkv(z_BSW))
        # Attention is skipped if there are no images: FlashAttention of torch before 2.10 refuses an empty batch.
        mixed_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK) if len(z_BSW) else v_BHSK
        return self.out_proj(mixed_BHSK.transpose(1, 2).flatten(2))


class ClipBlock(nn.Module):
    """The frozen modules of a block; VisionBlock calls them."""

    def __init__(self, config: VisionConfig, storage: Storage):
        super().__init__()
        W, hidden = config.width, int(config.width * config.mlp_ratio)
        self.ln_1 = nn.LayerNorm(W)
        self.attn = VisionAttention(W, config.heads, storage)
        self.ln_2 = nn.LayerNorm(W)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=FrozenLinear(W, hidden, storage),
                gelu=QuickGELU() if config.quick_gelu else nn.GELU(),
                c_proj=FrozenLinear(hidden, W, storage),
            )
        )


class VisionBlock(nn.Module):
    """x += MHA(A(ln_1 x)); x += MLP(A'(ln_2 x)), with A and A' adapters or nothing."""

    def __init__(self, config: VisionConfig, storage: Storage, adapter: AdapterConfig, batch_routed: bool):
        super().__init__()
        with default_dtype(storage.dtype):
            self.clip = ClipBlock(config, storage)
        self.adapters = build_adapters(config.width, adapter)
        self.batch_routed = batch_routed

    def adapt(self, place: str, z_BSW: torch.Tensor) -> torch.Tensor:
        if place not in self.adapters:
            return z_BSW
        B, S, _ = z_BSW.shape
        device = z_BSW.device
        if self.batch_routed:
            # compat: patch s of the batch's first image routes patch s of every image.
            token_MW, owner_N = z_BSW[0], torch.arange(S, device=device).repeat(B)
        else:
            token_MW, owner_N = z_BSW[:, 0], torch.arange(B, device=device).repeat_interleave(S)
        return self.adapters[place](z_BSW.flatten(0, 1), token_MW, owner_N).unflatten(0, (B, S))

    def forward(self, x_BSW: torch.Tensor) -> torch.Tensor:
        x_BSW = x_BSW + self.clip.attn(self.adapt("attention", self.clip.ln_1(x_BSW)))
        return x_BSW + self.clip.mlp(self.adapt("ffn", self.clip.ln_2(x_BSW)))


class VisionTower(nn.Module):
    """A ViT that returns rows of some of its blocks, as `config.readout` says.

    The blocks after the last one that is read out, the projection and the text tower are not built, because nothing
    would use them. The last norm (ln_post) is built if the read-out includes it.
    """

    def __init__(
        self,
        config: VisionConfig,
        adapter: AdapterConfig | None = None,
        storage: Storage = STORAGES["fp32"],
        activation_checkpointing: bool = False,
        compat: bool = False,
    ):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.read_blocks = set(config.readout.blocks(config.layers))
        self.kept_rows = ROWS[config.readout.rows]
        self.mean, self.std = (IMAGENET_MEAN, IMAGENET_STD) if compat else (CLIP_MEAN, CLIP_STD)
        with default_dtype(storage.dtype):
            self.conv1 = PatchEmbedding(config)
            self.class_embedding = nn.Parameter(torch.empty(config.width))
            tokens = 1 + (config.image_size // config.patch_size) ** 2
            self.positional_embedding = nn.Parameter(torch.empty(tokens, config.width))
            self.ln_pre = nn.LayerNorm(config.width)
            self.ln_post = nn.LayerNorm(config.width) if config.readout.norm else None
        self.blocks = nn.ModuleList(
            VisionBlock(config, storage, adapter or AdapterConfig(), batch_routed=compat) for _ in range(config.depth)
        )

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalises uint8 [B, S, S, 3] to floats [B, 3, S, S]. Floats are returned as they are."""
        return normalise(images, self.mean, self.std) if images.dtype == torch.uint8 else images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Rows [B, F, W] of images, block after block. Images are uint8 [B, S, S, 3] or normalised floats [B, 3, S, S].

        B may be 0: a rank without images still runs every module, as ZeRO's collectives need.
        """
        pixels = self.pixels(images)
        patches = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # [B, S-1, W]
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        x_BSW = self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)
        returned = []
        for number, block in enumerate(self.blocks, start=1):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BSW = checkpoint(block, x_BSW, use_reentrant=False)
            else:
                x_BSW = block(x_BSW)
            if number in self.read_blocks:
                returned.append(x_BSW[:, self.kept_rows])
        x_BFW = torch.cat(returned, dim=1)
        return x_BFW if self.ln_post is None else self.ln_post(x_BFW)

"""Swin transformers: windowed attention, shifted every other block, on a grid that halves by stage.

Letters: b batch, n tokens, d embedding, c classes.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.layers import (
    BlockConfig,
    BlockSpec,
    Dtype,
    Transformer,
    check_depths,
    check_eps,
    check_images,
    check_patches,
    check_sizes,
    dense_head_dim,
    dense_mlp_dim,
    kernel_init,
    patch_embedding,
)
from tapvit_jax.structs import check_fields


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Everything that fixes a Swin transformer's shapes and arithmetic.

    Blocks are numbered through all stages. The first block of every stage but the first starts
    with the patch merging that leads into it.

    Attributes:
      embed_dim: residual width of the first stage; each further stage doubles it.
      head_dims: head dimension of the dense model in each stage, see `BlockSpec`.
      depths: blocks of each stage.
      window_size: side of the attention windows; a stage whose grid is not larger is one window.
      dtype: see `BlockSpec`.
    """

    image_size: int
    patch_size: int
    num_classes: int
    embed_dim: int
    head_dims: tuple[int, ...]
    depths: tuple[int, ...]
    window_size: int
    blocks: tuple[BlockConfig, ...]
    in_channels: int = 3
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-5
    dtype: Dtype = "float32"

    def __post_init__(self):
        check_fields(self)
        sizes = ("image_size", "patch_size", "num_classes", "embed_dim", "window_size")
        check_sizes(self, (*sizes, "in_channels"))
        check_patches(self)
        check_eps("layer_norm_eps", self.layer_norm_eps)
        if not self.depths or min(self.depths) < 1 or sum(self.depths) != len(self.blocks):
            raise InputError(
                f"depths is {self.depths}, expected stages of one block or more, "
                f"{len(self.blocks)} together"
            )
        if len(self.head_dims) != len(self.depths) or min(self.head_dims) < 1:
            raise InputError(
                f"head_dims is {self.head_dims}, expected {len(self.depths)} positive numbers"
            )
        for stage in range(len(self.depths)):
            self._check_stage(stage)

    def _check_stage(self, stage: int) -> None:
        patches = self.image_size // self.patch_size
        if patches % 2**stage:
            raise InputError(
                f"image_size {self.image_size} gives {patches} x {patches} patches, expected a "
                f"multiple of {2 ** (len(self.depths) - 1)}, so that every stage can merge them"
            )
        if self.grid(stage) % self.window(stage):
            raise InputError(
                f"stage {stage} of image_size {self.image_size} has a {self.grid(stage)} x "
                f"{self.grid(stage)} grid, expected a multiple of window_size {self.window_size}"
            )

    @property
    def pooled_dim(self) -> int:
        """Width of what the classifier sees."""
        return self.stage_dim(len(self.depths) - 1)

    def stage_dim(self, stage: int) -> int:
        """Residual width of a stage."""
        return self.embed_dim * 2**stage

    def grid(self, stage: int) -> int:
        """Side of a stage's token grid."""
        return self.image_size // self.patch_size // 2**stage

    def window(self, stage: int) -> int:
        """Side of a stage's windows."""
        return min(self.window_size, self.grid(stage))

    def position(self, i: int) -> tuple[int, int]:
        """Stage of block i, and its place there."""
        for stage, depth in enumerate(self.depths):
            if i < depth:
                return stage, i
            i -= depth
        raise IndexError(i)

    def first_blocks(self, count: int) -> "SwinConfig":
        """The same network cut off behind its first blocks."""
        stage, place = self.position(count - 1)
        return dataclasses.replace(
            self,
            blocks=self.blocks[:count],
            depths=(*self.depths[:stage], place + 1),
            head_dims=self.head_dims[: stage + 1],
        )

    def block_spec(self, i: int) -> BlockSpec:
        """Shapes and arithmetic of block i."""
        stage, place = self.position(i)
        window = self.window(stage)
        # One window that is the whole grid has nothing to shift.
        shift = window // 2 if place % 2 and self.grid(stage) > window else 0
        return BlockSpec(
            widths=self.blocks[i],
            embed_dim=self.stage_dim(stage),
            head_dim=self.head_dims[stage],
            tokens=self.grid(stage) ** 2,
            layer_norm_eps=self.layer_norm_eps,
            window=window,
            shift=shift,
            merge=stage > 0 and place == 0,
            qkv_bias=self.qkv_bias,
            dtype=self.dtype,
        )


def swin_config(
    *,
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    mlp_ratio: float | tuple[float, ...] = 4.0,
    head_dim: tuple[int, ...] | None = None,
    **fields: Any,
) -> SwinConfig:
    """Build the config of a dense Swin, all blocks of a stage alike.

    Args:
      embed_dim: residual width of the first stage.
      depths: blocks of each stage.
      num_heads: heads of each stage.
      mlp_ratio: MLP units per residual channel, for all stages or each.
      head_dim: head dimension of each stage, where it is not the residual width over the heads.
      **fields: the rest of `SwinConfig`.

    Raises:
      InputError: a size out of range, or one that the patches, windows or heads do not divide.
    """
    check_depths(depths)
    stages = len(depths)
    ratios = mlp_ratio if isinstance(mlp_ratio, tuple) else (mlp_ratio,) * stages
    dims = head_dim or tuple(
        dense_head_dim(embed_dim * 2**stage, heads) for stage, heads in enumerate(num_heads)
    )
    if {len(num_heads), len(ratios), len(dims)} != {stages}:
        raise InputError(
            f"depths is {depths}, num_heads {num_heads}, mlp_ratio {ratios} and head_dim {dims}, "
            "expected as many of each"
        )
    blocks = []
    for stage, depth in enumerate(depths):
        mlp_dim = dense_mlp_dim(embed_dim * 2**stage, ratios[stage])
        blocks += [BlockConfig(num_heads[stage], dims[stage], dims[stage], mlp_dim)] * depth
    return SwinConfig(
        embed_dim=embed_dim,
        depths=depths,
        head_dims=dims,
        blocks=tuple(blocks),
        **fields,
    )


class Swin(Transformer):
    """The whole network; `embed`, the blocks, `pooled` and `classify` also run on their own."""

    config: SwinConfig

    def setup(self):
        config = self.config
        self.patch_embed = patch_embedding(config)
        self.patch_norm = nn.LayerNorm(config.layer_norm_eps)
        self.blocks = self.all_blocks()
        self.norm = nn.LayerNorm(config.layer_norm_eps)
        self.head = nn.Dense(config.num_classes, kernel_init=kernel_init)

    def embed(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b n d"]:
        """Patches, normalised."""
        check_images(self.config, images)
        x = self.patch_embed(images)
        x = x.reshape(-1, self.config.grid(0) ** 2, x.shape[-1])
        return self.patch_norm(x)

    def pooled(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """What the classifier sees: the mean of the normalised tokens."""
        return self.norm(x.astype(jnp.float32)).mean(axis=1)

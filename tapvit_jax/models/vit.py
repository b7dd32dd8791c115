"""Vision transformers (ViT, DeiT, distilled DeiT, DeiT-III) whose blocks may have own widths.

Letters: b batch, n tokens, d embedding, c classes.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.layers import (
    MOST_BLOCKS,
    BlockConfig,
    BlockSpec,
    Dtype,
    Transformer,
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
class ViTConfig:
    """Everything that fixes a vision transformer's shapes and arithmetic.

    Attributes:
      head_dim: see `BlockSpec`.
      class_token: whether a class token is prepended.
      distilled: whether a second, distillation token and head follow (the two heads' logits are
        averaged).
      pool: "cls" classifies the class token, "mean" the mean of the patch tokens, whose norm then
        comes after the mean (timm's fc_norm).
      prefix_positions: whether class and distillation tokens have position embeddings of their own
        (DeiT-III's have none).
      layer_scale, dtype: see `BlockSpec`.
    """

    image_size: int
    patch_size: int
    num_classes: int
    embed_dim: int
    head_dim: int
    blocks: tuple[BlockConfig, ...]
    in_channels: int = 3
    class_token: bool = True
    distilled: bool = False
    pool: Literal["cls", "mean"] = "cls"
    prefix_positions: bool = True
    layer_scale: bool = False
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    dtype: Dtype = "float32"

    def __post_init__(self):
        check_fields(self)
        sizes = ("image_size", "patch_size", "num_classes", "embed_dim", "head_dim", "in_channels")
        check_sizes(self, sizes)
        check_patches(self)
        check_eps("layer_norm_eps", self.layer_norm_eps)
        if (self.pool == "cls" or self.distilled) and not self.class_token:
            raise InputError("pool='cls' and distilled models need class_token=True")
        if self.distilled and self.pool != "cls":
            raise InputError("a distilled model classifies its two tokens: expected pool='cls'")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: class and distillation token."""
        return int(self.class_token) + int(self.distilled)

    @property
    def num_patches(self) -> int:
        """Tokens that stand for patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Sequence length that every block sees."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding."""
        return self.num_patches + (self.num_prefix_tokens if self.prefix_positions else 0)

    @property
    def final_norm(self) -> str:
        """Name of the last normalisation: timm calls it fc_norm when it follows the mean."""
        return "fc_norm" if self.pool == "mean" else "norm"

    @property
    def pooled_dim(self) -> int:
        """Width of what the classifier sees."""
        return self.embed_dim

    def first_blocks(self, count: int) -> "ViTConfig":
        """The same network cut off behind its first blocks."""
        return dataclasses.replace(self, blocks=self.blocks[:count])

    def block_spec(self, i: int) -> BlockSpec:
        """Shapes and arithmetic of block i."""
        return BlockSpec(
            widths=self.blocks[i],
            embed_dim=self.embed_dim,
            head_dim=self.head_dim,
            tokens=self.num_tokens,
            layer_norm_eps=self.layer_norm_eps,
            layer_scale=self.layer_scale,
            qkv_bias=self.qkv_bias,
            dtype=self.dtype,
        )


def vit_config(
    *,
    depth: int,
    num_heads: int,
    embed_dim: int,
    mlp_ratio: float = 4.0,
    **fields: Any,
) -> ViTConfig:
    """Build the config of a dense ViT, all blocks alike.

    Raises:
      InputError: a size out of range, or `embed_dim` is not a multiple of `num_heads`.
    """
    if not 0 <= depth <= MOST_BLOCKS:
        raise InputError(f"depth is {depth}, expected 0 to {MOST_BLOCKS}")
    dim = dense_head_dim(embed_dim, num_heads)
    block = BlockConfig(num_heads, dim, dim, dense_mlp_dim(embed_dim, mlp_ratio))
    return ViTConfig(embed_dim=embed_dim, head_dim=dim, blocks=(block,) * depth, **fields)


# As large as the patch tokens that it is added to: at 0.02, a small model trained from scratch
# hardly sees positions (digits: 78 % instead of 98 %).
_position_init = nn.initializers.normal(stddev=1.0)


class ViT(Transformer):
    """The whole network; `embed`, the blocks, `pooled` and `classify` also run on their own."""

    config: ViTConfig

    def setup(self):
        config = self.config
        self.patch_embed = patch_embedding(config)
        zeros = nn.initializers.zeros_init()
        if config.class_token:
            self.cls_token = self.param("cls_token", zeros, (1, 1, config.embed_dim))
        if config.distilled:
            self.dist_token = self.param("dist_token", zeros, (1, 1, config.embed_dim))
        positions = (1, config.num_positions, config.embed_dim)
        self.pos_embed = self.param("pos_embed", _position_init, positions)
        self.blocks = self.all_blocks()
        final_norm = nn.LayerNorm(config.layer_norm_eps)
        if config.pool == "mean":
            self.fc_norm = final_norm
        else:
            self.norm = final_norm
        head = functools.partial(nn.Dense, config.num_classes, kernel_init=kernel_init)
        self.head = head()
        if config.distilled:
            self.head_dist = head()

    def embed(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b n d"]:
        """Patches, prefix tokens and positions."""
        check_images(self.config, images)
        x = self.patch_embed(images)
        x = x.reshape(-1, self.config.num_patches, x.shape[-1])
        if not self.config.prefix_positions:
            x = x + self.pos_embed
        prefix = [self.cls_token] if self.config.class_token else []
        prefix += [self.dist_token] if self.config.distilled else []
        prefix = [jnp.broadcast_to(t, (x.shape[0], 1, x.shape[-1])).astype(x.dtype) for t in prefix]
        x = jnp.concatenate([*prefix, x], axis=1)
        return x + self.pos_embed if self.config.prefix_positions else x

    def pooled(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """What the classifier sees; for distilled models the mean of both tokens."""
        if self.config.distilled:
            return self._final_tokens(x).mean(axis=1)
        x = x.astype(jnp.float32)
        if self.config.pool == "mean":
            return self.fc_norm(x[:, self.config.num_prefix_tokens :].mean(axis=1))
        return self._final_tokens(x)[:, 0]

    def _final_tokens(self, x: Float[Array, "b n d"]) -> Float[Array, "b p d"]:
        return self.norm(x[:, : self.config.num_prefix_tokens].astype(jnp.float32))

    def classify(self, x: Float[Array, "b n d"]) -> Float[Array, "b c"]:
        """Final norm, pooling and head, in float32."""
        if self.config.distilled:
            tokens = self._final_tokens(x)
            return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2
        return self.head(self.pooled(x))

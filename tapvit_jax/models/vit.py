"""Vision transformers (ViT, DeiT, distilled DeiT) whose every block may have its own widths.

Letters: b batch, n tokens, d embedding, h heads, k qk dim, v value dim, f MLP hidden, c classes.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.params import Params
from tapvit_jax.structs import check_choices

Taps = dict[str, Array]
Gates = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Widths of one transformer block.

    Attributes:
      num_heads: attention heads.
      qk_dim: dimensions of queries and keys in each head.
      v_dim: dimensions of values in each head, hence the projection's inputs per head.
      mlp_dim: hidden units of the MLP.
      attn: whether the attention branch is there at all.
      mlp: whether the MLP branch is there at all.
    """

    num_heads: int
    qk_dim: int
    v_dim: int
    mlp_dim: int
    attn: bool = True
    mlp: bool = True

    def __post_init__(self):
        for field in ("num_heads", "qk_dim", "v_dim", "mlp_dim"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}, expected 0 or more")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes a vision transformer's shapes and arithmetic.

    Attributes:
      head_dim: head dimension of the dense model; the softmax scale is head_dim ** -0.5, and it
        stays so when qk dims are pruned.
      class_token: whether a class token is prepended.
      distilled: whether a second, distillation token and head follow (the two heads' logits are
        averaged).
      pool: "cls" classifies the class token, "mean" the mean of the patch tokens, whose norm then
        comes after the mean (timm's fc_norm).
      dtype: what the matrix products are computed in; parameters, normalisation and softmax stay
        in float32.
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
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "num_classes", "embed_dim", "head_dim", "in_channels")
        for field in sizes:
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{field} is {value!r}, expected a whole number, 1 or more")
        check_choices(self)
        if not self.layer_norm_eps > 0:
            raise InputError(f"layer_norm_eps is {self.layer_norm_eps}, expected more than 0")
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if (self.pool == "cls" or self.distilled) and not self.class_token:
            raise InputError("pool='cls' and distilled models need class_token=True")
        if self.distilled and self.pool != "cls":
            raise InputError("a distilled model classifies its two tokens: expected pool='cls'")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: class and distillation token."""
        return int(self.class_token) + int(self.distilled)

    @property
    def num_tokens(self) -> int:
        """Sequence length that every block sees."""
        return (self.image_size // self.patch_size) ** 2 + self.num_prefix_tokens

    @property
    def final_norm(self) -> str:
        """Name of the last normalisation: timm calls it fc_norm when it follows the mean."""
        return "fc_norm" if self.pool == "mean" else "norm"


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
    if num_heads < 1 or depth < 0:
        raise InputError(f"num_heads is {num_heads} and depth is {depth}, expected 1 and 0 or more")
    if embed_dim % num_heads:
        raise InputError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    head_dim = embed_dim // num_heads
    block = BlockConfig(num_heads, head_dim, head_dim, int(embed_dim * mlp_ratio))
    return ViTConfig(embed_dim=embed_dim, head_dim=head_dim, blocks=(block,) * depth, **fields)


# As large as the patch tokens that it is added to: at 0.02, a small model trained from scratch
# hardly sees positions (digits: 78 % instead of 98 %).
_position_init = nn.initializers.normal(stddev=1.0)
_XAVIER = nn.initializers.xavier_uniform()


def _kernel_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    # Fully pruned widths have no fan to scale by, and no entries either.
    return _XAVIER(key, shape, dtype) if 0 not in shape else jnp.zeros(shape, dtype)


def _apply_gate(x: Array, gates: Gates | None, kind: str) -> Array:
    # A gate has shape (b, *unit shape) and acts on all tokens of its image.
    if gates is None or kind not in gates:
        return x
    gate = gates[kind][:, None]
    return x * gate.reshape(gate.shape + (1,) * (x.ndim - gate.ndim)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with separate widths for queries/keys and values."""

    config: ViTConfig
    block: BlockConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], gates: Gates | None = None
    ) -> tuple[Float[Array, "b n d"], Taps]:
        config, block = self.config, self.block
        heads = functools.partial(
            nn.DenseGeneral, use_bias=config.qkv_bias, kernel_init=_kernel_init, dtype=config.dtype
        )
        q = heads((block.num_heads, block.qk_dim), name="q")(x)
        k = heads((block.num_heads, block.qk_dim), name="k")(x)
        v = heads((block.num_heads, block.v_dim), name="v")(x)
        taps = {"q": q, "k": k}
        q = _apply_gate(q, gates, "qk")
        logits = jnp.einsum("bnhk,bmhk->bhnm", q * config.head_dim**-0.5, k)
        attention = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(v.dtype)
        out = jnp.einsum("bhnm,bmhv->bnhv", attention, v)
        taps["vo"] = out
        out = _apply_gate(_apply_gate(out, gates, "vo"), gates, "head")
        project = nn.DenseGeneral(
            config.embed_dim,
            axis=(-2, -1),
            kernel_init=_kernel_init,
            dtype=config.dtype,
            name="proj",
        )
        return project(out), taps


class Mlp(nn.Module):
    """Two dense layers around the exact GELU."""

    config: ViTConfig
    block: BlockConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], gates: Gates | None = None
    ) -> tuple[Float[Array, "b n d"], Taps]:
        dense = functools.partial(nn.Dense, kernel_init=_kernel_init, dtype=self.config.dtype)
        hidden = nn.gelu(dense(self.block.mlp_dim, name="fc1")(x), approximate=False)
        taps = {"mlp": hidden}
        hidden = _apply_gate(hidden, gates, "mlp")
        return dense(self.config.embed_dim, name="fc2")(hidden), taps


class Block(nn.Module):
    """Pre-norm transformer block; a branch that was pruned away is the identity."""

    config: ViTConfig
    block: BlockConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], gates: Gates | None = None
    ) -> tuple[Float[Array, "b n d"], Taps]:
        norm = functools.partial(nn.LayerNorm, epsilon=self.config.layer_norm_eps)
        taps: Taps = {}
        if self.block.attn:
            out, found = Attention(self.config, self.block, name="attn")(
                norm(name="norm1")(x), gates
            )
            x, taps = x + out, taps | found
        if self.block.mlp:
            out, found = Mlp(self.config, self.block, name="mlp")(norm(name="norm2")(x), gates)
            x, taps = x + out, taps | found
        return x, taps


class ViT(nn.Module):
    """The whole network; `embed`, `block` and `classify` run its parts for layer-wise work."""

    config: ViTConfig

    def setup(self):
        config = self.config
        self.patch_embed = nn.Conv(
            config.embed_dim,
            (config.patch_size, config.patch_size),
            (config.patch_size, config.patch_size),
            padding="VALID",
            kernel_init=nn.initializers.lecun_normal(),
            dtype=config.dtype,
        )
        zeros = nn.initializers.zeros_init()
        if config.class_token:
            self.cls_token = self.param("cls_token", zeros, (1, 1, config.embed_dim))
        if config.distilled:
            self.dist_token = self.param("dist_token", zeros, (1, 1, config.embed_dim))
        positions = (1, config.num_tokens, config.embed_dim)
        self.pos_embed = self.param("pos_embed", _position_init, positions)
        self.blocks = [Block(config, block) for block in config.blocks]
        final_norm = nn.LayerNorm(epsilon=config.layer_norm_eps)
        if config.pool == "mean":
            self.fc_norm = final_norm
        else:
            self.norm = final_norm
        head = functools.partial(nn.Dense, config.num_classes, kernel_init=_kernel_init)
        self.head = head()
        if config.distilled:
            self.head_dist = head()

    def embed(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b n d"]:
        """Patches, prefix tokens and positions."""
        x = self.patch_embed(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        prefix = [self.cls_token] if self.config.class_token else []
        prefix += [self.dist_token] if self.config.distilled else []
        prefix = [jnp.broadcast_to(t, (x.shape[0], 1, x.shape[-1])).astype(x.dtype) for t in prefix]
        return jnp.concatenate([*prefix, x], axis=1) + self.pos_embed

    def classify(self, x: Float[Array, "b n d"]) -> Float[Array, "b c"]:
        """Final norm, pooling and head, in float32."""
        x = x.astype(jnp.float32)
        if self.config.pool == "mean":
            return self.head(self.fc_norm(x[:, self.config.num_prefix_tokens :].mean(axis=1)))
        x = self.norm(x[:, : self.config.num_prefix_tokens])
        logits = self.head(x[:, 0])
        if self.config.distilled:
            logits = (logits + self.head_dist(x[:, 1])) / 2
        return logits

    def __call__(
        self, images: Float[Array, "b s s ch"], gates: dict[str, Gates] | None = None
    ) -> tuple[Float[Array, "b c"], dict[str, Taps]]:
        x = self.embed(images)
        taps = {}
        for i, block in enumerate(self.blocks):
            name = f"blocks_{i}"
            x, taps[name] = block(x, None if gates is None else gates.get(name))
        return self.classify(x), taps


def init(config: ViTConfig, key: Array) -> Params:
    """Draw fresh parameters (Xavier, as the original ViT; small models start slowly at 0.02)."""
    images = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    return ViT(config).init(key, images)["params"]


@functools.lru_cache(maxsize=256)
def param_shapes(config: ViTConfig) -> Params:
    """Shapes and dtypes of the parameter tree, without making it. Treat the result as frozen."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def apply(
    config: ViTConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b c"]:
    """Logits of a batch of images."""
    return ViT(config).apply({"params": params}, images)[0]


def apply_with_taps(
    config: ViTConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    gates: dict[str, Gates] | None = None,
) -> tuple[Float[Array, "b c"], dict[str, Taps]]:
    """Logits, and for each block the activations that its prunable units produce.

    Taps of block "blocks_i": "mlp" (b, n, f) after GELU; "vo" (b, n, h, v), the heads' outputs
    before the projection; "q" and "k" (b, n, h, k). Gates, when given, multiply the units of one
    block: {"blocks_i": {"mlp": (b, f), "vo": (b, h, v), "qk": (b, h, k), "head": (b, h)}}; those of
    qk multiply the queries. What is not used of the taps costs nothing under jit.
    """
    return ViT(config).apply({"params": params}, images, gates)


def embed(
    config: ViTConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b n d"]:
    """The tokens that enter the first block."""
    return ViT(config).apply({"params": params}, images, method="embed")


def apply_block(
    config: ViTConfig, block: BlockConfig, block_params: Params, x: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
    """One block on its own; blocks of equal widths share one compiled program."""
    return Block(config, block).apply({"params": block_params}, x)[0]


def classify(config: ViTConfig, params: Params, x: Float[Array, "b n d"]) -> Float[Array, "b c"]:
    """Logits from the tokens that leave the last block."""
    return ViT(config).apply({"params": params}, x, method="classify")

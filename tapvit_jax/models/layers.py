"""Transformer blocks that every backbone shares, with widths of their own and gates on their units.

Letters: b batch, n tokens, w windows, m tokens of a window, d embedding, h heads, k qk dim, v value
dim, f MLP hidden.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tapvit_jax.errors import InputError
from tapvit_jax.structs import check_fields

Taps = dict[str, Array]
Gates = dict[str, Array]
Dtype = Literal["float32", "bfloat16", "float16"]
# More than any network has, and takes; a config.json may ask for more than there is memory.
MOST_BLOCKS = 1000
LARGEST_IMAGE = 2**15
LARGEST_SIZE = 2**20


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
        check_fields(self)
        for field in ("num_heads", "qk_dim", "v_dim", "mlp_dim"):
            if not 0 <= getattr(self, field) <= LARGEST_SIZE:
                raise InputError(f"{field} is {getattr(self, field)}, expected 0 to {LARGEST_SIZE}")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Everything that fixes one block's shapes and arithmetic; equal specs share a program.

    Attributes:
      widths: what pruning changes.
      embed_dim: residual width.
      head_dim: head dimension of the dense model; the softmax scale is head_dim ** -0.5, and it
        stays so when qk dims are pruned.
      tokens: tokens of an image that leave the block.
      window: side of the square windows that attend within themselves; 0 for global attention.
      shift: by how many tokens the windows are shifted, cyclically.
      merge: whether the block starts with patch merging, which halves the grid's side and doubles
        the width: tokens and embed_dim are those after it.
      layer_scale: whether each branch's output is scaled channel by channel.
      dtype: what the matrix products are computed in; parameters, normalisation and softmax stay
        in float32.
      standard_ops: whether softmax and GELU are those of `jax.nn`, which exporters know by name;
        the same numbers but for rounding, slower on CPUs.
    """

    widths: BlockConfig
    embed_dim: int
    head_dim: int
    tokens: int
    layer_norm_eps: float
    window: int = 0
    shift: int = 0
    merge: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    dtype: Dtype = "float32"
    standard_ops: bool = False

    @property
    def grid(self) -> int:
        """Side of the token grid, for windows."""
        return round(self.tokens**0.5)

    @property
    def attended(self) -> int:
        """Tokens that each token attends to."""
        return self.window**2 if self.window else self.tokens


_XAVIER = nn.initializers.xavier_uniform()


def kernel_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Xavier, as the original ViT; fully pruned widths have no fan to scale by, and no entries."""
    return _XAVIER(key, shape, dtype) if 0 not in shape else jnp.zeros(shape, dtype)


def _apply_gate(x: Array, gates: Gates | None, kind: str) -> Array:
    # A gate has shape (b, *unit shape) and acts on all tokens of its image.
    if gates is None or kind not in gates:
        return x
    gate = gates[kind]
    unit = gate.shape[1:]
    # The units' axes are the last ones, except that gates of heads leave the dims behind them.
    behind = (1,) if kind == "head" else ()
    between = (1,) * (x.ndim - 1 - len(unit) - len(behind))
    return x * gate.reshape(gate.shape[0], *between, *unit, *behind).astype(x.dtype)


@jax.custom_vjp
def attend(
    logits: Float[Array, "*h n m"], values: Float[Array, "*h m v"]
) -> Float[Array, "*h n v"]:
    """Softmax of float32 logits, times the values; in the values' dtype.

        exp(l - max l) v / sum exp(l - max l)

    The sum divides the few outputs instead of the many weights. That also keeps CPUs' compilers
    from making the product a part of the softmax, where it runs on one core.
    """
    return _attend_forward(logits, values)[0]


def _attend_forward(logits: Array, values: Array) -> tuple[Array, tuple[Array, ...]]:
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - highest)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = (out / total).astype(values.dtype)
    return out, (weights, total, values, out)


def _attend_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array]:
    weights, total, values, out = kept
    gradient = gradient.astype(jnp.float32) / total
    # The mean gradient of a row's weights: a sum over values is shorter than one over tokens.
    mean = (gradient * out).sum(axis=-1, keepdims=True)
    gradient = gradient.astype(values.dtype)
    of_weights = gradient @ jnp.swapaxes(values, -1, -2)
    of_values = jnp.swapaxes(weights.astype(values.dtype), -1, -2) @ gradient
    return weights * (of_weights - mean), of_values


attend.defvjp(_attend_forward, _attend_backward)


class Attention(nn.Module):
    """Multi-head self-attention with separate widths for queries/keys and values.

    Windows, where there are any, are an axis in front of the tokens. They add a learned bias for
    every relative position and head; shifted ones mask pairs that were no neighbours before.
    """

    spec: BlockSpec

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *w n d"], gates: Gates | None = None, queries: int | None = None
    ) -> tuple[Float[Array, "b *w q d"], Taps]:
        spec, widths = self.spec, self.spec.widths
        heads = functools.partial(
            nn.DenseGeneral, use_bias=spec.qkv_bias, kernel_init=kernel_init, dtype=spec.dtype
        )
        q = heads((widths.num_heads, widths.qk_dim), name="q")(x[..., :queries, :])
        k = heads((widths.num_heads, widths.qk_dim), name="k")(x)
        v = heads((widths.num_heads, widths.v_dim), name="v")(x)
        taps = {"q": q, "k": k}
        q = _apply_gate(q, gates, "qk")
        # Products of matrices, not einsum: ONNX Runtime runs the exported graph a tenth faster.
        q, k, v = (jnp.swapaxes(x, -2, -3) for x in (q * spec.head_dim**-0.5, k, v))
        logits = q @ jnp.swapaxes(k, -1, -2)
        logits = logits.astype(jnp.float32)
        if spec.window:
            bias = self.param(
                "rel_pos_bias",
                nn.initializers.normal(stddev=0.02),
                ((2 * spec.window - 1) ** 2, widths.num_heads),
            )
            logits = logits + bias[relative_positions(spec.window)].transpose(2, 0, 1)
            if spec.shift:
                logits = logits + shift_mask(spec.grid, spec.window, spec.shift)[:, None]
        taps["attention"] = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = taps["attention"] @ v if spec.standard_ops else attend(logits, v)
        out = jnp.swapaxes(out, -2, -3)
        taps["vo"] = out
        out = _apply_gate(_apply_gate(out, gates, "vo"), gates, "head")
        project = nn.DenseGeneral(
            spec.embed_dim,
            axis=(-2, -1),
            kernel_init=kernel_init,
            dtype=spec.dtype,
            name="proj",
        )
        return project(out), taps


@jax.custom_vjp
def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU, x Phi(x), with a derivative that is computed from x alone.

    By erf, as in PyTorch: JAX's own goes through the pieces of erfc, which take CPUs more than
    twice as long, and its derivative keeps four arrays of the MLP's size.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_distribution(wide)).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return exact_gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    # Behind the barrier it is computed again: kept from the pass before, it is one more array of
    # the MLP's size.
    wide = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    slope = _normal_distribution(wide) + wide * density
    return (gradient * slope.astype(x.dtype),)


def _normal_distribution(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


exact_gelu.defvjp(_gelu_forward, _gelu_backward)


class Mlp(nn.Module):
    """Two dense layers around the exact GELU."""

    spec: BlockSpec

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], gates: Gates | None = None
    ) -> tuple[Float[Array, "b n d"], Taps]:
        spec = self.spec
        dense = functools.partial(nn.Dense, kernel_init=kernel_init, dtype=spec.dtype)
        hidden = dense(spec.widths.mlp_dim, name="fc1")(x)
        hidden = nn.gelu(hidden, approximate=False) if spec.standard_ops else exact_gelu(hidden)
        taps = {"mlp": hidden}
        hidden = _apply_gate(hidden, gates, "mlp")
        return dense(spec.embed_dim, name="fc2")(hidden), taps


class LayerScale(nn.Module):
    """One learned factor a channel, as DeiT-III and DINOv2 have behind each branch."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        gamma = self.param("gamma", nn.initializers.constant(1e-5), (x.shape[-1],))
        return x * gamma.astype(x.dtype)


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the width."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n/4 2*d"]:
        b, _, d = x.shape
        half = self.spec.grid
        x = x.reshape(b, half, 2, half, 2, d)
        # Down the column first, then the next column: the order that the weights were trained in.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(b, half * half, 4 * d)
        x = nn.LayerNorm(self.spec.layer_norm_eps, name="norm")(x)
        reduce = nn.Dense(
            self.spec.embed_dim,
            use_bias=False,
            kernel_init=kernel_init,
            dtype=self.spec.dtype,
            name="reduction",
        )
        return reduce(x).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block; a branch that was pruned away is the identity.

    Taps: "mlp" (b, n, f) after GELU; "vo" (b, n, h, v), the heads' outputs before the projection;
    "q" and "k" (b, n, h, k); "attention" (b, h, n, n), a row of weights for every query. With
    windows, all but the first have (w, m) in place of n, and "attention" is (b, w, h, m, m).

    With `outputs`, which windows do not know, only so many of the first tokens leave the block and
    are queries; all are keys and values.
    """

    spec: BlockSpec

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], gates: Gates | None = None, outputs: int | None = None
    ) -> tuple[Float[Array, "b m d"], Taps]:
        spec = self.spec
        taps: Taps = {}
        if spec.merge:
            x = PatchMerging(spec, name="merge")(x)
        if spec.widths.attn:
            found = nn.LayerNorm(spec.layer_norm_eps, name="norm1")(x)
            found = to_windows(found, spec) if spec.window else found
            found, taps = Attention(spec, name="attn")(found, gates, outputs)
            found = from_windows(found, spec) if spec.window else found
            found = LayerScale(name="ls1")(found) if spec.layer_scale else found
            found = _apply_gate(found, gates, "attn_branch")
            x = x[:, :outputs] + found.astype(x.dtype)
        x = x[:, :outputs]
        if spec.widths.mlp:
            normed = nn.LayerNorm(spec.layer_norm_eps, name="norm2")(x)
            found, tap = Mlp(spec, name="mlp")(normed, gates)
            taps = taps | tap
            found = LayerScale(name="ls2")(found) if spec.layer_scale else found
            found = _apply_gate(found, gates, "mlp_branch")
            x = x + found.astype(x.dtype)
        return x, taps


def to_windows(x: Float[Array, "b n d"], spec: BlockSpec) -> Float[Array, "b w m d"]:
    """Shift the token grid cyclically and cut it into windows."""
    side, window = spec.grid, spec.window
    d = x.shape[-1]
    if spec.shift:
        x = x.reshape(-1, side, side, d)
        x = jnp.roll(x, (-spec.shift, -spec.shift), axis=(1, 2))
    x = x.reshape(-1, side // window, window, side // window, window, d)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, (side // window) ** 2, window**2, d)


def from_windows(x: Float[Array, "b w m d"], spec: BlockSpec) -> Float[Array, "b n d"]:
    """The inverse of `to_windows`."""
    side, window = spec.grid, spec.window
    d = x.shape[-1]
    x = x.reshape(-1, side // window, side // window, window, window, d)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    if spec.shift:
        x = x.reshape(-1, side, side, d)
        x = jnp.roll(x, (spec.shift, spec.shift), axis=(1, 2))
    return x.reshape(-1, side * side, d)


@functools.lru_cache(maxsize=32)
def relative_positions(window: int) -> Int[np.ndarray, "m m"]:
    """Row of the bias table for every pair of a window's tokens, by their offset."""
    y, x = (axis.ravel() for axis in np.indices((window, window)))
    rows = y[:, None] - y[None] + window - 1
    columns = x[:, None] - x[None] + window - 1
    return rows * (2 * window - 1) + columns


@functools.lru_cache(maxsize=32)
def shift_mask(side: int, window: int, shift: int) -> Float[np.ndarray, "w m m"]:
    """-100 for pairs that share a shifted window only because the grid was rolled, else 0."""
    # Along one axis the roll joins up to three stretches; a region is a pair of stretches.
    position = np.arange(side)
    stretch = (position >= side - window).astype(int) + (position >= side - shift)
    region = 3 * stretch[:, None] + stretch[None]
    count = side // window
    region = region.reshape(count, window, count, window).transpose(0, 2, 1, 3)
    region = region.reshape(count**2, window**2)
    return np.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).astype(np.float32)


class Transformer(nn.Module):
    """What all backbones of transformer blocks share; they add `setup`, `embed` and `pooled`."""

    config: Any
    standard_ops: bool = False

    @nn.nowrap
    def all_blocks(self) -> list[Block]:
        """The config's blocks, for `setup`."""
        specs = [self.config.block_spec(i) for i in range(len(self.config.blocks))]
        return [Block(dataclasses.replace(s, standard_ops=self.standard_ops)) for s in specs]

    def classify(self, x: Float[Array, "b n d"]) -> Float[Array, "b c"]:
        """Final norm, pooling and head, in float32."""
        return self.head(self.pooled(x))

    def __call__(
        self, images: Float[Array, "b s s ch"], gates: dict[str, Gates] | None = None
    ) -> tuple[Float[Array, "b c"], dict[str, Taps]]:
        x = self.embed(images)
        taps = {}
        for i, block in enumerate(self.blocks):
            name = f"blocks_{i}"
            x, taps[name] = block(x, None if gates is None else gates.get(name))
        return self.classify(x), taps


def patch_embedding(config: Any) -> nn.Conv:
    """The convolution that turns patches into tokens."""
    sides = (config.patch_size, config.patch_size)
    return nn.Conv(
        config.embed_dim,
        sides,
        sides,
        padding="VALID",
        kernel_init=nn.initializers.lecun_normal(),
        dtype=config.dtype,
    )


def check_prepared(images: Float[Array, "b s s ch"]) -> None:
    """Refuse bytes, which no network was trained on.

    Raises:
      InputError: not of a float type.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"images have dtype {images.dtype}, expected floats, prepared as the model's "
            "Preprocess says (see tap.batches)"
        )


def check_images(config: Any, images: Float[Array, "b s s ch"]) -> None:
    """Refuse images of another shape than the network's, which reshaping might take for others.

    Raises:
      InputError: not square, of another size or number of channels, or not of a float type.
    """
    check_prepared(images)
    expected = (config.image_size, config.image_size, config.in_channels)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise InputError(
            f"images have shape {tuple(images.shape)}, expected (batch, {expected[0]}, "
            f"{expected[1]}, {expected[2]})"
        )


def check_sizes(config: Any, fields: tuple[str, ...]) -> None:
    """Refuse a config whose `fields` are not positive, or absurdly large.

    Raises:
      InputError: names the field.
    """
    for field in fields:
        most = LARGEST_IMAGE if field == "image_size" else LARGEST_SIZE
        if not 1 <= getattr(config, field) <= most:
            raise InputError(f"{field} is {getattr(config, field)}, expected 1 to {most}")


def check_eps(name: str, eps: float) -> None:
    """Refuse what no normalisation can add to a variance.

    Raises:
      InputError: names it.
    """
    if not 0 < eps < math.inf:
        raise InputError(f"{name} is {eps}, expected a finite number, more than 0")


def check_patches(config: Any) -> None:
    """Refuse patches that do not fit the image.

    Raises:
      InputError: names both sizes.
    """
    if config.image_size % config.patch_size:
        raise InputError(
            f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}"
        )


def check_depths(depths: Sequence[int]) -> None:
    """Refuse more blocks than any network has.

    Raises:
      InputError: names them.
    """
    # One by one too: those below zero could make up for others.
    if max(*depths, len(depths), sum(depths)) > MOST_BLOCKS:
        raise InputError(
            f"depths is {depths!s:.80}, expected at most {MOST_BLOCKS} blocks together"
        )


def dense_mlp_dim(dim: int, mlp_ratio: float) -> int:
    """Hidden units of a dense model's MLP.

    Raises:
      InputError: `mlp_ratio` is negative or not finite.
    """
    if not 0 <= mlp_ratio <= LARGEST_SIZE:
        raise InputError(f"mlp_ratio is {mlp_ratio}, expected 0 to {LARGEST_SIZE}")
    return int(dim * mlp_ratio)


def dense_head_dim(embed_dim: int, num_heads: int) -> int:
    """Head dimension of a dense model.

    Raises:
      InputError: `embed_dim` is not a multiple of `num_heads`.
    """
    if num_heads < 1:
        raise InputError(f"num_heads is {num_heads}, expected 1 or more")
    if embed_dim % num_heads:
        raise InputError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    return embed_dim // num_heads

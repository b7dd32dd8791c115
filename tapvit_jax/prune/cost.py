"""What a model costs: parameters and multiply-accumulates, counted from its config."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tapvit_jax.models.vit import BlockConfig, ViTConfig, apply, param_shapes

CostKind = Literal["params", "macs", "encoder_params"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one model.

    Attributes:
      params: parameters of the whole model.
      macs: multiply-accumulates of one image's forward pass, attention products included.
      encoder_params: parameters of the transformer blocks alone; TAP-ViTs states its budgets so.
    """

    params: int
    macs: int
    encoder_params: int


@functools.lru_cache(maxsize=4096)
def _block_cost(block: BlockConfig, embed_dim: int, num_tokens: int, bias: bool) -> tuple[int, int]:
    params = macs = 0
    if block.attn:
        qk, v = block.num_heads * block.qk_dim, block.num_heads * block.v_dim
        params += (2 * qk + v) * (embed_dim + int(bias)) + v * embed_dim + 3 * embed_dim
        macs += num_tokens * embed_dim * (2 * qk + 2 * v) + num_tokens**2 * (qk + v)
    if block.mlp:
        params += block.mlp_dim * (2 * embed_dim + 1) + 3 * embed_dim
        macs += 2 * num_tokens * embed_dim * block.mlp_dim
    return params, macs


def cost(config: ViTConfig) -> Cost:
    """Count parameters and MACs.

        attention MACs = n d h (2 k + 2 v) + n^2 h (k + v),   MLP MACs = 2 n d f

    Normalisation, softmax, GELU, biases and residual sums are not multiply-accumulates of a matrix
    product and are left out, as the pruning literature does. Source: ours.
    """
    d, n = config.embed_dim, config.num_tokens
    found = [_block_cost(block, d, n, config.qkv_bias) for block in config.blocks]
    encoder_params = sum(params for params, _ in found)
    patches = n - config.num_prefix_tokens
    patch_dim = config.patch_size**2 * config.in_channels
    heads = 2 if config.distilled else 1
    params = encoder_params + (patch_dim + 1) * d + (config.num_prefix_tokens + n) * d
    params += 2 * d + heads * (d + 1) * config.num_classes
    macs = sum(macs for _, macs in found) + patches * patch_dim * d
    macs += heads * d * config.num_classes
    return Cost(params=params, macs=macs, encoder_params=encoder_params)


def param_count(config: ViTConfig) -> int:
    """Parameters of the model as it is really built: the sum over its parameter tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(param_shapes(config)))


def elementwise_flops(config: ViTConfig) -> int:
    """Operations outside the matrix products, counted as XLA counts them (one an element).

    LayerNorm takes 7 an element, softmax 4 an attention weight (max, subtraction, sum, division;
    the exponential is a transcendental, not a flop), scaling, a bias and a residual sum 1. GELU is
    asked of XLA, whose polynomial for erf changes between versions.
    """
    gelu = _gelu_flops()
    d, n = config.embed_dim, config.num_tokens
    norm = 7 * d
    total = (2 * n - config.num_prefix_tokens) * d  # position embedding and patch bias
    for block in config.blocks:
        if block.attn:
            qk, v = block.num_heads * block.qk_dim, block.num_heads * block.v_dim
            total += n * (norm + 2 * d + 3 * qk + v) + 4 * block.num_heads * n**2
        if block.mlp:
            total += n * (norm + 2 * d + (gelu + 1) * block.mlp_dim)
    return round(total + norm * max(config.num_prefix_tokens, 1))


@functools.lru_cache(maxsize=1)
def _gelu_flops() -> float:
    size = 1024
    lowered = jax.jit(functools.partial(jax.nn.gelu, approximate=False)).lower(
        jax.ShapeDtypeStruct((size,), jnp.float32)
    )
    return lowered.cost_analysis()["flops"] / size


def flops(config: ViTConfig) -> int:
    """Floating-point operations of one image's forward pass: 2 MACs plus the elementwise part."""
    return 2 * cost(config).macs + elementwise_flops(config)


def xla_flops(config: ViTConfig) -> int:
    """Operations that XLA itself counts in the lowered forward pass of one image."""
    shape = (1, config.image_size, config.image_size, config.in_channels)
    lowered = jax.jit(functools.partial(apply, config)).lower(
        param_shapes(config), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    return int(lowered.cost_analysis()["flops"])

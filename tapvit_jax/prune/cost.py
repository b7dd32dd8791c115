"""What a model costs: parameters, multiply-accumulates and memory, counted from its config."""

import dataclasses
import functools
from typing import Protocol

from tapvit_jax.models import convnet, resnet
from tapvit_jax.models.backbone import Config, TransformerConfig
from tapvit_jax.models.convnet import ConvNetConfig
from tapvit_jax.models.layers import BlockSpec
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.models.swin import SwinConfig

FLOAT32_BYTES = 4

# What a forward pass may take of an accelerator's or a machine's memory, unless one image needs it.
_FORWARD_BYTES = 2**32
# More of them together gain nothing.
_MOST_IMAGES = 256
# Batches of images that lie ready or are being read while one is computed.
_READ_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one model.

    Attributes:
      params: parameters of the whole model.
      macs: multiply-accumulates of one image's forward pass, attention products included.
      encoder_params: parameters of the transformer blocks alone; TAP-ViTs states its budgets so.
      model_bytes: bytes of all parameters in float32 (float16 halves them, int8 quarters them).
      activation_bytes: most bytes that live activations of one image take at once, in float32.
      latency_ms: predicted time of one forward pass; None without a latency model.
    """

    params: int
    macs: int
    encoder_params: int
    model_bytes: int
    activation_bytes: int
    latency_ms: float | None = None


class Latency(Protocol):
    """What predicts the time of a forward pass (see `prune.latency.LatencyModel`)."""

    def predict(self, config: TransformerConfig) -> float:
        """Milliseconds of one forward pass."""


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """Cost of one block, and the peak of live activations in each of its branches (elements)."""

    params: int
    macs: int
    attn_peak: int
    mlp_peak: int


@functools.lru_cache(maxsize=65536)
def block_cost(spec: BlockSpec) -> BlockCost:
    """Count one block.

        attention MACs = n d h (2 k + 2 v) + n m h (k + v),   MLP MACs = 2 n d f

    with m the tokens that each token attends to. Peaks assume an executor that runs one operation
    after the other, keeps the residual stream, and writes every result to fresh memory. Source:
    ours.
    """
    widths, d, n, m = spec.widths, spec.embed_dim, spec.tokens, spec.attended
    params = macs = 0
    attn_peak = mlp_peak = 0
    if spec.merge:
        params += 2 * 2 * d + 2 * d * d
        macs += n * 2 * d * d
        attn_peak = mlp_peak = 2 * n * 2 * d + n * d
    if widths.attn:
        qk, v = widths.num_heads * widths.qk_dim, widths.num_heads * widths.v_dim
        params += (2 * qk + v) * (d + int(spec.qkv_bias)) + v * d + 3 * d
        params += (2 * spec.window - 1) ** 2 * widths.num_heads if spec.window else 0
        macs += n * d * (2 * qk + 2 * v) + n * m * (qk + v)
        logits = widths.num_heads * n * m
        steps = (
            n * (2 * d + 2 * qk + v),  # the normalised input becomes queries, keys and values
            n * (d + 2 * qk + v) + logits,
            n * (d + v) + 2 * logits,  # softmax
            n * (d + 2 * v) + logits,
            n * (2 * d + v),  # projection
        )
        attn_peak = max(attn_peak, *steps)
    if widths.mlp:
        f = widths.mlp_dim
        params += f * (2 * d + 1) + 3 * d
        macs += 2 * n * d * f
        mlp_peak = max(mlp_peak, n * (2 * d + f), n * (d + 2 * f))
    params += d * (int(widths.attn) + int(widths.mlp)) if spec.layer_scale else 0
    return BlockCost(params, macs, attn_peak, mlp_peak)


def cost(config: Config, latency: Latency | None = None) -> Cost:
    """Count parameters, MACs and memory, see `block_cost` for the blocks; predict latency if asked.

    Normalisation, softmax, GELU, biases and residual sums are not multiply-accumulates of a matrix
    product and are left out, as the pruning literature does.

    Raises:
      InputError: `latency` was measured for another dense model.

    Source: ours.
    """
    image = config.image_size**2 * config.in_channels
    if isinstance(config, ResNetConfig):
        params, macs = resnet.cost(config)
        return _with_bytes(params, macs, 0, resnet.activation_peak(config))
    found = [block_cost(config.block_spec(i)) for i in range(len(config.blocks))]
    encoder_params = sum(block.params for block in found)
    patches = (config.image_size // config.patch_size) ** 2
    patch_dim = config.patch_size**2 * config.in_channels
    heads = 1
    if isinstance(config, SwinConfig):
        other = 2 * config.embed_dim
    else:
        heads += int(config.distilled)
        other = (config.num_prefix_tokens + config.num_positions) * config.embed_dim
    params = encoder_params + (patch_dim + 1) * config.embed_dim + other
    params += 2 * config.pooled_dim + heads * (config.pooled_dim + 1) * config.num_classes
    macs = sum(block.macs for block in found) + patches * patch_dim * config.embed_dim
    macs += heads * config.pooled_dim * config.num_classes
    peak = max([image + patches * config.embed_dim, *map(_peak, found)])
    counted = _with_bytes(params, macs, encoder_params, peak)
    if latency is None:
        return counted
    return dataclasses.replace(counted, latency_ms=latency.predict(config))


def images_at_once(config: Config | ConvNetConfig, count: int | None = None) -> int:
    """How many images a forward pass should take together where nothing depends on it.

    256, or the largest power of two whose activations and images, those that are read ahead
    included, take 4 GiB by count; or the smallest one that holds `count` images, if they are all.

    Source: ours.
    """
    if isinstance(config, ConvNetConfig):
        peak = FLOAT32_BYTES * convnet.activation_peak(config)
    else:
        peak = cost(config).activation_bytes
    image = FLOAT32_BYTES * config.image_size**2 * config.in_channels
    fitting = max(_FORWARD_BYTES // (peak + _READ_BATCHES * image), 1)
    enough = _MOST_IMAGES if count is None else 2 ** max(count - 1, 0).bit_length()
    return min(enough, _MOST_IMAGES, 2 ** (fitting.bit_length() - 1))


def _peak(block: BlockCost) -> int:
    return max(block.attn_peak, block.mlp_peak)


def _with_bytes(params: int, macs: int, encoder_params: int, peak: int) -> Cost:
    return Cost(
        params=params,
        macs=macs,
        encoder_params=encoder_params,
        model_bytes=FLOAT32_BYTES * params,
        activation_bytes=FLOAT32_BYTES * peak,
    )

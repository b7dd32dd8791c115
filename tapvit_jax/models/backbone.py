"""All backbones behind one set of functions: pure over (config, params, images)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models import resnet
from tapvit_jax.models.layers import Block, BlockSpec, Gates, Taps
from tapvit_jax.models.params import Params
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.models.swin import Swin, SwinConfig
from tapvit_jax.models.vit import ViT, ViTConfig
from tapvit_jax.structs import from_plain

T = TypeVar("T")

# Blocks of one run that are compiled one by one: those of a DeiT, in 20 s instead of 11 s.
_MOST_UNROLLED = 12

TransformerConfig = ViTConfig | SwinConfig
"""Backbones that can be pruned."""

Config = ViTConfig | SwinConfig | ResNetConfig

FAMILIES: dict[str, type] = {"vit": ViTConfig, "swin": SwinConfig, "resnet": ResNetConfig}
"""Name of every family in stored files, and its config."""


CLASSIFIERS = ("head", "head_dist", "fc")
"""First parts of the paths of all parameters behind the pooled features, whatever the family."""


def family(config: Config) -> str:
    """Name of a config's family."""
    return next(name for name, kind in FAMILIES.items() if isinstance(config, kind))


def read_config(name: Any, plain: Any, where: str) -> Config:
    """Build a config from a stored file's family name and plain values.

    Raises:
      InputError: an unknown family, or values that make no such config.
    """
    known = from_plain(Literal[*FAMILIES], name, f"{where}: family")
    return from_plain(FAMILIES[known], plain, where)


def check_prunable(config: Config) -> None:
    """Refuse a backbone without prunable units.

    Raises:
      InputError: a ResNet.
    """
    if not isinstance(config, TransformerConfig):
        raise InputError(
            f"a {family(config)} only serves as a feature extractor, expected a ViT or a Swin"
        )


def _module(config: TransformerConfig, standard_ops: bool = False) -> nn.Module:
    kind = Swin if isinstance(config, SwinConfig) else ViT
    return kind(config, standard_ops)


def init(config: Config, key: Array) -> Params:
    """Draw fresh parameters (Xavier, as the original ViT; small models start slowly at 0.02)."""
    if isinstance(config, ResNetConfig):
        return resnet.init(config, key)
    images = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    return _module(config).init(key, images)["params"]


@functools.lru_cache(maxsize=256)
def param_shapes(config: Config) -> Params:
    """Shapes and dtypes of the parameter tree, without making it. Treat the result as frozen."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def new_classifier(config: Config, params: Params, num_classes: int) -> tuple[Config, Params]:
    """The same network with a classifier of zeros for other classes, to be trained.

    All logits are 0 then, and the first step moves the classifier alone.

    Raises:
      InputError: no classes, or an absurd number of them.

    Source: fine-tuning as in the ViT paper (Dosovitskiy et al., 2021, arXiv 2010.11929, 3.2).
    """
    config = dataclasses.replace(config, num_classes=num_classes)
    kept = {name: leaf for name, leaf in params.items() if name not in CLASSIFIERS}
    shapes = {name: leaf for name, leaf in param_shapes(config).items() if name in CLASSIFIERS}
    return config, kept | jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def apply(
    config: Config,
    params: Params,
    images: Float[Array, "b s s ch"],
    *,
    standard_ops: bool = False,
) -> Float[Array, "b c"]:
    """Logits of a batch of images; with `standard_ops` as `layers.BlockSpec` says."""
    if isinstance(config, ResNetConfig):
        return resnet.apply(config, params, images)
    return _module(config, standard_ops).apply({"params": params}, images)[0]


def apply_with_taps(
    config: TransformerConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    gates: dict[str, Gates] | None = None,
) -> tuple[Float[Array, "b c"], dict[str, Taps]]:
    """Logits, and for each block "blocks_i" the activations that its prunable units produce.

    See `layers.Block` for the taps. Gates, when given, multiply the units of one block:
    {"blocks_i": {"mlp": (b, f), "vo": (b, h, v), "qk": (b, h, k), "head": (b, h)}}; those of qk
    multiply the queries. Gates "attn_branch" and "mlp_branch" have shape (b) and multiply what a
    branch adds. What is not used of the taps costs nothing under jit.
    """
    return _module(config).apply({"params": params}, images, gates)


def embed(
    config: TransformerConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b n d"]:
    """The tokens that enter the first block."""
    return _module(config).apply({"params": params}, images, method="embed")


def apply_block(
    spec: BlockSpec,
    params: Params,
    x: Float[Array, "b n d"],
    gates: Gates | None = None,
    outputs: int | None = None,
) -> Float[Array, "b m d"]:
    """One block on its own, from its part of the parameter tree (`block_params`).

    With `outputs`, only so many of the first tokens leave it (see `classified_tokens`).
    """
    return apply_block_with_taps(spec, params, x, gates, outputs)[0]


def apply_block_with_taps(
    spec: BlockSpec,
    params: Params,
    x: Float[Array, "b n d"],
    gates: Gates | None = None,
    outputs: int | None = None,
) -> tuple[Float[Array, "b m d"], Taps]:
    """As `apply_block`, and the activations of the block's units."""
    return Block(spec).apply({"params": params}, x, gates, outputs)


def classified_tokens(config: TransformerConfig, i: int) -> int | None:
    """How many of the first tokens that leave block i the logits depend on; None is all.

    Behind the last block of a ViT that classifies its class token nothing looks at the patches.
    """
    last = i == len(config.blocks) - 1
    if last and isinstance(config, ViTConfig) and config.pool == "cls":
        return config.num_prefix_tokens
    return None


def block_params(params: Params, i: int) -> Params:
    """A block's part of the parameter tree; a block without branches has none."""
    return params.get(f"blocks_{i}", {})


class BlockRun(NamedTuple):
    """Consecutive blocks in which `period` specs repeat `repeats` times, from block `start` on."""

    start: int
    period: int
    repeats: int


@functools.lru_cache(maxsize=256)
def block_runs(config: TransformerConfig) -> tuple[BlockRun, ...]:
    """Cut a backbone's blocks into runs that one compiled body serves.

    A dense ViT is one run; Swin's blocks alternate between plain and shifted windows, so that
    patterns of two count as well.
    """
    specs = [config.block_spec(i) for i in range(len(config.blocks))]
    runs, start = [], 0
    while start < len(specs):
        options = []
        for period in (1, 2):
            pattern = specs[start : start + period]
            repeats = 1
            while specs[(at := start + repeats * period) : at + period] == pattern:
                repeats += 1
            if repeats > 1 or period == 1:
                options.append(BlockRun(start, period, repeats))
        runs.append(max(options, key=lambda run: run.period * run.repeats))
        start += runs[-1].period * runs[-1].repeats
    return tuple(runs)


def visit_blocks(
    config: TransformerConfig,
    params: Params,
    x: Float[Array, "b n d"],
    visit: Callable[[BlockSpec, Params, Array, Any], tuple[Array, T]],
    inputs: Sequence[Any],
) -> tuple[Float[Array, "b n d"], list[T]]:
    """Pass x through all blocks by `visit(spec, params, x, input) -> (x, output)`.

    Blocks of one long run share their compiled code (`jax.lax.scan` over stacked parameters and
    inputs), so that a deep network compiles as fast as a shallow one; a short run is spared the
    stacking, which costs a backward pass a fifth of its time. Returns x and every block's output.
    """
    outputs: list[T] = []
    for run in block_runs(config):
        specs = [config.block_spec(run.start + j) for j in range(run.period)]

        def body(x: Array, parts: Any, specs: list[BlockSpec] = specs) -> tuple[Array, list[T]]:
            found = []
            for spec, (part, given) in zip(specs, parts, strict=True):
                x, output = visit(spec, part, x, given)
                found.append(output)
            return x, found

        periods = []
        for i in range(run.start, run.start + run.period * run.repeats, run.period):
            blocks = range(i, i + run.period)
            periods.append([(block_params(params, j), inputs[j]) for j in blocks])
        if run.period * run.repeats <= _MOST_UNROLLED:
            for parts in periods:
                x, found = body(x, parts)
                outputs += found
            continue
        x, stacked = jax.lax.scan(body, x, jax.tree.map(lambda *a: jnp.stack(a), *periods))
        for i in range(run.repeats):
            outputs += jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return x, outputs


def classify(
    config: TransformerConfig, params: Params, x: Float[Array, "b n d"]
) -> Float[Array, "b c"]:
    """Logits from the tokens that leave the last block."""
    return _module(config).apply({"params": params}, x, method="classify")


def pool(
    config: TransformerConfig, params: Params, x: Float[Array, "b n d"]
) -> Float[Array, "b e"]:
    """What the classifier sees of the tokens that leave the last block."""
    return _module(config).apply({"params": params}, x, method="pooled")


def apply_blocks(
    config: TransformerConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b n d"]:
    """The tokens that leave the last block."""
    x = embed(config, params, images)
    for i in range(len(config.blocks)):
        x = apply_block(config.block_spec(i), block_params(params, i), x)
    return x


def pooled(config: Config, params: Params, images: Float[Array, "b s s ch"]) -> Float[Array, "b e"]:
    """What the classifier sees: the features of a whole pretrained network."""
    if isinstance(config, ResNetConfig):
        return resnet.pooled(config, params, images)
    return pool(config, params, apply_blocks(config, params, images))

"""Costs, against the parameter tree, XLA's own count, and published numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tapvit_jax.models import convnet
from tapvit_jax.models.backbone import apply, param_shapes
from tapvit_jax.models.convnet import ConvNetConfig
from tapvit_jax.models.layers import BlockConfig, BlockSpec, exact_gelu
from tapvit_jax.models.presets import create, list_models
from tapvit_jax.models.swin import SwinConfig, swin_config
from tapvit_jax.models.vit import vit_config
from tapvit_jax.prune.cost import block_cost, cost, images_at_once
from tests.conftest import param_count

SHAPES = {
    "square": {},
    "layer_scale": {"layer_scale": True, "prefix_positions": False},
    "distilled": {"distilled": True},
    "mean": {"pool": "mean"},
    "no_bias": {"qkv_bias": False},
}


def config(**fields):
    return vit_config(
        image_size=64,
        patch_size=8,
        num_classes=40,
        depth=4,
        num_heads=4,
        embed_dim=128,
        **fields,
    )


def elementwise_flops(config):
    """Operations outside the matrix products, counted as XLA counts them (one an element).

    LayerNorm takes 7 an element, softmax 3 an attention weight (max, subtraction, sum; the
    exponential is a transcendental, not a flop) and a division an output, scaling, a bias and a
    residual sum 1. GELU is asked of XLA, whose polynomial for erf changes between versions.
    """
    gelu, norm = gelu_flops(), 7
    patches = (config.image_size // config.patch_size) ** 2
    total = patches * config.embed_dim  # bias of the patches
    if isinstance(config, SwinConfig):
        total += norm * patches * config.embed_dim
        total += (norm + 1) * config.block_spec(len(config.blocks) - 1).tokens * config.pooled_dim
    else:
        total += config.num_positions * config.embed_dim
        total += norm * config.embed_dim * max(config.num_prefix_tokens, 1)
    for i in range(len(config.blocks)):
        spec = config.block_spec(i)
        widths, n, d = spec.widths, spec.tokens, spec.embed_dim
        scale = int(spec.layer_scale)
        if spec.merge:
            total += norm * n * 2 * d
        if widths.attn:
            qk, v = widths.num_heads * widths.qk_dim, widths.num_heads * widths.v_dim
            logit = 3 + int(spec.window > 0) + int(spec.shift > 0)
            total += n * ((norm + 2 + scale) * d + 3 * qk + 2 * v)
            total += logit * widths.num_heads * n * spec.attended
        if widths.mlp:
            total += n * ((norm + 2 + scale) * d + (gelu + 1) * widths.mlp_dim)
    return round(total)


@functools.lru_cache(maxsize=1)
def gelu_flops():
    size = 1024
    lowered = jax.jit(exact_gelu).lower(jax.ShapeDtypeStruct((size,), jnp.float32))
    return lowered.cost_analysis()["flops"] / size


def flops(config):
    """2 MACs plus the elementwise part."""
    return 2 * cost(config).macs + elementwise_flops(config)


def xla_flops(config):
    """Operations that XLA itself counts in the lowered forward pass of one image."""
    shape = (1, config.image_size, config.image_size, config.in_channels)
    lowered = jax.jit(functools.partial(apply, config)).lower(
        param_shapes(config), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    return int(lowered.cost_analysis()["flops"])


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_equal_the_tree(shape):
    found = config(**SHAPES[shape])
    assert cost(found).params == param_count(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_agree_with_xla(shape):
    found = config(**SHAPES[shape])
    assert flops(found) == pytest.approx(xla_flops(found), rel=0.01)


@pytest.mark.parametrize("pruned", [False, True])
def test_swin_agrees_with_its_tree_and_with_xla(pruned):
    found = swin_config(
        image_size=64,
        patch_size=2,
        num_classes=10,
        embed_dim=32,
        depths=(2, 3),
        num_heads=(2, 4),
        window_size=8,
    )
    if pruned:
        blocks = (
            BlockConfig(1, 7, 19, 101),
            BlockConfig(0, 0, 0, 60, attn=False),
            *(BlockConfig(3, 16, 5, 0, mlp=False),) * 3,
        )
        found = dataclasses.replace(found, blocks=blocks)
    assert cost(found).params == param_count(found)
    assert flops(found) == pytest.approx(xla_flops(found), rel=0.01)


@pytest.mark.parametrize("name", [name for name in list_models() if "resnet" not in name])
def test_operations_of_presets_agree_with_xla(name):
    # ResNets have their own test: XLA leaves products with padding out.
    found = create(name)[0]
    assert flops(found) == pytest.approx(xla_flops(found), rel=0.01)


@pytest.mark.parametrize("name", list_models())
def test_memory_of_presets(name):
    found = cost(create(name)[0])
    assert found.model_bytes == 4 * found.params
    # The largest image's activations do not fit a small cache, none takes more than half a GB.
    assert 2**19 < found.activation_bytes < 2**28


def test_peak_memory_by_hand():
    # 4 x 4 patches and a class token: 17 tokens of 8 channels, 2 heads of 4, 16 MLP units.
    widths = BlockConfig(2, 4, 4, 16)
    spec = BlockSpec(widths, embed_dim=8, head_dim=4, tokens=17, layer_norm_eps=1e-6)
    found = block_cost(spec)
    logits = 2 * 17 * 17
    # Residual, queries, keys and values with the logits, or the residual, values and both sides of
    # the softmax.
    assert found.attn_peak == max(17 * 4 * 8 + logits, 17 * 2 * 8 + 2 * logits)
    assert found.mlp_peak == 17 * (8 + 2 * 16)


def test_operations_agree_with_xla_for_pruned_shapes():
    blocks = (
        BlockConfig(3, 7, 19, 101),
        BlockConfig(0, 0, 0, 300, attn=False),
        BlockConfig(2, 16, 5, 0, mlp=False),
    )
    found = dataclasses.replace(config(), blocks=blocks)
    assert cost(found).params == param_count(found)
    assert flops(found) == pytest.approx(xla_flops(found), rel=0.01)


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("deit_tiny_patch16_224", 5.72e6, 1.26),
        ("deit_small_patch16_224", 22.05e6, 4.61),
        ("deit_base_patch16_224", 86.57e6, 17.58),
        ("deit_small_distilled_patch16_224", 22.44e6, 4.63),
        ("vit_large_patch16_224", 304.33e6, 61.60),
        ("vit_huge_patch14_224", 632.05e6, 167.30),
        ("deit3_small_patch16_224", 22.06e6, 4.61),
        ("swin_tiny_patch4_window7_224", 28.29e6, 4.5),
        ("swin_small_patch4_window7_224", 49.61e6, 8.7),
        ("swin_base_patch4_window7_224", 87.77e6, 15.4),
        ("swin_base_patch4_window12_384", 87.90e6, 47.0),
        ("resnet18", 11.69e6, 1.82),
        ("resnet50", 25.56e6, 4.1),
    ],
)
def test_presets_cost_what_is_published(name, params, gmacs):
    found = cost(create(name)[0])
    assert found.params == pytest.approx(params, rel=1e-3)
    assert found.macs == pytest.approx(gmacs * 1e9, rel=0.006)
    assert name in list_models()


@pytest.mark.parametrize("name", list_models())
def test_a_forward_pass_takes_as_many_images_as_fit(name):
    config, _ = create(name)
    image = 4 * config.in_channels * config.image_size**2
    each = cost(config).activation_bytes + 3 * image
    count = images_at_once(config)
    assert count * each <= 2**32
    assert count == 256 or 2 * count * each > 2**32
    assert count.bit_count() == 1
    assert images_at_once(config, 4) == 4


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (256, 256), (257, 256), (10**9, 256)],
)
def test_few_images_are_not_padded_to_many(count, expected):
    assert images_at_once(create("deit_tiny_patch16_224")[0], count) == expected
    assert images_at_once(create("vit_small_patch14_dinov2")[0], count) == min(expected, 32)


def test_pretrained_networks_for_large_images_take_few_at_a_time():
    # One attention of DINOv2's has 1,370^2 weights a head: 256 images would take 23 GiB twice.
    assert images_at_once(create("vit_small_patch14_dinov2")[0]) == 32
    assert images_at_once(create("deit_base_patch16_224")[0]) == 256


def test_the_extractor_network_takes_as_many_images_as_fit():
    config = ConvNetConfig(image_size=8, num_classes=2, widths=(4, 16))
    # Its input and two of its output, or three of that; then at half the resolution.
    assert convnet.activation_peak(config) == 3 * 4 * 64
    assert images_at_once(config) == 256
    large = dataclasses.replace(config, image_size=4096)
    assert images_at_once(large) == 2
    assert images_at_once(dataclasses.replace(config, image_size=2**15)) == 1

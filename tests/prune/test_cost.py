"""Costs, against the parameter tree, XLA's own count, and published numbers."""

import dataclasses

import pytest

from tapvit_jax.models.registry import create, list_models
from tapvit_jax.models.vit import BlockConfig, vit_config
from tapvit_jax.prune.cost import cost, flops, param_count, xla_flops

SHAPES = {
    "square": {},
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


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_equal_the_tree(shape):
    found = config(**SHAPES[shape])
    assert cost(found).params == param_count(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_agree_with_xla(shape):
    found = config(**SHAPES[shape])
    assert flops(found) == pytest.approx(xla_flops(found), rel=0.01)


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
    ],
)
def test_presets_cost_what_is_published(name, params, gmacs):
    found = cost(create(name)[0])
    assert found.params == pytest.approx(params, rel=1e-3)
    assert found.macs == pytest.approx(gmacs * 1e9, rel=0.006)
    assert name in list_models()

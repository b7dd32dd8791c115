"""The published TAP-ViTs numbers, from the authors' own code (see tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest

from tapvit_jax.convert.timm import from_timm, to_timm
from tapvit_jax.files import read_safetensors
from tapvit_jax.importance.layers import LayerConfig, layer_importance
from tapvit_jax.importance.neurons import neuron_importance
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import vit_config
from tapvit_jax.prune.mask import Plan, apply_masks, top_k_mask
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.prune.units import unit_key
from tapvit_jax.prune.widths import layer_softmax, softmax_keep

DATA = Path(__file__).parents[1] / "data"
DEPTH = 12
KINDS = {"mlp": "mlp", "vo": "attn"}


@pytest.fixture(scope="module")
def reference():
    with np.load(DATA / "tap_reference_a.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model():
    config = vit_config(
        image_size=32, patch_size=8, num_classes=10, depth=DEPTH, num_heads=3, embed_dim=48
    )
    return Model(config, from_timm(config, read_safetensors(DATA / "tap_reference_a.safetensors")))


@pytest.fixture(scope="module")
def units(model, reference):
    return neuron_importance(model, list(reference["images"]), "tap_published")


def by_layer(units, kind):
    return np.stack([units[unit_key(i, kind)].ravel() for i in range(DEPTH)])


def test_logits(model, reference):
    for images, logits in zip(reference["images"], reference["logits"], strict=True):
        np.testing.assert_allclose(model.apply(images), logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_neuron_scores(units, reference, kind):
    expected = reference[f"{KINDS[kind]}_scores"]
    relative = np.abs(by_layer(units, kind) - expected) / np.abs(expected)
    assert (relative <= 1e-3).mean() >= 0.999


def test_scores_do_not_couple_units_that_are_the_same_set(units):
    for i in range(DEPTH):
        np.testing.assert_array_equal(units[unit_key(i, "qk")], units[unit_key(i, "vo")])


@pytest.mark.parametrize(("kind", "count"), [("mlp", int(192 * 0.6)), ("vo", int(48 * 0.6))])
def test_kept_sets(units, reference, kind, count):
    expected = reference[f"{KINDS[kind]}_keep_mask"] > 0
    reference_scores = reference[f"{KINDS[kind]}_scores"]
    for scores, kept, target in zip(by_layer(units, kind), expected, reference_scores, strict=True):
        mask = top_k_mask(scores, count)
        assert mask.sum() == kept.sum() == count
        # Where the sets differ, the reference itself must be undecided.
        threshold = np.sort(target)[-count]
        assert np.all(np.abs(target[mask != kept] - threshold) <= 1e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_layer_scores(model, units, reference, sparsity):
    scores = layer_importance(
        model,
        list(reference["images"]),
        units,
        config=LayerConfig.as_published((sparsity,)),
    )
    np.testing.assert_allclose(scores.mlp[0], reference[f"layer_kl_mlp_{sparsity}"], rtol=1e-2)
    np.testing.assert_allclose(scores.attn[0], reference[f"layer_kl_attn_{sparsity}"], rtol=1e-2)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize(("branch", "average"), [("mlp", 0.658), ("attn", 0.784)])
def test_keep_ratios(reference, sparsity, branch, average):
    scores = reference[f"layer_kl_{branch}_{sparsity}"]
    found = softmax_keep(layer_softmax(1.1 * scores), average)
    np.testing.assert_allclose(found, reference[f"keep_{branch}_{sparsity}"], atol=1e-3)


def test_masked_logits(model, reference):
    keep = {}
    for i in range(DEPTH):
        keep[unit_key(i, "mlp")] = reference["mlp_keep_mask"][i] > 0
        attention = (reference["attn_keep_mask"][i] > 0).reshape(3, 16)
        keep[unit_key(i, "qk")] = keep[unit_key(i, "vo")] = attention
    plan = Plan(model.config, keep)
    masked, small = apply_masks(model, plan), reshape(model, plan)
    for images, logits in zip(reference["images"], reference["masked_logits"], strict=True):
        np.testing.assert_allclose(masked.apply(images), logits, atol=1e-4)
        # Ragged heads, padded to the widest: still the same outputs.
        np.testing.assert_allclose(small.apply(images), masked.apply(images), atol=1e-5)


def test_conversion_round_trip_is_bit_identical(model):
    state = read_safetensors(DATA / "tap_reference_a.safetensors")
    back = to_timm(model.config, model.params)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)

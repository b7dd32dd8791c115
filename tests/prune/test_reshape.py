"""A reshaped model is the masked model, only smaller."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import check_params, flatten
from tapvit_jax.models.registry import Model
from tapvit_jax.models.swin import SwinConfig
from tapvit_jax.models.vit import vit_config
from tapvit_jax.pipeline import reshape_checked
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.mask import Plan, apply_masks, param_masks, unit_masks
from tapvit_jax.prune.reshape import reshape, reshape_tree, reshaped_config
from tapvit_jax.prune.units import unit_key, unit_table
from tests.conftest import param_count, realistic, tiny_swin

CONFIGS = {
    "plain": {},
    "distilled": {"distilled": True},
    "mean": {"pool": "mean"},
    "no_bias": {"qkv_bias": False},
    "layer_scale": {"layer_scale": True, "prefix_positions": False},
    "swin": None,
}


def make_config(variant, config, depth):
    if variant != "swin":
        return dataclasses.replace(config, blocks=config.blocks[:depth], **CONFIGS[variant])
    return tiny_swin()


@functools.cache
def make(variant, config):
    # Two blocks: every example compiles a network of new shapes.
    config = make_config(variant, config, 2)
    return Model(config, realistic(backbone.init(config, jax.random.key(2)), 2))


def random_plan(config, seed, ragged, density):
    """Random kept units of every kind, empty ones included."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in unit_table(config):
        if group.kind in ("qk", "vo") and not ragged:
            count = rng.integers(0, group.shape[1] + 1)
            rows = [rng.permutation(group.shape[1]) < count for _ in range(group.shape[0])]
            keep[group.key] = np.stack(rows)
        elif group.kind.endswith("branch"):
            keep[group.key] = np.array(rng.random() < 0.8)
        else:
            keep[group.key] = rng.random(group.shape) < density
    return Plan(config, keep)


@settings(max_examples=24)
@given(
    variant=st.sampled_from(sorted(CONFIGS)),
    seed=st.integers(0, 10_000),
    ragged=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_masked_equals_reshaped(tiny_config, images, variant, seed, ragged, density):
    model = make(variant, tiny_config)
    plan = random_plan(model.config, seed, ragged, density)
    masked, small = apply_masks(model, plan), reshape(model, plan)
    np.testing.assert_allclose(masked.apply(images), small.apply(images), atol=1e-5)
    check_params(backbone.param_shapes(small.config), small.params)
    assert cost(small.config).params == param_count(small.config)
    assert cost(small.config).params == sum(leaf.size for leaf in jax.tree.leaves(small.params))


def test_models_that_compute_in_bfloat16_are_checked_in_float32():
    sizes = {"image_size": 8, "patch_size": 4, "num_classes": 5}
    config = vit_config(**sizes, depth=2, num_heads=4, embed_dim=384)
    config = dataclasses.replace(config, dtype="bfloat16")
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), backbone.param_shapes(config))
    model, rng = Model(config, realistic(ones, 2)), np.random.default_rng(0)
    images = rng.standard_normal((24, 8, 8, 3)).astype(np.float32)
    width = config.blocks[0].mlp_dim
    half = rng.permutation(width) < width // 2
    plan = Plan(config, {unit_key(i, "mlp"): half for i in range(2)})
    small, relative = reshape_checked(model, plan, images)
    assert relative < 1e-5
    assert small.config == reshaped_config(plan) and small.config.dtype == "bfloat16"


def loss(config, params, images):
    labels = jnp.arange(len(images)) % config.num_classes
    log_p = jax.nn.log_softmax(backbone.apply(config, params, images))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()


gradient_of = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)


# The masks are an argument: all examples of a variant take the same program.
@functools.partial(jax.jit, static_argnums=0)
def masked_gradient(config, params, masks, images):
    masks = param_masks(config, masks)

    def masked_loss(params):
        return loss(config, jax.tree.map(jnp.multiply, params, masks), images)

    return jax.grad(masked_loss)(params)


@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), variant=st.sampled_from(["plain", "swin"]))
def test_gradients_of_masked_equal_those_of_reshaped(tiny_config, images, seed, variant):
    model = make(variant, tiny_config)
    plan = random_plan(model.config, seed, ragged=True, density=0.6)
    masked = masked_gradient(model.config, model.params, unit_masks(plan), images)
    gathered = flatten(reshape_tree(plan, masked))
    small = reshape(model, plan)
    gradient = flatten(gradient_of(small.config, small.params, images))
    assert gathered.keys() == gradient.keys()
    for path, leaf in gradient.items():
        np.testing.assert_allclose(gathered[path], leaf, atol=1e-5, err_msg="/".join(path))


def fixed_paths(config):
    """Parameters that no unit covers: the residual width and the classes stay as they are."""
    paths = {("patch_embed", "kernel"), ("patch_embed", "bias")}
    if isinstance(config, SwinConfig):
        for layer in ("patch_norm", "norm"):
            paths |= {(layer, name) for name in ("scale", "bias")}
        for i in range(len(config.blocks)):
            if config.block_spec(i).merge:
                merge = (f"blocks_{i}", "merge")
                paths |= {(*merge, "norm", name) for name in ("scale", "bias")}
                paths.add((*merge, "reduction", "kernel"))
        return paths | {("head", name) for name in ("kernel", "bias")}
    paths.add(("pos_embed",))
    paths |= {("cls_token",)} if config.class_token else set()
    paths |= {("dist_token",)} if config.distilled else set()
    heads = ("head", "head_dist") if config.distilled else ("head",)
    paths |= {(head, name) for head in heads for name in ("kernel", "bias")}
    paths |= {(config.final_norm, name) for name in ("scale", "bias")}
    return paths


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_parameter_is_covered_or_declared_fixed(tiny_config, variant):
    config = make_config(variant, tiny_config, 3)
    covered = {member.path for group in unit_table(config) for member in group.members}
    assert covered.isdisjoint(fixed_paths(config))
    assert covered | fixed_paths(config) == set(flatten(backbone.param_shapes(config)))


@pytest.mark.parametrize("variant", ["plain", "swin"])
def test_unit_axes_have_the_units_sizes(tiny_config, variant):
    config = make_config(variant, tiny_config, 3)
    shapes = flatten(backbone.param_shapes(config))
    for group in unit_table(config):
        for member in group.members:
            found = tuple(shapes[member.path].shape[axis] for axis in member.axes)
            assert found == group.shape[: len(member.axes)]


def test_masks_trace_and_batch_over_variants(tiny_model):
    plans = [random_plan(tiny_model.config, seed, True, 0.5) for seed in range(3)]
    stacked = jax.tree.map(lambda *m: jnp.stack(m), *(unit_masks(plan) for plan in plans))
    batched = jax.jit(jax.vmap(lambda m: param_masks(tiny_model.config, m)))(stacked)
    for i, plan in enumerate(plans):
        single = param_masks(tiny_model.config, unit_masks(plan))
        for path, leaf in flatten(single).items():
            found = flatten(batched)[path]
            row = found[i] if found.ndim > leaf.ndim else found
            np.testing.assert_array_equal(np.broadcast_to(row, leaf.shape), leaf)


def test_a_reshaped_model_can_be_pruned_again(tiny_model, images):
    once = reshape(tiny_model, random_plan(tiny_model.config, 5, True, 0.7))
    plan = random_plan(once.config, 6, True, 0.7)
    twice = reshape(once, plan)
    np.testing.assert_allclose(
        apply_masks(once, plan).apply(images), twice.apply(images), atol=1e-5
    )
    assert cost(twice.config).params < cost(once.config).params


def test_a_head_without_values_disappears(tiny_config):
    values = np.ones((2, 8), bool)
    values[1] = False
    config = reshaped_config(Plan(tiny_config, {unit_key(0, "vo"): values}))
    assert config.blocks[0].num_heads == 1
    assert config.blocks[0].qk_dim == 8


def test_a_pruned_head_takes_its_position_bias_along(swin_model):
    heads = np.array([True, False, False, True])
    plan = Plan(swin_model.config, {unit_key(2, "head"): heads})
    small = reshape(swin_model, plan)
    path = ("blocks_2", "attn", "rel_pos_bias")
    dense = np.asarray(flatten(swin_model.params)[path])
    np.testing.assert_array_equal(flatten(small.params)[path], dense[:, heads])
    assert small.config.blocks[2].num_heads == 2


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.45])
def test_swin_below_half_at_every_stage(swin_model, images, ratio):
    keep = {}
    for group in unit_table(swin_model.config):
        if group.kind in ("mlp", "qk", "vo"):
            count = max(1, round(ratio * group.shape[-1]))
            keep[group.key] = np.broadcast_to(np.arange(group.shape[-1]) < count, group.shape)
        elif group.kind == "head":
            keep[group.key] = np.arange(group.size) < max(1, round(ratio * group.size))
    plan = Plan(swin_model.config, keep)
    masked, small = apply_masks(swin_model, plan), reshape(swin_model, plan)
    np.testing.assert_allclose(masked.apply(images), small.apply(images), atol=1e-5)
    assert cost(small.config).macs < 0.6 * cost(swin_model.config).macs


def test_keeping_everything_changes_nothing(tiny_model):
    same = reshape(tiny_model, Plan(tiny_model.config, {}))
    assert same.config == tiny_model.config
    for path, leaf in flatten(tiny_model.params).items():
        np.testing.assert_array_equal(flatten(same.params)[path], leaf)


def test_plans_survive_json(tiny_config):
    plan = random_plan(tiny_config, 3, True, 0.5)
    again = Plan.from_plain(tiny_config, plan.to_plain())
    for key, mask in plan.keep.items():
        np.testing.assert_array_equal(again.keep[key], mask)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"blocks_9/mlp": [0]}, "does not have"),
        ({"blocks_0/mlp": [0, 999]}, "must lie in 0..31"),
        ({"blocks_0/mlp": [0, True]}, "must lie in 0..31"),
        ({"blocks_0/mlp": [1, 1]}, "twice"),
    ],
)
def test_bad_plans_are_refused(tiny_config, kept, message):
    with pytest.raises(InputError, match=message):
        Plan.from_plain(tiny_config, kept)


def test_a_plan_for_another_model_is_refused(tiny_model, distilled_model):
    with pytest.raises(InputError, match="another config"):
        reshape(tiny_model, Plan(distilled_model.config, {}))
    with pytest.raises(InputError, match="another config"):
        apply_masks(tiny_model, Plan(distilled_model.config, {}))

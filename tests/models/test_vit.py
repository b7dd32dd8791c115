"""The vision transformer: gates, taps, pooling, widths of zero, bfloat16, bad configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapvit_jax.errors import InputError
from tapvit_jax.importance.criteria import unit_importance
from tapvit_jax.models import backbone, layers
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import flatten
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import ViTConfig, vit_config
from tapvit_jax.prune.mask import mask_params
from tapvit_jax.prune.units import unit_table
from tests.conftest import realistic

GATED = ("mlp", "qk", "vo", "head")

with_taps = jax.jit(backbone.apply_with_taps, static_argnums=0)


def make(config, seed=3, **changes):
    config = dataclasses.replace(config, **changes)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), backbone.param_shapes(config))
    return Model(config, realistic(ones, seed))


def all_gates(config, b):
    gates = {f"blocks_{i}": {} for i in range(len(config.blocks))}
    for group in unit_table(config):
        if group.kind in GATED:
            shape = (b, *group.shape)
            gates[f"blocks_{group.block}"][group.kind] = np.ones(shape, np.float32)
    return gates


def test_gates_of_ones_change_nothing(tiny_model, images):
    found, _ = with_taps(
        tiny_model.config, tiny_model.params, images, all_gates(tiny_model.config, 6)
    )
    np.testing.assert_allclose(found, tiny_model.apply(images), atol=1e-5)


@pytest.mark.parametrize("kind", GATED)
def test_gates_of_zero_equal_masked_parameters(tiny_model, images, kind):
    rng = np.random.default_rng(0)
    gates, masks = all_gates(tiny_model.config, 6), {}
    for i, block in enumerate(gates.values()):
        mask = np.float32(rng.random(block[kind].shape[1:]) < 0.5)
        mask.flat[0] = 0
        masks[f"blocks_{i}/{kind}"] = mask
        block[kind] *= mask
    found, _ = with_taps(tiny_model.config, tiny_model.params, images, gates)
    masked = mask_params(tiny_model.config, tiny_model.params, masks)
    expected = tiny_model.replace(params=masked).apply(images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - tiny_model.apply(images)).max() > 1e-2


def test_a_gate_acts_on_its_own_image(tiny_model, images):
    gates = all_gates(tiny_model.config, 6)
    gates["blocks_1"]["mlp"][2] = 0
    found, _ = with_taps(tiny_model.config, tiny_model.params, images, gates)
    changed = np.abs(found - tiny_model.apply(images)).max(axis=1) > 1e-4
    assert changed.tolist() == [i == 2 for i in range(6)]


def test_taps(tiny_model, images):
    gates = all_gates(tiny_model.config, 6)
    _, taps = with_taps(tiny_model.config, tiny_model.params, images, gates)
    tokens, heads = tiny_model.config.num_tokens, (2, 8)
    assert tokens == 5
    assert taps.keys() == {"blocks_0", "blocks_1", "blocks_2"}
    for block in taps.values():
        shapes = {kind: tap.shape for kind, tap in block.items()}
        dims = dict.fromkeys(("q", "k", "vo"), (6, tokens, *heads))
        assert shapes == dims | {"mlp": (6, tokens, 32), "attention": (6, 2, tokens, tokens)}
    q, k = (np.float64(taps["blocks_0"][name]) for name in ("q", "k"))
    attention = np.exp(np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(8))
    attention /= attention.sum(axis=-1, keepdims=True)
    x = np.asarray(backbone.embed(tiny_model.config, tiny_model.params, images))
    block = tiny_model.params["blocks_0"]
    x = layer_norm(x, block["norm1"])
    v = np.einsum("bnd,dhv->bnhv", x, block["attn"]["v"]["kernel"]) + block["attn"]["v"]["bias"]
    out = np.einsum("bhnm,bmhv->bnhv", attention, v)
    np.testing.assert_allclose(taps["blocks_0"]["vo"], out, atol=1e-4)
    np.testing.assert_allclose(taps["blocks_0"]["attention"], attention, atol=1e-5)


def layer_norm(x, params):
    x = np.float64(x)
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def dense(x, params):
    return x @ np.float64(params["kernel"]) + params["bias"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"distilled": True}, {"pool": "mean"}, {"pool": "mean", "class_token": False}],
    ids=["cls", "distilled", "mean", "mean_without_token"],
)
def test_tokens_are_pooled_into_logits(tiny_config, changes):
    model = make(tiny_config, blocks=(), **changes)
    config, params = model.config, model.params
    x = np.random.default_rng(1).standard_normal((2, config.num_tokens, 16)).astype(np.float32)
    if config.pool == "mean":
        patches = x[:, -4:].mean(axis=1)
        expected = dense(layer_norm(patches, params["fc_norm"]), params["head"])
    else:
        expected = dense(layer_norm(x[:, 0], params["norm"]), params["head"])
    if config.distilled:
        second = dense(layer_norm(x[:, 1], params["norm"]), params["head_dist"])
        expected = (expected + second) / 2
    np.testing.assert_allclose(backbone.classify(config, params, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 1), ({"distilled": True}, 2), ({"pool": "mean"}, None), ({"layer_scale": True}, 1)],
    ids=["cls", "distilled", "mean", "layer_scale"],
)
def test_the_last_block_computes_only_tokens_that_are_classified(tiny_config, changes, count):
    model = make(tiny_config, **changes)
    config, last = model.config, len(tiny_config.blocks) - 1
    found = [backbone.classified_tokens(config, i) for i in range(last + 1)]
    assert found == [None] * last + [count]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, config.num_tokens, 16)).astype(np.float32)
    block = config.block_spec(last), backbone.block_params(model.params, last), x
    whole, few = backbone.apply_block(*block), backbone.apply_block(*block, outputs=count)
    assert few.shape[1] == (count or config.num_tokens)
    found = backbone.classify(config, model.params, few)
    np.testing.assert_allclose(
        found, backbone.classify(config, model.params, whole), rtol=1e-5, atol=1e-5
    )


def test_tokens_in_order(distilled_model, images):
    config, params = distilled_model.config, distilled_model.params
    found = np.asarray(backbone.embed(config, params, images))
    found = found - params["pos_embed"]
    np.testing.assert_allclose(found[:, 0], np.tile(params["cls_token"][0], (6, 1)), atol=1e-5)
    np.testing.assert_allclose(found[:, 1], np.tile(params["dist_token"][0], (6, 1)), atol=1e-5)
    patches = images.reshape(6, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(6, 4, -1)
    kernel = np.float64(params["patch_embed"]["kernel"]).reshape(-1, 16)
    expected = patches @ kernel + params["patch_embed"]["bias"]
    np.testing.assert_allclose(found[:, 2:], expected, atol=1e-5)


def test_bfloat16_computes_nearly_the_same(tiny_model, images):
    half = dataclasses.replace(tiny_model.config, dtype="bfloat16")
    logits, taps = with_taps(half, tiny_model.params, images)
    assert logits.dtype == jnp.float32
    assert all(tap.dtype == jnp.bfloat16 for block in taps.values() for tap in block.values())
    exact = np.asarray(tiny_model.apply(images))
    difference = np.abs(logits - exact).max()
    assert 1e-5 < difference < 0.05 * np.abs(exact).max()


def test_widths_of_zero(tiny_config, images):
    model = make(tiny_config, blocks=(BlockConfig(2, 0, 3, 0), BlockConfig(0, 0, 0, 0)))
    logits, taps = with_taps(model.config, model.params, images)
    assert taps["blocks_0"]["q"].shape == (6, 5, 2, 0)
    # Without queries and keys every token sees all tokens alike.
    vo = np.asarray(taps["blocks_0"]["vo"])
    np.testing.assert_allclose(vo, np.repeat(vo[:, :1], 5, axis=1), atol=1e-5)
    # Without units a branch adds its bias.
    x = np.asarray(backbone.embed(model.config, model.params, images))
    block = model.params["blocks_1"]
    found = backbone.apply_block(model.config.block_spec(1), block, x)
    bias = block["attn"]["proj"]["bias"] + block["mlp"]["fc2"]["bias"]
    np.testing.assert_allclose(found, x + bias, atol=1e-5)
    assert np.isfinite(logits).all()


def test_fresh_kernels_of_zero_widths():
    assert layers.kernel_init(jax.random.key(0), (16, 0)).shape == (16, 0)
    assert layers.kernel_init(jax.random.key(0), (16, 2, 0)).shape == (16, 2, 0)
    assert np.abs(layers.kernel_init(jax.random.key(0), (16, 3))).min() > 0


def test_an_absent_block_is_the_identity(tiny_config, images):
    absent = BlockConfig(0, 0, 0, 0, attn=False, mlp=False)
    model = make(tiny_config, blocks=(absent, BlockConfig(1, 2, 2, 3), absent))
    alone = dataclasses.replace(model.config, blocks=model.config.blocks[1:2])
    renamed = {name: leaf for name, leaf in model.params.items() if not name.startswith("blocks")}
    renamed["blocks_0"] = model.params["blocks_1"]
    assert "blocks_0" not in model.params
    np.testing.assert_array_equal(model.apply(images), Model(alone, renamed).apply(images))


def test_no_biases_for_queries_keys_and_values(tiny_config):
    with_bias = {path[1:] for path in flatten(backbone.param_shapes(tiny_config))}
    config = dataclasses.replace(tiny_config, qkv_bias=False)
    without = {path[1:] for path in flatten(backbone.param_shapes(config))}
    assert with_bias - without == {("attn", name, "bias") for name in ("q", "k", "v")}


FIELDS = {"image_size": 8, "patch_size": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"class_token": False}, "need class_token=True"),
        ({"pool": "mean", "distilled": True}, "expected pool='cls'"),
        ({"pool": "max"}, "pool is 'max', expected one of 'cls', 'mean'"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of 'float32', 'bfloat16'"),
        ({"image_size": 2**15 + 4}, "image_size is 32772, expected 1 to 32768"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"layer_norm_eps": np.inf}, "layer_norm_eps is inf, expected a finite number"),
        ({"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"depth": -1}, "depth is -1, expected 0 to 1000"),
        ({"depth": 2 * 10**9}, "depth is 2000000000, expected 0 to 1000"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0, expected 0 to 1048576"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    fields = {"depth": 1, "num_heads": 2, "embed_dim": 16} | FIELDS | changes
    with pytest.raises(InputError, match=message):
        vit_config(**fields)


def test_negative_and_absurd_widths_are_refused():
    with pytest.raises(InputError, match="qk_dim is -1, expected 0 to 1048576"):
        BlockConfig(2, -1, 4, 8)
    with pytest.raises(InputError, match=r"v_dim is 10{30}, expected 0 to 1048576"):
        BlockConfig(2, 4, 10**30, 8)
    with pytest.raises(InputError, match=r"embed_dim is 10{30}, expected 1 to 1048576"):
        ViTConfig(embed_dim=10**30, head_dim=1, blocks=(), **FIELDS)
    with pytest.raises(InputError, match="head_dim is 0"):
        ViTConfig(embed_dim=8, head_dim=0, blocks=(), **FIELDS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
@pytest.mark.parametrize("name", ["tiny_model", "swin_model"])
def test_images_that_are_not_prepared_are_refused(request, name, dtype):
    model = request.getfixturevalue(name)
    side = model.config.image_size
    images = np.ones((2, side, side, model.config.in_channels), dtype)
    with pytest.raises(InputError, match=rf"dtype {np.dtype(dtype)}, expected floats, prepared"):
        model.apply(images)
    with pytest.raises(InputError, match="expected floats, prepared"):
        unit_importance(model, [images], method="variance")

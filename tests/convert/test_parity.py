"""Numbers of timm 1.0.31 (stored by tests/peers/make_fixtures.py), from the same weights."""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from tapvit_jax.convert.resample import (
    resample_patch_embed,
    resample_pos_embed,
    resample_rel_pos_bias,
)
from tapvit_jax.convert.timm import (
    from_timm,
    load_timm,
    rename_old,
    rules,
    timm_model,
    to_timm,
)
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import flatten
from tapvit_jax.models.presets import create, list_models
from tapvit_jax.models.registry import Model
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.prune.cost import cost
from tests.peers.make_fixtures import (
    CASES,
    DATA,
    GRADIENTS,
    NUM_CLASSES,
    PRUNED,
    digest,
    images,
    labels,
    timm_tensor,
)


@functools.cache
def fixture():
    with np.load(DATA / "timm_transformers.npz") as file:
        return dict(file)


@functools.cache
def records():
    return json.loads((DATA / "timm_presets.json").read_text())


def drawn_state(key):
    shapes = json.loads(str(fixture()[key]))
    return {name: timm_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def make_model(case, **changes):
    name, arguments = CASES[case]
    config, preprocess = create(name, num_classes=NUM_CLASSES, **(arguments | changes))
    state = drawn_state(f"{case}/pruned_shapes" if changes else f"{case}/shapes")
    return Model(config, from_timm(config, state), preprocess, architecture=name), state


def logits(model):
    apply = jax.jit(functools.partial(backbone.apply, model.config))
    with jax.default_matmul_precision("highest"):
        return np.asarray(apply(model.params, images(model.config.image_size)))


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    model, _ = make_model(case)
    expected = fixture()[f"{case}/logits"]
    assert np.ptp(expected, axis=0).max() > 0.2
    assert_close(logits(model), expected)


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case):
    model, _ = make_model(case)
    batch, classes = images(model.config.image_size), labels()

    def loss(params):
        log_p = jax.nn.log_softmax(backbone.apply(model.config, params, batch))
        return -log_p[np.arange(len(classes)), classes].mean()

    with jax.default_matmul_precision("highest"):
        found = to_timm(model.config, jax.jit(jax.grad(loss))(model.params))
    for name, gradient in found.items():
        assert_close(gradient, fixture()[f"{case}/gradient/{name}"])


@pytest.mark.parametrize("case", CASES)
def test_names_both_ways(case):
    model, state = make_model(case)
    back = to_timm(model.config, model.params)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize("case", PRUNED)
def test_timm_gives_the_same_logits_for_pruned_models_it_can_represent(case):
    model, state = make_model(case, **PRUNED[case])
    assert_close(logits(model), fixture()[f"{case}/pruned_logits"])
    # What we hand back makes timm's scale out of ours, so that it differs from the original's.
    dense, _ = create(CASES[case][0], num_classes=NUM_CLASSES, **CASES[case][1])
    pruned = model
    if case == "swin4":
        config = model.config
        pruned = model.replace(config=type(config)(**vars(config) | {"head_dims": dense.head_dims}))
    name, arguments, found = timm_model(pruned)
    assert name == CASES[case][0]
    again, _ = create(name, **{k: v for k, v in arguments.items() if v is not None})
    assert again.blocks == model.config.blocks
    assert {key: array.shape for key, array in found.items()} == {
        key: array.shape for key, array in state.items()
    }
    rebuilt = Model(again, from_timm(again, found))
    assert_close(logits(rebuilt), logits(pruned))


def test_names_of_the_original_swin():
    """It merges patches at the end of a stage, calls its classifier "head" and stores buffers."""
    model, state = make_model("swin4")
    old = {}
    for name, array in state.items():
        name = name.replace("layers.1.downsample", "layers.0.downsample")
        old[name.replace("head.fc.", "head.")] = array
    old["layers.0.blocks.1.attn_mask"] = np.zeros((16, 16, 16), np.float32)
    old["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    assert old.keys() != state.keys()
    found = from_timm(model.config, rename_old(model.config, old))
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf)


def test_names_of_the_original_deit3():
    model, state = make_model("deit3")
    old = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): array
        for name, array in state.items()
    }
    assert "blocks.0.gamma_1" in old
    found = from_timm(model.config, rename_old(model.config, old))
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf)


@pytest.mark.parametrize(
    ("case", "changes", "resampled"),
    [
        ("vit", {"img_size": 24}, {"pos_embed"}),
        ("deit3", {"img_size": 24}, {"pos_embed"}),
        ("vit", {"patch_size": 8}, {"pos_embed", "patch_embed.proj.weight"}),
        ("swin4", {"img_size": 64}, set()),
        ("swin4", {"window_size": 8}, {"relative_position_bias_table"}),
    ],
)
def test_other_sizes_are_resampled_and_nothing_else_changes(tmp_path, case, changes, resampled):
    name, arguments = CASES[case]
    model, state = make_model(case)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    arguments = {"num_classes": NUM_CLASSES} | arguments | changes
    found = load_timm(name, tmp_path / "model.safetensors", **arguments)
    side = found.config.image_size
    assert found.preprocess.image_size == side
    assert np.isfinite(found.apply(images(side))).all()
    back = to_timm(found.config, found.params)
    changed = {key for key in state if not np.array_equal(back[key], state[key])}
    assert {key.rpartition("attn.")[2] for key in changed} == resampled
    for key in changed:
        if key == "pos_embed":
            prefix = model.config.num_positions - model.config.num_patches
            grid = side // found.config.patch_size
            expected = resample_pos_embed(state[key], grid, prefix)
        elif key == "patch_embed.proj.weight":
            expected = resample_patch_embed(state[key], found.config.patch_size)
        else:
            expected = resample_rel_pos_bias(state[key], 8)
        np.testing.assert_array_equal(back[key], expected)


@pytest.mark.parametrize(
    ("case", "into", "looks"),
    [
        ("swin4", "vit", "Swin"),
        ("vit", "swin4", "ViT"),
        ("deit_distilled", "vit", "distilled"),
    ],
)
def test_the_message_says_what_a_foreign_state_dict_looks_like(case, into, looks):
    config = make_model(into)[0].config
    with pytest.raises(
        InputError, match=rf"weights.pth: looks like .*{looks}.*, expected .*problems: "
    ):
        from_timm(config, make_model(case)[1], "weights.pth")


@pytest.mark.parametrize("shape", [(2, 16, 8, 3), (2, 8, 8, 3), (2, 16, 16, 1), (16, 16, 3)])
@pytest.mark.parametrize("case", ["vit", "swin4"])
def test_images_of_another_shape_are_refused(case, shape):
    model, _ = make_model(case)
    side = model.config.image_size
    shape = tuple(side if n == 16 else n for n in shape)
    with pytest.raises(InputError, match=rf"expected \(batch, {side}, {side}, 3\)"):
        model.apply(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_dim": 5}, "block 1 has pruned attention dims"),
        ({"num_heads": 1}, "block 1 has pruned heads"),
        ({"mlp_dim": 20}, "block 1 has another MLP width than the first"),
        ({"mlp": False, "mlp_dim": 0}, "block 1 lacks one of its branches"),
    ],
)
def test_what_timm_cannot_represent_is_said(change, message):
    model, _ = make_model("vit")
    first, second = model.config.blocks
    blocks = (first, BlockConfig(**vars(second) | change))
    config = type(model.config)(**vars(model.config) | {"blocks": blocks})
    with pytest.raises(InputError, match=f"{message}; export it as ONNX"):
        timm_model(model.replace(config=config))


@pytest.mark.parametrize("name", list_models())
def test_presets_are_timms(name):
    record = records()[name]
    config, preprocess = create(name)
    table = rules(config)
    if not isinstance(config, ResNetConfig):
        assert digest({rule.timm: rule.shape for rule in table}) == record["digest"]
    assert cost(config).params == record["params"]
    found = {key: getattr(preprocess, key) for key in ("image_size", "crop_pct", "interpolation")}
    assert found == {key: record[key] for key in found}
    assert [*preprocess.mean, *preprocess.std] == record["mean"] + record["std"]


@pytest.mark.parametrize("name", list_models())
def test_every_tensor_of_every_preset_comes_back_to_the_bit(name):
    rng, seen = np.random.default_rng(0), set()
    for rule in rules(create(name)[0]):
        # Tensors of one shape and role are treated alike.
        key = (rule.timm.rpartition(".")[2], rule.shape, len(rule.paths))
        if key in seen or np.prod(rule.shape) > 2**23:
            continue
        seen.add(key)
        array = rng.standard_normal(rule.shape, np.float32)
        back = np.ascontiguousarray(rule.theirs(*rule.ours(array)))
        assert back.tobytes() == array.tobytes(), rule.timm

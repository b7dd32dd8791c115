"""timm's weights in and out, and the presets."""

import dataclasses
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tapvit_jax.convert import timm
from tapvit_jax.convert.timm import from_timm, load_timm, resize, rules, save_timm, to_timm
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.files import file_hash, read_safetensors
from tapvit_jax.models import backbone
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import check_params, flatten
from tapvit_jax.models.presets import IMAGENET, create
from tapvit_jax.models.vit import vit_config
from tests.conftest import realistic

VARIANTS = {
    "plain": {},
    "distilled": {"distilled": True},
    "mean": {"pool": "mean"},
    "no_bias": {"qkv_bias": False},
}
TINY = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
    "mlp_ratio": 2.0,
}


def make_config(variant):
    return vit_config(
        image_size=8,
        patch_size=4,
        num_classes=5,
        depth=2,
        num_heads=3,
        embed_dim=12,
        mlp_ratio=2.0,
        **VARIANTS[variant],
    )


def timm_shapes(variant):
    """What timm calls its tensors, and their shapes."""
    dense = {"head": (5, 12)} | ({"head_dist": (5, 12)} if variant == "distilled" else {})
    for i in range(2):
        block = f"blocks.{i}"
        dense |= {f"{block}.attn.qkv": (36, 12), f"{block}.attn.proj": (12, 12)}
        dense |= {f"{block}.mlp.fc1": (24, 12), f"{block}.mlp.fc2": (12, 24)}
    norms = [f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)]
    norms.append("fc_norm" if variant == "mean" else "norm")
    tokens = 6 if variant == "distilled" else 5
    shapes = {"cls_token": (1, 1, 12), "pos_embed": (1, tokens, 12)}
    shapes |= {"dist_token": (1, 1, 12)} if variant == "distilled" else {}
    shapes |= {"patch_embed.proj.weight": (12, 3, 4, 4), "patch_embed.proj.bias": (12,)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{part}": (12,) for name in norms for part in ("weight", "bias")}
    if variant == "no_bias":
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("qkv.bias")}
    return shapes


def make_state(variant, seed=0):
    rng = np.random.default_rng(seed)
    shapes = timm_shapes(variant)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_states_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_to_ours_and_back(variant):
    config, state = make_config(variant), make_state(variant)
    params = from_timm(config, state)
    check_params(backbone.param_shapes(config), params)
    assert_states_equal(to_timm(config, params), state)


@pytest.mark.parametrize(
    "blocks",
    [
        (BlockConfig(2, 3, 5, 7), BlockConfig(0, 0, 0, 4, attn=False)),
        (BlockConfig(2, 0, 3, 0), BlockConfig(0, 0, 0, 0), BlockConfig(1, 2, 2, 0, mlp=False)),
    ],
    ids=["uneven", "zero"],
)
def test_pruned_widths_to_timm_and_back(blocks):
    config = dataclasses.replace(make_config("distilled"), blocks=blocks)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), backbone.param_shapes(config))
    params = realistic(ones)
    back = from_timm(config, to_timm(config, params))
    check_params(backbone.param_shapes(config), back)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(back)[path], leaf)


def test_where_the_entries_go():
    config, state = make_config("distilled"), make_state("distilled")
    params = from_timm(config, state)
    attn = params["blocks_1"]["attn"]
    x = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    qkv = state["blocks.1.attn.qkv.weight"] @ x + state["blocks.1.attn.qkv.bias"]
    for name, expected in zip("qkv", qkv.reshape(3, 3, 4), strict=True):
        found = np.einsum("d,dhk->hk", x, attn[name]["kernel"]) + attn[name]["bias"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    out = np.einsum("hv,hvd->d", x.reshape(3, 4), attn["proj"]["kernel"]) + attn["proj"]["bias"]
    expected = state["blocks.1.attn.proj.weight"] @ x + state["blocks.1.attn.proj.bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    patch = params["patch_embed"]["kernel"]
    np.testing.assert_array_equal(patch[1, 2, 0], state["patch_embed.proj.weight"][:, 0, 1, 2])
    np.testing.assert_array_equal(params["head_dist"]["kernel"], state["head_dist.weight"].T)
    np.testing.assert_array_equal(params["norm"]["scale"], state["norm.weight"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(dtype):
    state = {name: array.astype(dtype) for name, array in make_state("plain").items()}
    params = from_timm(make_config("plain"), state)
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["pos_embed"], state["pos_embed"].astype(np.float32))


def test_what_the_weights_are_comes_before_the_first_problems():
    state = make_state("plain")
    state["more"] = np.ones(1)
    del state["norm.weight"]
    state["blocks.1.attn.qkv.weight"] = np.zeros((30, 12), np.float32)
    state["head.bias"] = np.zeros(5, np.int64)
    state["blocks.2.norm1.bias"] = np.zeros(12, np.float32)
    with pytest.raises(InputError) as caught:
        from_timm(make_config("plain"), state, "weights")
    message = str(caught.value)
    ours = ", ".join(f"blocks_1/attn/{name}/kernel" for name in "qkv")
    assert message == (
        "weights: looks like a pruned or ragged ViT of 3 blocks, embed_dim 12, patch 4, 5 "
        "positions, 5 classes, expected a ViT of 2 blocks, embed_dim 12, patch 4, 5 positions, "
        "5 classes; "
        f"5 problems: blocks.1.attn.qkv.weight (ours: {ours}) has shape (30, 12), expected "
        "(36, 12); missing norm.weight (ours: norm/scale); head.bias (ours: head/bias) has dtype "
        "int64, expected a float type; and 2 more"
    )


@pytest.mark.parametrize(
    ("preset", "change", "options"),
    [
        ("deit_tiny_patch16_224", {"depth": 3}, "--set depth=2"),
        (
            "deit_tiny_patch16_224",
            {"img_size": 9, "patch_size": 3, "embed_dim": 24, "num_classes": 7, "mlp_ratio": 4.0},
            "--set patch_size=4 --set embed_dim=12 --set mlp_ratio=2.0 --set num_classes=5 "
            "--set img_size=8 --set num_heads=?",
        ),
        (
            "swin_tiny_patch4_window7_224",
            {"window_size": 14, "num_heads": [3, 3, 6, 6], "depths": [2, 2, 4, 2]},
            "--set window_size=7 --set depths=[2,2,6,2] --set num_heads=[3,6,12,24] "
            "--set img_size=?",
        ),
        ("resnet18", {}, None),
    ],
)
def test_what_to_type_for_weights_of_other_sizes(preset, change, options):
    given = TINY if preset.startswith("deit") else {"img_size": 448} if "swin" in preset else {}
    config, _ = create(preset, **given | change)
    if "swin" in preset:
        shapes = {rule.timm: rule.shape for rule in rules(create(preset)[0])}
        state = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    else:
        state = make_state("plain")
    with pytest.raises(InputError) as caught:
        from_timm(config, state)
    ending = f"; its sizes are those of {options}" if options else " more"
    assert str(caught.value).endswith(ending)


def test_tensors_are_not_resampled_to_absurd_sizes(monkeypatch):
    config, _ = create("deit_tiny_patch16_224", **TINY | {"img_size": 16})
    state = make_state("plain")
    assert resize(config, state)["pos_embed"].shape == (1, 17, 12)
    monkeypatch.setattr(timm, "_MOST_RESAMPLED", 17 * 12 - 1)
    with pytest.raises(InputError, match=r"pos_embed.* has shape \(1, 5, 12\), expected \(1, 17"):
        from_timm(config, resize(config, state))


def test_one_problem_of_weights_that_look_right():
    state = make_state("plain")
    state["extra"] = np.ones(1, np.float32)
    with pytest.raises(InputError) as caught:
        from_timm(make_config("plain"), state, "weights")
    assert str(caught.value) == "weights: 1 problems: unexpected extra"


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.float32, np.nan), (np.float16, -np.inf), (np.float64, 1e300)]
)
def test_weights_that_are_not_finite_are_refused(dtype, value):
    state = make_state("plain")
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].astype(dtype)
    state["blocks.0.mlp.fc1.weight"][3, 1] = value
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc1\.weight .*holds NaN or infinity"):
        from_timm(make_config("plain"), state)


@pytest.mark.parametrize("variant", ["plain", "distilled"])
def test_files_round_trip(tmp_path, variant):
    name = "deit_tiny_distilled_patch16_224" if variant == "distilled" else "deit_tiny_patch16_224"
    config, state = make_config(variant), make_state(variant)
    path = tmp_path / "new" / "model.safetensors"
    save_timm(path, config, from_timm(config, state))
    model = load_timm(name, path, **TINY)
    assert model.config == config
    assert (model.preprocess.image_size, model.preprocess.mean) == (8, IMAGENET["mean"])
    weights = {"name": name, "file": "model.safetensors", "sha256": file_hash(path)}
    assert model.history["weights"] == weights
    assert_states_equal(to_timm(model.config, model.params), state)
    assert_states_equal(read_safetensors(path), state)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_parameters_of_another_config_are_not_written(tmp_path):
    config = make_config("plain")
    params = from_timm(config, make_state("plain"))
    del params["patch_embed"]["kernel"]
    with pytest.raises(InputError, match="missing patch_embed/kernel"):
        save_timm(tmp_path / "model.safetensors", config, params)
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_another_preset_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(make_state("distilled"), path)
    with pytest.raises(InputError, match=r"safetensors: looks .*distilled, .*; 4 problems: "):
        load_timm("deit_tiny_patch16_224", path, **TINY)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, length):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(make_state("plain"), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model.safetensors: truncated or not a"):
        load_timm("deit_tiny_patch16_224", path, **TINY)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            load_timm("deit_tiny_patch16_224", path, **TINY)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(InputError, match=r"pytorch_model.bin: "):
        load_timm("deit_tiny_patch16_224", path, **TINY)
    assert not marker.exists()
    pickle.loads(path.read_bytes()).close()
    assert marker.exists()


def test_overrides_carry_timms_names():
    config, preprocess = create(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        in_chans=1,
        mean=(0.1,),
        std=(0.2,),
        num_classes=7,
        depth=3,
        global_pool="avg",
        qkv_bias=False,
        crop_pct=1.0,
    )
    expected = vit_config(
        image_size=32,
        patch_size=8,
        in_channels=1,
        num_classes=7,
        depth=3,
        num_heads=3,
        embed_dim=192,
        pool="mean",
        qkv_bias=False,
    )
    assert config == expected
    assert preprocess == Preprocess(32, (0.1,), (0.2,), channels=1, crop_pct=1.0)
    assert create("vit_tiny_patch16_224", global_pool="token")[0].pool == "cls"
    # What timm saves of the others says so too.
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        assert create(name, global_pool="avg") == create(name)


@pytest.mark.parametrize(
    ("name", "image_size", "crop_pct"),
    [
        ("resnet50.a1h_in1k", 176, 0.9),
        ("resnet101.a1h_in1k", 224, 0.95),
        ("resnet50.a3_in1k", 160, 0.95),
        ("resnet18.a3_in1k", 160, 0.95),
        ("resnet101.tv_in1k", 224, 0.875),
    ],
)
def test_tags_of_weights_say_how_images_are_prepared(name, image_size, crop_pct):
    config, preprocess = create(name)
    assert config.image_size == preprocess.image_size == image_size
    assert preprocess.crop_pct == crop_pct


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("resnet51", {}, "unknown model 'resnet51', expected one of deit3_base"),
        ("deit_tiny_patch16_224", {"colour": 1, "blocks": ()}, "unknown argument blocks, colour"),
        ("deit_tiny_patch16_224", {"img_size": 225}, "not a multiple of patch_size"),
        ("deit_tiny_patch16_224", {"img_size": (224, 192)}, "expected a square"),
        ("swin_tiny_patch4_window7_224", {"img_size": 256}, "multiple of window_size 7"),
        ("swin_tiny_patch4_window7_224", {"img_size": 308}, "so that every stage can merge"),
        ("swin_tiny_patch4_window7_224", {"num_heads": [3, 6]}, "expected as many of each"),
        ("swin_tiny_patch4_window7_224", {"global_pool": "token"}, "global_pool is 'token'"),
        ("resnet18", {"global_pool": "max"}, "global_pool is 'max', expected one of .'avg'"),
        ("deit_tiny_patch16_224", {"mlp_ratio": float("nan")}, "224: mlp_ratio is nan, expected a"),
        (
            "deit_tiny_patch16_224",
            {"mlp_ratio": 1e308},
            "mlp_ratio is 1e.308, expected 0 to 1048576",
        ),
        ("deit_tiny_patch16_224", {"mlp_ratio": 1e5}, "mlp_dim is 19200000, expected 0 to 1048576"),
        (
            "deit_tiny_patch16_224",
            {"num_classes": 10**30},
            "num_classes is 10+, expected 1 to 1048576",
        ),
        ("deit_tiny_patch16_224", {"embed_dim": 3 * 10**400}, "an argument is too large"),
        ("swin_tiny_patch4_window7_224", {"depths": [2, 2, 2, 10**5]}, "expected at most 1000"),
        ("resnet18", {"patch_size": 16}, "unknown argument patch_size"),
        ("deit_tiny_patch16_224", {"num_heads": 5}, "not a multiple of num_heads"),
        ("deit_tiny_patch16_224", {"global_pool": "map"}, "pool is 'map'"),
        ("deit_tiny_patch16_224", {"qkv_bias": 1}, "224: qkv_bias is 1, expected bool"),
        ("deit_tiny_patch16_224", {"no_embed_class": "no"}, "class is 'no', expected bool"),
        ("deit_tiny_patch16_224", {"mlp_ratio": "4"}, "mlp_ratio is '4', expected float"),
        ("deit_tiny_patch16_224", {"global_pool": []}, r"pool is \(\), expected str"),
        ("swin_tiny_patch4_window7_224", {"num_heads": [3, "6"]}, r"\[1\] is '6', expected int"),
        ("resnet18", {"bottleneck": "no"}, "bottleneck is 'no', expected bool"),
    ],
)
def test_unknown_names_and_arguments_are_refused(name, overrides, message):
    with pytest.raises(InputError, match=message):
        create(name, **overrides)

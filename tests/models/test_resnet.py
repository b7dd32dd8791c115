"""ResNets: timm's numbers (stored by tests/peers/make_fixtures_resnet.py), names, cost, configs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapvit_jax.convert.resnet import IGNORED_SUFFIXES, extra, rules
from tapvit_jax.errors import InputError
from tapvit_jax.models import resnet
from tapvit_jax.models.backbone import param_shapes
from tapvit_jax.models.params import check_params, flatten, unflatten
from tapvit_jax.models.resnet import BatchNorm, ResNetConfig
from tests.peers.make_fixtures_resnet import CONFIGS, DATA, images, timm_tensor

# As timm and published tables count them: parameters, and G MACs at 224.
COUNTS = {
    "resnet18": (False, (2, 2, 2, 2), 11_689_512, 1.8),
    "resnet34": (False, (3, 4, 6, 3), 21_797_672, 3.7),
    "resnet50": (True, (3, 4, 6, 3), 25_557_032, 4.1),
    "resnet101": (True, (3, 4, 23, 3), 44_549_160, 7.8),
}


def full_config(name):
    bottleneck, depths, _, _ = COUNTS[name]
    return ResNetConfig(image_size=224, num_classes=1000, bottleneck=bottleneck, depths=depths)


@functools.cache
def fixture():
    with np.load(DATA / "timm_resnet.npz") as file:
        return dict(file)


def timm_shapes(name):
    shapes = json.loads(str(fixture()[f"{name}_shapes"]))
    return {key: tuple(shape) for key, shape in shapes.items()}


def to_ours(config, state):
    leaves = {}
    for rule in rules(config):
        leaves |= dict(zip(rule.paths, rule.ours(state[rule.timm]), strict=True))
    return unflatten(leaves)


def make_params(name):
    state = {key: timm_tensor(key, shape) for key, shape in timm_shapes(name).items()}
    return to_ours(CONFIGS[name], state)


def jitted(compute, config):
    return jax.jit(functools.partial(compute, config))


def image_struct(config):
    shape = (1, config.image_size, config.image_size, config.in_channels)
    return jax.ShapeDtypeStruct(shape, np.float32)


@pytest.mark.parametrize("kind", ["logits", "pooled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_numbers_as_timm(name, kind):
    compute = {"logits": resnet.apply, "pooled": resnet.pooled}[kind]
    with jax.default_matmul_precision("highest"):
        found = jitted(compute, CONFIGS[name])(make_params(name), images(name))
    expected = fixture()[f"{name}_{kind}"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    # The images must not all look the same to the network.
    assert expected.std(axis=0).max() > 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_timm_has_its_place(name):
    config, shapes = CONFIGS[name], timm_shapes(name)
    table = {rule.timm: rule.shape for rule in rules(config)}
    ignored = {key for key in shapes if key.endswith(IGNORED_SUFFIXES)}
    assert table == {key: shape for key, shape in shapes.items() if key not in ignored}
    assert extra(config).keys() == ignored
    for array in extra(config).values():
        assert (array.shape, array.dtype, int(array)) == ((), np.int64, 0)
    check_params(param_shapes(config), make_params(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_to_timm_and_back(name):
    leaves = flatten(make_params(name))
    for rule in rules(CONFIGS[name]):
        back = rule.theirs(*(leaves[path] for path in rule.paths))
        expected = timm_tensor(rule.timm, rule.shape)
        np.testing.assert_array_equal(back, expected, strict=True, err_msg=rule.timm)


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    config, (_, _, params, giga_macs) = full_config(name), COUNTS[name]
    found = resnet.cost(config)
    assert found[0] == params
    assert found[1] == pytest.approx(giga_macs * 1e9, abs=0.05e9)
    assert config.embed_dim == config.pooled_dim == (2048 if config.bottleneck else 512)
    leaves = flatten(param_shapes(config))
    learned = [leaf.size for path, leaf in leaves.items() if path[-1] not in ("mean", "var")]
    assert sum(learned) == params


def taps_inside(side, outputs, size, stride, pad):
    """Products along one axis whose input is no padding."""
    places = np.arange(outputs)[:, None] * stride + np.arange(size) - pad
    return int(((places >= 0) & (places < side)).sum())


def traced_macs(config):
    """MACs of the traced program, once with padding and once without it, as XLA counts."""
    traced = jax.make_jaxpr(functools.partial(resnet.apply, config))(
        param_shapes(config), image_struct(config)
    )
    padded = inside = 0
    for equation in traced.eqns:
        if equation.primitive.name == "conv_general_dilated":
            image, kernel = (variable.aval.shape for variable in equation.invars)
            out = equation.outvars[0].aval.shape
            padded += np.prod(kernel) * np.prod(out[1:3])
            taps = np.prod(kernel[2:])
            strides, pads = equation.params["window_strides"], equation.params["padding"]
            for i, (stride, (pad, _)) in enumerate(zip(strides, pads, strict=True)):
                taps *= taps_inside(image[1 + i], out[1 + i], kernel[i], stride, pad)
            inside += taps
    head = config.embed_dim * config.num_classes
    return int(padded) + head, int(inside) + head


@pytest.mark.parametrize(
    "config",
    [*(full_config(name) for name in ("resnet18", "resnet50")), *CONFIGS.values()],
    ids=["resnet18", "resnet50", *CONFIGS],
)
def test_macs_are_those_of_the_program(config):
    padded, _ = traced_macs(config)
    assert resnet.cost(config)[1] == padded


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_xla_counts_the_same_but_for_padding(name):
    config = full_config(name)
    _, inside = traced_macs(config)
    lowered = jitted(resnet.apply, config).lower(param_shapes(config), image_struct(config))
    # Norms, ReLUs, sums and pooling make up the rest.
    excess = lowered.cost_analysis()["flops"] / 2 / inside - 1
    assert 0 < excess < 0.01


def test_batch_norm_matches_its_formula_where_the_variance_is_small():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 3, 4)).astype(np.float32)
    params = {name: np.float32(rng.standard_normal(4)) for name in ("scale", "bias", "mean")}
    params["var"] = np.float32([0, 1e-6, 1e-5, 1])
    found = BatchNorm(1e-5).apply({"params": params}, x)
    normed = (x - params["mean"]) / np.sqrt(params["var"] + 1e-5)
    expected = normed * params["scale"] + params["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_lower_precision_stays_close(dtype, tolerance):
    config = dataclasses.replace(CONFIGS["bottleneck"], dtype=dtype)
    found = jitted(resnet.apply, config)(make_params("bottleneck"), images("bottleneck"))
    expected = fixture()["bottleneck_logits"]
    assert found.dtype == jnp.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < tolerance


def test_fresh_blocks_start_as_identities():
    config = dataclasses.replace(CONFIGS["basic"], depths=(2,))
    params = resnet.init(config, jax.random.key(0))
    check_params(param_shapes(config), params)
    np.testing.assert_array_equal(params["layer1_1"]["bn1"]["scale"], 1)
    shallow = dataclasses.replace(config, depths=(1,))
    # The last block adds nothing: the scale does not grow with the depth.
    without = {key: part for key, part in params.items() if key != "layer1_1"}
    found = resnet.apply(config, params, images("basic"))
    np.testing.assert_array_equal(found, resnet.apply(shallow, without, images("basic")))
    assert 0.01 < float(jnp.abs(found).max()) < 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size is 0, expected 1 to 32768"),
        ({"image_size": (224, 224)}, r"image_size is \(224, 224\)"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"width": 1.5}, "width is 1.5"),
        ({"depths": ()}, r"depths is \(\), expected stages of one block or more"),
        ({"depths": (2, 0)}, r"depths is \(2, 0\)"),
        ({"depths": (2, 2 * 10**9)}, r"depths is \(2, 2000000000\), expected at most 1000"),
        ({"batch_norm_eps": 0.0}, "batch_norm_eps is 0.0, expected a finite number"),
        ({"batch_norm_eps": np.inf}, "batch_norm_eps is inf, expected a finite number"),
        ({"image_size": 2**15 + 1}, "image_size is 32769, expected 1 to 32768"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIGS["basic"], **changes)


def test_images_that_are_not_prepared_are_refused():
    config = CONFIGS["basic"]
    struct = jax.ShapeDtypeStruct(image_struct(config).shape, np.uint8)
    with pytest.raises(InputError, match="dtype uint8, expected floats, prepared"):
        jax.eval_shape(functools.partial(resnet.apply, config), param_shapes(config), struct)

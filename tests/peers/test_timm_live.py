"""Every named model against timm itself. Needs requirements-peers.txt; skipped without.

make peers
"""

import functools
import importlib
import importlib.util

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tapvit_jax.convert.timm import from_timm, load_timm, rename_old, rules, to_timm
from tapvit_jax.export.timm import export_timm
from tapvit_jax.models import backbone
from tapvit_jax.models.presets import create, list_models
from tapvit_jax.models.registry import Model
from tapvit_jax.models.resnet import ResNetConfig
from tests.peers import make_fixtures, make_fixtures_resnet

torch = pytest.importorskip("torch")
if importlib.util.find_spec("timm") is None:
    pytest.skip("needs timm", allow_module_level=True)

# As trained ones, weights are such that logits have a scale of ten or so.
TOLERANCE = 2e-5

MODELS = {
    "deit_tiny_patch16_224": {},
    "deit_small_patch16_224": {},
    "deit_base_patch16_224": {},
    "deit_small_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_224.mae": {"global_pool": "avg"},
    "vit_huge_patch14_224": {},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "swin_tiny_patch4_window7_224": {},
    "swin_small_patch4_window7_224": {},
    "swin_base_patch4_window7_224": {},
    "swin_tiny_patch4_window7_224/12": {"img_size": 384, "window_size": 12},
    "swin_small_patch4_window7_224/12": {"img_size": 384, "window_size": 12},
    "swin_base_patch4_window12_384": {},
    "resnet18": {},
    "resnet50": {},
}
GRADIENTS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224")


@functools.cache
def timm():
    return make_fixtures_resnet.import_timm()[1]


def build(name, arguments):
    arguments = {"num_classes": 1000} | arguments
    config, _ = create(name, **arguments)
    name = name.partition("/")[0].partition(".")[0]
    if isinstance(config, ResNetConfig):
        model = make_fixtures_resnet.fill(torch, timm().create_model(name, **arguments))
    else:
        model = make_fixtures.timm_model(timm(), torch, name, **arguments)
    return config, model


def state_of(model):
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _highest():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_names(name):
    config, model = build(name.partition("/")[0], MODELS[name])
    state = state_of(model)
    params = from_timm(config, rename_old(config, state))
    batch = make_fixtures.images(config.image_size, 2)
    with torch.no_grad():
        expected = make_fixtures.logits_of(torch, model, batch).numpy()
    found = np.asarray(jax.jit(functools.partial(backbone.apply, config))(params, batch))
    scale = np.abs(expected).max()
    assert scale > 0.5
    assert np.abs(found - expected).max() <= TOLERANCE * scale
    back = to_timm(config, params)
    assert back.keys() == state.keys()
    for key, array in state.items():
        if not key.endswith("num_batches_tracked"):
            assert back[key].tobytes() == np.ascontiguousarray(array).tobytes(), key


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    config, model = build(name, MODELS[name])
    params = from_timm(config, state_of(model))
    batch, classes = make_fixtures.images(config.image_size, 2), make_fixtures.labels(2)
    expected = make_fixtures.gradients_of(torch, model, batch)

    def loss(params):
        log_p = jax.nn.log_softmax(backbone.apply(config, params, batch))
        return -log_p[np.arange(2), classes].mean()

    found = to_timm(config, jax.jit(jax.grad(loss))(params))
    for key, gradient in expected.items():
        assert np.abs(found[key] - gradient).max() <= TOLERANCE * np.abs(gradient).max(), key


@pytest.mark.parametrize(
    ("name", "saved", "wanted"),
    [
        ("deit_tiny_patch16_224", {}, {"img_size": 160}),
        ("deit_tiny_distilled_patch16_224", {}, {"img_size": 256, "patch_size": 32}),
        ("deit3_small_patch16_224", {}, {"img_size": 192}),
        ("swin_tiny_patch4_window7_224", {}, {"img_size": 256, "window_size": 8}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_sizes_are_resampled_as_timm_does(tmp_path, name, saved, wanted):
    _, model = build(name, saved)
    path = tmp_path / "model.safetensors"
    save_file(state_of(model), path)
    ours = load_timm(name, path, **wanted)
    # timm loads a file of another size through the filter of the architecture.
    theirs = (
        timm()
        .create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **wanted)
        .eval()
    )
    batch = make_fixtures.images(ours.config.image_size, 2)
    with torch.no_grad():
        expected = make_fixtures.logits_of(torch, theirs, batch).numpy()
    assert np.abs(ours.apply(batch) - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("case", make_fixtures.CASES)
def test_timm_loads_our_folder(tmp_path, case):
    name, arguments = make_fixtures.CASES[case]
    config, model = build(name, {"num_classes": make_fixtures.NUM_CLASSES} | arguments)
    _, preprocess = create(name, **arguments)
    params = from_timm(config, state_of(model))
    ours = Model(config, params, preprocess, architecture=name)
    export_timm(ours, tmp_path / "folder")
    theirs = timm().create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    batch = make_fixtures.images(config.image_size, 2)
    with torch.no_grad():
        found = make_fixtures.logits_of(torch, theirs, batch).numpy()
    np.testing.assert_allclose(ours.apply(batch), found, atol=2e-5)


@pytest.mark.parametrize("name", list_models())
def test_names_and_shapes_of_every_preset(name):
    with torch.device("meta"):
        model = timm().create_model(name, num_classes=1000)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config, _ = create(name)
    found = {rule.timm: rule.shape for rule in rules(config)}
    assert found.items() <= shapes.items()
    assert all(key.endswith("num_batches_tracked") for key in shapes.keys() - found.keys())


HEADLESS = {
    "vit_small_patch14_dinov2": {"img_size": 56},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "swin_tiny_patch4_window7_224": {},
    "resnet18": {},
}


@pytest.mark.parametrize("name", HEADLESS)
def test_what_timm_saves_without_a_classifier(tmp_path, name):
    _, model = build(name, HEADLESS[name])
    model.reset_classifier(0)
    model.eval()
    hub = importlib.import_module("timm.models._hub")
    hub.save_for_hf(model, tmp_path, safe_serialization=True, model_args=HEADLESS[name])
    weights = tmp_path / "model.safetensors"
    found = load_timm(name, weights, new_classifier=True, num_classes=4)
    assert found.config.num_classes == 4
    side = found.config.image_size
    images = np.random.default_rng(1).standard_normal((2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    features = backbone.pooled(found.config, found.params, images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(features, expected, atol=TOLERANCE * scale)

"""Torch-Pruning as a row of the comparison. What runs it needs requirements-peers.txt.

make peers
"""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.peers import METHODS, PEERS, available, import_timm, settings, torch_pruning
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.budget import Budget, within
from tapvit_jax.prune.cost import cost
from tests.conftest import param_count, realistic

needs_peers = pytest.mark.skipif(not available(), reason="needs requirements-peers.txt")

HALF = Budget(macs=0.5)


@pytest.fixture(scope="module", autouse=True)
def _highest():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def labels(images):
    return np.arange(len(images)) % 5


@pytest.fixture(scope="module")
def scaled_model(tiny_config):
    """As DeiT-III: layer scales, and no positions for the class token."""
    config = dataclasses.replace(tiny_config, layer_scale=True, prefix_positions=False)
    params = realistic(backbone.init(config, jax.random.key(3)), 3)
    return Model(config, params, architecture="deit3_small_patch16_224")


def direct_macs(network, image):
    """Multiply-accumulates of the matrix products that one forward pass really does."""
    torch, _ = import_timm()
    found = []

    def linear(module, inputs, output):
        found.append(module.weight[0].numel() * output.numel())

    def conv(module, inputs, output):
        found.append(module.weight[0].numel() * output.numel())

    def attention(module, inputs, output):
        windows, tokens, _ = inputs[0].shape
        found.append(windows * tokens**2 * module.qkv.out_features // 3 * 2)

    hooks = []
    for module in network.modules():
        for kind, hook in ((torch.nn.Linear, linear), (torch.nn.Conv2d, conv)):
            if isinstance(module, kind):
                hooks.append(module.register_forward_hook(hook))
        if hasattr(module, "qkv"):
            hooks.append(module.register_forward_hook(attention))
    with torch.no_grad():
        network(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()))
    for hook in hooks:
        hook.remove()
    return sum(found)


def check(found, dense, images, budget):
    """Within the budget, counted right, and the same function in torch and here."""
    assert within(found.cost, budget.limits(dense.config))
    parameters = sum(parameter.numel() for parameter in found.network.parameters())
    assert found.cost.params == parameters == param_count(found.model.config)
    assert found.cost.macs == direct_macs(found.network, images[0])
    assert found.cost == cost(found.model.config)
    np.testing.assert_allclose(found.predict(images), found.model.apply(images), atol=1e-4)


def test_looking_for_the_packages_imports_none():
    code = (
        "import sys; from experiments.peers import available; available(); "
        "print(sorted({'torch', 'timm', 'torch_pruning'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"


def test_names_of_peers():
    assert len(set(PEERS)) == len(PEERS) == 2 * len(METHODS)
    assert settings("tp_group_taylor") == ("group_taylor", "cut")
    assert settings("tp_random_whole") == ("random", "whole")
    with pytest.raises(InputError, match="peer is 'tp_l3', expected one of tp_group_taylor"):
        settings("tp_l3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "l3"}, "method is 'l3', expected one of group_taylor"),
        ({"embedding": "left"}, "embedding is 'left', expected one of cut, whole"),
    ],
)
def test_unknown_methods_are_refused(tiny_model, images, labels, changes, message):
    arguments = {"method": "l2", "embedding": "whole"} | changes
    with pytest.raises(InputError, match=message):
        torch_pruning(tiny_model, images, labels, HALF, seed=0, **arguments)


@needs_peers
@pytest.mark.parametrize("name", ["tiny_model", "distilled_model", "scaled_model", "swin_model"])
def test_nothing_pruned_is_the_dense_model(name, images, labels, request):
    model = request.getfixturevalue(name)
    found = torch_pruning(
        model, images, labels, Budget(macs=1.0), method="l2", embedding="whole", seed=0
    )
    assert found.ratio == 0
    assert found.model.config == model.config
    np.testing.assert_allclose(found.predict(images), model.apply(images), atol=1e-4)


@needs_peers
@pytest.mark.parametrize("name", PEERS)
def test_budgets_are_met_and_counted_right(name, tiny_model, images, labels):
    method, embedding = settings(name)
    found = torch_pruning(
        tiny_model, images, labels, HALF, method=method, embedding=embedding, seed=0
    )
    check(found, tiny_model, images, HALF)
    width, dense = found.model.config.embed_dim, tiny_model.config.embed_dim
    assert width == dense if embedding == "whole" else width < dense
    assert found.cost.macs > 0.42 * cost(tiny_model.config).macs
    again = torch_pruning(
        tiny_model, images, labels, HALF, method=method, embedding=embedding, seed=0
    )
    assert again.ratio == found.ratio
    np.testing.assert_array_equal(again.predict(images), found.predict(images))


@needs_peers
@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("distilled_model", "cut"),
        ("distilled_model", "whole"),
        ("scaled_model", "cut"),
        ("scaled_model", "whole"),
        ("swin_model", "whole"),
    ],
)
def test_other_architectures(name, embedding, images, labels, request):
    model, budget = request.getfixturevalue(name), Budget(params=0.7, macs=0.7)
    found = torch_pruning(
        model, images, labels, budget, method="group_taylor", embedding=embedding, seed=0
    )
    check(found, model, images, budget)


@needs_peers
def test_whole_embeddings_keep_rows_of_the_dense_weights(tiny_model, images, labels):
    found = torch_pruning(
        tiny_model, images, labels, HALF, method="isomorphic", embedding="whole", seed=0
    )
    dense = np.asarray(tiny_model.params["blocks_0"]["mlp"]["fc1"]["kernel"]).T
    kept = np.asarray(found.model.params["blocks_0"]["mlp"]["fc1"]["kernel"]).T
    rows = [np.flatnonzero((dense == row).all(axis=1)).item() for row in kept]
    assert 0 < len(rows) < len(dense)
    assert rows == sorted(rows)


@needs_peers
def test_the_seed_chooses_for_the_random_method_alone(tiny_model, images, labels):
    def run(method, seed):
        return torch_pruning(
            tiny_model, images, labels, HALF, method=method, embedding="cut", seed=seed
        ).predict(images)

    assert np.abs(run("random", 0) - run("random", 1)).max() > 1e-3
    np.testing.assert_array_equal(run("l2", 0), run("l2", 1))


@needs_peers
def test_taylor_scores_follow_the_labels(tiny_model, images, labels):
    def run(labels):
        return torch_pruning(
            tiny_model, images, labels, HALF, method="group_taylor", embedding="cut", seed=0
        ).predict(images)

    assert np.abs(run(labels) - run((labels + 2) % 5)).max() > 1e-3


@needs_peers
def test_pruning_leaves_the_generators_of_torch_alone(tiny_model, images, labels):
    torch, _ = import_timm()
    before = torch.random.get_rng_state()
    torch_pruning(tiny_model, images, None, HALF, method="random", embedding="cut", seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


@needs_peers
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": Budget(macs=0.01)}, "out of reach; the smallest reached: macs [0-9]+ of at"),
        ({"labels": None}, "group_taylor needs the classes of its images"),
        ({"labels": np.zeros(3, np.int64)}, "labels have shape"),
        ({"labels": np.full(6, 5)}, "numbers from 0 to 4"),
        ({"images": np.zeros((6, 9, 9, 3), np.float32)}, "images have shape"),
    ],
)
def test_what_cannot_be_done_is_refused(tiny_model, images, labels, changes, message):
    given = {"images": images, "labels": labels, "budget": HALF} | changes
    with pytest.raises(InputError, match=message):
        torch_pruning(
            tiny_model,
            given["images"],
            given["labels"],
            given["budget"],
            method="group_taylor",
            embedding="whole",
            seed=0,
        )


@needs_peers
def test_a_cut_embedding_of_swin_is_refused(swin_model, images, labels):
    with pytest.raises(InputError, match="expected 'whole' for a Swin"):
        torch_pruning(swin_model, images, labels, HALF, method="l2", embedding="cut", seed=0)

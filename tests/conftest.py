"""Eight fake devices on the CPU and a shared cache of programs, set before anything imports JAX."""

import os

from tests.flags import CHEAP

os.environ["XLA_FLAGS"] = " ".join(
    ("--xla_force_host_platform_device_count=8", CHEAP, os.environ.get("XLA_FLAGS", ""))
)

# Workers and the programs that tests start compile much the same: whoever is first does it for all,
# and the next run finds it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", __file__.removesuffix("tests/conftest.py") + ".pytest_cache/jax"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import dataclasses
import gc

import jax
import numpy as np
import pytest
from hypothesis import settings

from tapvit_jax.models import backbone, vit
from tapvit_jax.models.registry import Model
from tapvit_jax.models.swin import swin_config
from tapvit_jax.runtime import forget_programs

# Compiling takes longer than hypothesis' deadline allows for; nothing here is timed.
settings.register_profile("tapvit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tapvit")

# Few tests that take long.
LONGEST = ("test_sweep.py", "test_distributed.py", "test_configs.py", "test_run.py")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """What was imported stays: walking all of it again and again takes a tenth of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 1000)


@pytest.fixture(autouse=True, scope="module")
def bounded_programs():
    """A worker that runs half of all tests would hold more programs than a process may."""
    yield
    forget_programs()


def realistic(params, seed=0):
    """Weights of the scale that trained networks have: logits and attention really vary."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, fan_in = path[-1].key, np.prod(leaf.shape[:-1])
        noise = rng.standard_normal(leaf.shape)
        if name == "kernel":
            if path[-2].key == "proj":
                fan_in = np.prod(leaf.shape[:2])
            elif path[-2].key in ("q", "k", "v"):
                fan_in = leaf.shape[0]
            return np.float32(noise * 1.5 / np.sqrt(max(fan_in, 1)))
        return np.float32(leaf + 0.2 * noise)

    return jax.tree_util.tree_map_with_path(draw, params)


def param_count(config):
    """Parameters of a model as it is really built."""
    return sum(leaf.size for leaf in jax.tree.leaves(backbone.param_shapes(config)))


@pytest.fixture(scope="session")
def tiny_config():
    return vit.vit_config(
        image_size=8,
        patch_size=4,
        num_classes=5,
        in_channels=3,
        depth=3,
        num_heads=2,
        embed_dim=16,
        mlp_ratio=2.0,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    return Model(tiny_config, realistic(backbone.init(tiny_config, jax.random.key(0))), name="tiny")


@pytest.fixture(scope="session")
def distilled_model(tiny_config):
    config = dataclasses.replace(tiny_config, distilled=True)
    return Model(config, realistic(backbone.init(config, jax.random.key(1)), 1), name="distilled")


def tiny_swin():
    """Two stages: shifted windows on an 8 x 8 grid, then patch merging and a single window."""
    return swin_config(
        image_size=8,
        patch_size=1,
        num_classes=5,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 4),
        window_size=4,
        mlp_ratio=2.0,
    )


@pytest.fixture(scope="session")
def swin_model():
    config = tiny_swin()
    return Model(config, realistic(backbone.init(config, jax.random.key(2)), 2), name="swin")


@pytest.fixture(scope="session")
def images(tiny_config):
    rng = np.random.default_rng(0)
    side = tiny_config.image_size
    return rng.standard_normal((6, side, side, 3)).astype(np.float32)

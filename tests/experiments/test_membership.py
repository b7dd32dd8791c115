"""What payloads give away."""

import json

import numpy as np
import pytest

from configs import digits, tiny_imagenet_40
from experiments.config import read
from experiments.membership import areas, measure, table
from tapvit_jax.errors import InputError
from tapvit_jax.proxy.gmm import Gmm, GmmConfig


def test_the_area_counts_how_often_a_member_is_likelier_than_another():
    gmm = Gmm(np.ones(1), np.zeros((1, 1)), np.ones((1, 1)), "diag")
    members, others = np.array([[0.0], [0.5], [3.0]]), np.array([[1.0], [2.0]])
    # Density falls with the distance from 0: 0 and 0.5 are above both others, 3 above none.
    assert areas([gmm, gmm], members, others) == pytest.approx([4 / 6, 4 / 6])


def test_a_covariance_of_too_few_images_gives_them_away_and_a_variance_does_not():
    rng = np.random.default_rng(0)
    members, others = rng.standard_normal((2, 60, 40)).astype(np.float32)
    gmms = [Gmm.fit(members, GmmConfig((1,), kind)) for kind in ("full", "spherical")]
    full, spherical = areas(gmms, members, others)
    assert full > 0.95
    assert spherical < 0.65


def tiny():
    config = digits.get_config()
    config.extractor.update({"widths": (4,), "embed_dim": 8, "dim": 4})
    config.extractor_train.epochs = 1
    config.gmm.components = (1, 2)
    config.data.partition.num_devices = 2
    return config


def test_every_device_is_attacked_with_every_kind(tmp_path):
    results = measure(read(tiny()), tmp_path / "m", ("diag", "full"), quiet=True)
    assert json.loads((tmp_path / "m" / "membership.json").read_text()) == results
    assert list(results["kinds"]) == ["diag", "full"]
    for kind, numbers in (("diag", 1 + 4 + 4), ("full", 1 + 4 + 16)):
        rows = results["kinds"][kind]
        assert len(rows) == 2
        for row in rows:
            assert row["parameters"] == row["components"] * numbers
            assert 0.3 < row["auc"] < 0.9
    lines = table(results).splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("| full | 0.")


def test_splits_that_leak_are_refused(tmp_path):
    config = tiny_imagenet_40.get_config()
    config.data.partition.leaks = True
    with pytest.raises(InputError, match="leaks: private-test images are members as well"):
        measure(read(config), tmp_path / "m", ("diag",), quiet=True)
    assert not (tmp_path / "m").exists()


def test_a_directory_of_another_config_is_refused(tmp_path):
    config = tiny()
    measure(read(config), tmp_path / "m", ("spherical",), quiet=True)
    config.seed = 1
    with pytest.raises(InputError, match=r"seed \(0 there, 1 here\)"):
        measure(read(config), tmp_path / "m", ("spherical",), quiet=True)


def test_the_program_takes_kinds_as_a_list(programs, tmp_path):
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path / 'm'}"]
    found = programs.run("experiments.membership", *arguments, "--covariances=diag,round")
    assert found.returncode == 2, found.stderr
    message = "error: --covariances is 'diag,round', expected some of diag,"
    assert found.stderr.startswith(message) and not (tmp_path / "m").exists()

"""Pools on disk give the same lists as pools in memory, however they are walked."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tapvit_jax.errors import InputError
from tapvit_jax.proxy import pool as pool_module
from tapvit_jax.proxy.density import component_log_likelihood, log_likelihood
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.proxy.pool import (
    Best,
    open_pool,
    pick_rows,
    pool_range,
    read_rows,
    scores,
    skip_noise,
)
from tapvit_jax.proxy.select import select
from tapvit_jax.sharding import data_mesh

ROWS, DIM = 5000, 6


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    # Rounded and repeated: many exact ties.
    return np.tile(rng.normal(size=(ROWS // 2, DIM)).round(1).astype(np.float32), (2, 1))


@pytest.fixture(scope="module")
def gmms():
    rng = np.random.default_rng(1)
    return [
        Gmm(rng.dirichlet(np.ones(g)), rng.normal(size=(g, DIM)), np.ones((g, DIM)), "diag")
        for g in (2, 4)
    ]


@pytest.mark.parametrize("method", ["top", "quota", "importance"])
def test_the_same_lists_from_memory_disk_and_any_devices(
    method, features, gmms, tmp_path, monkeypatch
):
    expected = select(gmms, features, 100, method=method, finetune_count=700)
    np.save(tmp_path / "pool.npy", features)
    monkeypatch.setattr(pool_module, "_PIECE_FLOATS", 2**10)
    monkeypatch.setattr(pool_module, "chunk_rows", lambda gmms: 64)
    one = data_mesh(jax.devices()[:1])
    for pool in (tmp_path / "pool.npy", np.load(tmp_path / "pool.npy", mmap_mode="r")):
        for mesh in (one, data_mesh()):
            found = select(gmms, pool, 100, method=method, finetune_count=700, mesh=mesh)
            np.testing.assert_array_equal(found, expected)


PICK = """
import sys
from pathlib import Path
import numpy as np
from tapvit_jax.proxy.pool import open_pool, pick_rows

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM:")).split()[1]) / 2**10

pool = open_pool(sys.argv[1])
rows = np.random.default_rng(0).choice(len(pool), 20_000, replace=False)
before = peak_mib()
picked = pick_rows(pool, rows)
added = peak_mib() - before
assert (picked[:, 0] == rows).all()
print(added)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_random_rows_of_a_large_file_add_little_memory(tmp_path):
    path, rows = tmp_path / "pool.npy", 3_200_000
    written = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 16))
    written[:, 0] = np.arange(rows)
    del written
    # 195 MiB, of whose pages the rows touch a third.
    command = [sys.executable, "-c", PICK, path]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    path.unlink()
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 32


@pytest.mark.parametrize("on_disk", [True, False])
def test_picked_rows_come_in_the_order_asked_for(features, tmp_path, on_disk):
    np.save(tmp_path / "pool.npy", features.astype(np.float64))
    pool = open_pool(tmp_path / "pool.npy" if on_disk else features)
    rows = np.random.default_rng(0).permutation(ROWS)[:1000]
    picked = pick_rows(pool, rows)
    np.testing.assert_array_equal(picked, features[rows])
    assert picked.dtype == np.float32


def test_changes_to_a_map_of_its_own_are_kept(features, tmp_path):
    np.save(tmp_path / "pool.npy", features)
    pool = np.load(tmp_path / "pool.npy", mmap_mode="c")
    pool[:] += 1
    for _ in range(2):
        np.testing.assert_array_equal(read_rows(pool, 0, ROWS), features + 1)


def test_scores_are_the_same_bits_on_any_devices(features, gmms, monkeypatch):
    monkeypatch.setattr(pool_module, "chunk_rows", lambda gmms: 64)
    bounds = pool_range(features)
    found = [
        np.concatenate([v for _, v in scores(gmms, features, bounds, mesh)], axis=1)
        for mesh in (data_mesh(jax.devices()[:1]), data_mesh())
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], log_likelihood(gmms, features), rtol=1e-5)


def test_quota_takes_the_best_of_each_component(features, gmms):
    chosen = select(gmms, features, 50, method="quota")
    values = component_log_likelihood(gmms, features)
    for row, value in zip(chosen, values, strict=True):
        owners = value.argmax(axis=0)
        for k in np.unique(owners[row]):
            mine = np.flatnonzero(owners == k)
            best = mine[np.argsort(-value[k, mine], kind="stable")]
            taken = row[owners[row] == k]
            assert value[k, taken].min() >= value[k, best[taken.size - 1]] - 1e-4


@pytest.mark.parametrize("count", [1, 7, 40])
def test_running_best_is_the_stable_sort(count):
    keys = np.random.default_rng(count).integers(0, 9, 200).astype(float)
    keys[::5] = -np.inf
    best = Best(1, count)
    for start in range(0, 200, 13):
        best.add(0, keys[start : start + 13], start)
    np.testing.assert_array_equal(best.finish()[0], np.argsort(-keys, kind="stable")[:count])


def test_lists_that_stay_short_are_a_bug():
    best = Best(2, 2)
    best.add(0, np.array([0.5, 0.1, 0.3]), 0)
    best.add(1, np.array([np.nan, -np.inf, 0.3]), 0)
    assert [rows.tolist() for rows in best.finish(whole=False)] == [[0, 2], [2]]
    with pytest.raises(RuntimeError, match="1 rows have finite keys, expected 2 or more"):
        best.finish()


def test_skipping_noise_is_drawing_it():
    one, other = (np.random.default_rng(3) for _ in range(2))
    skip_noise(one, 2**20 + 5)
    assert one.gumbel() == other.gumbel(size=2**20 + 6)[-1]


def named(path, message, act):
    with pytest.raises(InputError, match=message) as caught:
        act(path)
    assert str(caught.value).count(str(path)) == 1
    assert "\n" not in str(caught.value)


def test_bad_pools_on_disk_are_named(features, gmms, tmp_path):
    path = tmp_path / "pool.npy"

    def choose(path):
        return select(gmms, path, 5)

    holed = features.copy()
    holed[[7, 9], 2] = np.nan
    np.save(path, holed)
    named(path, r"2 samples hold NaN or infinity .the first is sample 7", choose)
    np.save(path, np.nan_to_num(holed.astype(float), nan=1e300))
    named(path, r"2 samples hold NaN or infinity .the first is sample 7", choose)
    np.save(path, features[:, :3])
    named(path, "3 dimensions, expected the mixtures' 6", choose)
    np.save(path, features)
    named(path, "count is 5001, expected from 1 to 5000", lambda p: select(gmms, p, 5001))
    np.save(path, features[:4])
    named(path, "count is 5, expected from 1 to 4", choose)
    for other in (features[:, 0], features[None], features.astype(complex), features > 0):
        np.save(path, other)
        named(path, "expected real numbers", choose)


def test_files_that_are_no_pools_are_named(features, tmp_path):
    path = tmp_path / "pool.npy"
    np.save(path, features)
    path.write_bytes(path.read_bytes()[:-4])
    named(path, r"is not a whole \.npy file", open_pool)
    np.save(path, np.array([{}]), allow_pickle=True)
    named(path, r"is not a whole \.npy file", open_pool)
    np.savez(tmp_path / "pool.npz", features)
    named(tmp_path / "pool.npz", r"is not a whole \.npy file", open_pool)
    with pytest.raises(InputError, match=r"is not a whole \.npy file"):
        open_pool(tmp_path / "none.npy")
    for empty in (features[:0], features[:, :0]):
        np.save(path, empty)
        with pytest.raises(InputError, match="at least one of each"):
            open_pool(path)


def test_bad_pools_in_memory(features, gmms):
    with pytest.raises(InputError, match=r"count is 5001, .* in the pool \(features\)"):
        select(gmms, features, 5001)
    with pytest.raises(InputError, match=r"^features: 3 dimensions"):
        select(gmms, features[:, :3], 5)

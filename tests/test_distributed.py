"""Joining processes, and two real ones on loopback against one."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tests.processes import ROOT, run_together


def start(tmp_path, processes):
    """Run tests.two_processes in several processes; their results by rank."""
    out, shared = tmp_path / f"out{processes}", tmp_path / f"shared{processes}"
    command = ["-m", "tests.two_processes", str(out), str(shared)]
    for ended in run_together([command] * processes, tmp_path / "cache", one_job=processes > 1):
        assert ended.returncode == 0, ended.stdout[-4000:]
    return [dict(np.load(out / f"{rank}.npz")) for rank in range(processes)]


def test_two_processes_give_what_one_gives(tmp_path):
    first, second = start(tmp_path, 2)
    (alone,) = start(tmp_path, 1)
    assert [int(found.pop("processes")) for found in (first, second, alone)] == [2, 2, 1]
    for found in (first, second):
        text = str(found.pop("refused"))
        assert text.endswith("these fields differ between hosts: pool.rows")
    assert str(alone.pop("refused")) == ""
    assert alone.keys() == first.keys() == second.keys()
    for name, expected in alone.items():
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        if name.startswith("select"):
            np.testing.assert_array_equal(first[name], expected, err_msg=name)
        else:
            np.testing.assert_allclose(first[name], expected, atol=1e-4, rtol=1e-4, err_msg=name)


def test_one_process_is_a_job_of_its_own():
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.is_main()
    assert list(distributed.share(5)) == [0, 1, 2, 3, 4]
    assert distributed.gather_bytes(b"abc") == [b"abc"]
    summed = distributed.sum_over_processes({"a": np.float32([1.5, 2.5])})
    np.testing.assert_array_equal(summed["a"], [1.5, 2.5])
    assert summed["a"].dtype == np.float64
    distributed.check_agreement({"config": {"seed": 1}})
    distributed.barrier()


@pytest.mark.parametrize("count", [0, 1, 5, 16, 17])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_cover_all_rows_once(monkeypatch, count, processes):
    monkeypatch.setattr(distributed, "process_count", lambda: processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "process_index", lambda rank=rank: rank)
        shares.append(list(distributed.share(count)))
    assert [row for rows in shares for row in rows] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (("127.0.0.1:1", "2", ""), "JAX_PROCESS_ID not set"),
        (("", "2", "0"), "JAX_COORDINATOR_ADDRESS not set"),
        (("127.0.0.1:1", "2", "2"), "expected a number and one below it"),
        (("127.0.0.1:1", "two", "0"), "expected a number"),
        (("localhost", "2", "0"), "expected host:port"),
    ],
)
def test_a_job_named_by_halves_is_refused(monkeypatch, variables, message):
    for name, value in zip(distributed._BY_HAND, variables, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        distributed.initialize()


JOIN = """
from tapvit_jax import distributed
from tapvit_jax.errors import InputError

try:
    distributed.initialize()
    print(distributed.process_count())
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "1"),
        # srun started two tasks, of which JAX is told nothing more.
        ({"SLURM_STEP_NUM_TASKS": "2"}, "cannot join the other processes: coordinator_address"),
    ],
)
def test_libtpu_alone_makes_no_job(tmp_path, variables, expected):
    (tmp_path / "libtpu.py").write_text("def get_library_path():\n    return None\n")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMPI_", "JAX_"))}
    found = subprocess.run(
        [sys.executable, "-c", JOIN],
        cwd=ROOT,
        env={**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{tmp_path}", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0 and found.stdout.startswith(expected), found


def test_a_process_can_be_kept_on_its_own(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("TAPVIT_DISTRIBUTED", "0")
    distributed.initialize()
    assert distributed.process_count() == 1

"""Programs of `experiments` as one job of two processes, and two of them on one directory."""

import json

import pytest

import tapvit_jax as tap
from tests.processes import run_together

CONFIG = "--config=tests/experiments/tiny_sweep.py"
# Long steps would blow rounding up until some images change sides.
PROGRAM = ["-m", "experiments.sweep", CONFIG, "--config.recover.learning_rate=1e-4"]


def read_results(directory):
    results = json.loads((directory / "results.json").read_text())
    assert not results["failed"]
    # Times are of the machine, not of the results.
    return [{name: row[name] for name in row if name != "latency_ms"} for row in results["units"]]


def same(first, second, path=""):
    """Numbers agree as far as sums in another order do, all else exactly."""
    if isinstance(second, dict):
        assert first.keys() == second.keys(), path
        for name in second:
            same(first[name], second[name], f"{path}/{name}")
    elif isinstance(second, list):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            same(a, b, f"{path}/{i}")
    else:
        assert first == (pytest.approx(second, abs=1e-4) if type(second) is float else second), path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def shared_directory(cache):
    """What two programs of their own make of one directory."""
    command = [*PROGRAM, f"--workdir={cache / 'workers'}"]
    for ended in run_together([command] * 2, cache, one_job=False):
        assert ended.returncode == 0, ended.stdout[-4000:]
    return cache / "workers"


def test_two_workers_share_a_directory_and_leave_it_whole(shared_directory):
    units = read_results(shared_directory)
    assert [row["unit"] for row in units] == [0, 1, 2]
    assert not list(shared_directory.rglob("*.lock"))
    assert not list(shared_directory.rglob("*.partial"))


def test_one_job_of_two_processes_gives_what_one_process_gives(cache, shared_directory):
    command = [*PROGRAM, f"--workdir={cache / 'job'}"]
    for ended in run_together([command] * 2, cache, one_job=True):
        assert ended.returncode == 0, ended.stdout[-4000:]
    same(read_results(cache / "job"), read_results(shared_directory))


def test_processes_of_one_job_with_different_units_are_refused(cache):
    # As `srun ... --work_unit=$SLURM_PROCID` without TAPVIT_DISTRIBUTED=0.
    workdir = cache / "units"
    commands = [[*PROGRAM, f"--workdir={workdir}", f"--work_unit={rank}"] for rank in range(2)]
    for ended in run_together(commands, cache, one_job=True):
        assert ended.returncode == 2, ended.stdout[-4000:]
        assert "fields differ between hosts: units" in ended.stdout
    assert not workdir.exists()


def test_a_run_of_two_processes_is_whole(cache):
    command = ["-m", "experiments.run", CONFIG, f"--workdir={cache / 'run'}"]
    for ended in run_together([command] * 2, cache, one_job=True):
        assert ended.returncode == 0, ended.stdout[-4000:]
    results = json.loads((cache / "run" / "results.json").read_text())
    dense = tap.load(cache / "run" / "models" / "dense")
    for row in results["devices"]:
        small = tap.load(cache / "run" / row["model"])
        assert tap.cost(small.config).macs == row["cost"]["macs"] < tap.cost(dense.config).macs
    assert tap.Extractor.load(cache / "run" / "extractor").dim > 0


def test_processes_that_hold_different_configs_are_refused(cache):
    commands = [
        [*PROGRAM, f"--workdir={cache / 'apart'}", f"--config.seed={seed}"] for seed in (0, 1)
    ]
    for ended in run_together(commands, cache, one_job=True):
        assert ended.returncode == 2, ended.stdout[-4000:]
        assert "these fields differ between hosts: config.seed" in ended.stdout
    assert not (cache / "apart").exists()

"""What benchmarks print and what becomes of it; what they measure is no test's matter."""

import json
import os
import subprocess
import time
import types
from pathlib import Path

import pytest

from experiments import bench
from experiments.joined import LiveTable
from tapvit_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def test_every_benchmark_file_is_run_by_make_bench():
    files = {path.stem.removeprefix("bench_") for path in ROOT.glob("experiments/bench_*.py")}
    assert files == set(bench.MODULES)


def test_runs_are_timed_in_turns_after_a_warm_up():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.02))}
    times = bench.alternate(runs, repeats=3)
    assert order == ["a", "b"] * 4
    assert times["b"] > times["a"] >= 0


def test_the_table_holds_what_benchmarks_report(tmp_path, monkeypatch, capsys):
    def run(command, env):
        monkeypatch.setenv(bench._RECORD, env[bench._RECORD])
        if command[-1].endswith("scoring"):
            bench.report("one pass", {"forward": 0.25, "scores": 0.5})
            bench.note("peak memory: 3 GiB")
        else:
            bench.heading("nothing to time")
        monkeypatch.delenv(bench._RECORD)
        return subprocess.CompletedProcess(command, int(command[-1].endswith("pool")))

    monkeypatch.setattr(bench, "subprocess", types.SimpleNamespace(run=run))
    with pytest.raises(InputError, match="failed: bench_pool"):
        bench.main(["--out", str(tmp_path), "scoring", "pool"])
    text = (tmp_path / "bench.md").read_text()
    for part in (f"{os.cpu_count()} cores", "## bench_scoring", "**one pass**", "3 GiB"):
        assert part in text
    assert "| forward | 250.0 | 1.00 |\n| scores | 500.0 | 2.00 |" in text
    assert "## bench_pool\n\nFailed with exit code 1." in text
    found = json.loads((tmp_path / "bench.json").read_text())["benchmarks"]
    assert found["scoring"]["lines"][0]["times"] == {"forward": 0.25, "scores": 0.5}
    assert "scores" in capsys.readouterr().out


def test_a_table_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delattr(bench, "_run")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "out" / "bench.md").mkdir(parents=True)
    for out, message in (("file", "lies below a file"), ("out", r"bench\.md")):
        with pytest.raises(InputError, match=message):
            bench.main(["--out", str(tmp_path / out)])


def test_the_live_table_shows_finished_failed_and_foreign_units():
    table = LiveTable(("budget", "recovery"), (8, 6))
    row = {"cost": {"macs": 50, "params": 30}, "dense_cost": {"macs": 100, "params": 60}}
    row |= {"dense": 0.9, "pruned": 0.5, "compensated": 0.8, "recovered": 0.85}
    overrides = {"budget": "macs=0.5", "recovery": "ridge"}
    head, done, failed, other = (
        table.head(),
        table.line(3, overrides, row),
        table.line(4, overrides, None, "too small"),
        table.line(5, overrides, None),
    )
    assert head.split()[:3] == ["unit", "budget", "recovery"]
    shares = (50.0, 50.0, 90.0, 50.0, 80.0, 85.0)
    assert done.split() == ["3", "macs=0.5", "ridge", *map(str, shares)]
    assert len(done) == len(head)
    assert failed.endswith("failed: too small") and other.endswith("elsewhere")

"""All benchmarks one after the other, and what they share: timing in turns, and the table.

    python -m experiments.bench --out=runs/bench            # or: make bench
    python -m experiments.bench scoring pool                # some of them

Every pair is timed in one process, so that a machine that slows down slows both. The table with all
ratios goes to OUT/bench.md, and the same numbers to OUT/bench.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tapvit_jax.errors import InputError
from tapvit_jax.files import check_file, write_json, write_text
from tapvit_jax.runtime import run_program
from tapvit_jax.versions import library_versions

REPEATS = 3
MODULES = ("scoring", "recover", "pool", "variants", "sweep", "data", "latency")
_PAUSE, _WARM = 0.05, 0.1
# Where a benchmark that the runner starts leaves what it prints as JSON lines.
_RECORD = "TAPVIT_BENCH_RECORD"


def alternate(
    runs: dict[str, Callable[[], object]], repeats: int = REPEATS, *, warm: bool = False
) -> dict[str, float]:
    """Median seconds of every run, in turns, after one warm-up each.

    `warm` runs each for a tenth of a second, untimed, right before it is timed: after the pause
    that keeps runs apart, what takes milliseconds would be timed on cold caches and slow clocks.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            while warm and time.perf_counter() - start < _WARM:
                jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
            # The threads of NumPy's linear algebra go on waiting on all cores for 30 ms.
            time.sleep(_PAUSE)
    return {name: float(np.median(values)) for name, values in times.items()}


def _record(line: dict[str, Any]) -> None:
    if _RECORD in os.environ:
        with Path(os.environ[_RECORD]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def peak_mib() -> float:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says includes the process that started this one.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def report(title: str, times: dict[str, float]) -> None:
    """Print all times (seconds) as multiples of the first."""
    base = next(iter(times.values()))
    _record({"title": title, "times": times})
    print(title)
    for name, seconds in times.items():
        print(f"  {name:52} {1e3 * seconds:9.1f} ms   x {seconds / base:.2f}", flush=True)


def heading(title: str) -> None:
    """Print a title for notes that have no times."""
    _record({"title": title, "times": {}})
    print(title)


def note(text: str) -> None:
    """Print a remark on what was reported last."""
    _record({"note": text})
    print(f"  {text}", flush=True)


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def _markdown(results: dict[str, Any]) -> str:
    machine = results["machine"]
    jax_version = machine["libraries"]["jax"]
    lines = ["# Benchmarks", ""]
    lines += [f"{machine['cores']} cores, {machine['system']}, jax {jax_version}", ""]
    for name, found in results["benchmarks"].items():
        lines += [f"## bench_{name}", ""]
        lines += [f"Failed with exit code {found['code']}.", ""] if found["code"] else []
        for line in found["lines"]:
            if "note" in line:
                lines += [f"- {line['note']}"]
                continue
            lines += ["", f"**{line['title']}**", ""]
            if line["times"]:
                base = next(iter(line["times"].values()))
                lines += ["| | ms | ratio |", "|---|--:|--:|"]
                for run, seconds in line["times"].items():
                    lines.append(f"| {run} | {1e3 * seconds:.1f} | {seconds / base:.2f} |")
                lines.append("")
        lines.append("")
    return "\n".join(lines)


def _run(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        record.touch()
        command = [sys.executable, "-m", f"experiments.bench_{name}"]
        code = subprocess.run(command, env=os.environ | {_RECORD: str(record)}).returncode
        text = record.read_text(encoding="utf-8")
        return {"code": code, "lines": [json.loads(line) for line in text.splitlines()]}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmarks that are asked for, and write the table after each.

    Raises:
      InputError: the table cannot be written, or a benchmark failed (after all have run).
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.bench")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the table")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODULES)}; all by default")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(MODULES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(MODULES)}")
    table, numbers = args.out / "bench.md", args.out / "bench.json"
    for path in (table, numbers):
        check_file(path)
    benchmarks: dict[str, Any] = {}
    results = {"machine": _machine(), "benchmarks": benchmarks}
    for name in args.names or MODULES:
        print(f"\nbench_{name}", flush=True)
        benchmarks[name] = _run(name)
        write_json(numbers, results)
        write_text(table, _markdown(results))
    print(f"\n{table}")
    failed = [name for name, found in benchmarks.items() if found["code"]]
    if failed:
        raise InputError(f"failed: {', '.join(f'bench_{name}' for name in failed)}")


if __name__ == "__main__":
    sys.exit(run_program(main))

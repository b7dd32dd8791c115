"""All benchmarks one after the other, and what they share: timing in turns, and the table.

    python -m experiments.bench --out=runs/bench            # or: make bench

Every pair is timed in one process, so that a machine that slows down slows both. The table with all
ratios goes to OUT/bench.md, and the same numbers to OUT/bench.json.
"""

import argparse
import dataclasses
import importlib
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tapvit_jax.files import write_json, write_text
from tapvit_jax.runtime import run_program, set_up_jax
from tapvit_jax.versions import library_versions

REPEATS = 3
MODULES = ("scoring", "pool", "variants", "sweep", "data", "latency")


@dataclasses.dataclass
class Section:
    """What one comparison printed: times and their multiples of the first, and remarks."""

    title: str
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


_sections: list[Section] = []


def alternate(runs: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of every run, after one warm-up each."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def report(title: str, times: dict[str, float]) -> None:
    """Print all times as multiples of the first."""
    base = next(iter(times.values()))
    _sections.append(Section(title, times))
    print(title)
    for name, seconds in times.items():
        print(f"  {name:52} {1e3 * seconds:9.1f} ms   x {seconds / base:.2f}", flush=True)


def note(text: str) -> None:
    """Print a remark on what was reported last."""
    if not _sections:
        _sections.append(Section(""))
    _sections[-1].notes.append(text)
    print(f"  {text}", flush=True)


def _markdown(results: dict) -> str:
    machine = results["machine"]
    lines = ["# Benchmarks", "", ", ".join(f"{k}: {v}" for k, v in machine.items()), ""]
    for name, sections in results["benchmarks"].items():
        lines += [f"## bench_{name}", ""]
        for section in sections:
            lines += [f"**{section['title']}**", ""] if section["title"] else []
            if section["times"]:
                base = next(iter(section["times"].values()))
                lines += ["| | ms | ratio |", "|---|--:|--:|"]
                lines += [
                    f"| {run} | {1e3 * seconds:.1f} | {seconds / base:.2f} |"
                    for run, seconds in section["times"].items()
                ]
                lines.append("")
            lines += [f"- {text}" for text in section["notes"]]
            lines += [""] if section["notes"] else []
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmarks that are asked for and write the table after each.

    Raises:
      InputError: the table cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.bench")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the table")
    parser.add_argument("names", nargs="*", default=MODULES, help=f"of {', '.join(MODULES)}")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(MODULES))
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(MODULES)}")
    set_up_jax()
    device = jax.local_devices()[0]
    machine = {
        "device": f"{jax.local_device_count()} x {device.device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": library_versions()["jax"],
    }
    results = {"machine": machine, "libraries": library_versions(), "benchmarks": {}}
    # Run as a program, this module is another one than the one the benchmarks import.
    shared = importlib.import_module("experiments.bench")
    for name in args.names:
        print(f"\nbench_{name}", flush=True)
        shared._sections.clear()
        importlib.import_module(f"experiments.bench_{name}").main()
        results["benchmarks"][name] = [dataclasses.asdict(s) for s in shared._sections]
        write_json(args.out / "bench.json", results)
        write_text(args.out / "bench.md", _markdown(results))
    print(f"\n{args.out / 'bench.md'}")


if __name__ == "__main__":
    sys.exit(run_program(main))

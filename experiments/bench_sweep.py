"""Five budgets of one device against one budget: everything before fine-tuning, from scratch.

    python -m experiments.bench_sweep

Both sweeps run in turns in one process, each in an empty work directory, after one that has
compiled what both need. Training the dense model, evaluation and latencies are part of it.
"""

import tempfile
import time
from pathlib import Path

from absl import app, flags

from configs import digits
from experiments.config import grid, read
from experiments.sweep import Sweep
from tapvit_jax.runtime import set_up_jax

BUDGETS = ("macs=0.5", "macs=0.7", "macs=0.6", "macs=0.4", "macs=0.3")

_REPEATS = flags.DEFINE_integer("repeats", 2, "Timed sweeps of each kind.")


def seconds(workdir: Path, budgets: tuple[str, ...]) -> float:
    """How long a sweep over budgets takes, in an empty directory."""
    axes = {"device": (0,), "budget": budgets, "recovery": ("none",)}
    start = time.perf_counter()
    Sweep(read(digits.get_config()), grid(axes), workdir, quiet=True).run()
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Print both times and their ratio."""
    del argv
    set_up_jax()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds(root / "warm", BUDGETS)
        times = {1: [], len(BUDGETS): []}
        for repeat in range(_REPEATS.value):
            for count, found in times.items():
                found.append(seconds(root / f"{repeat}-{count}", BUDGETS[:count]))
    one, many = (min(found) for found in times.values())
    print(f"digits, one device, before fine-tuning: one budget {one:.1f} s")
    print(f"  {len(BUDGETS)} budgets {many:.1f} s   x {many / one:.2f}")


if __name__ == "__main__":
    app.run(main)

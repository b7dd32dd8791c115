"""Five budgets of one device against one budget, on digits, from scratch.

    python -m experiments.bench_sweep

Everything before fine-tuning: dense model, extractor, payloads, selection, scores and plans; the
same with the accuracy of the masked models; and with the config's closed-form recovery as well, and
the accuracy after it, as in a sweep. All are run in turns in one process, each in an empty
directory, after one that has compiled what all need. The dense model is trained for a quarter of
its epochs, which is the harder case: what is shared costs less.
"""

import tempfile
import time
from pathlib import Path

from absl import app, flags

from configs import digits
from experiments.bench import report
from experiments.config import ExperimentConfig, read
from experiments.job import Job
from tapvit_jax.progress import Progress
from tapvit_jax.prune.budget import Budget
from tapvit_jax.runtime import set_up_jax
from tapvit_jax.stages import Stages

BUDGETS = ("macs=0.5", "macs=0.7", "macs=0.6", "macs=0.4", "macs=0.3")

_REPEATS = flags.DEFINE_integer("repeats", 2, "Timed runs of each kind.")


def seconds(config: ExperimentConfig, workdir: Path, budgets: tuple[str, ...]) -> list[float]:
    """Time until plans are made, masked models evaluated, and recovered ones made and evaluated."""
    start = time.perf_counter()
    job = Job(config, Stages(workdir), workdir / "payloads", Progress(1.0, quiet=True))
    sets = job.image_sets(0)
    plans = [job.plan("bench", 0, sets, config.prune, Budget.parse(text)) for text in budgets]
    times, test = [time.perf_counter() - start], job.parts.devices[0].private_test
    for plan in plans:
        job.top1(job.pruned(plan), test)
    times.append(time.perf_counter() - start)
    for plan in plans:
        found = job.compensate("bench", plan, sets, config.compensate, config.prune.batch_size)
        job.top1(found, test)
    return [*times, time.perf_counter() - start]


def main(argv: list[str]) -> None:
    """Print the times and their ratios."""
    del argv
    set_up_jax()
    config = digits.get_config()
    config.dense.train.epochs //= 4
    config = read(config)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds(config, root / "warm", BUDGETS)
        times: dict[int, list[list[float]]] = {1: [], len(BUDGETS): []}
        for repeat in range(_REPEATS.value):
            for count, found in times.items():
                found.append(seconds(config, root / f"{repeat}-{count}", BUDGETS[:count]))
    one, many = ([min(values) for values in zip(*found, strict=True)] for found in times.values())
    titles = ("all plans", "the accuracy of masked models", "that after closed-form recovery")
    for title, first, second in zip(titles, one, many, strict=True):
        report(f"digits until {title}", {"one budget": first, f"{len(BUDGETS)} budgets": second})


if __name__ == "__main__":
    app.run(main)

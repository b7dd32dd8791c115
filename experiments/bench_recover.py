"""How long closed-form recovery takes beside forward passes over the same images, and its memory.

    python -m experiments.bench_recover [--images=64] [--model=deit_base]

Half of all widths stay. The runs are timed one after the other, each after one small batch that has
compiled what it needs.
"""

import argparse
import time

import jax
import numpy as np

from experiments.bench import note, peak_mib, report
from experiments.bench_scoring import dense, random_images
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.mask import Plan, top_k_mask
from tapvit_jax.prune.recover import recover
from tapvit_jax.prune.units import WIDTH_KINDS, unit_table
from tapvit_jax.runtime import set_up_jax

_BATCH = 32
_PASSES = 3


def half(model: Model) -> Plan:
    """A plan that keeps the first half of the units of every group."""
    keep = {}
    for group in unit_table(model.config):
        if group.kind in WIDTH_KINDS:
            row = top_k_mask(-np.arange(group.shape[-1]), group.shape[-1] // 2)
            keep[group.key] = np.broadcast_to(row, group.shape).copy()
    return Plan(model.config, keep)


def passes(model: Model, batches: list[np.ndarray]) -> None:
    """Forward passes over all batches."""
    for _ in range(_PASSES):
        for batch in batches:
            model.apply(batch).block_until_ready()


def main() -> None:
    """Time both and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--model", default="deit_base")
    args = parser.parse_args()
    set_up_jax()
    model = dense(args.model)
    plan = half(model)
    images = random_images(model, max(_BATCH, args.images // _BATCH * _BATCH))
    batches = np.split(images, len(images) // _BATCH)
    runs = {
        f"{_PASSES} forward passes": lambda part: passes(model, part),
        "closed-form recovery": lambda part: jax.block_until_ready(
            recover(model, plan, part).params
        ),
    }
    times = {}
    for name, run in runs.items():
        run(batches[:1])
        start = time.perf_counter()
        run(batches)
        times[name] = time.perf_counter() - start
    report(f"recovery, {args.model}, {len(images)} images, half of all widths", times)
    note(f"peak memory of the process: {peak_mib() / 2**10:.2f} GiB")


if __name__ == "__main__":
    main()

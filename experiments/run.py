"""The main job: the whole path for many devices, from private images to smaller models.

    python -m experiments.run --config=configs/digits.py --workdir=runs/digits

Any field of the config can be overridden: --config.seed=1 --config.recover.epochs=5. A job that was
interrupted continues when the same command is given again.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments import arguments, report
from experiments.config import ExperimentConfig, identity
from experiments.job import Job, Pruned, described, keep_ratios
from experiments.methods import image_sets
from experiments.preparation import SELECTED, UNITS
from tapvit_jax import distributed
from tapvit_jax.files import file_lock, remove_leftovers, write_json
from tapvit_jax.models import store
from tapvit_jax.progress import Progress
from tapvit_jax.prune.allocate import check_budget
from tapvit_jax.prune.cost import cost
from tapvit_jax.runtime import run_program, set_up_jax
from tapvit_jax.stages import Stages, claim_workdir, on_main
from tapvit_jax.structs import to_plain

_OUTPUTS = ("results.json", "results.csv", "report.html", "extractor", "models/dense")
_WAITING = "another process works in this directory; waiting for it to end"


class Experiment:
    """One experiment in one work directory.

    Raises:
      InputError: processes that hold different configs, or a work directory of another config.
    """

    def __init__(self, config: ExperimentConfig, workdir: Path, quiet: bool = False):
        distributed.check_agreement({"config": identity(config)}, "the hosts")
        on_main(lambda: claim_workdir(workdir, identity(config)))
        self.config = config
        self.workdir = workdir
        self.stages = Stages(workdir / "stages")
        self.quiet = quiet or not distributed.is_main()

    def run(self) -> dict[str, Any]:
        """Do everything, and return what `results.json` holds."""
        lock = file_lock(self.workdir / ".lock", on_wait=lambda: print(_WAITING, file=sys.stderr))
        if not distributed.is_main():
            return self._run()
        with lock as locked:
            if locked:
                devices = range(self.config.data.partition.num_devices)
                for name in (*_OUTPUTS, *(f"models/device_{d}" for d in devices)):
                    remove_leftovers(self.workdir / name)
            return self._run()

    def _run(self) -> dict[str, Any]:
        start = time.monotonic()
        config, workdir = self.config, self.workdir
        devices, variants = config.data.partition.num_devices, 1 + len(config.comparisons)
        total = sum(UNITS[name] for name in ("data", "dense", "extractor", "select", "report"))
        total += devices * (UNITS["device"] + UNITS["latency"])
        each = sum(UNITS[name] for name in ("units", "compensate", "recover"))
        each += UNITS["layers"] * config.prune.allocate.reads_layers
        total += devices * variants * each
        self.progress = Progress(total, self.quiet)
        self.job = job = Job(config, self.stages, workdir / "payloads", self.progress)
        for device in range(len(job.parts.devices)):
            # Before any work: a budget that cannot be met is refused now.
            budget, allocate = config.budget(device), config.prune.allocate
            check_budget(job.dense_config, budget, allocate, job.latency_for(budget))
        # All processes make them, one writes them.
        dense, extractor = job.dense, job.extractor
        on_main(lambda: store.save(dense, workdir / "models" / "dense"))
        on_main(lambda: extractor.save(workdir / "extractor"))
        rows = [self._device_row(d) for d in range(len(job.parts.devices))]
        with self.progress.step("report", UNITS["report"]):
            results = self._results(rows)
            results["seconds"] = round(time.monotonic() - start, 1)
            on_main(lambda: write_json(workdir / "results.json", results))
            on_main(lambda: report.write(results, workdir))
        self.progress.close()
        return results

    def _device_row(self, d: int) -> dict[str, Any]:
        config, job, split = self.config, self.job, self.job.parts.devices[d]
        budget, test = config.budget(d), split.private_test
        variants = {}
        for variant in (SELECTED, *config.comparisons):
            title, sets = f"device {d}, {variant}", image_sets(job, d, variant)
            plan = job.plan(title, d, sets, config.prune, budget)
            compensated = job.compensate(
                title, plan, sets, config.compensate, config.prune.batch_size
            )
            pruned = Pruned(d, plan, sets, compensated, config.compensate)
            recovered, best_epoch = job.recover(title, pruned, config.recover, config.recover_on)
            variants[variant] = {
                "pruned": job.top1(job.pruned(plan), test),
                "compensated": job.top1(compensated, test),
                "recovered": job.top1(recovered, test),
                "best_epoch": best_epoch,
            }
            if variant == SELECTED:
                selected = plan.value
                small, difference = job.reshaped(d, plan, recovered.value, config.recover_on)
        small = small.replace(
            name=f"{config.name}-device{d}",
            history={
                **small.history,
                "budget": str(budget),
                "device": d,
                "recovered": to_plain(config.compensate),
                "recover_epochs": config.recover.epochs,
            },
        )
        directory = self.workdir / "models" / f"device_{d}"
        on_main(lambda: store.save(small, directory))
        return {
            "device": d,
            "classes": list(split.classes),
            "private_train": len(split.private_train),
            "private_test": len(test),
            "payload_bytes": job.payloads[d][1],
            "budget": str(budget),
            "limits": budget.limits(job.dense.config, job.latency_model),
            "cost": dataclasses.asdict(cost(small.config, job.latency_model)),
            "dense": job.dense_top1(d),
            "variants": variants,
            "latency_ms": job.latency(f"device {d}", small, config.latency_batch),
            "reshape_difference": difference,
            "keep_ratios": keep_ratios(selected),
            "selection": job.selection(d),
            "model": str(directory.relative_to(self.workdir)),
        }

    def _results(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return (
            {"name": self.config.name, "config": identity(self.config)}
            | described(self.job)
            | {"seed": self.config.seed, "devices": rows}
        )


def main(argv: list[str]) -> None:
    """Run the experiment that the arguments name and print its table.

    Raises:
      InputError: unknown or missing arguments, or anything wrong in the config or the data.
    """
    set_up_jax()
    flags.adopt_module_key_flags(arguments)
    config, workdir = arguments.parse(argv)
    results = Experiment(config, workdir).run()
    if distributed.is_main():
        print(report.table(results))
        if report.leaks(results):
            print(f"\n{report.LEAKS}")
        print(f"\nreport: {workdir / 'report.html'}   models: {workdir / 'models'}")


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv)))

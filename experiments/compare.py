"""Methods side by side: criteria, widths and recovery, budgets, devices, metric sets and seeds.

    python -m experiments.compare --config=configs/digits.py --workdir=runs/compare \\
        --methods=ours,taylor_ridge,tap_published --sets=selected,random --seeds=0,1,2,3,4

All methods get the same dense weights, the same images and the same budget, counted by the same
cost model, and are scored on the device's private-test images. What cells share is computed once. A
comparison that was interrupted continues when the same command is given again; the lists may grow
in between, and several such commands at once share the work.
"""

import contextlib
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import arguments, comparison
from experiments.cells import (
    COLUMNS,
    DENSE,
    Cell,
    Grid,
    as_published,
    cells_of,
    parse_budget,
    seed_config,
)
from experiments.config import ExperimentConfig, NamedFiles, identity
from experiments.hardware import hardware
from experiments.job import Job, Pruned
from experiments.methods import (
    DEFAULT_METHODS,
    PEER,
    PRIOR_ONLY,
    RECOVERIES,
    SETS,
    find_methods,
    image_sets,
    split_changes,
)
from experiments.peers import PEERS, available
from experiments.preparation import UNITS, Found, ImageSets
from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.files import (
    WriteError,
    content_hash,
    file_lock,
    remove_leftovers,
)
from tapvit_jax.progress import Progress
from tapvit_jax.prune.allocate import check_budget
from tapvit_jax.prune.budget import within
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.reshape import reshaped_config
from tapvit_jax.runtime import one_line, run_program, set_up_jax
from tapvit_jax.stages import (
    Stages,
    all_succeed,
    claim_workdir,
    from_main,
    on_main,
    read_row,
    write_row,
)
from tapvit_jax.structs import to_plain
from tapvit_jax.versions import library_versions

DEFAULT_BUDGETS = ("macs=0.5", "macs=0.35", "macs=0.25")
MODES = ("honest", "as_published")


class Comparison:
    """All cells of a grid in one work directory.

    Args:
      config: what all methods have in common.
      grid: what is compared.
      workdir: where results and unfinished work are kept.
      mode: "honest", or "as_published", which the config already follows; reports say so.
      command: for the record.
      quiet: say nothing.

    Raises:
      InputError: an impossible cell, or processes that hold different configs.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        grid: Grid,
        workdir: Path,
        *,
        mode: str = "honest",
        command: str = "",
        quiet: bool = False,
    ):
        self.config, self.grid, self.workdir = config, grid, workdir
        self._mode, self._command = mode, command
        self.cells = cells_of(config, grid)
        self.stages = Stages(workdir / "stages")
        self._quiet = quiet or not distributed.is_main()
        self._files = NamedFiles()
        self._job: tuple[int, Job] | None = None
        self._widths = [max(len(str(cell.labels()[n])) for cell in self.cells) for n in COLUMNS]
        self._widths = [max(w, len(n)) for w, n in zip(self._widths, COLUMNS, strict=True)]

    def run(self) -> dict[int, str]:
        """Compute the cells that are not there yet, and write the report of all that are.

        Returns:
          why cells failed, by position.

        Raises:
          InputError: the work directory belongs to another config or cannot be written; images or
            a dense model that cannot be had.
        """
        plain = {"program": "experiments.compare", "mode": self._mode, **identity(self.config)}
        named = self._files.identity(self.config)
        distributed.check_agreement(
            {"config": plain, "cells": [cell.key for cell in self.cells], "files": named},
            "the hosts",
        )
        on_main(lambda: claim_workdir(self.workdir, plain))
        self.progress = Progress(self._total(), self._quiet, lines=False)
        self._print("  ".join(map(str.ljust, COLUMNS, self._widths)) + "  MACs %  dense %  top-1 %")
        failed: dict[int, str] = {}
        # Cells that others work on come last: by then they are done, or their worker is gone.
        everything = range(len(self.cells))
        waiting = [n for n in everything if not self._attempt(n, failed, wait=False)]
        for n in waiting:
            self._attempt(n, failed, wait=True)
        self.progress.close()
        on_main(lambda: self._join(failed))
        return failed

    def results(self, failed: Mapping[int, str]) -> dict[str, Any]:
        """Everything that is known so far, as `compare.json` holds it."""
        rows = []
        for cell in self.cells:
            row = self._result(cell)
            if row is not None:
                rows.append(cell.labels() | row)
        # Cells lie in the order of the work; tables list methods, sets, budgets as they were named.
        names = list(self.grid.methods)
        order = {"set": self.grid.sets, "budget": self.grid.budgets, "method": names}
        rows.sort(key=lambda row: [order[n].index(row[n]) for n in order] + [row["epochs"]])
        return {
            "name": self.config.name,
            "mode": self._mode,
            "command": self._command,
            "dense": self.grid.dense,
            "seeds": list(self.grid.seeds),
            "methods": to_plain(self.grid.methods),
            "config": identity(self.config),
            "libraries": library_versions(),
            "hardware": hardware(),
            "rows": rows,
            "failed": [self.cells[n].labels() | {"reason": why} for n, why in failed.items()],
            "missing": len(self.cells) - len(rows) - len(failed),
            "summary": self._summary(rows) if rows else {},
        }

    def _summary(self, rows: Sequence[comparison.Row]) -> dict[str, Any]:
        shared = self.grid.dense == "shared"
        return comparison.summarize(rows, self.grid.reference, shared_dense=shared)

    def _join(self, failed: Mapping[int, str]) -> None:
        # Locked: who has seen fewer results must not write after who has seen all.
        with file_lock(self.workdir / ".results.lock") as locked:
            if locked:
                names = [f"compare.{suffix}" for suffix in ("csv", "json", "md", "html")]
                names += [path.name for path in self.workdir.glob("compare_*.svg")]
                for name in names:
                    remove_leftovers(self.workdir / name)
            results = self.results(failed)
            if results["rows"]:
                comparison.write(results, self.workdir)

    def _attempt(self, number: int, failed: dict[int, str], wait: bool) -> bool:
        """Do a cell unless it is done; False if another worker is at it and `wait` is false."""
        cell = self.cells[number]
        with contextlib.ExitStack() as stack:
            todo = from_main(all_succeed(lambda: self._claim(cell, wait, stack)))
            if todo == "busy":
                return False
            if todo == "compute":
                # What all cells of a seed need is no cell's own failure.
                self._job_of(cell)
                if reason := self._compute(cell):
                    failed[number] = reason
            else:
                self.progress.advance(cell.method, self._weight(cell))
        self._print_line(cell, failed.get(number))
        return True

    def _claim(self, cell: Cell, wait: bool, stack: contextlib.ExitStack) -> str:
        if not distributed.is_main():
            return ""
        if self._result(cell) is not None:
            return "done"
        path = self._path(cell)
        locked = stack.enter_context(file_lock(path.with_suffix(".lock"), wait=wait))
        if locked is False:
            return "busy"
        if self._result(cell, say=True) is not None:
            return "done"
        if locked:
            remove_leftovers(path)
        return "compute"

    def _compute(self, cell: Cell) -> str | None:
        """Compute a cell and keep its row; why it failed, if it did."""
        try:
            row = all_succeed(lambda: self._row(cell))
        except WriteError:
            # The next cell could not be written either.
            raise
        except Exception as error:
            self.progress.resume()
            if isinstance(error, InputError):
                return one_line(str(error))
            if not self._quiet:
                tqdm.write(traceback.format_exc(), file=sys.stderr)
            return one_line(f"{type(error).__name__}: {error}")
        files = self._files.identity(self.config)
        on_main(lambda: write_row(self._path(cell), cell.key, row, files))
        return None

    def _row(self, cell: Cell) -> dict[str, Any]:
        job, budget = self._job_of(cell), parse_budget(cell.budget)
        sets = image_sets(job, cell.device, cell.set)
        plan, model = self._pruned(job, cell, sets)
        latency = job.latency_for(budget)
        found = cost(model.value.config if plan is None else reshaped_config(plan.value), latency)
        limits, dense = budget.limits(job.dense.config, latency), cost(job.dense.config)
        if not within(found, limits):
            raise InputError(f"{cell.method}: cost {found} exceeds the budget {limits}")
        best_epoch = 0
        if cell.epochs:
            model, best_epoch = self._finetuned(job, cell, sets, plan, model)
        top1 = job.top1(model, job.parts.devices[cell.device].private_test)
        row = {"top1": _percent(top1), "dense_top1": _percent(job.dense_top1(cell.device))}
        for unit in ("macs", "params"):
            row[unit], row[f"dense_{unit}"] = getattr(found, unit), getattr(dense, unit)
            row[f"{unit}_percent"] = round(100 * row[unit] / row[f"dense_{unit}"], 3)
        row |= {"best_epoch": best_epoch, "metric_images": len(sets.metric)}
        return row | {"test_images": len(job.parts.devices[cell.device].private_test)}

    def _pruned(self, job: Job, cell: Cell, sets: ImageSets) -> tuple[Found | None, Found]:
        """The plan and the masked model after closed-form recovery, or a peer's small model."""
        method, budget = self.grid.methods[cell.method], parse_budget(cell.budget)
        title = f"{cell.method}, {cell.set}"
        if method.widths == PEER:
            small = job.peer(title, cell.device, sets.metric, method.criterion, budget)
            return None, job.with_prior(small, sets, RECOVERIES[method.recover])
        prune = method.prune(job.config.prune)
        # Before any work: a budget that cannot be met is refused now.
        check_budget(job.dense_config, budget, prune.allocate, job.latency_for(budget))
        probe = method.probes(job.config.prune)
        plan = job.plan(title, cell.device, sets, prune, budget, probe=probe)
        options, size = RECOVERIES[method.recover], prune.batch_size
        return plan, job.compensate(title, plan, sets, options, size)

    def _finetuned(
        self, job: Job, cell: Cell, sets: ImageSets, plan: Found | None, start: Found
    ) -> tuple[Found, int]:
        method, title = self.grid.methods[cell.method], f"{cell.method}, {cell.epochs} epochs"
        options = method.recipe(job.config.recover, cell.epochs)
        recovery = RECOVERIES[method.recover]
        if not cell.partners:
            pruned = Pruned(cell.device, plan, sets, start, recovery)
            return job.recover(title, pruned, options, job.config.recover_on)
        members, place = [], 0
        for partner in (self.cells[n] for n in cell.partners):
            if partner == cell:
                place = len(members)
                found = sets, plan, start
            else:
                try:
                    own = image_sets(job, partner.device, partner.set)
                    found = own, *self._pruned(job, partner, own)
                except WriteError:
                    raise
                except InputError:
                    # It cannot be pruned, whoever asks, and fails on its own.
                    continue
            own, kept, begun = found
            members.append(Pruned(partner.device, kept, own, begun, recovery))
        return job.recover_together(title, members, place, options)

    def _job_of(self, cell: Cell) -> Job:
        if self._job is None or self._job[0] != cell.seed:
            # Only the last one is kept: its images and models may take gigabytes.
            self._job = None
            config = seed_config(self.config, self.grid, cell.seed)
            key = content_hash([Job.shared_key(config), cell.seed])
            payloads = self.workdir / "payloads" / key[:16]
            job = Job(config, self.stages, payloads, self.progress, seed=cell.seed)
            _ = job.dense
            self._job = cell.seed, job
        return self._job[1]

    def _total(self) -> float:
        once = sum(UNITS[name] for name in ("data", "dense", "extractor", "select"))
        once += UNITS["device"] * self.config.data.partition.num_devices
        return sum(map(self._weight, self.cells)) + once * len(self.grid.seeds)

    def _weight(self, cell: Cell) -> float:
        # Everything is counted for every cell that uses it, computed or found.
        method = self.grid.methods[cell.method]
        weight = UNITS["units"] + UNITS["compensate"]
        weight += UNITS["layers"] * method.probes(self.config.prune)
        if method.widths == PEER:
            weight = UNITS["peer"]
        return weight + UNITS["recover"] * bool(cell.epochs)

    def _result(self, cell: Cell, say: bool = False) -> dict[str, Any] | None:
        return read_row(self._path(cell), cell.key, say, self._files.identity(self.config))

    def _path(self, cell: Cell) -> Path:
        return self.workdir / "cells" / f"{cell.key[:24]}.json"

    def _print_line(self, cell: Cell, reason: str | None) -> None:
        labels, row = cell.labels(), self._result(cell)
        line = "  ".join(
            str(labels[name]).ljust(width)
            for name, width in zip(COLUMNS, self._widths, strict=True)
        )
        if row is None:
            self._print(f"{line}  {f'failed: {reason}' if reason else 'elsewhere'}")
            return
        values = (row["macs_percent"], row["dense_top1"], row["top1"])
        self._print(f"{line}  {values[0]:6.1f}  {values[1]:7.1f}  {values[2]:7.1f}")

    def _print(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def _percent(share: float) -> float:
    return round(100 * share, 4)


def _peer_names(wanted: bool, methods: Sequence[str]) -> tuple[str, ...]:
    """External peers, if they are asked for by a flag or by name.

    Raises:
      InputError: they are not installed.
    """
    bases = {split_changes(name)[0].removesuffix(f"_{PRIOR_ONLY}") for name in methods}
    if not wanted and not bases & set(PEERS):
        return ()
    if not available():
        raise InputError("--peers: torch-pruning is not installed; `make peers` does it")
    return PEERS


def main(argv: list[str]) -> dict[int, str]:
    """Run the comparison that the arguments name; return why cells failed.

    Raises:
      InputError: unknown or missing arguments, anything wrong in the config, or a work directory
        that cannot be used.
    """
    set_up_jax()
    flags.adopt_module_key_flags(arguments)
    # Not on import: a config file may well import this module, as the second of its name.
    define = flags.DEFINE_list
    methods = define("methods", list(DEFAULT_METHODS), "Methods, see experiments/methods.py.")
    sets = define("sets", list(SETS), "Metric sets; methods are compared on the first.")
    set_methods = define("set_methods", None, "Methods that see all metric sets; default all.")
    budgets = define("budgets", list(DEFAULT_BUDGETS), "Budgets; macs=0.5+params=0.4 is one.")
    devices = define("devices", None, "Numbers of the devices; default all.")
    seeds = define("seeds", None, "Seeds; default the config's.")
    epochs = define("epochs", ["0"], "Epochs of fine-tuning; 0 is none.")
    use_peers = flags.DEFINE_bool("peers", False, "External pruners as well.")
    mode = flags.DEFINE_enum("mode", MODES[0], MODES, "Splits and recipe as published, or honest.")
    dense = flags.DEFINE_enum("dense", DENSE[0], DENSE, "Dense models that are trained.")
    config, workdir = arguments.parse(argv)
    if mode.value == "as_published":
        config = as_published(config)
    peers = _peer_names(use_peers.value, methods.value)
    names = [*methods.value, *(peers if use_peers.value else ())]
    every = [str(d) for d in range(config.data.partition.num_devices)]
    grid = Grid(
        find_methods(names, peers),
        tuple(dict.fromkeys(sets.value)),
        None if set_methods.value is None else tuple(set_methods.value),
        tuple(dict.fromkeys(budgets.value)),
        arguments.numbers("devices", every if devices.value is None else devices.value),
        arguments.numbers("seeds", [str(config.seed)] if seeds.value is None else seeds.value),
        arguments.numbers("epochs", epochs.value),
        dense.value,
    )
    command = shlex.join(["python", "-m", "experiments.compare", *argv[1:]])
    found = Comparison(config, grid, workdir, mode=mode.value, command=command)
    failed = found.run()
    if distributed.is_main():
        for number, reason in failed.items():
            labels = " ".join(f"{n}={v}" for n, v in found.cells[number].labels().items())
            print(f"failed: {labels}: {reason}", file=sys.stderr)
        print(f"\nreport: {workdir / 'compare.html'}   tables: {workdir / 'compare.md'}")
    return failed


def _program() -> int:
    failed: dict[int, str] = {}
    code = run_program(lambda: failed.update(main(sys.argv)))
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(_program())

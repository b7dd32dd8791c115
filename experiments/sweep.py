"""A grid of experiments in one work directory: devices, budgets, criteria, recoveries, seeds ...

    python -m experiments.sweep --config=configs/digits.py --workdir=runs/sweep

The units of the grid are what `sweep(config)` beside `get_config()` in the config file returns (see
`experiments.config.grid`). What units have in common is computed once. A sweep that was interrupted
continues when the same command is given again, and the grid may grow in between. Several such
commands at once, on one or many machines that see the directory, share the work; --work_unit=N does
one unit, for cluster schedulers. --list says what the units are, --status how far they are.
"""

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from absl import flags
from tqdm import tqdm

from experiments import arguments, joined
from experiments.config import ExperimentConfig, NamedFiles, grid, identity
from experiments.job import Job, Pruned, keep_ratios
from experiments.methods import image_sets
from experiments.preparation import SELECTED, UNITS, Found, ImageSets
from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.files import (
    WriteError,
    content_hash,
    file_lock,
    is_locked,
    read_json,
    remove_leftovers,
    write_json,
)
from tapvit_jax.progress import Progress
from tapvit_jax.prune.allocate import check_budget
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.recover import Method as RecoverMethod
from tapvit_jax.runtime import one_line, run_program, set_up_jax
from tapvit_jax.stages import (
    Stages,
    all_succeed,
    check_workdir,
    claim_workdir,
    from_main,
    on_main,
    read_row,
    write_row,
)
from tapvit_jax.structs import from_plain, to_plain

State = Literal["done", "failed", "running", "missing"]

DEFAULT_BUDGETS = ("macs=0.7", "macs=0.5", "macs=0.35")
RECOVERIES: dict[str, tuple[RecoverMethod | None, bool]] = {
    "none": ("none", False),
    "mean": ("mean", False),
    "ridge": ("ridge", False),
    "finetune": (None, True),
    "finetune_only": ("none", True),
}
"""Recoveries by name: the closed form, None as configured, and whether fine-tuning follows."""

_OWN_NAMES = ("device", "budget", "criterion", "recovery")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One device under one budget: a cell of the grid.

    Attributes:
      number: its place in the grid.
      overrides: what the grid says of it.
      config: the base config with the overrides; `budgets` holds the one budget.
      recovery: a name in `RECOVERIES`; `config.compensate` follows it.
      partners: numbers of the units that are fine-tuned with it in one program, itself included.
      key: hash of everything its result depends on but the contents of files; the same wherever it
        stands in a grid.
    """

    number: int
    overrides: Mapping[str, Any]
    config: ExperimentConfig
    device: int
    recovery: str
    partners: tuple[int, ...]
    key: str

    @property
    def budget(self) -> Budget:
        """What the device can afford."""
        return self.config.budget(0)

    @property
    def finetuned(self) -> bool:
        """Whether it is fine-tuned."""
        return RECOVERIES[self.recovery][1]


def default_grid(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Every device under a few budgets, for configs without `sweep`."""
    return grid({"device": range(config.data.partition.num_devices), "budget": DEFAULT_BUDGETS})


def resolve(config: ExperimentConfig, overrides: Iterable[Mapping[str, Any]]) -> list[Unit]:
    """The units of a grid, checked one by one.

    Raises:
      InputError: an unknown name, or a value that does not fit; names the unit and the field.
    """
    units = [_unit(config, number, names) for number, names in enumerate(overrides)]
    if not units:
        raise InputError("the grid has no units, expected at least one")
    return _with_partners(units)


def _unit(base: ExperimentConfig, number: int, overrides: Mapping[str, Any]) -> Unit:
    where = f"unit {number}"
    if not isinstance(overrides, Mapping):
        raise InputError(f"{where}: is {overrides!r}, expected a mapping of names to values")
    plain = to_plain(base)
    try:
        if (criterion := overrides.get("criterion")) is not None:
            plain["prune"] |= to_plain(base.prune.ranked_by(criterion))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for name, value in overrides.items():
        if name not in _OWN_NAMES:
            _set(plain, where, str(name), to_plain(value))
    try:
        config = from_plain(ExperimentConfig, plain)
        device = overrides.get("device")
        devices = config.data.partition.num_devices
        if type(device) is not int or not 0 <= device < devices:
            raise InputError(f"device is {device!r}, expected 0 to {devices - 1}")
        budget = overrides.get("budget", config.budgets[device % len(config.budgets)])
        if not isinstance(budget, str):
            raise InputError(f"budget is {budget!r}, expected text such as 'macs=0.5'")
        config = dataclasses.replace(config, budgets=(budget,))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    recovery = _named(where, "recovery", overrides.get("recovery", "finetune"), RECOVERIES)
    method = RECOVERIES[recovery][0] or config.compensate.method
    compensate = dataclasses.replace(config.compensate, method=method)
    config = dataclasses.replace(config, compensate=compensate)
    key = content_hash({"config": identity(config), "device": device, "recovery": recovery})
    return Unit(number, to_plain(overrides), config, device, recovery, (number,), key)


def _named(where: str, field: str, value: Any, options: Iterable[str]) -> str:
    if value not in tuple(options):
        raise InputError(f"{where}: {field} is {value!r}, expected one of {', '.join(options)}")
    return value


def _set(plain: dict[str, Any], where: str, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        plain = plain.setdefault(part, {})
        if not isinstance(plain, dict):
            raise InputError(f"{where}: unknown field {name}: {part} has no fields")
    plain[last] = value


def _with_partners(units: list[Unit]) -> list[Unit]:
    """Join units that are fine-tuned in one program; only the grid decides which."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.finetuned and unit.config.recover_together > 1:
            alike = [Job.shared_key(unit.config), unit.config.recover.identity()]
            alike.append(unit.config.recover_together)
            groups.setdefault(content_hash(alike), []).append(unit)
    result = list(units)
    for group in groups.values():
        size = group[0].config.recover_together
        for first in range(0, len(group), size):
            members = group[first : first + size]
            numbers = tuple(unit.number for unit in members)
            for unit in members:
                # Who is fine-tuned beside it changes the last bits of its result.
                key = content_hash([unit.key, [member.key for member in members]])
                result[unit.number] = dataclasses.replace(unit, partners=numbers, key=key)
    return result


class Sweep:
    """All units of a grid in one work directory.

    Raises:
      InputError: an impossible unit, processes that hold different configs, or a work directory of
        another config.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        overrides: Iterable[Mapping[str, Any]],
        workdir: Path,
        quiet: bool = False,
    ):
        self.config, self.workdir = config, workdir
        self.units = resolve(config, overrides)
        self.stages = Stages(workdir / "stages")
        self._quiet = quiet or not distributed.is_main()
        self._files = NamedFiles()
        self._job: tuple[str, Job] | None = None
        self._failed_before: dict[int, int | None] = {}
        self._table = joined.LiveTable(*self._columns())

    def run(self, numbers: Sequence[int] | None = None) -> dict[int, str]:
        """Compute the units that are not there yet, and join all that are.

        Args:
          numbers: only these units; None is all of them.

        Returns:
          why units failed, by number.

        Raises:
          InputError: the work directory belongs to another config or cannot be written.
        """
        plain = identity(self.config)
        chosen = [self.units[n] for n in (range(len(self.units)) if numbers is None else numbers)]
        files = [self._files.identity(unit.config) for unit in chosen]
        same = {"config": plain, "grid": [unit.key for unit in self.units], "files": files}
        same["units"] = [unit.number for unit in chosen]
        distributed.check_agreement(same, "the hosts")
        on_main(lambda: claim_workdir(self.workdir, self._claimed))
        shared = {Job.shared_key(unit.config): unit.config for unit in chosen}
        total = sum(map(_weight, chosen)) + sum(map(_shared_weight, shared.values()))
        self.progress = Progress(total, self._quiet, lines=False)
        self._print(self._table.head())
        self._failed_before = {unit.number: self._failed_at(unit) for unit in chosen}
        failed: dict[int, str] = {}
        # Units that others work on come last: by then they are done, or their worker is gone.
        waiting = [unit for unit in chosen if not self._attempt(unit, failed, wait=False)]
        for unit in waiting:
            self._attempt(unit, failed, wait=True)
        self.progress.close()
        on_main(self._join)
        return failed

    @property
    def _claimed(self) -> dict[str, Any]:
        """What a work directory is tied to."""
        return {"program": "experiments.sweep", **identity(self.config)}

    def check_workdir(self) -> None:
        """Check that the work directory is of this sweep.

        Raises:
          InputError: it is of another config or program, or of none.
        """
        check_workdir(self.workdir, self._claimed)

    def status(self, unit: Unit) -> tuple[State, str]:
        """How far a unit is, and why it failed if it did; without a look at the data."""
        if read_row(self._path(unit, ".json"), unit.key) is not None:
            return "done", ""
        if is_locked(self._path(unit, ".lock")):
            return "running", ""
        failure = self._path(unit, ".failed.json")
        if failure.exists():
            return "failed", str(read_json(failure).get("reason", ""))
        return "missing", ""

    def results(self) -> dict[str, Any]:
        """Everything that is known so far, as `results.json` holds it."""
        rows, failed = [], []
        for unit in self.units:
            row = self._result(unit)
            if row is not None:
                rows.append({"unit": unit.number, "overrides": dict(unit.overrides), **row})
                continue
            state, reason = self.status(unit)
            if state == "failed":
                failed.append({"unit": unit.number, "reason": reason})
        return {
            "name": self.config.name,
            "config": identity(self.config),
            "grid": len(self.units),
            "units": rows,
            "failed": failed,
        }

    def _join(self) -> None:
        # Locked: who has seen fewer results must not write after who has seen all.
        with file_lock(self.workdir / ".results.lock") as locked:
            if locked:
                for name in ("results.json", "units.csv", "units.json", "units.html"):
                    remove_leftovers(self.workdir / name)
            results = self.results()
            write_json(self.workdir / "results.json", results)
            if results["units"]:
                name = results["name"]
                found = joined.records(results, name)
                joined.write(found, self.workdir, name, *joined.gaps(results, name))

    def _attempt(self, unit: Unit, failed: dict[int, str], wait: bool) -> bool:
        """Do a unit unless it is done; False if another worker is at it and `wait` is false."""
        with contextlib.ExitStack() as stack:
            todo = from_main(all_succeed(lambda: self._claim(unit, wait, stack)))
            if todo == "busy":
                return False
            if todo == "compute":
                self._compute(unit)
            else:
                self.progress.advance(f"unit {unit.number}", _weight(unit))
        state, reason = from_main(all_succeed(lambda: self.status(unit)))
        if state == "failed":
            failed[unit.number] = reason
        self._print(self._table.line(unit.number, unit.overrides, self._result(unit), reason))
        return True

    def _claim(self, unit: Unit, wait: bool, stack: contextlib.ExitStack) -> str:
        if not distributed.is_main():
            return ""
        if self._result(unit) is not None:
            return "done"
        said = f"unit {unit.number}: another process works on it; waiting"
        lock = file_lock(
            self._path(unit, ".lock"), wait=wait, on_wait=lambda: tqdm.write(said, file=sys.stderr)
        )
        locked = stack.enter_context(lock)
        if locked is False:
            return "busy"
        if self._result(unit, say=True) is not None:
            return "done"
        if self._failed_at(unit) not in (None, self._failed_before.get(unit.number)):
            # Another worker has tried since this one began.
            return "failed"
        failure = self._path(unit, ".failed.json")
        failure.unlink(missing_ok=True)
        if locked:
            remove_leftovers(self._path(unit, ".json"))
            remove_leftovers(failure)
        return "compute"

    def _failed_at(self, unit: Unit) -> int | None:
        try:
            return self._path(unit, ".failed.json").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _compute(self, unit: Unit) -> None:
        try:
            row = all_succeed(lambda: self._row(unit))
        except WriteError:
            # The next unit could not be written either.
            raise
        except Exception as error:
            self.progress.resume()
            known = isinstance(error, InputError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            failure = {"unit": unit.number, "reason": one_line(reason)}
            if not known:
                failure["traceback"] = traceback.format_exc().splitlines()
            on_main(lambda: write_json(self._path(unit, ".failed.json"), failure))
            return
        files = self._files.identity(unit.config)
        on_main(lambda: write_row(self._path(unit, ".json"), unit.key, row, files))

    def _row(self, unit: Unit) -> dict[str, Any]:
        job, d, title = self._job_of(unit), unit.device, f"unit {unit.number}"
        split, config = job.parts.devices[d], unit.config
        sets, plan = self._plan(job, unit)
        compensated = self._compensated(job, unit, plan, sets)
        if unit.finetuned:
            recovered, best_epoch = self._recovered(job, unit, plan, sets)
            on = config.recover_on
        else:
            recovered, best_epoch, on = compensated, 0, "masked"
        small, difference = job.reshaped(d, plan, recovered.value, on)
        return {
            "device": d,
            "seed": config.seed,
            "recovery": unit.recovery,
            "classes": list(split.classes),
            "private_test": len(split.private_test),
            "payload_bytes": job.payloads[d][1],
            "budget": str(unit.budget),
            "limits": unit.budget.limits(job.dense.config, job.latency_model),
            "cost": dataclasses.asdict(cost(small.config, job.latency_model)),
            "dense_cost": dataclasses.asdict(cost(job.dense.config, job.latency_model)),
            "dense": job.dense_top1(d),
            "pruned": job.top1(job.pruned(plan), split.private_test),
            "compensated": job.top1(compensated, split.private_test),
            "recovered": job.top1(recovered, split.private_test),
            "best_epoch": best_epoch,
            "reshape_difference": difference,
            "keep_ratios": keep_ratios(plan.value),
            "latency_ms": job.latency(title, small, config.latency_batch),
        }

    def _plan(self, job: Job, unit: Unit) -> tuple[ImageSets, Found]:
        prune, budget = unit.config.prune, unit.budget
        # Before any work: a budget that cannot be met is refused now.
        check_budget(job.dense_config, budget, prune.allocate, job.latency_for(budget))
        sets = image_sets(job, unit.device, SELECTED)
        return sets, job.plan(f"unit {unit.number}", unit.device, sets, prune, budget)

    def _compensated(self, job: Job, unit: Unit, plan: Found, sets: ImageSets) -> Found:
        options, size = unit.config.compensate, unit.config.prune.batch_size
        return job.compensate(f"unit {unit.number}", plan, sets, options, size)

    def _recovered(self, job: Job, unit: Unit, plan: Found, sets: ImageSets) -> tuple[Found, int]:
        title, options = f"unit {unit.number}", unit.config.recover
        if unit.config.recover_together == 1:
            pruned = self._pruned(job, unit, plan, sets)
            return job.recover(title, pruned, options, unit.config.recover_on)
        members, place = [], 0
        for number in unit.partners:
            partner = self.units[number]
            if number == unit.number:
                place = len(members)
            try:
                own, kept = (sets, plan) if partner is unit else self._plan(job, partner)
                members.append(self._pruned(job, partner, kept, own))
            except WriteError:
                raise
            except InputError:
                if partner is unit:
                    raise
                # It cannot be pruned, whoever asks, and fails on its own.
        return job.recover_together(title, members, place, options)

    def _pruned(self, job: Job, unit: Unit, plan: Found, sets: ImageSets) -> Pruned:
        start = self._compensated(job, unit, plan, sets)
        return Pruned(unit.device, plan, sets, start, unit.config.compensate)

    def _job_of(self, unit: Unit) -> Job:
        key = Job.shared_key(unit.config)
        if self._job is None or self._job[0] != key:
            # Only the last one is kept: its images and models may take gigabytes.
            self._job = None
            payloads = self.workdir / "payloads" / key[:16]
            self._job = key, Job(unit.config, self.stages, payloads, self.progress)
        return self._job[1]

    def _result(self, unit: Unit, say: bool = False) -> dict[str, Any] | None:
        path = self._path(unit, ".json")
        if not path.exists():
            return None
        return read_row(path, unit.key, say, self._files.identity(unit.config))

    def _path(self, unit: Unit, suffix: str) -> Path:
        return self.workdir / "units" / f"{unit.key[:16]}{suffix}"

    def _columns(self) -> tuple[list[str], list[int]]:
        """The overrides in which units differ, and how wide their values are."""
        names = dict.fromkeys(name for unit in self.units for name in unit.overrides)
        values = {name: [unit.overrides.get(name, "") for unit in self.units] for name in names}
        shown = [n for n in names if n in ("device", "budget") or len(set(map(str, values[n]))) > 1]
        return shown, [max(len(str(value)) for value in values[name]) for name in shown]

    def _print(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def _weight(unit: Unit) -> float:
    found = sum(UNITS[name] for name in ("units", "compensate", "latency"))
    found += UNITS["layers"] * unit.config.prune.allocate.reads_layers
    return found + UNITS["recover"] * unit.finetuned


def _shared_weight(config: ExperimentConfig) -> float:
    once = sum(UNITS[name] for name in ("data", "dense", "extractor", "select"))
    return once + UNITS["device"] * config.data.partition.num_devices


def print_list(sweep: Sweep) -> None:
    """Print the units and their overrides."""
    for unit in sweep.units:
        print(f"{unit.number:4}  {_describe(unit)}")


def print_status(sweep: Sweep) -> None:
    """Print how far every unit is, and why those failed that did.

    Raises:
      InputError: a work directory that is not this sweep's.
    """
    sweep.check_workdir()
    states = []
    for unit in sweep.units:
        state, reason = sweep.status(unit)
        states.append(state)
        print(f"{unit.number:4}  {state:8} {_describe(unit)}{reason and ': '}{reason}")
    counts = ", ".join(f"{states.count(state)} {state}" for state in get_args(State))
    print(f"{len(states)} units: {counts}")


def _describe(unit: Unit) -> str:
    return one_line("  ".join(f"{name}={value}" for name, value in unit.overrides.items()))


def main(argv: list[str]) -> dict[int, str]:
    """Run the sweep that the arguments name; return why units failed.

    Raises:
      InputError: unknown or missing arguments, anything wrong in the config or the grid, or a work
        directory that cannot be used.
    """
    set_up_jax()
    flags.adopt_module_key_flags(arguments)
    # Not on import: a config file may well import this module, as the second of its name.
    work_unit = flags.DEFINE_integer("work_unit", None, "Do only this unit of the grid.")
    only_list = flags.DEFINE_bool("list", False, "Say what the units are; compute nothing.")
    only_status = flags.DEFINE_bool("status", False, "Say how far the units are.")
    config, workdir = arguments.parse(argv)
    overrides = arguments.sweep_of_config_file(config)
    sweep = Sweep(config, default_grid(config) if overrides is None else overrides, workdir)
    if only_list.value:
        print_list(sweep)
        return {}
    if only_status.value:
        print_status(sweep)
        return {}
    number = work_unit.value
    if number is not None and not 0 <= number < len(sweep.units):
        raise InputError(f"--work_unit is {number}, expected 0 to {len(sweep.units) - 1}")
    failed = sweep.run(None if number is None else [number])
    if distributed.is_main():
        for unit, reason in failed.items():
            print(f"unit {unit} failed: {reason}", file=sys.stderr)
        print(f"\nreport: {workdir / 'units.html'}   table: {workdir / 'units.csv'}")
    return failed


def _program() -> int:
    failed: dict[int, str] = {}
    code = run_program(lambda: failed.update(main(sys.argv)))
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(_program())

"""The epochs of one run or of many in lockstep: the best epoch, early stopping, and resuming."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.params import Params
from tapvit_jax.train.checkpoint import Checkpoints
from tapvit_jax.train.evaluate import Metrics
from tapvit_jax.train.step import TrainConfig

Record = dict[str, Any]
State = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainResult:
    """Parameters of the best epoch, and what was measured after every epoch.

    Attributes:
      params: parameters after the epoch with the best validation accuracy (the start included).
      best_epoch: that epoch; 0 is the start.
      record: validation metrics of every epoch.
    """

    params: Params
    best_epoch: int
    record: list[Record]


class Program(abc.ABC):
    """What the loop drives: the arrays of R runs that take their steps together.

    Attributes:
      steps: steps of an epoch, for every run.
    """

    steps: Sequence[int]

    @abc.abstractmethod
    def initial(self) -> State:
        """The state before the first step; its keys are "params", "best" and "rest"."""

    @abc.abstractmethod
    def batches(self, epoch: int, first: int, alive: Bool[np.ndarray, "r"]) -> Iterator[Any]:
        """Training batches of an epoch from the given step on, for the runs that are alive."""

    @abc.abstractmethod
    def step(
        self, state: State, batch: Any, epoch: int, i: int, alive: Bool[np.ndarray, "r"]
    ) -> State:
        """The state after one step; runs that are not alive stay as they are."""

    @abc.abstractmethod
    def losses(self, state: State) -> Float[np.ndarray, "r steps"]:
        """Training loss of every step of the epoch so far."""

    @abc.abstractmethod
    def measure(self, state: State, alive: Bool[np.ndarray, "r"]) -> list[Metrics | None]:
        """Validation metrics of the runs that are alive."""

    @abc.abstractmethod
    def keep_best(self, state: State, improved: Bool[np.ndarray, "r"]) -> State:
        """The state with the present parameters as the best of the runs that improved."""


def run_epochs(
    program: Program,
    options: TrainConfig,
    keeper: Checkpoints | None,
    on_epoch: Callable[[int, int, Metrics], None] | None,
) -> tuple[State, list[list[Record]]]:
    """Drive a program to its end; resume where the checkpoints say, be it within an epoch.

    Args:
      program: the runs.
      options: the recipe.
      keeper: where checkpoints are kept.
      on_epoch: called with (run, epoch, validation metrics).

    Returns:
      the last state and every run's record.

    Raises:
      InputError: a loss that is no longer finite, or checkpoints of another run.
    """
    count, longest = len(program.steps), max(program.steps)
    state = program.initial()
    found = None if keeper is None else keeper.restore(state)
    if found is None:
        start = program.measure(state, np.ones(count, bool))
        runs, first = [[_row(0, metrics)] for metrics in start], 0
    else:
        state, runs, first = found[0], found[1]["runs"], found[1]["step"]
    while (alive := np.array([not finished(record, options) for record in runs])).any():
        epoch = max(map(len, runs))
        length = max(n for n, living in zip(program.steps, alive, strict=True) if living)
        for i, batch in enumerate(program.batches(epoch, first, alive), first):
            state = program.step(state, batch, epoch, i, alive)
            position = (epoch - 1) * longest + i + 1
            if keeper is not None and i + 1 < length and _is_due(position, options):
                keeper.save(position, state, {"runs": runs, "step": i + 1})
        first = 0
        losses, measured = program.losses(state), program.measure(state, alive)
        for r in np.flatnonzero(alive):
            loss = float(np.float64(losses[r, : program.steps[r]]).mean())
            _check_finite(loss, measured[r].loss, epoch, options, int(r) if count > 1 else None)
            runs[r].append(_row(epoch, measured[r]) | {"train_loss": loss})
        improved = [living and best_epoch(runs[r]) == epoch for r, living in enumerate(alive)]
        state = program.keep_best(state, np.array(improved))
        position = epoch * longest
        if keeper is not None and (
            epoch % options.checkpoint_epochs == 0 or _is_due(position, options)
        ):
            keeper.save(position, state, {"runs": runs, "step": 0})
        if on_epoch is not None:
            for r in np.flatnonzero(alive):
                on_epoch(int(r), epoch, measured[r])
    return state, runs


def best_epoch(record: list[Record]) -> int:
    """The epoch with the highest accuracy, then the lowest loss, then the earliest."""
    return max(record, key=lambda row: (row["top1"], -row["loss"], -row["epoch"]))["epoch"]


def finished(record: list[Record], options: TrainConfig) -> bool:
    """Whether a run has had all its epochs, or too many without a better one."""
    epoch, patience = record[-1]["epoch"], options.patience
    return epoch >= options.epochs or (
        patience is not None and epoch - best_epoch(record) >= patience
    )


def _is_due(position: int, options: TrainConfig) -> bool:
    return options.checkpoint_steps is not None and position % options.checkpoint_steps == 0


def _row(epoch: int, metrics: Metrics) -> Record:
    return {"epoch": epoch, "top1": metrics.top1, "loss": metrics.loss}


def _check_finite(
    train_loss: float, loss: float, epoch: int, options: TrainConfig, run: int | None
) -> None:
    if not math.isfinite(train_loss + loss):
        where = "" if run is None else f"variant {run}: "
        raise InputError(
            f"{where}the training loss became {train_loss} and the validation loss {loss} "
            f"in epoch {epoch}: lower learning_rate (now {options.learning_rate})"
        )

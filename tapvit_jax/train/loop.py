"""The epochs of one run or of many in lockstep: the best epoch, early stopping, and resuming."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from tapvit_jax.models.params import Params
from tapvit_jax.sharding import Backlog
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
    on_share: Callable[[float], None] = lambda share: None,
) -> tuple[State, list[list[Record]], list[str | None]]:
    """Drive a program to its end; resume where the checkpoints say, be it within an epoch.

    A run whose loss is no longer finite ends there, and the others go on.

    Args:
      program: the runs.
      options: the recipe.
      keeper: where checkpoints are kept.
      on_epoch: called with (run, epoch, validation metrics).
      on_share: called with every share of the steps that is done, those before a resume at once.

    Returns:
      the last state, every run's record, and why it ended early if its loss was not finite.

    Raises:
      InputError: checkpoints of another run.
    """
    count, longest = len(program.steps), max(program.steps)
    done = 0

    def tell(position: int) -> None:
        nonlocal done
        if position > done:
            on_share((position - done) / (options.epochs * longest))
            done = position

    state = program.initial()
    found = None if keeper is None else keeper.restore(state)
    if found is None:
        start = program.measure(state, np.ones(count, bool))
        failed = [_failure_at_start(metrics.loss) for metrics in start]
        runs = [[] if why else [_row(0, m)] for m, why in zip(start, failed, strict=True)]
        first = 0
    else:
        state, record = found
        runs, failed, first = record["runs"], record["failed"], record["step"]
        tell((max(1, *map(len, runs)) - 1) * longest + first)
    backlog = Backlog()
    while (alive := _alive(runs, failed, options)).any():
        epoch = max(map(len, runs))
        length = max(n for n, living in zip(program.steps, alive, strict=True) if living)
        for i, batch in enumerate(program.batches(epoch, first, alive), first):
            state = program.step(state, batch, epoch, i, alive)
            backlog.sent(batch, state)
            position = (epoch - 1) * longest + i + 1
            tell(position)
            if keeper is not None and i + 1 < length and _is_due(position, options):
                keeper.save(position, state, {"runs": runs, "failed": failed, "step": i + 1})
        first = 0
        losses, measured = program.losses(state), program.measure(state, alive)
        for r in np.flatnonzero(alive):
            loss = float(np.float64(losses[r, : program.steps[r]]).mean())
            failed[r] = _failure(loss, measured[r].loss, epoch, options)
            if failed[r] is None:
                runs[r].append(_row(epoch, measured[r]) | {"train_loss": loss})
        alive &= [why is None for why in failed]
        if not alive.any():
            break
        improved = [living and best_epoch(runs[r]) == epoch for r, living in enumerate(alive)]
        state = program.keep_best(state, np.array(improved))
        position = epoch * longest
        tell(position)
        if keeper is not None and (
            epoch % options.checkpoint_epochs == 0 or _is_due(position, options)
        ):
            keeper.save(position, state, {"runs": runs, "failed": failed, "step": 0})
        if on_epoch is not None:
            for r in np.flatnonzero(alive):
                on_epoch(int(r), epoch, measured[r])
    return state, runs, failed


def best_epoch(record: list[Record]) -> int:
    """The epoch with the highest accuracy, then the lowest loss, then the earliest."""
    return max(record, key=lambda row: (row["top1"], -row["loss"], -row["epoch"]))["epoch"]


def finished(record: list[Record], options: TrainConfig) -> bool:
    """Whether a run has had all its epochs, or too many without a better one."""
    epoch, patience = record[-1]["epoch"], options.patience
    return epoch >= options.epochs or (
        patience is not None and epoch - best_epoch(record) >= patience
    )


def _alive(
    runs: list[list[Record]], failed: list[str | None], options: TrainConfig
) -> Bool[np.ndarray, "r"]:
    pairs = zip(runs, failed, strict=True)
    return np.array([why is None and not finished(record, options) for record, why in pairs])


def _is_due(position: int, options: TrainConfig) -> bool:
    return options.checkpoint_steps is not None and position % options.checkpoint_steps == 0


def _row(epoch: int, metrics: Metrics) -> Record:
    return {"epoch": epoch, "top1": metrics.top1, "loss": metrics.loss}


def _failure_at_start(loss: float) -> str | None:
    if math.isfinite(loss):
        return None
    return f"the validation loss is {loss} before training: the parameters are no start"


def _failure(train_loss: float, loss: float, epoch: int, options: TrainConfig) -> str | None:
    if math.isfinite(train_loss + loss):
        return None
    return (
        f"the training loss became {train_loss} and the validation loss {loss} "
        f"in epoch {epoch}: lower learning_rate (now {options.learning_rate})"
    )

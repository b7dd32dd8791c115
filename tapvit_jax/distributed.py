"""Several processes as one job: joining, sharing out rows, adding up, and agreeing.

Every process runs the same program on the same config. Statistics are summed where the data are and
added over the processes once, at the end, so that hosts never wait for one another in between. All
functions here are trivial where there is one process, and collective where there are several: every
process must call them in the same order.

Except where one fails: work that may fail on one process alone is done in a `section`, and all
collectives begin by telling whether somebody has failed. The others then leave the section with a
`PeerError` instead of waiting for what will never come.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from importlib import util
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash

T = TypeVar("T")

# How JAX says that nothing around it names a job.
_NO_JOB = "coordinator_address should be defined"

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Join the other processes of the job, if there are any; the first thing that a program does.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID name the
    job by hand. Without them the job is found by JAX on Cloud TPU, under `srun` and under Open
    MPI's `mpirun`; where there is none, this process is one of its own. TAPVIT_DISTRIBUTED=0 keeps
    a process on its own wherever it runs.

    Raises:
      InputError: some of the three variables are missing or not numbers, or the others cannot be
        reached.
    """
    if os.environ.get("TAPVIT_DISTRIBUTED") == "0" or jax.distributed.is_initialized():
        return
    arguments: dict[str, Any] = {}
    if any(os.environ.get(name) for name in _BY_HAND):
        arguments = _job_by_hand()
    elif not _has_tasks() and util.find_spec("libtpu") is None:
        return
    # It would take SIGTERM, and only tell of it those who ask.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if _NO_JOB in reason and not _has_tasks():
            # libtpu is installed, but this is no TPU machine.
            return
        raise InputError(
            f"cannot join the other processes: {reason} (TAPVIT_DISTRIBUTED=0 does without them)"
        ) from error


def _job_by_hand() -> dict[str, Any]:
    missing = [name for name in _BY_HAND if not os.environ.get(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)} not set, expected all of {', '.join(_BY_HAND)}")
    address, count, rank = (os.environ[name] for name in _BY_HAND)
    if not count.isdecimal() or not rank.isdecimal() or not 0 <= int(rank) < int(count):
        raise InputError(
            f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID {rank!r}, expected a number and "
            "one below it"
        )
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise InputError(f"JAX_COORDINATOR_ADDRESS is {address!r}, expected host:port")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(rank),
    }


def _has_tasks() -> bool:
    """Whether `srun` or `mpirun` has started several processes."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return any(os.environ.get(name, "1") not in ("", "0", "1") for name in counts)


def process_index() -> int:
    """Number of this process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """Number of processes of the job."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this is the process that writes what all have in common."""
    return jax.process_index() == 0


class PeerError(Exception):
    """A process has failed in a section, which all processes have to leave.

    Attributes:
      depth: of the section; where several fail, that of the outermost.
    """

    def __init__(self, depth: int):
        super().__init__("another process failed")
        self.depth = depth


# Sections that this process is in; they begin and end on the main thread alone.
_depth = 0


@contextlib.contextmanager
def section() -> Iterator[int]:
    """Begin what all processes do or none; gives the section's depth, 1 for the outermost."""
    global _depth
    _depth += 1
    try:
        yield _depth
    finally:
        _depth -= 1


def agree(failed: int = 0) -> None:
    """Tell the others that nothing has failed here, or in the section of which depth something has.

    Raises:
      PeerError: something has failed, here or elsewhere.
    """
    found = _exchange(np.array(failed, np.uint8))
    if found.any():
        raise PeerError(int(found[found > 0].min()))


def barrier() -> None:
    """Wait until all processes have come to the barrier.

    Raises:
      PeerError: one of them has failed before.
    """
    agree()


def share(count: int) -> range:
    """This process's contiguous share of `count` rows; shares differ by one row at most."""
    index, processes = process_index(), process_count()
    return range(index * count // processes, (index + 1) * count // processes)


def own_count(most: int) -> int:
    """How many of the first `most` batches of all processes this one has, dealt out in turn."""
    return len(range(process_index(), most, process_count()))


def gather(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "processes ..."]:
    """The arrays of all processes, which have one shape and type, in process order.

    They travel as bytes, so that every type arrives bit for bit.

    Raises:
      PeerError: another process failed on the way here; so do all that follow.
    """
    agree()
    return _exchange(array)


def _exchange(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "processes ..."]:
    array = np.asarray(array, order="C")
    if process_count() == 1:
        return array[None]
    sent = np.frombuffer(array.tobytes(), np.uint8)
    received = np.asarray(multihost_utils.process_allgather(sent), np.uint8)
    return received.reshape(-1).view(array.dtype).reshape(process_count(), *array.shape)


def sum_over_processes(tree: T) -> T:
    """Sum arrays over all processes, in float64 and process order: the same result everywhere."""
    agree()
    return jax.tree.map(lambda a: _exchange(np.asarray(a, np.float64)).sum(axis=0), tree)


def gather_bytes(data: bytes) -> list[bytes]:
    """The bytes of all processes, whatever their lengths, in process order."""
    agree()
    return exchange_bytes(data)


def exchange_bytes(data: bytes) -> list[bytes]:
    """As `gather_bytes`, between processes that know that all of them have come here."""
    if process_count() == 1:
        return [data]
    lengths = _exchange(np.array(len(data), np.int64))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    received = _exchange(padded)
    return [row[:length].tobytes() for row, length in zip(received, lengths, strict=True)]


def check_agreement(values: Mapping[str, Any], what: str = "the processes") -> None:
    """Refuse to go on where processes hold different JSON values under one name.

    Raises:
      InputError: on every process, names the fields that differ, nested ones with dots.
    """
    flat = _flatten(values)
    text = "\n".join(f"{content_hash(value)} {name}" for name, value in sorted(flat.items()))
    tables = [
        dict(reversed(line.split(" ", 1)) for line in found.decode().splitlines())
        for found in gather_bytes(text.encode())
    ]
    names = sorted(set().union(*tables))
    differing = [name for name in names if len({table.get(name) for table in tables}) > 1]
    if differing:
        raise InputError(
            f"{what} do not agree; these fields differ between hosts: {', '.join(differing[:20])}"
        )


def _flatten(values: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, path)
        else:
            flat[path] = value
    return flat

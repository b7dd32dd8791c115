"""Training checkpoints through orbax: whole training states, kept until the run is finished."""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.files import WriteError, file_lock, read_json, write_json
from tapvit_jax.runtime import interrupts_wait
from tapvit_jax.stages import Scratch, differences, on_main
from tapvit_jax.versions import library_versions

_KEPT = 2
_NAME = re.compile(r"step_(\d{9})(\.json)?")
_LOCK = ".checkpoints.lock"
_LAYOUT = 2

log = logging.getLogger(__name__)


class Checkpoints:
    """The latest states of one training run, in one directory.

    Orbax writes a state and renames it when it is whole; a note of its files, its identity and what
    was measured is written behind it. A state without its note, or whose files are not as noted, is
    left aside and the one before is taken: a run that is killed at any moment, even while it saves,
    goes on from a whole state. Several processes need a directory that all of them see; process 0
    decides which state all of them take.

    As a context manager it removes them when the body succeeds and keeps them otherwise. A stage's
    `Scratch` it never removes: the stage does, when its artefact is there.

    Args:
      directory: where to keep them.
      identity: plain values that say which run this is; a resumed run must have the same, and the
        same version of this package. In a `Scratch`, states of another run are deleted, and that is
        said.

    Raises:
      InputError: the directory cannot be made or written to, another process keeps its checkpoints
        there, or it holds something else under a checkpoint's name.
    """

    def __init__(self, directory: Path | Scratch, identity: dict[str, Any]):
        self._lent = isinstance(directory, Scratch)
        self._directory = (directory.path if self._lent else directory).resolve()
        # Another version may take other steps from the same state.
        self._identity = {"version": library_versions()["tapvit-jax"]} | identity
        with contextlib.ExitStack() as lock:
            on_main(lambda: self._claim(lock))
            with _orbax_works():
                self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())
            self._lock = lock.pop_all()

    def _claim(self, lock: contextlib.ExitStack) -> None:
        with self._disk_errors():
            self._directory.mkdir(parents=True, exist_ok=True)
            if not self._lent:
                if lock.enter_context(file_lock(self._directory / _LOCK, wait=False)) is False:
                    raise InputError(
                        f"{self._directory}: another process keeps its checkpoints there, "
                        "expected a directory of this run's own"
                    )
                for path in self._directory.iterdir():
                    if _NAME.fullmatch(path.name) and not _is_own(path.with_suffix("")):
                        raise InputError(
                            f"{self._directory}: holds {path.name!r}, which is no checkpoint but "
                            "is called like one, expected another directory"
                        )
            for left in self._directory.glob("step_*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
            for left in self._directory.glob(".step_*.json.*.partial"):
                left.unlink()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.close(delete=kind is None and not self._lent)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Keep the state after a step, and what was measured so far.

        Raises:
          InputError: the disk is full or cannot be written to.
        """
        target = self._path(step)
        entries = _entries(state)
        with self._disk_errors():
            with _orbax_works():
                self._orbax.save(target, args=ocp.args.StandardSave(entries), force=True)
            if distributed.is_main():
                note = {
                    "layout": _LAYOUT,
                    "identity": self._identity,
                    "record": record,
                    "shapes": _shapes(entries),
                    "bytes": _sizes(target),
                }
                write_json(_note(target), note)
                # Later ones are those that a resumed run could not read.
                steps = self._steps()
                own = [other for other in steps if other <= step][:_KEPT]
                for other in set(steps).difference(own):
                    self._remove(self._path(other))

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The latest whole state and its record, or None when there is none.

        Raises:
          InputError: the checkpoints belong to another run, in a directory that is no `Scratch`.
        """
        entries = _entries(template)
        for step in self._agreed(self._steps()):
            target = self._path(step)
            reason, note = self._examine(target, entries)
            # Process 0 has the word: what others see of the directory may be older.
            if distributed.sum_over_processes(np.array(float(reason is not None)))[()]:
                reason = reason or "another process cannot read it"
            elif differing := ", ".join(differences(note["identity"], self._identity)):
                if not self._lent:
                    raise InputError(
                        f"{self._directory}: holds checkpoints of a run with another "
                        f"configuration; these fields differ: {differing}. Choose another work "
                        "directory or delete them"
                    )
                reason = f"it was made by another run: {differing}"
                if distributed.is_main():
                    # Else they would count among the latest, before those of this run.
                    self._remove(target)
            else:
                found, reason = self._read(target, entries)
                if reason is None:
                    leaves, structure = jax.tree.flatten(template)
                    leaves = [found.get(str(i), leaf) for i, leaf in enumerate(leaves)]
                    return jax.tree.unflatten(structure, leaves), note["record"]
            log.warning("%s: left aside, %s; taking the one before, if any", target, reason)
        return None

    def close(self, delete: bool = False) -> None:
        """Release the directory; `delete` removes the checkpoints once they are of no more use.

        The directory goes with them if it holds nothing else: it is the user's, who may keep other
        things there.
        """
        with _orbax_works():
            self._orbax.close()
        if delete:
            distributed.barrier()
            if distributed.is_main():
                for step in self._steps():
                    self._remove(self._path(step))
        self._lock.close()
        if delete and distributed.is_main():
            with contextlib.suppress(OSError):
                self._directory.rmdir()

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step:09}"

    def _steps(self) -> list[int]:
        found = {_NAME.fullmatch(path.name) for path in self._directory.glob("step_*")}
        return sorted({int(match[1]) for match in found if match}, reverse=True)

    def _agreed(self, steps: list[int]) -> list[int]:
        newest = np.full(_KEPT + 2, -1, np.int64)
        newest[: len(steps)] = steps[: len(newest)]
        return [int(step) for step in distributed.gather(newest)[0] if step >= 0]

    def _examine(self, target: Path, entries: dict[str, Any]) -> tuple[str | None, Any]:
        """What is wrong with a checkpoint, and its note."""
        if not _note(target).exists():
            return "it was not finished", None
        try:
            note = read_json(_note(target))
        except InputError as error:
            return str(error), None
        if not isinstance(note, dict) or note.get("layout") != _LAYOUT:
            return "its note is not of this version", None
        if not target.is_dir() or _sizes(target) != note["bytes"]:
            return "its files are truncated or missing", None
        # Behind the identity, which names what differs.
        if note["identity"] == self._identity and _shapes(entries) != note["shapes"]:
            return "it was made for another number of devices", None
        return None, note

    def _read(self, target: Path, entries: dict[str, Any]) -> tuple[Any, str | None]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, entries)
        found, reason = None, None
        try:
            with _orbax_works():
                found = self._orbax.restore(target, args=ocp.args.StandardRestore(abstract))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = f"it cannot be read ({_first_line(error)})"
        if distributed.sum_over_processes(np.array(float(reason is not None)))[()]:
            return None, reason or "another process cannot read it"
        return found, None

    def _remove(self, target: Path) -> None:
        # The note goes first: without it the rest does not count as a checkpoint. What is left of
        # the rest by a kill has the name of orbax's unfinished ones, which the next run deletes.
        _note(target).unlink(missing_ok=True)
        left = target.with_suffix(".orbax-checkpoint-tmp")
        with contextlib.suppress(FileNotFoundError):
            target.rename(left)
        shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            # Tensorstore has its own errors; when a state is written all of them are the disk's.
            raise WriteError(
                f"{self._directory}: cannot hold checkpoints ({_first_line(error)})"
            ) from error


@contextlib.contextmanager
def _orbax_works() -> Iterator[None]:
    # Orbax tells every step of its work, and errors with their call stacks before it raises them;
    # users want the progress line, and one line for an error. Its threads do not end when the main
    # one is interrupted, and fail when the program does.
    logger = logging.getLogger("absl")
    level = logger.level
    with interrupts_wait():
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _note(target: Path) -> Path:
    return target.with_suffix(".json")


def _is_own(target: Path) -> bool:
    """Whether orbax wrote a directory, or there is a note beside it, whole or not."""
    if (target / "_CHECKPOINT_METADATA").exists():
        return True
    try:
        note = read_json(_note(target))
    except (InputError, OSError):
        return False
    return isinstance(note, dict) and {"layout", "identity"} <= note.keys()


def _entries(state: Any) -> dict[str, Any]:
    # Orbax refuses arrays without entries, which fully pruned widths have.
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state)) if np.size(leaf)}


def _shapes(entries: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [str(leaf.dtype), *leaf.shape] for name, leaf in entries.items()}


def _sizes(target: Path) -> dict[str, int]:
    files = (path for path in target.rglob("*") if path.is_file())
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in files}

"""Training checkpoints through orbax: whole training states, kept until the run is finished."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash


class Checkpoints:
    """The latest state of one training run, in one directory.

    Orbax writes each state beside the last one and renames it when it is whole, so that a run that
    is killed at any moment resumes from a whole state.

    As a context manager it removes them when the body succeeds and keeps them otherwise.

    Args:
      directory: where to keep them.
      identity: plain values that say which run this is; a resumed run must have the same.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]):
        # Orbax tells every step of its work at INFO level; users want the progress line instead.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._directory = directory.resolve()
        if self._directory.exists() and not self._directory.is_dir():
            raise InputError(f"{directory}: cannot hold checkpoints (is a file)")
        self._identity = content_hash(identity)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, create=True, enable_async_checkpointing=False
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise InputError(f"{directory}: cannot hold checkpoints ({error})") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.close(delete=kind is None)

    def save(self, epoch: int, state: Any, record: dict[str, Any]) -> None:
        """Keep the state after an epoch, and what was measured so far."""
        meta = {"identity": self._identity, "record": record}
        self._manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_entries(state)), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The latest epoch, state and record, or None when there is none.

        Raises:
          InputError: the checkpoints belong to another run.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        meta = self._manager.restore(epoch, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        if meta["meta"]["identity"] != self._identity:
            raise InputError(
                f"{self._directory}: holds checkpoints of a run with another configuration; "
                "choose another work directory or delete them"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _entries(template))
        found = self._manager.restore(
            epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        leaves, structure = jax.tree.flatten(template)
        leaves = [found.get(str(i), leaf) for i, leaf in enumerate(leaves)]
        return epoch, jax.tree.unflatten(structure, leaves), meta["meta"]["record"]

    def close(self, delete: bool = False) -> None:
        """Release the directory; `delete` removes it once the run's result is stored elsewhere."""
        self._manager.close()
        if delete:
            shutil.rmtree(self._directory, ignore_errors=True)


def _entries(state: Any) -> dict[str, Any]:
    # Orbax refuses arrays without entries, which fully pruned widths have.
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state)) if np.size(leaf)}

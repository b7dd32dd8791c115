"""Reading images in several processes, with grain."""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_file

if TYPE_CHECKING:
    from tapvit_jax.data.base import ImageSource


class _Reader:
    """Random access to whole batches of images: the form in which grain takes data.

    What to read lies in a file of the parent's. A process that is started with more than a pipe
    holds, and dies before it takes it, would leave its parent waiting for ever.
    """

    def __init__(self, path: Path, count: int):
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _task(self) -> tuple["ImageSource", Sequence[Int[np.ndarray, "b"]], Preprocess]:
        with self._path.open("rb") as file:
            return pickle.load(file)

    def __getitem__(self, i: int) -> Float[np.ndarray, "b s s c"]:
        source, chunks, preprocess = self._task
        return source.load(chunks[i], preprocess)


def load_in_workers(
    source: "ImageSource",
    chunks: Sequence[Int[np.ndarray, "b"]],
    preprocess: Preprocess,
    workers: int,
) -> Iterator[Float[np.ndarray, "b s s c"]]:
    """Yield the images of every chunk in order; worker w of n reads chunks w, w + n, ...

    Closing the iterator ends the workers, and so do its end, an error, and the end of this process.
    They are started afresh (spawned, never forked), so that a program's own code must stand behind
    `if __name__ == "__main__"`.

    Raises:
      InputError: an image cannot be read (as without workers), or a worker died.
    """
    # Imported here: it takes a second, and most sets are read without workers.
    import grain

    if not flags.FLAGS.is_parsed():
        # grain asks absl for its flags' values, which absl refuses before a program parsed any.
        flags.FLAGS.mark_as_parsed()
    workers = min(workers, len(chunks))
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "task.pickle"
        with atomic_file(path) as partial, partial.open("wb") as file:
            pickle.dump((source, chunks, preprocess), file, protocol=pickle.HIGHEST_PROTOCOL)
        images = iter(
            grain.MapDataset.source(_Reader(path, len(chunks)))
            .to_iter_dataset(reading)
            .mp_prefetch(options, worker_init_fn=_start_worker)
        )
        # grain's threads leave cycles that hold the last images in shared memory.
        stack.callback(gc.collect)
        stack.callback(images.close)
        while True:
            try:
                # A copy in memory of this process: what is shared is scarce and freed at once.
                found = np.array(next(images))
            except StopIteration:
                return
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                code = str(error).partition("exit code ")[2].partition(".")[0]
                raise InputError(
                    f"{source.name}: one of {workers} worker processes died (exit code {code}; -9 "
                    "is usually too little memory, -7 too little of it in /dev/shm, 1 an error "
                    "that it printed); use fewer workers or 0"
                ) from error
            yield found


def _start_worker(index: int, count: int) -> None:
    # An accelerator belongs to the process that trains; grain imports JAX, sometimes before this.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Ctrl-C reaches the whole group of processes; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed cannot end its workers.
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

"""Streaming over a public pool that need not fit into memory.

The pool is walked in chunks of one fixed shape on a grid that starts at row 0, whoever walks them:
a row's scores are then the same bits for any number of devices and processes. Each process walks
its share of the chunks and keeps the best rows so far; the lists are merged at the end.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.proxy.density import (
    any_direct,
    check_features,
    chunk_rows,
    group,
    pool_pass,
    value_range,
)
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.sharding import AXIS, fetch_ahead, replicate, shard_rows

# Floats of one piece that is read from the pool at a time: 16 MiB.
_PIECE_FLOATS = 2**22
# Rows picked from a file at a time: around each the system may map pages of 64 KiB, 16 MiB in all.
_PICK_ROWS = 256

Range = tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d"]]


def open_pool(features: Any) -> Float[np.ndarray, "p d"]:
    """Return a pool of features to read in pieces: an array, or a path of a `.npy` file, mapped.

    Raises:
      InputError: a missing, truncated or foreign file, or anything but (p, d) real numbers; names
        the file.

    Source: ours.
    """
    if isinstance(features, str | os.PathLike):
        try:
            # Not np.load, which opens archives and pickles too.
            features = np.lib.format.open_memmap(features, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{features}: is not a whole .npy file ({error})") from error
    if isinstance(features, np.memmap):
        if features.ndim != 2 or 0 in features.shape or features.dtype.kind not in "fiu":
            raise InputError(
                f"{pool_name(features)}: {features.dtype} of shape {features.shape}, expected real "
                "numbers (samples, dimensions), at least one of each"
            )
        return features
    return check_features(features)


def pool_name(pool: Float[np.ndarray, "p d"]) -> str:
    """What to call a pool in a message: its file, where it has one."""
    return str(getattr(pool, "filename", None) or "features")


def read_rows(pool: Float[np.ndarray, "p d"], start: int, stop: int) -> Float[np.ndarray, "n d"]:
    """Rows of the pool as float32, copied if they come from a file, whose pages are let go."""
    if not isinstance(pool, np.memmap):
        return pool[start:stop]
    with np.errstate(over="ignore"):
        rows = np.array(pool[start:stop], dtype=np.float32, order="C")
    _let_go(pool)
    return rows


def pick_rows(
    pool: Float[np.ndarray, "p d"], rows: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n d"]:
    """Some rows of the pool as float32, in the order of `rows`; a file's pages are let go.

    Raises:
      InputError: rows that hold NaN or infinity.

    Source: ours.
    """
    picked = np.empty((rows.size, pool.shape[1]), np.float32)
    # In the file's order, and a part at a time: else random rows map almost the whole file.
    order = np.argsort(rows, kind="stable")
    for start in range(0, rows.size, _PICK_ROWS):
        part = order[start : start + _PICK_ROWS]
        with np.errstate(over="ignore"):
            picked[part] = pool[rows[part]]
        _let_go(pool)
    bad = ~np.isfinite(picked).all(axis=1)
    if bad.any():
        raise InputError(
            f"{pool_name(pool)}: {np.count_nonzero(bad)} of the {rows.size} samples looked at hold "
            f"NaN or infinity (the first is sample {rows[bad].min()}), expected finite float32 "
            "numbers"
        )
    return picked


def _let_go(pool: Float[np.ndarray, "p d"]) -> None:
    """No longer count a mapped file's pages as this process's; they stay in the system's cache."""
    mapped = getattr(pool, "_mmap", None)
    # What was written to a copy-on-write map ("c") exists nowhere else.
    if mapped is not None and pool.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def pool_range(pool: Float[np.ndarray, "p d"]) -> Range:
    """Lowest and highest value of each dimension, over all processes.

    Raises:
      InputError: on every process, rows that hold NaN or infinity.

    Source: ours.
    """
    dim = pool.shape[1]
    low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
    bad, first = 0, pool.shape[0]
    share = distributed.share(pool.shape[0])
    step = max(1, _PIECE_FLOATS // dim)
    for start in range(share.start, share.stop, step):
        rows = read_rows(pool, start, min(start + step, share.stop))
        least, most = value_range(rows)
        if not (np.isfinite(least).all() and np.isfinite(most).all()):
            found = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            bad, first = bad + found.size, min(first, start + int(found[0]))
            continue
        low, high = np.minimum(low, least), np.maximum(high, most)
    counts = distributed.gather(np.array([bad, first]))
    if counts[:, 0].sum():
        raise InputError(
            f"{pool_name(pool)}: {counts[:, 0].sum()} samples hold NaN or infinity (the first is "
            f"sample {counts[:, 1].min()}), expected finite float32 numbers"
        )
    low, high = distributed.gather(np.stack([low, high])).swapaxes(0, 1)
    return low.min(axis=0), high.max(axis=0)


def scores(
    gmms: Sequence[Gmm],
    pool: Float[np.ndarray, "p d"],
    bounds: Range,
    mesh: Mesh,
    *,
    joint: bool = False,
) -> Iterator[tuple[int, Float[np.ndarray, "..."]]]:
    """First row and log-likelihoods (v, n), or (v, g, n) if `joint`, of piece after piece.

    Goes through this process's share of the pool, in order. The next piece is read and sent before
    the scores of the last are waited for.

    Source: ours.
    """
    rows, dim = pool.shape
    chunk = chunk_rows(gmms)
    wide = max(dim, len(gmms) * (max(g.components for g in gmms) if joint else 1))
    together = max(1, _PIECE_FLOATS // (wide * chunk * mesh.shape[AXIS]))
    share = distributed.share(-(-rows // chunk))
    stop = min(share.stop * chunk, rows)
    together = min(together, -(-len(share) // mesh.shape[AXIS]))
    step = chunk * mesh.shape[AXIS] * max(together, 1)
    grouped = group(gmms, *bounds)
    placed, mixed = replicate(grouped, mesh), any_direct(grouped[0])

    def pieces() -> Iterator[tuple[jax.Array, tuple[int, int]]]:
        for start in range(share.start * chunk, stop, step):
            part = read_rows(pool, start, min(start + step, stop))
            count = len(part)
            sharded, _ = shard_rows(np.pad(part, [(0, step - count), (0, 0)]), mesh)
            values = pool_pass(*placed, sharded, mesh=mesh, chunk=chunk, joint=joint, mixed=mixed)
            yield values, (start, count)

    for values, (start, count) in fetch_ahead(pieces()):
        yield start, values[..., :count]


class Best:
    """The `count` rows of the highest keys in each of several lists; ties by the lower index.

    Keys of -inf and NaN are never kept.
    """

    def __init__(self, lists: int, count: int):
        self.count = count
        self._keys = [np.zeros(0) for _ in range(lists)]
        self._rows = [np.zeros(0, np.int64) for _ in range(lists)]
        self._least = np.full(lists, -np.inf)

    def add(self, position: int, keys: Float[np.ndarray, "n"], start: int) -> None:
        """Offer rows `start`, `start` + 1, ... to one list; later calls bring higher rows."""
        # A later row that ties with the last kept one loses, so only higher keys matter.
        better = np.flatnonzero(keys > self._least[position])
        if better.size == 0:
            return
        all_keys = np.concatenate([self._keys[position], keys[better]])
        all_rows = np.concatenate([self._rows[position], better + start])
        if all_keys.size >= 2 * self.count:
            all_keys, all_rows = _highest(all_keys, all_rows, self.count)
            self._least[position] = all_keys[-1]
        self._keys[position], self._rows[position] = all_keys, all_rows

    def finish(self, *, whole: bool = True) -> list[Int[np.ndarray, "m"]]:
        """The rows of every list over all processes, the highest key first.

        Raises:
          RuntimeError: a list of fewer than `count` rows where `whole`; a bug, not bad input.
        """
        found = []
        for keys, rows in zip(self._keys, self._rows, strict=True):
            keys, rows = _highest(keys.astype(np.float64), rows, self.count)
            missing = self.count - keys.size
            keys = distributed.gather(np.pad(keys, (0, missing), constant_values=-np.inf))
            rows = distributed.gather(np.pad(rows, (0, missing)))
            real = keys > -np.inf
            found.append(_highest(keys[real], rows[real], self.count)[1])
        if whole and any(rows.size < self.count for rows in found):
            least = min(rows.size for rows in found)
            raise RuntimeError(f"{least} rows have finite keys, expected {self.count} or more")
        return found


def _highest(
    keys: Float[np.ndarray, "n"], rows: Int[np.ndarray, "n"], count: int
) -> tuple[Float[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    order = np.lexsort((rows, -keys))[:count]
    return keys[order], rows[order]


def skip_noise(generator: np.random.Generator, count: int) -> None:
    """Move on in a stream of Gumbel noise, in bounded memory."""
    for start in range(0, count, 2**20):
        generator.gumbel(size=min(2**20, count - start))

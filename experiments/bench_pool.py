"""How long scoring a pool takes beside scikit-learn and a matrix product, and in what memory.

    python -m experiments.bench_pool [one] [many] [memory]

Everything is in float32, scikit-learn's mixtures too, and timed in turns in one process, each right
after a tenth of a second of the same.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.mixture import GaussianMixture

from experiments.bench import alternate, note, peak_mib, report
from tapvit_jax.proxy.density import chunk_rows, log_likelihood
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.proxy.select import Method, select
from tapvit_jax.runtime import set_up_jax

COMPONENTS = 10
REPEATS = 9
ONE = (1, 128, 40_000)  # devices, dimensions, rows
MANY = (50, 64, 20_000)
MEMORY_ROWS = (1_000_000, 10_000_000)
MEMORY_DIM = 16
COUNTS = (640, 6_400)
_WRITE_ROWS = 2**18


def mixture(rng: np.random.Generator, dim: int, covariance_type: str) -> Gmm:
    """A mixture whose components overlap, as those of images do."""
    weights = rng.dirichlet(np.full(COMPONENTS, 5.0)).astype(np.float32)
    means = rng.standard_normal((COMPONENTS, dim)).astype(np.float32)
    if covariance_type == "diag":
        covariances = rng.uniform(0.5, 2.0, (COMPONENTS, dim))
    else:
        roots = rng.standard_normal((COMPONENTS, dim, dim)) / np.sqrt(dim)
        covariances = roots @ np.swapaxes(roots, 1, 2) + 0.5 * np.eye(dim)
    return Gmm(weights, means, covariances.astype(np.float32), covariance_type)


def scikit_learn(gmm: Gmm) -> GaussianMixture:
    """The same mixture in scikit-learn."""
    found = GaussianMixture(gmm.components, covariance_type=gmm.covariance_type)
    found.weights_, found.means_, found.covariances_ = gmm.weights, gmm.means, gmm.covariances
    if gmm.covariance_type == "diag":
        precisions = 1 / np.sqrt(gmm.covariances)
    else:
        lower = np.linalg.cholesky(gmm.covariances.astype(np.float64))
        precisions = np.swapaxes(np.linalg.inv(lower), 1, 2)
    found.precisions_cholesky_ = precisions.astype(np.float32)
    return found


def against_scikit_learn(shape: tuple[int, int, int], covariance_type: str, flops: int) -> None:
    """Log-likelihoods of all mixtures against scikit-learn's and the product's own rate.

    `flops` is what one row costs in one component of one mixture.
    """
    devices, dim, rows = shape
    rng = np.random.default_rng(0)
    gmms = [mixture(rng, dim, covariance_type) for _ in range(devices)]
    features = rng.standard_normal((rows, dim)).astype(np.float32)
    theirs = [scikit_learn(gmm) for gmm in gmms]
    # What diagonal mixtures multiply are values and their squares; full ones bring d rows each.
    inner, outer = (2 * dim, 1) if covariance_type == "diag" else (dim, dim)
    columns = devices * COMPONENTS * outer
    left = jnp.asarray(rng.standard_normal((rows, inner)), jnp.float32)
    right = jnp.asarray(rng.standard_normal((inner, columns)), jnp.float32)
    chunk = chunk_rows(gmms)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    whole = f"matrix product {rows} x {inner} by {inner} x {columns}"
    part = f"the same of one chunk, {chunk} rows"
    runs = {
        "log_likelihood": lambda: log_likelihood(gmms, features),
        "scikit-learn": lambda: [g.score_samples(features) for g in theirs],
        whole: lambda: product(left, right),
        part: lambda: product(left[:chunk], right),
    }
    times = alternate(runs, REPEATS, warm=True)
    title = f"pool scoring, {devices} x {covariance_type}, K = {COMPONENTS}, d = {dim}"
    report(f"{title}, {rows} rows", times)
    ours, expected = log_likelihood(gmms, features), np.stack(runs["scikit-learn"]())
    note(f"largest difference of the two: {np.abs(ours - expected).max():.1e}")
    useful = flops * rows * COMPONENTS * devices / times["log_likelihood"] / 1e9
    rates = [2e-9 * n * inner * columns / times[name] for n, name in ((rows, whole), (chunk, part))]
    note(
        f"{useful:.0f} useful GFLOP/s ({flops} a row and component), "
        f"{useful / rates[0]:.0%} of the matrix product's {rates[0]:.0f} and "
        f"{useful / rates[1]:.0%} of one chunk's {rates[1]:.0f}"
    )


def write_pool(path: Path, rows: int) -> None:
    """A `.npy` file of random features, written a part at a time."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, MEMORY_DIM)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, _WRITE_ROWS):
            count = min(_WRITE_ROWS, rows - start)
            file.write(rng.standard_normal((count, MEMORY_DIM), dtype=np.float32).tobytes())


def _select_once(path: Path, method: str, queue) -> None:
    set_up_jax()
    gmms = [mixture(np.random.default_rng(1), MEMORY_DIM, "diag")]
    jax.block_until_ready(jnp.zeros(1))
    before, start = peak_mib(), time.perf_counter()
    select(gmms, path, COUNTS[0], method=method, finetune_count=COUNTS[1])
    queue.put((time.perf_counter() - start, peak_mib() - before))


def memory(rows: int) -> None:
    """Peak memory that choosing images of a pool on disk adds to a process, and its time."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.npy"
        write_pool(path, rows)
        size = path.stat().st_size / 2**20
        for method in get_args(Method):
            queue = context.SimpleQueue()
            process = context.Process(target=_select_once, args=(path, method, queue))
            process.start()
            seconds, added = queue.get()
            process.join()
            note(
                f"select, {method}, {COUNTS[1]} of {rows} rows on disk ({size:.0f} MiB): "
                f"adds {added:.0f} MiB, {seconds:.1f} s with compilation"
            )


def one() -> None:
    """A single full mixture."""
    dim = ONE[1]
    # The product of a triangular factor, without what is zero.
    against_scikit_learn(ONE, "full", dim * (dim + 1))


def many() -> None:
    """Diagonal mixtures of many devices."""
    # Two products of vectors: with the values and with their squares.
    against_scikit_learn(MANY, "diag", 4 * MANY[1])


def on_disk() -> None:
    """Pools on disk, one ten times as large as the other."""
    for rows in MEMORY_ROWS:
        memory(rows)


PARTS = {"one": one, "many": many, "memory": on_disk}


def main(argv: Sequence[str] = ()) -> None:
    """Run the comparisons that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_pool")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PARTS)}")
    names = parser.parse_args(argv).names or list(PARTS)
    unknown = sorted(set(names) - PARTS.keys())
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    set_up_jax()
    for name in names:
        PARTS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])

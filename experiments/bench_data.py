"""Images decoded in a second, and how long training waits for them.

    python -m experiments.bench_data [IMAGES ...] [--workers=0,1,2] [--batch=16]

Photographs of 500 x 375 pixels are made up and decoded at 224; IMAGES are folders or whatever else
`open_source` takes. All ways are timed in turns in one process, so that a machine that slows down
slows all.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from absl import app, flags
from PIL import Image

from experiments.bench import heading, note
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import FolderSource, open_source
from tapvit_jax.models import backbone
from tapvit_jax.models.presets import create
from tapvit_jax.runtime import set_up_jax

_WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes to compare.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images in a batch.")
_IMAGES = flags.DEFINE_integer("images", 512, "Images to decode in a run.")
_STEPS = flags.DEFINE_integer("steps", 12, "Training steps in a run.")
_SIZE = flags.DEFINE_integer("train_size", 64, "Side of the images trained on.")

_FILES, _REPEATS = 128, 2
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_photographs(root: Path) -> None:
    """JPEGs of 500 x 375 pixels, about 80 kB each, smooth with some noise as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(_FILES):
        coarse = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        path = root / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def _order(source: ImageSource, count: int) -> np.ndarray:
    return np.resize(np.random.default_rng(0).permutation(len(source)), count)


def decoding(title: str, source: ImageSource) -> None:
    """Images in a second between the first batch and the last, and when the first one comes."""
    preprocess = Preprocess(224, mean=_MEAN, std=_STD, crop_pct=0.9)
    order = _order(source, _IMAGES.value)
    rates: dict[int, list[float]] = {int(w): [] for w in _WORKERS.value}
    delays: dict[int, list[float]] = {workers: [] for workers in rates}
    for _ in range(_REPEATS):
        for workers in rates:
            start = time.perf_counter()
            found = batches(source, order, preprocess, _BATCH.value, workers=workers)
            next(found)
            first = time.perf_counter()
            count = 0
            for batch in found:
                count += len(batch["image"])
                last = time.perf_counter()
            rates[workers].append(count / (last - first))
            delays[workers].append(first - start)
    base = max(next(iter(rates.values())))
    heading(f"decoding at 224, {title}, batch {_BATCH.value}")
    for workers, values in rates.items():
        note(
            f"{_name(workers):20} {max(values):9.0f} images/s   x {max(values) / base:.2f}   "
            f"first batch after {min(delays[workers]):.2f} s"
        )


def training(title: str, source: ImageSource) -> None:
    """Share of the time that a training loop stands still for the next batch."""
    size = _SIZE.value
    preprocess = Preprocess(size, mean=_MEAN, std=_STD, crop_pct=0.9)
    config, _ = create("deit_tiny_patch16_224", img_size=size)
    params = backbone.init(config, jax.random.key(0))
    optimizer = optax.adamw(1e-4)
    moments = optimizer.init(params)

    @jax.jit
    def step(params, moments, images, labels):
        def loss(params):
            logits = backbone.apply(config, params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    def run(found: Iterator) -> tuple[float, float]:
        nonlocal params, moments
        waited = 0.0
        begin = time.perf_counter()
        for _ in range(_STEPS.value):
            start = time.perf_counter()
            batch = next(found)
            waited += time.perf_counter() - start
            params, moments, value = step(params, moments, batch["image"], batch["label"])
            jax.block_until_ready(value)
        return waited, time.perf_counter() - begin

    order = _order(source, _BATCH.value * (_STEPS.value + 1))
    heading(f"training DeiT-T at {size}, {title}, batch {_BATCH.value}, {jax.default_backend()}")
    for workers in map(int, _WORKERS.value):
        shares, rates = [], []
        for _ in range(_REPEATS):
            found = batches(source, order, preprocess, _BATCH.value, workers=workers)
            # The first batch pays for starting workers and for compiling.
            batch = next(found)
            jax.block_until_ready(step(params, moments, batch["image"], batch["label"]))
            waited, whole = run(found)
            found.close()
            shares.append(waited / whole)
            rates.append(_BATCH.value * _STEPS.value / whole)
        note(
            f"{_name(workers):20} {max(rates):9.0f} images/s   "
            f"waits {100 * min(shares):.1f} % of the time"
        )


def _name(workers: int) -> str:
    return f"{workers} worker processes" if workers else "threads"


def main(arguments: list[str]) -> None:
    """Run both comparisons on made-up photographs and on every set that is named."""
    set_up_jax()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        sources = {"500 x 375 JPEG": FolderSource(folder)}
        sources |= {name: open_source(name) for name in arguments[1:]}
        for title, source in sources.items():
            decoding(title, source)
        for title, source in sources.items():
            training(title, source)


if __name__ == "__main__":
    app.run(main)

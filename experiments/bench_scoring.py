"""How long scoring takes beside the forward pass, and layer probes beside masking one at a time.

    python -m experiments.bench_scoring

Every pair is timed in turns in one process, so that a machine that slows down slows both.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np

from experiments.bench import alternate, note, peak_mib, report
from tapvit_jax.importance import layers as layer_scoring
from tapvit_jax.importance.criteria import unit_importance
from tapvit_jax.importance.layers import LayerConfig, LayerScores, layer_importance, probe_mask
from tapvit_jax.importance.neurons import NeuronConfig, neuron_importance
from tapvit_jax.models import backbone
from tapvit_jax.models.presets import create
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.mask import Plan, apply_masks
from tapvit_jax.prune.units import unit_key
from tapvit_jax.runtime import set_up_jax

NEURONS = (("deit_tiny", 16, 5), ("deit_tiny", 64, 3), ("deit_small", 64, 2))
LAYERS = (("deit_tiny", 8, 2), ("swin_tiny", 2, 1))
MEMORY = ("deit_base", 64)
SPARSITY = 0.5


def dense(name: str) -> Model:
    """A DeiT or Swin with fresh parameters: how long it takes does not depend on them."""
    size = "patch4_window7_224" if name.startswith("swin") else "patch16_224"
    config, _ = create(f"{name}_{size}")
    return Model(config, backbone.init(config, jax.random.key(0)), name=name)


def random_images(model: Model, count: int) -> np.ndarray:
    """Noise in the shape of images."""
    side = model.config.image_size
    return np.random.default_rng(0).standard_normal((count, side, side, 3)).astype(np.float32)


def neurons(name: str, batch: int, repeats: int) -> None:
    """Composite scores of one batch against the plain forward pass."""
    model = dense(name)
    images = jax.device_put(random_images(model, batch))
    standard = jax.jit(functools.partial(backbone.apply, model.config, standard_ops=True))
    runs = {
        "forward pass": lambda: model.apply(images),
        "the same, softmax and GELU of jax.nn": lambda: standard(model.params, images),
    }
    published = NeuronConfig.as_published()
    mlp, attn = (dataclasses.replace(w, gradient=0.5) for w in (published.mlp, published.attn))
    methods = {
        "relevance, redundancy, activation (tap_published)": published,
        "these and Taylor": dataclasses.replace(published, mlp=mlp, attn=attn),
        "mended, queries and keys apart, and Taylor (tap)": NeuronConfig(),
    }
    for title, scoring in methods.items():
        runs[title] = lambda scoring=scoring: neuron_importance(model, [images], config=scoring)
    runs["Taylor alone (taylor)"] = lambda: unit_importance(model, [images], "taylor")
    report(f"neuron scores, {name}, batch {batch}", alternate(runs, repeats))


def one_at_a_time(model: Model, images: jax.Array, units: dict) -> LayerScores:
    """Layer scores the plain way: mask one branch, run both models from the start."""
    blocks = model.config.blocks
    found = {"mlp": np.zeros((1, len(blocks))), "attn": np.zeros((1, len(blocks)))}
    for i in range(len(blocks)):
        for branch, kinds in (("mlp", ("mlp",)), ("attn", ("qk", "vo"))):
            keys = [unit_key(i, kind) for kind in kinds]
            masks = {key: probe_mask(units[key], SPARSITY, ragged=False) for key in keys}
            masked = apply_masks(model, Plan(model.config, masks))
            original = jax.nn.log_softmax(model.apply(images))
            pruned = jax.nn.log_softmax(masked.apply(images))
            kl = (np.exp(original) * (original - pruned)).sum(axis=1)
            found[branch][0, i] = kl.mean()
    return LayerScores((SPARSITY,), **found)


def block_evaluations(run: Callable[[], object], batch: int) -> int:
    """How often layer scoring runs a block on a batch of images; a probe of a block counts as one.

    On several devices `batch` has to be a multiple of their number.
    """
    found = []

    def counted(original: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def evaluate(*args):
            out = original(*args)
            found.append(len(out) // batch)
            return out

        return evaluate

    with contextlib.ExitStack() as stack:
        for block in ("run_block", "_gated_block"):
            replaced = counted(getattr(layer_scoring, block))
            stack.enter_context(mock.patch.object(layer_scoring, block, replaced))
        run()
    return sum(found)


def layers(name: str, batch: int, repeats: int) -> None:
    """Layer scores with shared prefixes against one whole forward pass for every probe."""
    model = dense(name)
    images = jax.device_put(random_images(model, batch))
    units = neuron_importance(model, [images], "tap_published")
    probes = LayerConfig(sparsity=(SPARSITY,))
    runs = {
        "shared prefixes": lambda: layer_importance(model, [images], units, config=probes),
        "one masked branch at a time, original rerun": lambda: one_at_a_time(model, images, units),
    }
    depth = len(model.config.blocks)
    report(f"layer scores, {name}, {depth} blocks, batch {batch}", alternate(runs, repeats))
    quick, plain = (run() for run in runs.values())
    difference = max(np.abs(getattr(quick, b) - getattr(plain, b)).max() for b in ("mlp", "attn"))
    note(f"largest difference of the two: {difference:.1e}")
    count = len(probes.sparsity)
    bound = depth + count * depth * (depth - 1) + 2 * count * depth
    found = block_evaluations(runs["shared prefixes"], batch)
    note(f"block evaluations: {found}, of at most L + S L (L - 1) + 2 S L = {bound}")


def _score_once(name: str, batch: int, method: str, queue) -> None:
    set_up_jax()
    model = dense(name)
    images = random_images(model, batch)
    start = time.perf_counter()
    neuron_importance(model, [images], method)
    queue.put((time.perf_counter() - start, peak_mib() / 2**10))


def memory(name: str, batch: int) -> None:
    """Peak memory of a process that scores one batch, and its time with compilation."""
    context = multiprocessing.get_context("spawn")
    for method in ("tap_published", "tap"):
        queue = context.SimpleQueue()
        process = context.Process(target=_score_once, args=(name, batch, method, queue))
        process.start()
        seconds, peak = queue.get()
        process.join()
        note(f"{name}, batch {batch}, {method}: peak {peak:.2f} GiB, {seconds:.0f} s in all")


def main() -> None:
    """Run all comparisons."""
    set_up_jax()
    for name, batch, repeats in NEURONS:
        neurons(name, batch, repeats)
    for name, batch, repeats in LAYERS:
        layers(name, batch, repeats)
    memory(*MEMORY)


if __name__ == "__main__":
    main()

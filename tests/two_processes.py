"""A whole small job for one process or several, run by test_distributed.py as a program of its own.

    python -m tests.two_processes OUT SHARED

Writes OUT/RANK.npz with everything that must not depend on the number of processes.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tapvit_jax import distributed
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import MemorySource
from tapvit_jax.errors import InputError
from tapvit_jax.importance.layers import LayerConfig
from tapvit_jax.models import backbone, store
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import vit_config
from tapvit_jax.pipeline import (
    PruneConfig,
    evaluate_model,
    plan_masks,
    score,
    scoring_batches,
)
from tapvit_jax.proxy.density import log_likelihood
from tapvit_jax.proxy.gmm import Gmm, GmmConfig
from tapvit_jax.proxy.select import select
from tapvit_jax.prune.allocate import allocate
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.recover import RecoverConfig, recover
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.runtime import set_up_jax
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train
from tapvit_jax.train.variants import Variant, train_variants

CLASSES, IMAGES = 3, 48
PREPROCESS = Preprocess(image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
RECIPE = TrainConfig(
    epochs=2, batch_size=8, learning_rate=1e-3, distill=0.5, shift=1, flip=True, cutmix=0.5
)


def job(shared: Path) -> dict[str, np.ndarray]:
    """Select, score, plan, fine-tune, evaluate, save and load."""
    rng = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    images = rng.standard_normal((IMAGES, 8, 8, 3)).astype(np.float32)
    images += labels[:, None, None, None].astype(np.float32)
    source = MemorySource(images, labels, [str(c) for c in range(CLASSES)])
    config = vit_config(
        image_size=8,
        patch_size=4,
        num_classes=CLASSES,
        in_channels=3,
        depth=1,
        num_heads=2,
        embed_dim=16,
        mlp_ratio=2.0,
    )
    params = backbone.init(config, jax.random.key(0))
    model = Model(config, params, PREPROCESS, source.class_names, name="small")
    found = {}

    # Rounded and repeated: many exact ties, also of rows that different processes score.
    features = np.tile(rng.standard_normal((167, 4)).round(1).astype(np.float32), (3, 1))
    gmms = [Gmm.fit(features[i * 40 : 90 + i * 40], GmmConfig(components=(2,))) for i in range(3)]
    found["log_likelihood"] = log_likelihood(gmms, features)
    for method in ("top", "quota", "importance"):
        found[f"select_{method}"] = select(gmms, features, 32, method=method)

    metric = rng.permutation(IMAGES)[:38]
    options = PruneConfig(batch_size=8, layers=LayerConfig(sparsity=(0.5,)))
    units, layers = score(model, source, metric, options)
    scored = units | layers.arrays()
    found |= {f"score_{name}": array for name, array in scored.items()}

    plans = [allocate(model, units, layers, Budget.parse(f"macs={share}")) for share in (0.5, 0.7)]
    own = scoring_batches(source, metric, PREPROCESS, options.batch_size)
    found["recovered"] = logits(
        recover(model, plans[0], own, config=RecoverConfig(prior="metric")), images
    )
    teacher = Teacher(config, params)
    variants = [
        Variant(params, metric[i : i + 20 + i], np.arange(5, 16 + i), plan_masks(plan), seed=i)
        for i, plan in enumerate([*plans, plans[0]])
    ]
    variants[1] = dataclasses.replace(variants[1], prior=np.array([0.5, 1.0, 2.0]))
    recipe = dataclasses.replace(RECIPE, checkpoint_epochs=1, checkpoint_steps=2)
    results = interrupted_once(
        functools.partial(
            train_variants,
            config,
            variants,
            source,
            PREPROCESS,
            recipe,
            teacher=teacher,
            checkpoints=shared / "variants",
        )
    )
    for i, result in enumerate(results):
        found[f"variant_{i}"] = logits(model.replace(params=result.params), images)

    data = TrainData(source, PREPROCESS, metric, np.arange(10))
    result = interrupted_once(
        functools.partial(
            train,
            config,
            params,
            data,
            recipe,
            seed=1,
            masks=variants[0].masks,
            teacher=teacher,
            checkpoints=shared / "one",
        )
    )
    tuned = model.replace(params=result.params)
    found["one"] = logits(tuned, images)
    metrics = evaluate_model(tuned, source, np.arange(IMAGES - 1), 8)
    found["metrics"] = np.array([metrics.top1, metrics.loss, metrics.count])
    small = reshape(tuned, plans[0])
    if distributed.is_main():
        store.save(small, shared / "model")
    distributed.barrier()
    loaded = store.load(shared / "model")
    found["loaded"] = logits(loaded, images)
    return found


class InterruptionError(Exception):
    """What stops a run after its first epoch."""


def interrupted_once(run: Callable[..., Any]) -> Any:
    """Stop a run after an epoch and let it go on from its checkpoint."""

    def stop(*_: Any) -> None:
        raise InterruptionError

    with contextlib.suppress(InterruptionError):
        run(on_epoch=stop)
    return run()


def logits(model: Model, images: np.ndarray) -> np.ndarray:
    """What a model is compared by: key biases, for one, may be anything, so Adam makes them so."""
    return np.asarray(model.apply(images))


def main(out: Path, shared: Path) -> None:
    """Run the job, check that disagreement is refused everywhere, and write the results."""
    set_up_jax()
    rank = distributed.process_index()
    found = job(shared)
    same = {"config": {"seed": 0, "budget": "macs=0.5"}}
    distributed.check_agreement(same)
    refused = ""
    try:
        distributed.check_agreement(same | {"pool": {"rows": 10 + rank, "dim": 4}})
    except InputError as error:
        refused = str(error)
    found["refused"] = np.array(refused)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / f"{rank}.npz", processes=distributed.process_count(), **found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

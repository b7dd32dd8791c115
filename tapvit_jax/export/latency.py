"""Latencies of models in ONNX Runtime on this machine, and the latency model fitted to them."""

import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tapvit_jax.errors import InputError
from tapvit_jax.export.onnx import write_onnx
from tapvit_jax.export.runtime import OnnxModel, measure_latency
from tapvit_jax.models.backbone import TransformerConfig, check_prunable, param_shapes
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.latency import LatencyModel, fit_latency, random_widths
from tapvit_jax.timing import Latency
from tapvit_jax.versions import library_versions


def load_models(models: Mapping[str, Model], threads: int) -> dict[str, OnnxModel]:
    """Each model in ONNX Runtime, through a temporary file."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="tapvit-latency-") as folder:
        for i, (name, model) in enumerate(models.items()):
            path = Path(folder) / f"{i}.onnx"
            write_onnx(model, path)
            found[name] = OnnxModel(path, threads)
    return found


def compare_latency(
    models: Mapping[str, Model], *, batch_size: int, threads: int, repeats: int = 40
) -> dict[str, Latency]:
    """Export several models and time them side by side (see `measure_latency`)."""
    loaded = load_models(models, threads)
    return measure_latency(loaded, batch_size=batch_size, repeats=repeats)


def measure_latency_model(
    dense: TransformerConfig,
    count: int,
    *,
    batch_size: int,
    threads: int,
    repeats: int = 20,
    round_to: int = 1,
    seed: int = 0,
    on_share: Callable[[float], None] = lambda share: None,
) -> LatencyModel:
    """Time random prunings of a dense model, and fit a latency model to them.

    Every pruning is timed together with the dense model and scaled by it, so that a machine whose
    speed drifts over the minutes that this takes still gives consistent times.

    Args:
      dense: the dense model's config.
      count: how many prunings.
      batch_size: images in a forward pass.
      threads: of ONNX Runtime.
      repeats: timed passes each.
      round_to: multiple of the random widths.
      seed: of the widths.
      on_share: called with every share of the work that is done.

    Raises:
      InputError: a ResNet, fewer than three prunings, or another number below one.

    Source: ours.
    """
    check_prunable(dense)
    # The dense model is a measurement too, and `fit_latency` takes four.
    if count < 3:
        raise InputError(f"count is {count}, expected 3 or more random prunings")
    sizes = {"batch_size": batch_size, "threads": threads, "repeats": repeats, "round_to": round_to}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} is {value}, expected 1 or more")
    rng = np.random.default_rng(seed)
    reference = load_models({"dense": _filled(dense)}, threads)["dense"]
    configs, ratios, times = [dense], [1.0], []
    for _ in range(count):
        config = random_widths(dense, rng, round_to)
        pair = {"dense": reference} | load_models({"pruned": _filled(config)}, threads)
        found = measure_latency(pair, batch_size=batch_size, repeats=repeats)
        configs.append(config)
        ratios.append(found["pruned"].median / found["dense"].median)
        times.append(found["dense"].median)
        on_share(1.0 / count)
    scale = float(np.median(times))
    machine = machine_record(threads) | {"repeats": repeats, "seed": seed}
    return fit_latency(
        dense,
        configs,
        [scale * ratio for ratio in ratios],
        batch_size=batch_size,
        threads=threads,
        machine=machine,
    )


def machine_record(threads: int) -> dict[str, Any]:
    """What latencies depend on, for the record."""
    return {
        "machine": platform.machine(),
        "processor": platform.processor(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": threads,
        "runtime": "ONNX Runtime, CPU",
        "libraries": library_versions(),
    }


def _filled(config: TransformerConfig) -> Model:
    # Times do not depend on values, unless they are so small that arithmetic slows down.
    rng = np.random.default_rng(0)
    shapes = param_shapes(config)
    params = jax.tree.map(
        lambda s: (0.02 * rng.standard_normal(s.shape)).astype(np.float32), shapes
    )
    return Model(config, params)

"""A latency model: milliseconds of a forward pass from a model's widths, fitted to measurements.

The model belongs to one dense model, one machine and one way to run it. It is stored as JSON, with
the measurements that it was fitted to.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.files import read_json, write_json
from tapvit_jax.models.backbone import TransformerConfig, family, read_config
from tapvit_jax.models.layers import BlockSpec
from tapvit_jax.structs import from_plain, to_plain

FORMAT = "tapvit-latency"
VERSION = 1

FEATURES = (
    "constant",
    "attn_branches",
    "attn_dense_macs",
    "attn_product_macs",
    "attn_logits",
    "mlp_branches",
    "mlp_macs",
    "mlp_units",
)
"""What a forward pass consists of; each takes a fitted time.

All but the first are sums over blocks: branches that are there, MACs of dense layers and of
attention products, attention weights (softmax), and MLP units times tokens (GELU).
"""

_NUMBER_SCALE = 1e9


def _block_features(spec: BlockSpec) -> list[float]:
    widths, n, d = spec.widths, spec.tokens, spec.embed_dim
    found = [0.0] * (len(FEATURES) - 1)
    if widths.attn:
        qk, v = widths.num_heads * widths.qk_dim, widths.num_heads * widths.v_dim
        found[0] = 1.0
        found[1] = n * d * (2 * qk + 2 * v) / _NUMBER_SCALE
        found[2] = n * spec.attended * (qk + v) / _NUMBER_SCALE
        found[3] = n * spec.attended * widths.num_heads / _NUMBER_SCALE
    if widths.mlp:
        found[4] = 1.0
        found[5] = 2 * n * d * widths.mlp_dim / _NUMBER_SCALE
        found[6] = n * widths.mlp_dim / _NUMBER_SCALE
    return found


def features(config: TransformerConfig) -> Float[np.ndarray, "k"]:
    """The quantities `FEATURES` of a config; counts are in units of 10^9."""
    blocks = [_block_features(config.block_spec(i)) for i in range(len(config.blocks))]
    return np.array([1.0, *np.sum(blocks, axis=0)])


def skeleton(config: TransformerConfig) -> TransformerConfig:
    """A config without its widths: what all models that one latency model serves share."""
    bare = [
        dataclasses.replace(block, num_heads=0, qk_dim=0, v_dim=0, mlp_dim=0, attn=True, mlp=True)
        for block in config.blocks
    ]
    return dataclasses.replace(config, blocks=tuple(bare))


@dataclasses.dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a forward pass, linear in a config's `features`.

    Attributes:
      dense: config of the dense model whose prunings were measured.
      coefficients: milliseconds a feature, none negative, so that wider is never predicted faster.
      batch_size: images in the measured forward pass.
      threads: of the runtime that was measured.
      error_median: median relative error of predictions for left-out measurements.
      error_max: the largest of them.
      measured: the measurements, as features and milliseconds.
      machine: where and how it was measured, for the record.

    Raises:
      InputError: values out of range.
    """

    dense: TransformerConfig
    coefficients: tuple[float, ...]
    batch_size: int
    threads: int
    error_median: float
    error_max: float
    measured: tuple[tuple[tuple[float, ...], float], ...]
    machine: Mapping[str, Any]

    def __post_init__(self):
        known = [c for c in self.coefficients if 0 <= c < math.inf]
        if len(self.coefficients) != len(FEATURES) or len(known) != len(FEATURES) or not any(known):
            raise InputError(
                f"coefficients are {self.coefficients}, expected {len(FEATURES)}, finite, none "
                "negative and not all zero"
            )
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("error_median", "error_max"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 or more, finite")

    def predict(self, config: TransformerConfig) -> float:
        """Milliseconds of one forward pass.

        Raises:
          InputError: a config that is no pruning of the dense model.
        """
        if skeleton(config) != skeleton(self.dense):
            raise InputError(
                "the latency model was measured for another dense model: "
                f"{_brief(self.dense)}, found {_brief(config)}"
            )
        return float(features(config) @ np.array(self.coefficients))

    def save(self, path: str | os.PathLike) -> None:
        """Write the model as JSON."""
        plain = to_plain(self) | {"format": FORMAT, "version": VERSION}
        write_json(path, plain | {"family": family(self.dense), "features": list(FEATURES)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LatencyModel":
        """Read a model that `save` wrote.

        Raises:
          InputError: a missing, damaged or foreign file.
        """
        found = read_json(Path(path))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path}: is not a {FORMAT} file")
        if found.get("version") != VERSION or found.get("features") != list(FEATURES):
            raise InputError(f"{path}: has another version, expected {VERSION}")
        dense = read_config(found.get("family"), found.get("dense"), f"{path}: dense")
        fields = {f.name for f in dataclasses.fields(cls)} - {"dense"}
        rest = {key: value for key, value in found.items() if key in fields}
        return from_plain(cls, rest | {"dense": dense}, str(path))


def _brief(config: TransformerConfig) -> str:
    return (
        f"{family(config)} of {len(config.blocks)} blocks, embed_dim {config.embed_dim}, "
        f"image_size {config.image_size}"
    )


def fit_latency(
    dense: TransformerConfig,
    configs: Sequence[TransformerConfig],
    milliseconds: Sequence[float],
    *,
    batch_size: int = 1,
    threads: int = 1,
    machine: Mapping[str, Any] | None = None,
) -> LatencyModel:
    """Fit a latency model to measured prunings of a dense model.

        minimise sum_i ((x_i c - t_i) / t_i)^2   over c >= 0

    so that every measurement counts by its relative error. The errors come from leaving each
    measurement out in turn. Source: ours.

    Args:
      dense: the dense model's config.
      configs: what was measured; widths should vary over the range that plans will use.
      milliseconds: median time of each.
      batch_size: images in the forward pass.
      threads: of the runtime.
      machine: for the record.

    Raises:
      InputError: fewer than four measurements, or a time that is not positive.
    """
    x = np.stack([features(config) for config in configs]) if configs else np.zeros((0, 1))
    t = np.asarray(milliseconds, np.float64)
    if len(t) < 4 or len(t) != len(x):
        raise InputError(f"{len(t)} measurements of {len(x)} models, expected four or more of each")
    if not np.isfinite(t).all() or t.min() <= 0:
        raise InputError("measured times must be positive and finite")

    # Here, where tables are fitted: scipy.optimize would take a tenth of every program's start.
    from scipy.optimize import nnls

    def solve(rows: Float[np.ndarray, "i k"], times: Float[np.ndarray, "i"]) -> np.ndarray:
        scaled = rows / times[:, None]
        size = np.maximum(np.abs(scaled).max(axis=0), 1e-30)
        return nnls(scaled / size, np.ones(len(times)))[0] / size

    errors = []
    for i in range(len(t)):
        rest = np.arange(len(t)) != i
        errors.append(abs(float(x[i] @ solve(x[rest], t[rest])) / t[i] - 1.0))
    return LatencyModel(
        dense=dense,
        coefficients=tuple(map(float, solve(x, t))),
        batch_size=batch_size,
        threads=threads,
        error_median=float(np.median(errors)),
        error_max=float(np.max(errors)),
        measured=tuple(
            (tuple(map(float, row)), float(time)) for row, time in zip(x, t, strict=True)
        ),
        machine=dict(machine or {}),
    )


def random_widths(
    dense: TransformerConfig, rng: np.random.Generator, round_to: int = 1
) -> TransformerConfig:
    """A random pruning: an overall ratio, and each block's widths around it."""
    overall = rng.uniform(0.1, 1.0)
    blocks = []
    for block in dense.blocks:

        def narrow(size: int) -> int:
            ratio = float(np.clip(overall * rng.uniform(0.6, 1.4), 0.05, 1.0))
            return min(size, max(1, round(ratio * size / round_to)) * round_to)

        blocks.append(
            dataclasses.replace(
                block,
                qk_dim=narrow(block.qk_dim),
                v_dim=narrow(block.v_dim),
                mlp_dim=narrow(block.mlp_dim),
            )
        )
    return dataclasses.replace(dense, blocks=tuple(blocks))

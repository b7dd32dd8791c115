"""Layer importance: the divergence of the output when one branch of one block is pruned.

All probes of a block share its input, which one pass of the dense model provides, and run only the
blocks behind it: for L blocks and S sparsities, L + 2 S L + S L (L - 1) block evaluations a batch
instead of 4 S L^2. Blocks of equal widths share one compiled program, but for the last one of a ViT
that classifies its class token, which runs for that token alone.

With recovery in the loop a probe is what closed-form recovery makes of the pruned branch, and
queries and keys are probed apart from values: what recovery can make up for costs nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.importance.neurons import Scores
from tapvit_jax.importance.probes import (
    Direction,
    divergence_sums,
    log_probabilities,
    run_block,
)
from tapvit_jax.importance.streaming import unpack_batch
from tapvit_jax.models.backbone import (
    TransformerConfig,
    apply_block,
    block_params,
    check_prunable,
    classified_tokens,
)
from tapvit_jax.models.layers import BlockConfig, BlockSpec, Gates
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.mask import top_k_mask
from tapvit_jax.prune.recover import (
    kept_moments,
    layer_scale,
    solve_mlp,
    solve_queries_keys,
    solve_values,
)
from tapvit_jax.prune.streams import Streams, embed_images
from tapvit_jax.prune.units import HEAD_KINDS, WIDTH_KINDS, check_unit_scores, unit_key
from tapvit_jax.sharding import data_mesh, replicate, shard_rows
from tapvit_jax.structs import check_fields

Branch = Literal["mlp", "attn"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """How layers are probed.

    Attributes:
      sparsity: shares of a branch's units that the probes remove, one probe each; 1 removes the
        branch, biases and all.
      direction: "forward" is KL(original || pruned); "reverse", as published, KL(pruned ||
        original).
      batch_quirk: sum over batches of (mean over images / batch size), as published, which makes
        scores depend on the batch size; otherwise the plain mean over all images.
      ragged: choose attention dims over all heads of a layer together (as published) or the same
        count in every head.
      attention: probes remove "dims" of every head, or whole "heads", to the nearest one and all
        only at sparsity 1; as `AllocateConfig.attention`. Scores stand under the sparsity that was
        asked for: of four heads, 0.9 removes three.
      recovery: "ridge" recovers every probe in closed form, each branch alone, and scores queries
        and keys apart from values; "none" prunes only.
      max_batches: divergences are taken on so many batches, and none beyond is read.
      recovery_batches: with recovery, so many batches are read after all, to solve from.
    """

    sparsity: tuple[float, ...] = (0.5, 0.7, 0.9)
    direction: Direction = "forward"
    attention: Literal["dims", "heads"] = "dims"
    recovery: Literal["none", "ridge"] = "none"
    batch_quirk: bool = False
    ragged: bool = False
    max_batches: int = 50
    recovery_batches: int = 50

    def __post_init__(self):
        check_fields(self)
        for name in ("max_batches", "recovery_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        distinct = len(set(self.sparsity)) == len(self.sparsity)
        if not self.sparsity or not distinct or any(not 0 < s <= 1 for s in self.sparsity):
            raise InputError(
                f"sparsity is {self.sparsity}, expected different values above 0, at most 1"
            )
        if self.attention == "heads" and self.ragged:
            raise InputError("attention 'heads' goes not with ragged")
        if self.recovery == "ridge" and (self.ragged or self.batch_quirk):
            raise InputError("recovery in the loop goes neither with ragged nor with batch_quirk")

    @classmethod
    def as_published(cls, sparsity: tuple[float, ...] = (0.5,)) -> "LayerConfig":
        """What the authors' code of TAP-ViTs (arXiv 2601.02437) computes."""
        return cls(sparsity=sparsity, direction="reverse", batch_quirk=True, ragged=True)

    @property
    def batches_read(self) -> int:
        """How many batches are read at most."""
        most = self.recovery_batches if self.recovery == "ridge" else 0
        return max(self.max_batches, most)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerScores:
    """Divergences by probe sparsity and block; an absent branch scores 0.

    Attributes:
      sparsity: the probes.
      mlp: scores of the MLP branches.
      attn: scores of the attention branches; of queries, keys and values together, or of heads.
      qk: scores of queries and keys alone, with recovery in the loop.
      vo: scores of values alone, with recovery in the loop; `attn` is then the sum of both.
    """

    sparsity: tuple[float, ...]
    mlp: Float[np.ndarray, "s l"]
    attn: Float[np.ndarray, "s l"]
    qk: Float[np.ndarray, "s l"] | None = None
    vo: Float[np.ndarray, "s l"] | None = None

    def mean(self, branch: Branch) -> Float[np.ndarray, "l"]:
        """Mean over the probes."""
        return getattr(self, branch).mean(axis=0)

    def arrays(self) -> dict[str, Float[np.ndarray, "s l"]]:
        """The scores by name, for storage."""
        found = {name: getattr(self, name) for name in ("mlp", "attn", "qk", "vo")}
        return {name: values for name, values in found.items() if values is not None}


def probe_count(size: int, sparsity: float) -> int:
    """Units that a probe keeps: int(n (1 - s)), as published, safe against 0.5 - 1e-17."""
    return int(size * (1 - sparsity) + 1e-9)


def layer_importance(
    model: Model,
    batches: Iterable[Any],
    units: Scores,
    sparsity: Sequence[float] | float | None = None,
    *,
    config: LayerConfig | None = None,
    mesh: Mesh | None = None,
) -> LayerScores:
    """Score every branch of every block by what pruning it alone does to the output.

        R_l = mean over images of KL(p || p_l)

    where p is the dense prediction and p_l the one with branch l pruned to its highest-scoring
    units at the probe sparsity.

    Args:
      model: the dense model.
      batches: as in `neuron_importance`.
      units: neuron scores, which say what a probe removes.
      sparsity: one or several probe sparsities; overrides the config's.
      config: direction and quirks.
      mesh: devices of this process that share every batch's images; by default all.

    Raises:
      InputError: a sparsity outside (0, 1], no batches, or scores missing, of another shape or not
        finite.

    Source: TAP-ViTs (arXiv 2601.02437); several probes, the shared prefix and the fixes are ours.
    """
    check_prunable(model.config)
    config = config or LayerConfig()
    if sparsity is not None:
        values = (sparsity,) if isinstance(sparsity, int | float) else tuple(sparsity)
        config = dataclasses.replace(config, sparsity=values)
    kinds = HEAD_KINDS if config.attention == "heads" else WIDTH_KINDS
    units = check_unit_scores(model.config, units, kinds)
    if config.recovery == "ridge":
        return _recovered_importance(model, batches, units, config, mesh)
    gates = _probe_gates(model.config, config, units)
    devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
    total: list[Array] | None = None
    weight = 0.0
    placed: tuple[int, Params, list[dict[Branch, Gates]]] | None = None
    for batch in itertools.islice(batches, distributed.own_count(config.max_batches)):
        images, _ = unpack_batch(batch)
        if len(images) == 0:
            continue
        if placed is None:
            used = data_mesh(devices[: len(images)])
            placed = (used.size, replicate(model.params, used), replicate(gates, used))
            mesh = used
        rows, count = shard_rows(images, mesh)
        real, _ = shard_rows(np.ones(count, np.float32), mesh)
        found = _probe_batch(model.config, config, *placed, rows, real)
        scale = 1.0 / count**2 if config.batch_quirk else 1.0
        found = [values * scale for values in found]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        weight += 1.0 if config.batch_quirk else count
    if total is None:
        total = [np.zeros((1, len(_variants(config, block)))) for block in model.config.blocks]
    own = [np.asarray(values, np.float64).sum(axis=0) for values in jax.device_get(total)]
    found, weight = distributed.sum_over_processes((own, weight))
    if weight == 0:
        raise InputError("layer importance needs at least one batch")
    divisor = 1.0 if config.batch_quirk else weight
    return _unpack(model.config, config, [values / divisor for values in found])


def _variants(config: LayerConfig, block: BlockConfig) -> list[tuple[Branch, float]]:
    branches = (["mlp"] if block.mlp else []) + (["attn"] if block.attn else [])
    return [(branch, s) for branch in branches for s in config.sparsity]


def _unpack(
    model_config: TransformerConfig, config: LayerConfig, found: list[np.ndarray]
) -> LayerScores:
    shape = (len(config.sparsity), len(model_config.blocks))
    scores = {"mlp": np.zeros(shape), "attn": np.zeros(shape)}
    for i, (block, values) in enumerate(zip(model_config.blocks, found, strict=True)):
        for (branch, s), value in zip(_variants(config, block), values, strict=True):
            scores[branch][config.sparsity.index(s), i] = value
    return LayerScores(config.sparsity, **scores)


def _probe_gates(
    model_config: TransformerConfig, config: LayerConfig, units: Scores
) -> list[dict[Branch, Gates]]:
    """Gates of zeros and ones for every probe of every branch of every block.

    A gate of zero on an MLP unit after GELU, on a value dim or on a query dim computes what zeroed
    parameters compute, and lets the probes of a branch share all that comes before the gate. Where
    no unit stays, neither does the branch: its bias would go with it.
    """
    kinds = {"mlp": ("mlp",), "attn": ("head",) if config.attention == "heads" else ("qk", "vo")}
    gates: list[dict[Branch, Gates]] = []
    for i, block in enumerate(model_config.blocks):
        rows: dict[Branch, Gates] = {}
        for branch in ("mlp", "attn"):
            if getattr(block, branch):
                rows[branch] = {
                    kind: np.stack(
                        [
                            _kind_mask(kind, units[unit_key(i, kind)], s, config.ragged)
                            for s in config.sparsity
                        ]
                    ).astype(np.float32)
                    for kind in kinds[branch]
                }
                there = [s < 1 for s in config.sparsity]
                rows[branch][f"{branch}_branch"] = np.array(there, np.float32)
        gates.append(rows)
    return gates


def probe_mask(scores: Float[np.ndarray, "..."], sparsity: float, ragged: bool) -> np.ndarray:
    """Mask of the units that a probe keeps: over all heads together if ragged, else per head."""
    if scores.ndim == 1 or ragged or scores.size == 0:
        return top_k_mask(scores, probe_count(scores.size, sparsity))
    count = probe_count(scores.shape[1], sparsity)
    return np.stack([top_k_mask(row, count) for row in scores])


def head_mask(scores: Float[np.ndarray, "h"], sparsity: float) -> np.ndarray:
    """Mask of the heads that a probe keeps: the nearest number, and one at least below 1."""
    count = round(len(scores) * (1 - sparsity))
    return top_k_mask(scores, count if sparsity == 1 else max(count, min(len(scores), 1)))


def _kind_mask(
    kind: str, scores: Float[np.ndarray, "..."], sparsity: float, ragged: bool
) -> np.ndarray:
    return head_mask(scores, sparsity) if kind == "head" else probe_mask(scores, sparsity, ragged)


def _probe_batch(
    model_config: TransformerConfig,
    config: LayerConfig,
    devices: int,
    params: Params,
    gates: list[dict[Branch, Gates]],
    images: Float[Array, "b s s ch"],
    real: Float[Array, "b"],
) -> list[Float[Array, "devices v"]]:
    """Sum over the real images on each device of every probe's divergence, for every block."""
    specs = [model_config.block_spec(i) for i in range(len(model_config.blocks))]
    ends = [classified_tokens(model_config, i) for i in range(len(specs))]
    inputs = [embed_images(model_config, params, images)]
    for i, spec in enumerate(specs):
        inputs.append(run_block(spec, block_params(params, i), inputs[-1], ends[i]))
    original = log_probabilities(model_config, params, inputs[-1])
    sums = []
    for i, spec in enumerate(specs):
        if not gates[i]:
            sums.append(jnp.zeros((devices, 0)))
            continue
        x = _gated_block(spec, block_params(params, i), inputs[i], gates[i], ends[i])
        for j in range(i + 1, len(specs)):
            x = run_block(specs[j], block_params(params, j), x, ends[j])
        pruned = log_probabilities(model_config, params, x)
        sums.append(divergence_sums(config.direction, devices, original, pruned, real))
    return sums


def _recovered_importance(
    model: Model,
    batches: Iterable[Any],
    units: Scores,
    config: LayerConfig,
    mesh: Mesh | None,
) -> LayerScores:
    """Probes of branches that are recovered on the dense model's own stream."""
    own = distributed.own_count(config.batches_read)
    streams = Streams(model, itertools.islice(batches, own), mesh)
    specs = [model.config.block_spec(i) for i in range(len(model.config.blocks))]
    ends = [classified_tokens(model.config, i) for i in range(len(specs))]
    params, devices = streams.dense, streams.mesh.size
    originals: list[Array] = []
    probed = distributed.own_count(config.max_batches)
    for x, _ in itertools.islice(streams.dense_batches(), probed):
        for i, spec in enumerate(specs):
            x = run_block(spec, block_params(params, i), x, ends[i])
        originals.append(log_probabilities(model.config, params, x))
    shape = (len(config.sparsity), len(specs))
    scores = {kind: np.zeros(shape) for kind in ("mlp", "qk", "vo")}
    for i, spec in enumerate(specs):
        probes = _recovered_probes(streams, i, units, config)
        if not probes:
            streams.leave()
            continue
        placed = replicate(list(probes.values()), streams.mesh)
        none = jnp.zeros((devices, len(probes) * len(config.sparsity)))
        total = none, jnp.zeros(())
        for (x, real), original in zip(streams.dense_batches(), originals, strict=False):
            x = _changed_block(spec, block_params(params, i), x, placed, ends[i])
            for j in range(i + 1, len(specs)):
                x = run_block(specs[j], block_params(params, j), x, ends[j])
            pruned = log_probabilities(model.config, params, x)
            found = divergence_sums(config.direction, devices, original, pruned, real), real.sum()
            total = jax.tree.map(jnp.add, total, found)
        sums, count = jax.device_get(total)
        own_sums = np.asarray(sums, np.float64).sum(axis=0), float(count)
        sums, weight = distributed.sum_over_processes(own_sums)
        for kind, values in zip(probes, (sums / weight).reshape(len(probes), -1), strict=True):
            scores[kind][:, i] = values
        streams.leave()
    if config.attention == "heads":
        return LayerScores(config.sparsity, scores["mlp"], scores["vo"])
    return LayerScores(config.sparsity, attn=scores["qk"] + scores["vo"], **scores)


def _recovered_probes(
    streams: Streams, i: int, units: Scores, config: LayerConfig
) -> dict[str, Params]:
    """By kind of unit, a block's parameters that change, for all probes along a leading axis."""
    dense = streams.begin(i, parallel=True)
    keep = {
        kind: [_kind_mask(kind, units[unit_key(i, kind)], s, False) for s in config.sparsity]
        for kind in ("mlp", "qk", "vo", "head")
        if unit_key(i, kind) in units
    }
    found: dict[str, list[Params]] = {}
    if "attn" in dense:
        if config.attention == "heads":
            # A head whose values are gone is gone.
            dims = np.ones((1, dense["attn"]["v"]["kernel"].shape[2]), bool)
            keep["vo"] = [mask[:, None] & dims for mask in keep["head"]]
        else:
            logits = streams.logit_moments(dense)
            found["qk"] = [
                {"attn": solve_queries_keys(dense["attn"], *logits, mask)} for mask in keep["qk"]
            ]
        folds, scale = streams.attention_moments(dense), layer_scale(dense, "ls1")
        found["vo"] = [
            {"attn": solve_values(dense["attn"], folds, mask, scale=scale)[0]}
            for mask in keep["vo"]
        ]
    if "mlp" in dense:
        streams.see_dense_middle()
        mlp, folds, scale = dense["mlp"], streams.hidden_moments(dense), layer_scale(dense, "ls2")
        kernel = mlp["fc2"]["kernel"] * scale
        found["mlp"] = []
        for mask in keep["mlp"]:
            solved = solve_mlp(mlp, *kept_moments(folds, mask, kernel), mask, scale=scale)
            # The first layer's pruned units lead nowhere, and all probes can share them.
            found["mlp"].append({"mlp": {"fc2": solved["fc2"]}})
    for kind in {"vo", "mlp"} & found.keys():
        # Without units the branch goes, and the bias that was fitted in their place.
        found[kind] = [
            jax.tree.map(np.zeros_like, probe) if s == 1 else probe
            for probe, s in zip(found[kind], config.sparsity, strict=True)
        ]
    return {kind: jax.tree.map(lambda *a: np.stack(a), *probes) for kind, probes in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _changed_block(
    spec: BlockSpec,
    params: Params,
    x: Float[Array, "b n d"],
    probes: list[Params],
    outputs: int | None,
) -> Float[Array, "bv m d"]:
    """One block under every probe of each of its kinds; an image's probes lie together."""

    def probe(change: Params) -> Array:
        return apply_block(spec, _changed(params, change), x, outputs=outputs)

    found = [jax.vmap(probe, out_axes=1)(changes) for changes in probes]
    out = jnp.concatenate(found, axis=1)
    return out.reshape(-1, *out.shape[2:])


def _changed(params: Params, change: Params) -> Params:
    if not isinstance(change, Mapping):
        return change
    return params | {name: _changed(params[name], part) for name, part in change.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _gated_block(
    spec: BlockSpec,
    params: Params,
    x: Float[Array, "b n d"],
    gates: dict[Branch, Gates],
    outputs: int | None,
) -> Float[Array, "bv m d"]:
    """One block under every probe of each of its branches; an image's probes lie together.

    Only one branch is gated at a time, so that `vmap` runs the other one, and all that comes before
    the gates, once.
    """

    def probe(gate: Gates) -> Array:
        # The gates' image axis has size one and broadcasts: every image gets the same probe.
        gate = {kind: value[None] for kind, value in gate.items()}
        return apply_block(spec, params, x, gate, outputs)

    found = [jax.vmap(probe, out_axes=1)(branch) for _, branch in sorted(gates.items())[::-1]]
    out = jnp.concatenate(found, axis=1)
    return out.reshape(-1, *out.shape[2:])

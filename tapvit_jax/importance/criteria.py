"""All criteria that units can be ranked by, in one registry, each with its source.

`unit_importance` computes any of them; `CRITERIA` lists them. Scores have one meaning everywhere:
higher means keep. Those of the composite family (tap, relevance, redundancy, activation) lie in
[0, 1], their terms scaled to it in every layer; tap_published scales them in every batch, and its
scores are sums over batches. All others are left in their own unit, so that they can also be
compared between layers (see `prune.ranking`).
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.importance.deletion import deletion_divergences
from tapvit_jax.importance.gradients import Loss
from tapvit_jax.importance.neurons import (
    NeuronConfig,
    Scores,
    TermWeights,
    neuron_importance,
)
from tapvit_jax.importance.residual import residual_importance
from tapvit_jax.importance.statistics import (
    MOMENTS,
    Moments,
    Power,
    fisher_statistic,
    gate_statistic,
    group_sums,
    hessian_statistic,
    mean_square,
    variance,
)
from tapvit_jax.importance.streaming import Statistic, sum_over_batches
from tapvit_jax.models.backbone import TransformerConfig, block_params, check_prunable
from tapvit_jax.models.params import Params
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.units import UnitGroup, check_unit_scores, unit_key, unit_table
from tapvit_jax.structs import check_fields, check_kind

Needs = Literal["parameters", "activations", "gradients", "forward"]
Heads = Literal["own", "sum", "norm"]


@dataclasses.dataclass(frozen=True)
class CriterionConfig:
    """Limits on what the criteria read.

    Attributes:
      max_batches: batches of all processes beyond these are not read.
      max_images: for single_channel_kl, images of all processes beyond these are not read.
      chunk: for single_channel_kl, units that are deleted at once.
    """

    max_batches: int = 50
    max_images: int = 64
    chunk: int = 32

    def __post_init__(self):
        check_fields(self)
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise InputError(f"{name} is {value}, expected 1 or more")


class ScoreUnits(Protocol):
    """How a criterion scores all units of a model."""

    def __call__(
        self,
        model: Model,
        batches: Iterable[Any],
        seed: int = 0,
        *,
        config: CriterionConfig = CriterionConfig(),
        mesh: Mesh | None = None,
    ) -> Scores:
        """Scores of kinds mlp, qk, vo and head by group key."""


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One way to rank units.

    Attributes:
      name: what `unit_importance` calls it.
      source: paper, or ours.
      summary: the formula in a line.
      needs: what it looks at; "parameters" reads no batches, "forward" runs the model once a unit.
      needs_labels: whether batches must come with labels.
      score: see `ScoreUnits`.
      heads: how a whole head's score follows from its value dims': "sum" where scores add up, as
        energies do, "norm" (root of the sum of squares) of norms; "own" where the criterion gives
        it: what deleting the head does or, of the composite family, whose scaled scores do not add
        up, the mean, which compares heads with heads alone.
    """

    name: str
    source: str
    summary: str
    needs: Needs
    needs_labels: bool
    score: ScoreUnits = dataclasses.field(repr=False)
    heads: Heads = "own"


def criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises:
      InputError: an unknown name; lists the known ones.
    """
    if name not in CRITERIA:
        raise InputError(f"criterion is {name!r}, expected one of {', '.join(CRITERIA)}")
    return CRITERIA[name]


def unit_importance(
    model: Model,
    batches: Iterable[Any],
    method: str = "tap",
    *,
    seed: int = 0,
    config: CriterionConfig | None = None,
    mesh: Mesh | None = None,
) -> Scores:
    """Score every prunable dim and head of a model by any criterion of the registry.

    Args:
      model: a dense or an already reshaped model.
      batches: as in `neuron_importance`; not read by criteria that need parameters only.
      method: name of a criterion, see `CRITERIA`.
      seed: for random scores, and for the classes that label-free losses draw.
      config: limits on what is read.
      mesh: devices of this process that share the work; by default all.

    Returns:
      Scores by unit group: "blocks_i/mlp" (f,), "blocks_i/qk" and "blocks_i/vo" (h, k), and
      "blocks_i/head" (h,): of the head's value dims, where the criterion does not say what
      deleting the whole head does, see `Criterion.heads`.

    Raises:
      InputError: an unknown criterion, a negative seed, a config of another kind, a backbone
        without prunable units, no batches, labels missing or beyond the network's classes, or
        parameters, activations or gradients that are not finite.

    Source: see each criterion.
    """
    check_prunable(model.config)
    config = CriterionConfig() if config is None else config
    check_kind(config, CriterionConfig)
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    chosen = criterion(method)
    scores = chosen.score(model, batches, seed, config=config, mesh=mesh)
    scores = _with_heads(model.config, scores, chosen.heads)
    check_unit_scores(model.config, scores)
    return scores


def _groups(config: TransformerConfig) -> list[UnitGroup]:
    return [group for group in unit_table(config) if group.shape]


def _with_heads(config: TransformerConfig, scores: Scores, heads: Heads) -> Scores:
    result = {key: np.asarray(value, np.float32) for key, value in scores.items()}
    for group in _groups(config):
        if group.kind == "head" and heads != "own":
            # Without its values a head does nothing, so that its queries and keys add nothing.
            dims = result[unit_key(group.block, "vo")]
            norms = heads == "norm"
            total = (np.square(dims) if norms else dims).sum(axis=1)
            result[group.key] = np.sqrt(total) if norms else total
    return {group.key: result[group.key] for group in _groups(config)}


def _of_parameters(score: Callable[[TransformerConfig, Params], dict[str, Array]]) -> ScoreUnits:
    compiled = functools.partial(jax.jit, static_argnums=0)(score)

    def scores(model, batches, seed=0, *, config=None, mesh=None) -> Scores:
        return jax.device_get(compiled(model.config, model.params))

    return scores


def _random(model, batches, seed=0, *, config=None, mesh=None) -> Scores:
    rng = np.random.default_rng(seed)
    return {group.key: rng.random(group.shape) for group in _groups(model.config)}


def _magnitude_l1(config: TransformerConfig, params: Params) -> dict[str, Array]:
    return group_sums(config, jax.tree.map(jnp.abs, params))


def _magnitude_l2(config: TransformerConfig, params: Params) -> dict[str, Array]:
    squares = group_sums(config, jax.tree.map(jnp.square, params))
    return jax.tree.map(jnp.sqrt, squares)


def unit_rows(
    config: TransformerConfig, params: Params, group: UnitGroup
) -> tuple[Float[Array, "*units a"], Float[Array, "*units b"]]:
    """Both weight vectors of a group's units of kind mlp, qk or vo, without biases.

    What makes the unit and what uses it: (fc1, fc2), (queries, keys), (values, projection). Layer
    scale counts as a part of the matrix behind which it stands.
    """
    part = block_params(params, group.block)
    if group.kind == "mlp":
        made, used = part["mlp"]["fc1"]["kernel"].T, part["mlp"]["fc2"]["kernel"]
        scale = part.get("ls2")
    else:
        names = ("q", "k") if group.kind == "qk" else ("v", "proj")
        made, used = (part["attn"][name]["kernel"] for name in names)
        made = jnp.moveaxis(made, 0, -1)
        used = jnp.moveaxis(used, 0, -1) if group.kind == "qk" else used
        scale = part.get("ls1") if group.kind == "vo" else None
    return made, used if scale is None else used * scale["gamma"]


def _width_groups(config: TransformerConfig) -> list[UnitGroup]:
    return [group for group in _groups(config) if group.kind != "head"]


def _toast(config: TransformerConfig, params: Params) -> dict[str, Array]:
    scores = {}
    for group in _width_groups(config):
        rows = jnp.concatenate(unit_rows(config, params, group), axis=-1)
        # Rows of one head are compared with each other, hidden units with their layer's. A median
        # of nothing would be NaN, which a group without units does not need.
        median = jnp.median(rows, axis=-2, keepdims=True) if group.size else 0.0
        scores[group.key] = jnp.sqrt(jnp.square(rows - median).sum(axis=-1))
    return scores


def _nuwa(config: TransformerConfig, params: Params) -> dict[str, Array]:
    scores = {}
    for group in _width_groups(config):
        made, used = unit_rows(config, params, group)
        squares = jnp.square(made).sum(axis=-1) * jnp.square(used).sum(axis=-1)
        scores[group.key] = jnp.sqrt(squares)
    return scores


def _of_statistic(
    statistic: Statistic,
    finish: Callable[[Model, Any], Scores],
    needs_labels: bool = False,
) -> ScoreUnits:
    def score(model, batches, seed=0, *, config=CriterionConfig(), mesh=None) -> Scores:
        sums = sum_over_batches(
            model,
            batches,
            statistic,
            seed=seed,
            max_batches=config.max_batches,
            needs_labels=needs_labels,
            mesh=mesh,
        )
        return finish(model, sums)

    return score


def _mean(model: Model, sums: dict[str, np.ndarray], factor: float = 1.0) -> Scores:
    count = sums["count"]
    return {key: factor * value / count for key, value in sums.items() if key != "count"}


def _taylor(loss: Loss, power: Power) -> ScoreUnits:
    # A drawn class's squared gradient is twice what deletion does to the divergence.
    factor = 0.5 if loss == "kl" and power == 2 else 1.0
    finish = functools.partial(_mean, factor=factor)
    return _of_statistic(gate_statistic(loss, power), finish, needs_labels=loss == "label")


def _variance(model: Model, sums: dict[str, Moments]) -> Scores:
    return {key: variance(moments) for key, moments in sums.items()}


def _corp(model: Model, sums: dict[str, Moments]) -> Scores:
    scores = {}
    for group in _width_groups(model.config):
        energy = mean_square(sums[group.key])
        if group.kind == "qk":
            scores[group.key] = energy / model.config.block_spec(group.block).head_dim
        else:
            _, used = unit_rows(model.config, model.params, group)
            scores[group.key] = energy * np.square(np.asarray(used, np.float64)).sum(axis=-1)
    return scores


def _composite(config_of: Callable[[], NeuronConfig]) -> ScoreUnits:
    def score(model, batches, seed=0, *, config=CriterionConfig(), mesh=None) -> Scores:
        options = dataclasses.replace(config_of(), max_batches=config.max_batches)
        return neuron_importance(model, batches, config=options, seed=seed, mesh=mesh)

    return score


def _term(name: str) -> ScoreUnits:
    """One term of the composite score on its own."""
    nothing = {"relevance": 0.0, "redundancy": 0.0, "activation": 0.0}
    weights = TermWeights(**nothing | {name: 1.0})
    return _composite(functools.partial(NeuronConfig, mlp=weights, attn=weights))


def _single_channel_kl(model, batches, seed=0, *, config=CriterionConfig(), mesh=None) -> Scores:
    return deletion_divergences(
        model, batches, max_images=config.max_images, chunk=config.chunk, mesh=mesh
    )


def _residual(model, batches, seed=0, *, config=CriterionConfig(), mesh=None) -> Scores:
    own = distributed.own_count(config.max_batches)
    return residual_importance(model, itertools.islice(batches, own), mesh=mesh)


_TAP = "TAP-ViTs (arXiv 2601.02437)"
_FO = "Molchanov et al. (arXiv 1906.10771)"

_ALL = (
    Criterion("random", "baseline", "uniform numbers", "parameters", False, _random),
    Criterion(
        "magnitude_l1",
        "Li et al. (arXiv 1608.08710)",
        "sum of |w| over all parameters of a unit",
        "parameters",
        False,
        _of_parameters(_magnitude_l1),
    ),
    Criterion(
        "magnitude_l2",
        "group norm, as in Torch-Pruning (arXiv 2301.12900)",
        "sqrt of the sum of w^2 over all parameters of a unit",
        "parameters",
        False,
        _of_parameters(_magnitude_l2),
    ),
    Criterion(
        "toast",
        "ToaSt (arXiv 2602.15720); MLP units ours",
        "L2 distance of a unit's weights to the median unit of its head (MLP: of its layer)",
        "parameters",
        False,
        _of_parameters(_toast),
        "norm",
    ),
    Criterion(
        "nuwa",
        "NuWa (arXiv 2504.03118), its spectrum read off dim by dim; MLP units ours",
        "norm of the rank-one term that a dim adds to W_Q W_K^T or W_V W_O",
        "parameters",
        False,
        _of_parameters(_nuwa),
        "norm",
    ),
    Criterion(
        "activation",
        _TAP,
        "sum of |x|; for queries and keys of the norm of a dim's logits",
        "activations",
        False,
        _term("activation"),
    ),
    Criterion(
        "variance",
        "VBP (arXiv 2507.12988); attention dims ours",
        "variance of a hidden unit, head output or dim's logits over tokens and images",
        "activations",
        False,
        _of_statistic(MOMENTS, _variance),
        "sum",
    ),
    Criterion(
        "corp",
        "CORP (arXiv 2602.05243)",
        "E[x^2] times the squared norm of the outgoing weights; of a qk dim E[logit^2]",
        "activations",
        False,
        _of_statistic(MOMENTS, _corp),
        "sum",
    ),
    Criterion(
        "residual",
        "ours; optimal brain surgeon (Hassibi and Stork, 1993) for units",
        "error of the branch's output (qk: of the logits) once least squares has made up for it",
        "activations",
        False,
        _residual,
        "sum",
    ),
    Criterion(
        "relevance",
        _TAP,
        "HSIC of a unit's activations with the prediction",
        "activations",
        False,
        _term("relevance"),
    ),
    Criterion(
        "redundancy",
        _TAP,
        "1 - scaled HSIC of a unit's activations with the layer's mean or the other heads",
        "activations",
        False,
        _term("redundancy"),
    ),
    Criterion(
        "taylor",
        "Fisher pruning (arXiv 1801.05787); gates of all kinds ours",
        "E[g^2] / 2, g the gate's gradient of -log p of a class drawn from the prediction",
        "gradients",
        False,
        _taylor("kl", 2),
    ),
    Criterion(
        "taylor_label",
        _FO,
        "E|g|, g the gate's gradient of the cross-entropy with the label",
        "gradients",
        True,
        _taylor("label", 1),
    ),
    Criterion(
        "taylor_squared",
        _FO,
        "E[g^2], g the gate's gradient of the cross-entropy with the label",
        "gradients",
        True,
        _taylor("label", 2),
    ),
    Criterion(
        "entropy_taylor",
        "AMP (arXiv 2603.08100); attention dims and heads ours",
        "E|g|, g the gate's gradient of the prediction's entropy",
        "gradients",
        False,
        _taylor("entropy", 1),
    ),
    Criterion(
        "fisher",
        "NViT (arXiv 2110.04869)",
        "mean over batches of (sum over a unit's weights of w dL/dw)^2, L with labels",
        "gradients",
        True,
        _of_statistic(fisher_statistic("label"), _mean, needs_labels=True),
    ),
    Criterion(
        "fisher_kl",
        "NViT (arXiv 2110.04869); classes drawn from the prediction ours",
        "as fisher, L with classes drawn from the prediction",
        "gradients",
        False,
        _of_statistic(fisher_statistic("kl"), _mean),
    ),
    Criterion(
        "hessian",
        "optimal brain damage (LeCun et al., 1989), Fisher diagonal",
        "sum over a unit's weights of w^2 E[(dl/dw)^2] / 2, l with labels",
        "gradients",
        True,
        _of_statistic(hessian_statistic("label"), _mean, needs_labels=True),
    ),
    Criterion(
        "hessian_kl",
        "optimal brain damage (LeCun et al., 1989), Fisher diagonal; drawn classes ours",
        "as hessian, l with classes drawn from the prediction",
        "gradients",
        False,
        _of_statistic(hessian_statistic("kl"), _mean),
    ),
    Criterion(
        "single_channel_kl",
        "UP-ViTs (arXiv 2111.15127)",
        "KL(p || p without the unit), for one unit at a time",
        "forward",
        False,
        _single_channel_kl,
    ),
    Criterion(
        "tap",
        "TAP-ViTs (arXiv 2601.02437), mended by ours",
        "relevance, redundancy, activation and taylor, see NeuronConfig",
        "gradients",
        False,
        _composite(NeuronConfig),
    ),
    Criterion(
        "tap_published",
        _TAP,
        "relevance, redundancy and activation as the authors' code computes them",
        "activations",
        False,
        _composite(NeuronConfig.as_published),
    ),
)

CRITERIA: Mapping[str, Criterion] = types.MappingProxyType({c.name: c for c in _ALL})
"""Every criterion by name."""

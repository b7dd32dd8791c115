"""The methods that `experiments.compare` sets side by side, and the metric sets that they see.

Either name may carry changes of the config, NAME:FIELD=VALUE+FIELD=VALUE, each a row of its own:
"ours:relevance=0", "ours:recover.ema=0.99", "selected:method=quota".
"""

import ast
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np

from experiments.job import Job
from experiments.preparation import ORACLE, SELECTED, ImageSets
from tapvit_jax.errors import InputError
from tapvit_jax.importance.criteria import CRITERIA
from tapvit_jax.importance.layers import LayerConfig
from tapvit_jax.importance.neurons import Method as Composite
from tapvit_jax.importance.neurons import NeuronConfig, TermWeights
from tapvit_jax.pipeline import PruneConfig
from tapvit_jax.proxy.gmm import GmmConfig
from tapvit_jax.proxy.select import SelectConfig
from tapvit_jax.prune.allocate import AllocateConfig
from tapvit_jax.prune.recover import RecoverConfig
from tapvit_jax.structs import from_plain, to_plain
from tapvit_jax.train.finetune import TrainConfig

SETS = {
    SELECTED: "chosen by the device's mixture",
    "random": "as many random public images",
    "pool": "the public pool, as many images of it as criteria read at most",
    ORACLE: "the device's own private-train images (simulation only: no cloud has them)",
}
"""Metric sets by name, and what they are."""

# What each kind can be changed in; whatever else is named would change nothing.
_COUNTS = ("metric_count", "finetune_count")
_CHANGEABLE = {SELECTED: None, "random": _COUNTS, "pool": (), ORACLE: _COUNTS}

PEER = "peer"
PRIOR_ONLY = "prior_only"
RECOVERIES = {
    "none": RecoverConfig("none"),
    "mean": RecoverConfig("mean"),
    "prior": RecoverConfig(prior="mixture"),
    "metric_prior": RecoverConfig(prior="metric"),
    PRIOR_ONLY: RecoverConfig("prior", prior="mixture"),
    "ridge": RecoverConfig(),
    "parallel": RecoverConfig(order="parallel"),
    "kept": RecoverConfig(attention="kept"),
    "headless": RecoverConfig(head=False),
    "nuwa": RecoverConfig(order="parallel", attention="weights", head=False),
    "corp": RecoverConfig(order="parallel", attention="kept", head=False),
}
"""Closed-form recoveries by name.

Ours is "prior", with the classes' prior from the mixture; "metric_prior" has it from the dense
model's predictions on the metric set, "ridge" has none, "prior_only" has nothing else and goes
behind external peers as well. "corp" is all that CORP does; "nuwa" has
NuWa's subspaces and least squares, but also solves for attention's projection; others lie between.
"""

_RANKED = ("local", "global", "global_per_cost", "isomorphic")
_WIDTHS = ("sensitivity", "heads", "greedy", "exact", "depth", "softmax", "uniform", *_RANKED)
_PROBED = ("sensitivity", "heads", "greedy", "exact", "depth")
_RULES: dict[str, dict[str, Any]] = {
    "heads": {"widths": "sensitivity", "attention": "heads"},
    "depth": {"widths": "exact", "branches": True},
    "uniform": {"widths": "softmax"},
    "global_per_cost": {"widths": "global", "per_cost": True, "normalize": True},
}
"""What a name for widths that is no rule of its own stands for, in `AllocateConfig`'s fields."""
_TERMS = tuple(field.name for field in dataclasses.fields(TermWeights))

_RECIPE = "recover."  # before the fields of the recipe, as in the config
_GIVEN = {
    "epochs": "--epochs says how many",
    "images_per_epoch": "select.finetune_count says how many, of all alike",
    "checkpoint_epochs": "it changes no result",
    "checkpoint_steps": "it changes no result",
}

Changes = Mapping[str, Any]


def split_changes(text: str) -> tuple[str, Changes]:
    """Name and changes of "NAME:FIELD=VALUE+FIELD=VALUE".

    Raises:
      InputError: a change without a value.
    """
    name, _, rest = text.partition(":")
    changes = {}
    for part in rest.split("+") if rest else ():
        field, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{text}: {part!r} is no change, expected FIELD=VALUE")
        try:
            changes[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[field] = value
    return name, changes


@dataclasses.dataclass(frozen=True)
class Method:
    """Everything that turns a dense model, a metric set and a budget into a smaller model.

    Attributes:
      criterion: name in `CRITERIA`, or of an external peer.
      widths: a rule of `AllocateConfig`; "heads", "sensitivity" with whole heads to lose; "depth",
        "exact" with branches that may go; "global_per_cost", "global" by scores per MAC, kinds of
        units on one scale; "uniform", the same share of every layer, of attention less, as
        published; "published", all of TAP-ViTs' rules; "peer", whatever the peer does.
      recover: closed-form recovery behind it, a name in `RECOVERIES`.
      loop: layers are probed with recovery in the loop.
      changes: of `NeuronConfig`'s fields, or of a term's weight for MLP and attention both; of the
        recipe's fields, as "recover.FIELD".
    """

    criterion: str
    widths: str = "sensitivity"
    recover: str = "none"
    loop: bool = False
    changes: Changes = dataclasses.field(default_factory=dict)

    def prune(self, base: PruneConfig) -> PruneConfig:
        """How it scores and chooses widths, limits and floors as in the experiment's config.

        Raises:
          InputError: widths that do not go with the criterion, or changes that it does not know.
        """
        changes = {n: value for n, value in self.changes.items() if not n.startswith(_RECIPE)}
        if changes and self.criterion not in get_args(Composite):
            raise InputError(
                f"{self.criterion} knows no changes but of the recipe ({_RECIPE}FIELD): "
                f"{', '.join(changes)}"
            )
        ranked = {} if self.widths == PEER else base.ranked_by(self.criterion)
        neurons = _changed(ranked.get("neurons", base.neurons), changes)
        layers, allocate = base.layers, base.allocate
        if self.widths == "published":
            layers = LayerConfig.as_published()
            layers = dataclasses.replace(layers, max_batches=base.layers.max_batches)
            allocate = AllocateConfig.as_published()
        elif self.widths != PEER:
            rule = {"widths": self.widths, "branches": False, "per_cost": False, "normalize": False}
            allocate = dataclasses.replace(allocate, **rule | _RULES.get(self.widths, {}))
            if allocate.branches:
                layers = dataclasses.replace(layers, sparsity=(*layers.sparsity, 1.0))
            recovery = "ridge" if self.loop else "none"
            ragged = layers.ragged and allocate.attention == "dims"
            changed = {"attention": allocate.attention, "recovery": recovery, "ragged": ragged}
            layers = dataclasses.replace(layers, **changed)
        named = ranked.get("criterion")
        return PruneConfig(neurons, layers, allocate, base.batch_size, named, base.deletion_images)

    def probes(self, base: PruneConfig) -> bool:
        """Whether its widths follow from layer scores."""
        return self.widths not in (PEER, "uniform") and self.prune(base).allocate.reads_layers

    @property
    def recipe_changes(self) -> Changes:
        """The fields of the recipe in which its fine-tuning differs from the config's."""
        named = self.changes.items()
        return {n.removeprefix(_RECIPE): value for n, value in named if n.startswith(_RECIPE)}

    def recipe(self, base: TrainConfig, epochs: int) -> TrainConfig:
        """How it is fine-tuned for so many epochs, the warm-up at most a fifth of them.

        Raises:
          InputError: changes that a recipe does not know, or values out of range.
        """
        for field in self.recipe_changes:
            if field in _GIVEN:
                raise InputError(f"{_RECIPE}{field} is not a method's to change: {_GIVEN[field]}")
        changed = from_plain(TrainConfig, {**to_plain(base), **self.recipe_changes}, "recover")
        warmup = min(changed.warmup_epochs, epochs / 5)
        return dataclasses.replace(changed, epochs=epochs, warmup_epochs=warmup)


def _changed(neurons: NeuronConfig, changes: Changes) -> NeuronConfig:
    if not changes:
        return neurons
    plain = to_plain(neurons)
    for name, value in changes.items():
        for fields in (plain["mlp"], plain["attn"]) if name in _TERMS else (plain,):
            fields[name] = value
    return from_plain(NeuronConfig, plain, "neurons")


def _methods() -> dict[str, Method]:
    found = {}
    for criterion in CRITERIA:
        # What TAP-ViTs published is criterion and rules together.
        default = "published" if criterion == "tap_published" else _WIDTHS[0]
        for widths in dict.fromkeys((default, *_WIDTHS)):
            for recover, loop in itertools.product(RECOVERIES, (False, True)):
                if loop and widths not in _PROBED:
                    continue
                parts = [criterion] + ["loop"] * loop
                parts += [widths] * (widths != default) + [recover] * (recover != "none")
                found["_".join(parts)] = Method(criterion, widths, recover, loop)
    return {"ours": found["tap_prior"], **found}


METHODS = _methods()
"""Methods by name: CRITERION[_loop][_WIDTHS][_RECOVERY], and "ours", the defaults."""

DEFAULT_METHODS = (
    *("ours", "tap", "tap_mean", "tap_ridge", "tap_published", "tap_published_prior"),
    *("taylor", "taylor_prior", "magnitude_l2", "magnitude_l2_prior", "random", "random_prior"),
)


def find_methods(names: Iterable[str], peers: Iterable[str] = ()) -> dict[str, Method]:
    """The methods of these names, each once, in their order.

    Args:
      names: keys of `METHODS`, or external peers, with "_prior_only" or without; any with changes.
      peers: names that are external peers.

    Raises:
      InputError: an unknown name or change, or no name.
    """
    peers, found = tuple(peers), {}
    for name in names:
        base, changes = split_changes(name)
        peer = base.removesuffix(f"_{PRIOR_ONLY}")
        if peer in peers:
            found[name] = Method(peer, PEER, "none" if peer == base else PRIOR_ONLY)
        elif base in METHODS:
            found[name] = METHODS[base]
        else:
            raise InputError(
                f"method is {name!r}, expected ours or CRITERION[_loop][_WIDTHS][_RECOVERY]; "
                f"criteria are {', '.join((*CRITERIA, *peers))}; widths {', '.join(_WIDTHS)}; "
                f"recoveries {', '.join(RECOVERIES)}"
            )
        found[name] = dataclasses.replace(found[name], changes=changes)
        found[name].prune(PruneConfig())
        found[name].recipe(TrainConfig(), epochs=1)
    if not found:
        raise InputError("no method is named, expected at least one")
    return found


@dataclasses.dataclass(frozen=True)
class MetricSet:
    """Whose images score units and layers, and how they are chosen.

    Attributes:
      kind: one of `SETS`.
      changes: of the fields of `SelectConfig` and, for those that a mixture chooses, `GmmConfig`.
    """

    kind: str
    changes: Changes = dataclasses.field(default_factory=dict)

    def configs(self, select: SelectConfig, gmm: GmmConfig) -> tuple[SelectConfig, GmmConfig]:
        """Selection and mixtures, all else as in these.

        Raises:
          InputError: changes that neither knows, or values out of range.
        """
        known = _CHANGEABLE[self.kind]
        for name in self.changes:
            if known is not None and name not in known:
                expected = " or ".join(known) or "no changes at all"
                raise InputError(f"{name} changes nothing of {self.kind!r}, expected {expected}")
        mixture = {field.name for field in dataclasses.fields(GmmConfig)}
        chosen, fitted = to_plain(select), to_plain(gmm)
        for name, value in self.changes.items():
            if name == "components" and isinstance(value, int):
                value = (value,)
            # Both have a seed, of which the selection's is the one to change.
            (fitted if name in mixture and name not in chosen else chosen)[name] = value
        counts = chosen["metric_count"], chosen["finetune_count"]
        if "finetune_count" not in self.changes and all(isinstance(n, int) for n in counts):
            chosen["finetune_count"] = max(counts)
        return from_plain(SelectConfig, chosen, "select"), from_plain(GmmConfig, fitted, "gmm")


def find_set(name: str) -> MetricSet:
    """The metric set of a name: one of `SETS`, with changes or without.

    Raises:
      InputError: an unknown name or change.
    """
    kind, changes = split_changes(name)
    if kind not in SETS:
        raise InputError(f"--sets names {name!r}, expected {', '.join(SETS)}")
    found = MetricSet(kind, changes)
    found.configs(SelectConfig(), GmmConfig())
    return found


def image_sets(job: Job, device: int, name: str) -> ImageSets:
    """A device's images of a metric set; no more metric images than criteria read at most."""
    chosen = find_set(name)
    found = job.image_sets(device, chosen.kind, *chosen.configs(job.config.select, job.config.gmm))
    if chosen.kind == "pool":
        # Sorted by class, the first batches would hold few classes. One order for all devices, so
        # that they share its scores.
        order = np.random.default_rng([job.seed, len(job.parts.devices)])
        found = dataclasses.replace(found, metric=order.permutation(found.metric))
    prune = job.config.prune
    most = prune.neurons.max_batches * prune.batch_size
    return dataclasses.replace(found, metric=found.metric[:most])

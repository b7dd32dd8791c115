"""What an experiment's config file may say; anything else is refused by name."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from tapvit_jax.convert.weights import fingerprint
from tapvit_jax.data.partition import PartitionConfig
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash, read_json
from tapvit_jax.models.backbone import Config
from tapvit_jax.models.presets import create
from tapvit_jax.pipeline import PruneConfig
from tapvit_jax.proxy.features import ExtractorConfig
from tapvit_jax.proxy.gmm import GmmConfig
from tapvit_jax.proxy.select import SelectConfig
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.recover import RecoverConfig
from tapvit_jax.structs import check_fields, from_plain, to_plain
from tapvit_jax.train.finetune import TrainConfig

Comparison = Literal["pool", "random"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images and who owns them.

    Attributes:
      source: "digits", "tfds:NAME", or a path to image folders, Tiny-ImageNet or CIFAR.
      preprocess: how an image becomes an input.
      partition: devices, public pool and public-validation.
      workers: processes that decode images; 0 decodes on threads. Results do not depend on it.
    """

    source: str
    preprocess: Preprocess
    partition: PartitionConfig
    workers: int = 0

    def __post_init__(self):
        check_fields(self)
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}, expected 0 or more")


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """The dense model that every device's model is cut from.

    Attributes:
      model: timm's name of the architecture (`tap.list_models()`).
      arguments: timm's arguments where it differs: patch_size, embed_dim, depth, num_heads ...;
        image size, channels and classes come from the data.
      weights: a checkpoint under timm's names, a file or a hub id; None trains from scratch on the
        public pool.
      new_classifier: train the weights on the public pool too, from a classifier of zeros for its
        classes: of a checkpoint of other classes, or without a classifier.
      train: the recipe for what is trained on the public pool.

    Raises:
      InputError: a new classifier of no weights.
    """

    model: str = "vit_tiny_patch16_224"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = None
    new_classifier: bool = False
    train: TrainConfig = TrainConfig()

    def __post_init__(self):
        check_fields(self)
        if self.new_classifier and self.weights is None:
            raise InputError("new_classifier is True, expected weights for it to stand on")

    def network(self, preprocess: Preprocess, num_classes: int) -> Config:
        """The network's config.

        Raises:
          InputError: an unknown model or argument, or sizes that do not fit together.
        """
        data = {
            "img_size": preprocess.image_size,
            "in_chans": preprocess.channels,
            "num_classes": num_classes,
            "mean": preprocess.mean,
            "std": preprocess.std,
        }
        twice = sorted(set(self.arguments) & set(data))
        if twice:
            raise InputError(f"dense.arguments names {', '.join(twice)}, which the data decides")
        return create(self.model, **self.arguments, **data)[0]


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides an experiment's results.

    Attributes:
      seed: every random choice follows from it.
      budgets: one per device, such as "macs=0.5" or "macs=0.4,params=0.5"; used in turn.
      extractor_train: recipe of the embedding network, for extractor kind "embedding".
      compensate: closed-form recovery after pruning, from which fine-tuning starts; its classes'
        prior is fine-tuning's as well.
      recover: fine-tuning.
      recover_on: fine-tune the "masked" model (one compiled program for all devices) or the
        "reshaped" one (fewer operations, but every device compiles its own).
      recover_together: in a sweep, so many units that share the dense model and the recipe are
        fine-tuned in one program; what is fine-tuned together follows from the grid alone.
      likely_share: fine-tuning distils only the classes that hold this share of the dense model's
        mean prediction on the metric dataset; None distils all.
      validation_share: share of public-validation, the most likely under the device's GMM, that
        chooses the device's epoch.
      comparisons: metric sets to stand beside the selected one: the whole pool, or a random public
        subset of the same size.
      latency_batch: batch size of the latency measurement.
      latency_table: what `tapvit bench-latency --fit` wrote for the dense model; budgets on latency
        need it. Plans keep to what it predicts, and reports show what is measured.
    """

    name: str
    seed: int
    data: DataConfig
    dense: DenseConfig
    budgets: tuple[str, ...]
    select: SelectConfig
    extractor: ExtractorConfig = ExtractorConfig()
    extractor_train: TrainConfig = TrainConfig()
    gmm: GmmConfig = GmmConfig()
    prune: PruneConfig = PruneConfig()
    compensate: RecoverConfig = RecoverConfig()
    recover: TrainConfig = TrainConfig()
    recover_on: Literal["masked", "reshaped"] = "masked"
    recover_together: int = 1
    likely_share: float | None = None
    validation_share: float = 0.5
    comparisons: tuple[Comparison, ...] = ("pool", "random")
    latency_batch: int = 1
    latency_table: str | None = None

    def __post_init__(self):
        check_fields(self)
        if not self.budgets:
            raise InputError("budgets is empty, expected at least one")
        # Devices and repeats count on from it.
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}, expected 0 to {2**31 - 1}")
        for name in ("recover_together", "latency_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.recover_together > 1 and self.recover_on != "masked":
            raise InputError("recover_together needs recover_on 'masked': one shape for all")
        if self.likely_share is not None:
            if not 0 < self.likely_share <= 1:
                raise InputError(f"likely_share is {self.likely_share}, expected (0, 1]")
            if not self.recover.asks_teacher:
                raise InputError("likely_share needs recover.distill or recover.choose 'teacher'")
        if not 0 < self.validation_share <= 1:
            raise InputError(f"validation_share is {self.validation_share}, expected (0, 1]")
        for text in self.budgets:
            Budget.parse(text)

    def budget(self, device: int) -> Budget:
        """The budget of one device."""
        return Budget.parse(self.budgets[device % len(self.budgets)])


class NamedFiles:
    """What configs name by a path and may change there: images, weights and latency tables.

    Each is read once, when a config that names it is first asked for.
    """

    def __init__(self):
        self._source = functools.cache(lambda spec: open_source(spec).fingerprint())
        self._weights = functools.cache(fingerprint)
        self._table = functools.cache(lambda path: content_hash(read_json(path)))

    def identity(self, config: ExperimentConfig) -> dict[str, str | None] | None:
        """Hashes of a config's files; None where one of them cannot be read."""
        weights, table = config.dense.weights, config.latency_table
        try:
            return {
                "source": self._source(config.data.source),
                "weights": None if weights is None else self._weights(weights),
                "latency": None if table is None else self._table(table),
            }
        except InputError:
            return None


def identity(config: ExperimentConfig) -> dict[str, Any]:
    """A config as JSON values, without what changes no result."""
    plain = to_plain(config)
    del plain["data"]["workers"]
    plain["dense"]["train"] = config.dense.train.identity()
    for name in ("extractor_train", "recover"):
        plain[name] = getattr(config, name).identity()
    return plain


def complete(values: Mapping[str, Any]) -> ConfigDict:
    """A config file's values with all defaults filled in, so that every field can be overridden.

    Raises:
      InputError: unknown or missing fields, or values of another type; all in one message.
    """
    plain = to_plain(from_plain(ExperimentConfig, values))
    return ConfigDict(_with_tuples(plain))


def _with_tuples(value: Any) -> Any:
    # Sequences can be overridden on the command line only where they are tuples.
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def read(config: Any) -> ExperimentConfig:
    """Check an ml_collections config and turn it into an `ExperimentConfig`.

    Raises:
      InputError: unknown or missing fields, or values of another type; all in one message.
    """
    return from_plain(ExperimentConfig, config.to_dict())


def grid(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """All combinations of the values of several fields, the first field changing slowest.

    What a config file's `sweep(config)` returns, the config as the command line left it (it may do
    without): a list of overrides, one mapping of names to values for every unit. Names are
    "device", "budget", "criterion", "recovery", or dotted fields of the config such as "seed" and
    "prune.neurons.loss". A "recovery" is

        "none"           nothing
        "mean", "ridge"  that closed form, all else as in `compensate`, and no fine-tuning
        "finetune"       the closed form as in `compensate`, then fine-tuning (the default)
        "finetune_only"  fine-tuning from the pruned model
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

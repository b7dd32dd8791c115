"""The first stages of an experiment: images, dense model, extractor, mixtures and selection.

Every stage is cached under a hash of what it depends on and nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from experiments.config import ExperimentConfig
from tapvit_jax import distributed
from tapvit_jax.convert.timm import params_of
from tapvit_jax.convert.weights import fingerprint, read_weights
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.partition import Partition, partition
from tapvit_jax.data.pipeline import load_all
from tapvit_jax.data.sources import MemorySource, open_source
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash, file_lock, remove_leftovers
from tapvit_jax.models import backbone, convnet
from tapvit_jax.models.backbone import Config
from tapvit_jax.models.params import Params, flatten, unflatten
from tapvit_jax.models.presets import architecture
from tapvit_jax.models.registry import Model
from tapvit_jax.progress import Progress, Step
from tapvit_jax.proxy.density import log_likelihood
from tapvit_jax.proxy.features import Extractor, build_extractor, embedding_network
from tapvit_jax.proxy.gmm import Gmm, GmmConfig, fit_report
from tapvit_jax.proxy.pool import pick_rows
from tapvit_jax.proxy.pool_features import pool_features
from tapvit_jax.proxy.select import SelectConfig, select, selection_report
from tapvit_jax.proxy.shares import (
    ClassGaussians,
    class_shares,
    fit_classes,
    mixture_shares,
    rows_for_classes,
)
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import images_at_once
from tapvit_jax.prune.latency import LatencyModel
from tapvit_jax.stages import Artefact, Scratch, Stages, all_succeed, on_main
from tapvit_jax.structs import to_plain
from tapvit_jax.train.classes import prior_weights
from tapvit_jax.train.evaluate import predict
from tapvit_jax.train.finetune import Teacher, TrainData, train

SELECTED, ORACLE = "selected", "oracle"

# Rough costs of the steps, in seconds on two cores; only their ratios matter, for the ETA.
UNITS = {"data": 1, "dense": 60, "extractor": 10, "device": 1, "select": 3, "units": 2}
UNITS |= {"layers": 8, "peer": 30, "compensate": 2, "recover": 10, "latency": 3, "report": 3}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSets:
    """Images of one device's pruning, as indices of the source.

    Attributes:
      metric: they score units and layers.
      finetune: they recover the pruned model.
      validation: they choose its epoch.
      mixture: what chose them; None where no mixture did.
    """

    metric: Int[np.ndarray, "m"]
    finetune: Int[np.ndarray, "n"]
    validation: Int[np.ndarray, "v"]
    mixture: Gmm | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Something a stage made, and the stage's key."""

    key: str
    value: Any


class Preparation:
    """The stages up to every device's images: dense model, extractor, mixtures, selection.

    Args:
      config: budgets, scoring and recovery are not read from it but given to the methods.
      stages: where artefacts are kept.
      payloads: folder of the devices' payload files.
      progress: told of every stage.
      seed: of all that comes after the split of the data, the dense model and the extractor, which
        always follow the config's; None is the config's here as well.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        stages: Stages,
        payloads: Path,
        progress: Progress,
        seed: int | None = None,
    ):
        self.config, self.stages, self.progress = config, stages, progress
        self.seed = config.seed if seed is None else seed
        self._payloads = payloads
        self._mixtures: dict[GmmConfig, list[tuple[Gmm, int]]] = {}
        self._selections: dict[tuple[SelectConfig, GmmConfig], Artefact] = {}
        table = config.latency_table
        self.latency_model = (
            None if table is None else all_succeed(lambda: LatencyModel.load(table))
        )
        with progress.step("read and partition the images", UNITS["data"]):
            all_succeed(self._read_data)
        distributed.check_agreement({"data": self.data_key}, "the hosts")

    def latency_for(self, budget: Budget) -> LatencyModel | None:
        """What predicts times under a budget; None under one that bounds none.

        Not every network has a predicted time: one whose residual width is cut has none.
        """
        return self.latency_model if budget.needs_latency else None

    # Data.

    def _read_data(self) -> None:
        data = self.config.data
        self.files = open_source(data.source)
        self.parts: Partition = partition(
            self.files.labels, data.partition, self.config.seed, splits=self.files.splits
        )
        self.data_key = {
            "source": self.files.fingerprint(),
            "preprocess": to_plain(data.preprocess),
            "partition": to_plain(data.partition),
            "seed": self.config.seed,
        }
        self.source: ImageSource = self.files
        self.dense_config: Config = self.config.dense.network(
            data.preprocess, len(self.files.class_names)
        )
        self._check_counts(self.config.select)
        everything = np.arange(len(self.files))
        if len(self.files) * data.preprocess.image_size**2 * data.preprocess.channels * 4 < 2**30:
            # Small sets are decoded once, not once an epoch.
            images, labels = load_all(self.files, everything, data.preprocess)
            self.source = MemorySource(images, labels, self.files.class_names, self.files.name)

    def _check_counts(self, options: SelectConfig) -> None:
        pool = len(self.parts.public_pool)
        for field in ("metric_count", "finetune_count"):
            count = getattr(options, field)
            if count > pool:
                raise InputError(
                    f"select.{field} is {count}, but the public pool has {pool} images"
                )

    def _train_data(self, train_on: np.ndarray, validation: np.ndarray) -> TrainData:
        data = self.config.data
        return TrainData(self.source, data.preprocess, train_on, validation, data.workers)

    def _images_key(self, indices: np.ndarray) -> dict[str, Any]:
        return {"data": self.data_key, "images": content_hash(np.asarray(indices).tolist())}

    def _stage(
        self,
        name: str,
        title: str,
        units: float,
        inputs: Mapping[str, Any],
        compute: Callable[[Step, Scratch], tuple[Mapping[str, np.ndarray], Mapping[str, Any]]],
    ) -> Artefact:
        """Run a stage; only one that is computed gets a line."""
        scratch = self.stages.scratch(name, inputs)

        def timed():
            with self.progress.step(title, units) as step:
                return compute(step, scratch)

        found = self.stages.run(name, inputs, timed)
        if found.cached:
            self.progress.advance(title, units)
        return found

    # Cloud: the dense model and the extractor.

    @functools.cached_property
    def _dense(self) -> Found:
        config, dense, shapes = self.config, self.config.dense, self.dense_config
        trained = dense.new_classifier or dense.weights is None

        def compute(step, scratch):
            if dense.weights is None:
                start, source = backbone.init(shapes, jax.random.key(config.seed)), None
            else:
                weights = read_weights(dense.weights)
                start = params_of(shapes, weights, new_classifier=dense.new_classifier)
                source = weights.source
            if not trained:
                return to_arrays(start), {"weights": source, "record": []}
            result = train(
                shapes,
                start,
                self._train_data(self.parts.public_pool, self.parts.public_validation),
                dense.train,
                seed=config.seed,
                checkpoints=scratch,
                on_share=step.advance,
            )
            return to_arrays(result.params), {"weights": source, "record": result.record}

        weights = None if dense.weights is None else fingerprint(dense.weights)
        if trained:
            # Wherever they lie; that there are any to train says that the classifier is new.
            plain = to_plain(dense) | {"train": dense.train.identity(), "weights": weights}
            del plain["new_classifier"]
            inputs = {"data": self.data_key, "dense": plain}
        else:
            inputs = {"network": to_plain(shapes), "weights": weights}
        found = self._stage("dense", "dense model", UNITS["dense"], inputs, compute)
        history = {
            "weights": found.meta["weights"],
            "trained_on": config.data.source,
            "seed": config.seed,
        }
        model = Model(
            config=shapes,
            params=to_params(found.arrays),
            preprocess=config.data.preprocess,
            class_names=self.files.class_names,
            name=f"{config.name}-dense",
            architecture=architecture(dense.model),
            history=history,
        )
        return Found(found.key, model)

    @property
    def dense(self) -> Model:
        """The model that every device's model is cut from."""
        return self._dense.value

    @functools.cached_property
    def extractor(self) -> Extractor:
        """The features that devices summarise."""
        options, preprocess = self.config.extractor, self.config.data.preprocess
        embedding = options.kind == "embedding"
        inputs = {"extractor": to_plain(options), "preprocess": to_plain(preprocess)}
        inputs |= self._images_key(self.parts.public_pool)
        network = embedding_network(options, preprocess, len(self.files.class_names))
        trained = self._embedding_network(network) if embedding else None
        inputs |= {"network": trained.key if trained else self._dense.key}

        def compute(step, scratch):
            made = build_extractor(
                options,
                self.source,
                self.parts.public_pool,
                preprocess,
                model=None if embedding else self.dense,
                network=network if embedding else None,
                params=trained.value if trained else None,
                workers=self.config.data.workers,
                on_share=step.advance,
            )
            arrays = {"mean": made.mean, "projection": made.projection}
            return arrays | {f"params/{n}": a for n, a in to_arrays(made.params).items()}, {}

        found = self._stage("extractor", "extractor's PCA", UNITS["extractor"] / 4, inputs, compute)
        if options.kind == "backbone":
            network = self.dense.config.first_blocks(options.depth)
        elif options.kind == "pooled":
            network = self.dense.config
        params = {n[7:]: a for n, a in found.arrays.items() if n.startswith("params/")}
        return Extractor(
            options.kind,
            network,
            to_params(params),
            preprocess,
            found.arrays["mean"],
            found.arrays["projection"],
        )

    def _embedding_network(self, network: convnet.ConvNetConfig) -> Found:
        config = self.config

        def compute(step, scratch):
            result = train(
                network,
                convnet.init(network, jax.random.key(config.seed + 1)),
                self._train_data(self.parts.public_pool, self.parts.public_validation),
                config.extractor_train,
                seed=config.seed + 1,
                forward=convnet.apply,
                checkpoints=scratch,
                on_share=step.advance,
            )
            return to_arrays(result.params), {"record": result.record}

        inputs = {
            "data": self.data_key,
            "network": to_plain(network),
            "train": config.extractor_train.identity(),
        }
        found = self._stage("embedding", "embedding network", UNITS["extractor"], inputs, compute)
        return Found(found.key, to_params(found.arrays))

    def _features(self, indices: np.ndarray) -> np.ndarray:
        """Features of public images, mapped from a file that is computed once for all devices."""
        inputs = {"extractor": self.extractor.fingerprint, **self._images_key(indices)}
        return pool_features(
            self.extractor,
            self.source,
            indices,
            self.stages.directory("features", inputs),
            workers=self.config.data.workers,
        )

    def compute_features(self, images: np.ndarray) -> np.ndarray:
        """Features of a few images, which no file keeps."""
        return self.extractor.features(self.source, images, workers=self.config.data.workers)

    # Device: nothing but the payload leaves this method.

    def seeded(self, options: GmmConfig, d: int) -> GmmConfig:
        """How a device fits its mixture, with the seed that is its own."""
        return dataclasses.replace(options, seed=self.seed + options.seed + d)

    def _payload(self, d: int, options: GmmConfig) -> tuple[Gmm, int]:
        path = self._payloads / f"device_{d}.gmm"
        if options != self.config.gmm:
            path = self._payloads / content_hash(to_plain(options))[:16] / path.name
        images, key = self.parts.devices[d].private_train, self.extractor.fingerprint
        options = self.seeded(options, d)

        def compute(step, scratch):
            gmm, table = fit_report(self.compute_features(images), options)
            return _gmm_arrays(gmm), {"bic": table}

        inputs = {"extractor": key, **self._images_key(images), "gmm": to_plain(options)}
        title = f"device {d}: mixture and payload"
        found = self._stage("gmm", title, UNITS["device"], inputs, compute)
        gmm = Gmm(**found.arrays, covariance_type=options.covariance_type)
        on_main(lambda: _save_payload(gmm, path, key))
        # The cloud reads the file, as it would from a real device, and trusts nothing in it.
        received = all_succeed(lambda: Gmm.load(path, dim=self.extractor.dim, extractor=key))
        return received, path.stat().st_size

    @property
    def payloads(self) -> list[tuple[Gmm, int]]:
        """Every device's mixture as the cloud received it, and the bytes that it took."""
        return self._received(self.config.gmm)

    def _received(self, options: GmmConfig) -> list[tuple[Gmm, int]]:
        if options not in self._mixtures:
            devices = range(len(self.parts.devices))
            self._mixtures[options] = [self._payload(d, options) for d in devices]
        return self._mixtures[options]

    # Cloud: one pass over the pool for all devices.

    def _chosen(self, config: SelectConfig, mixtures: GmmConfig) -> Artefact:
        if (config, mixtures) not in self._selections:
            self._selections[config, mixtures] = self._choose(config, mixtures)
        return self._selections[config, mixtures]

    def _choose(self, config: SelectConfig, mixtures: GmmConfig) -> Artefact:
        pool = self.parts.public_pool
        gmms = [gmm for gmm, _ in self._received(mixtures)]

        def compute(step, scratch):
            features = self._features(pool)
            positions = select(
                gmms,
                features,
                config.metric_count,
                method=config.method,
                seed=self.seed + config.seed,
                finetune_count=config.finetune_count,
                task_share=config.task_share,
            )
            validation = self.parts.public_validation
            keep = max(1, round(self.config.validation_share * len(validation)))
            likely = log_likelihood(gmms, self._features(validation))
            order = np.argsort(-np.asarray(likely), axis=1, kind="stable")[:, :keep]
            metric = positions[:, : config.metric_count]
            reports = [
                self._selection_report(d, gmm, metric[d], features) for d, gmm in enumerate(gmms)
            ]
            arrays = {"finetune": pool[positions], "validation": np.sort(validation[order])}
            return arrays, {"reports": reports}

        inputs = {
            "extractor": self.extractor.fingerprint,
            "data": self.data_key,
            "gmms": [[array.tolist() for array in _gmm_arrays(gmm).values()] for gmm in gmms],
            "select": to_plain(config),
            "validation_share": self.config.validation_share,
        }
        if self.seed != self.config.seed:
            inputs["seed"] = self.seed
        return self._stage("select", "score the pool, select", UNITS["select"], inputs, compute)

    def _selection_report(
        self, d: int, gmm: Gmm, positions: np.ndarray, features: np.ndarray
    ) -> dict[str, Any]:
        # Held-out private features exist only in simulation; they are reported, never used.
        split = self.parts.devices[d]
        return selection_report(
            positions,
            self.files.labels[self.parts.public_pool],
            len(self.files.class_names),
            gmm,
            features,
            held_out=self.compute_features(split.private_test),
        )

    def selection(self, d: int) -> dict[str, Any]:
        """What the metric dataset chosen for a device holds."""
        return self._chosen(self.config.select, self.config.gmm).meta["reports"][d]

    def image_sets(
        self,
        d: int,
        kind: str = SELECTED,
        select_config: SelectConfig | None = None,
        mixtures: GmmConfig | None = None,
    ) -> ImageSets:
        """Images for a device: selected by its payload, a "random" public subset, or the "pool".

        "oracle" are its own private-train images, with the public-validation images of its classes:
        what no cloud has, for simulation only. Sizes, selection and mixtures are the config's where
        none are given.

        Raises:
          InputError: more images than the pool has.
        """
        select_config, pool = select_config or self.config.select, self.parts.public_pool
        self._check_counts(select_config)
        split, validation, mixture = self.parts.devices[d], self.parts.public_validation, None
        if kind == SELECTED:
            mixtures = mixtures or self.config.gmm
            chosen = self._chosen(select_config, mixtures)
            finetune, validation = (chosen.arrays[n][d] for n in ("finetune", "validation"))
            metric = finetune[: select_config.metric_count]
            mixture = self._received(mixtures)[d][0]
        elif kind == "random":
            order = np.random.default_rng([self.seed, d]).permutation(pool)
            finetune = order[: select_config.finetune_count]
            metric = finetune[: select_config.metric_count]
        elif kind == ORACLE:
            order = np.random.default_rng([self.seed, d]).permutation(split.private_train)
            finetune = np.resize(order, select_config.finetune_count)
            metric = order[: select_config.metric_count]
            validation = validation[np.isin(self.files.labels[validation], split.classes)]
        else:
            metric = finetune = pool
        # As many steps for every set: few images are taken several times in an epoch.
        finetune = np.resize(finetune, max(len(finetune), self.config.select.finetune_count))
        if self.config.data.partition.leaks:
            # As published: whatever the images, the epoch is chosen on what is reported.
            validation = split.private_test
        return ImageSets(metric, finetune, validation, mixture)

    # Cloud: the classes that a device sees.

    @functools.cached_property
    def _classes(self) -> Found:
        """Gaussians of the classes, on some images of the pool under the dense model's names."""
        pool = self.parts.public_pool
        rows = rows_for_classes(len(pool), len(self.files.class_names), self.config.seed)

        def compute(step, scratch):
            found = fit_classes(pick_rows(self._features(pool), rows), self.predictions(pool[rows]))
            return {"means": found.means, "precision": found.precision}, {}

        inputs = {"extractor": self.extractor.fingerprint, "dense": self._dense.key}
        inputs |= self._images_key(pool[rows])
        found = self._stage("classes", "classes' features", 0, inputs, compute)
        return Found(found.key, ClassGaussians(**found.arrays))

    def class_prior(self, sets: ImageSets, kind: str) -> Found:
        """How much likelier each class is on a device, see `prior_weights`.

        Of kind "metric", from the dense model's mean prediction on the metric images. Of kind
        "mixture", from the mixture that chose them; where none did, from their features.
        """

        def compute():
            if kind == "metric":
                shares = self.predictions(sets.metric).mean(axis=0)
            elif sets.mixture is not None:
                shares = mixture_shares(sets.mixture, self._classes.value)
            else:
                features = self.compute_features(sets.metric)
                shares = class_shares(self._classes.value, features)
            return {"weights": prior_weights(shares, len(sets.metric))}, {}

        inputs = {"dense": self._dense.key} if kind == "metric" else {"classes": self._classes.key}
        if kind == "mixture" and sets.mixture is not None:
            inputs["gmm"] = [array.tolist() for array in _gmm_arrays(sets.mixture).values()]
            inputs["count"] = len(sets.metric)
        else:
            inputs |= self._images_key(sets.metric)
        found = self.stages.run("prior", inputs, compute)
        return Found(found.key, found.arrays["weights"])

    def predictions(self, indices: np.ndarray) -> Float[np.ndarray, "n c"]:
        """The dense model's predictions on some images."""
        return predict(
            Teacher(self.dense.config, self.dense.params),
            self.source,
            indices,
            self.config.data.preprocess,
            images_at_once(self.dense.config, len(indices)),
            workers=self.config.data.workers,
        )


def _save_payload(gmm: Gmm, path: Path, extractor: str) -> None:
    with file_lock(path.with_name(f".{path.name}.lock")) as locked:
        if locked:
            remove_leftovers(path)
        gmm.save(path, extractor=extractor)


def _gmm_arrays(gmm: Gmm) -> dict[str, np.ndarray]:
    return {"weights": gmm.weights, "means": gmm.means, "covariances": gmm.covariances}


def to_arrays(params: Params) -> dict[str, np.ndarray]:
    """Parameters by path, as stages keep them."""
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


def to_params(arrays: Mapping[str, np.ndarray]) -> Params:
    """Parameters from what a stage kept."""
    return unflatten({tuple(name.split("/")): jax.numpy.asarray(a) for name, a in arrays.items()})

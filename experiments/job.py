"""The stages of an experiment, from images to evaluated models, for runs and sweeps.

Every stage is cached under a hash of what it depends on and nothing else, so that jobs which differ
only in a budget or a seed of their own share all that they can.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Bool, Int

from experiments import peers
from experiments.config import ExperimentConfig, identity
from tapvit_jax import distributed
from tapvit_jax.convert.timm import params_of
from tapvit_jax.convert.weights import fingerprint, read_weights
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.partition import Partition, partition
from tapvit_jax.data.pipeline import load_all
from tapvit_jax.data.sources import MemorySource, open_source
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash, file_lock, remove_leftovers
from tapvit_jax.importance.criteria import CriterionConfig, unit_importance
from tapvit_jax.importance.layers import LayerScores, layer_importance
from tapvit_jax.importance.neurons import Method, Scores, neuron_importance
from tapvit_jax.models import backbone, convnet
from tapvit_jax.models.backbone import Config
from tapvit_jax.models.params import Params, flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.pipeline import (
    PruneConfig,
    even_batch_size,
    latencies,
    plan_masks,
    reshape_checked,
    score,
    score_arrays,
    scores_from_arrays,
    scoring_batches,
)
from tapvit_jax.progress import Progress, Step
from tapvit_jax.proxy.density import log_likelihood
from tapvit_jax.proxy.features import Extractor, build_extractor, embedding_network
from tapvit_jax.proxy.gmm import Gmm, GmmConfig, fit_report
from tapvit_jax.proxy.pool_features import pool_features
from tapvit_jax.proxy.select import SelectConfig, select, selection_report
from tapvit_jax.prune.allocate import AllocateConfig, allocate
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.mask import Plan, apply_masks
from tapvit_jax.prune.recover import RecoverConfig, recover
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.stages import Artefact, Stages, all_succeed
from tapvit_jax.structs import to_plain
from tapvit_jax.train.classes import likely_classes
from tapvit_jax.train.evaluate import evaluate_indices, predict
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train
from tapvit_jax.train.variants import Variant, train_variants
from tapvit_jax.versions import library_versions

SELECTED, ORACLE = "selected", "oracle"

# Rough costs of the steps, in seconds on two cores; only their ratios matter, for the ETA.
UNITS = {"data": 1, "dense": 60, "extractor": 10, "device": 1, "select": 3, "score": 8}
UNITS |= {"peer": 30, "compensate": 2, "recover": 10, "latency": 3, "report": 3}

# What the methods of a job are told rather than read from its config.
_OF_UNITS = ("name", "budgets", "prune", "compensate", "recover", "recover_on")
_OF_UNITS += ("recover_together", "comparisons", "latency_batch")

_BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSets:
    """Images of one device's pruning, as indices of the source.

    Attributes:
      metric: they score units and layers.
      finetune: they recover the pruned model.
      validation: they choose its epoch.
    """

    metric: Int[np.ndarray, "m"]
    finetune: Int[np.ndarray, "n"]
    validation: Int[np.ndarray, "v"]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Something a stage made, and the stage's key."""

    key: str
    value: Any


class Job:
    """All stages for one set of images, dense model, extractor and selection.

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
        with progress.step("read and partition the images", UNITS["data"]):
            all_succeed(self._read_data)
        distributed.check_agreement({"data": self.data_key}, "the hosts")

    @staticmethod
    def shared_key(config: ExperimentConfig) -> str:
        """The same for configs whose units can use one job."""
        plain = identity(config)
        return content_hash({name: plain[name] for name in plain if name not in _OF_UNITS})

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
        compute: Callable[[Step, Path], tuple[Mapping[str, np.ndarray], Mapping[str, Any]]],
    ) -> Artefact:
        """Run a stage; only one that is computed gets a line."""
        scratch = self.stages.scratch(f"{name}-{self.stages.key(name, inputs)[:16]}")

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

        def compute(step, scratch):
            if dense.weights is not None:
                found = read_weights(dense.weights)
                return _to_arrays(params_of(shapes, found)), {"weights": found.source, "record": []}
            result = train(
                shapes,
                backbone.init(shapes, jax.random.key(config.seed)),
                self._train_data(self.parts.public_pool, self.parts.public_validation),
                dense.train,
                seed=config.seed,
                checkpoints=scratch,
                on_epoch=_report_epochs(step, dense.train),
            )
            return _to_arrays(result.params), {"weights": None, "record": result.record}

        if dense.weights is None:
            inputs = {"data": self.data_key, "dense": to_plain(dense)}
        else:
            inputs = {"network": to_plain(shapes), "weights": fingerprint(dense.weights)}
        found = self._stage("dense", "dense model", UNITS["dense"], inputs, compute)
        history = {
            "architecture": dense.model,
            "weights": found.meta["weights"],
            "trained_on": config.data.source,
            "seed": config.seed,
        }
        model = Model(
            config=shapes,
            params=_to_params(found.arrays),
            preprocess=config.data.preprocess,
            class_names=self.files.class_names,
            name=f"{config.name}-dense",
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
                model=self.dense,
                network=network if embedding else None,
                params=trained.value if trained else None,
            )
            arrays = {"mean": made.mean, "projection": made.projection}
            return arrays | {f"params/{n}": a for n, a in _to_arrays(made.params).items()}, {}

        found = self._stage("extractor", "extractor's PCA", UNITS["extractor"] / 4, inputs, compute)
        if options.kind == "backbone":
            network = self.dense.config.first_blocks(options.depth)
        elif options.kind == "pooled":
            network = self.dense.config
        params = {n[7:]: a for n, a in found.arrays.items() if n.startswith("params/")}
        return Extractor(
            options.kind,
            network,
            _to_params(params),
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
                on_epoch=_report_epochs(step, config.extractor_train),
            )
            return _to_arrays(result.params), {"record": result.record}

        inputs = {
            "data": self.data_key,
            "network": to_plain(network),
            "train": to_plain(config.extractor_train),
        }
        found = self._stage("embedding", "embedding network", UNITS["extractor"], inputs, compute)
        return Found(found.key, _to_params(found.arrays))

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

    # Device: nothing but the payload leaves this method.

    def _payload(self, d: int, options: GmmConfig) -> tuple[Gmm, int]:
        path = self._payloads / f"device_{d}.gmm"
        if options != self.config.gmm:
            path = self._payloads / content_hash(to_plain(options))[:16] / path.name
        images, key = self.parts.devices[d].private_train, self.extractor.fingerprint
        options = dataclasses.replace(options, seed=self.seed + options.seed + d)

        def compute(step, scratch):
            gmm, table = fit_report(self.extractor.features(self.source, images), options)
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
            held_out=self.extractor.features(self.source, split.private_test),
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
        if kind == SELECTED:
            chosen = self._chosen(select_config, mixtures or self.config.gmm)
            finetune, validation = (chosen.arrays[n][d] for n in ("finetune", "validation"))
            if self.config.data.partition.leaks:
                validation = self.parts.devices[d].private_test
            return ImageSets(finetune[: select_config.metric_count], finetune, validation)
        validation = self.parts.public_validation
        if kind == "random":
            order = np.random.default_rng([self.seed, d]).permutation(pool)
            finetune = order[: select_config.finetune_count]
            return ImageSets(finetune[: select_config.metric_count], finetune, validation)
        if kind == ORACLE:
            split = self.parts.devices[d]
            order = np.random.default_rng([self.seed, d]).permutation(split.private_train)
            # As many steps as with other sets: few images are taken several times in an epoch.
            finetune = np.resize(order, select_config.finetune_count)
            own = validation[np.isin(self.files.labels[validation], split.classes)]
            return ImageSets(order[: select_config.metric_count], finetune, own)
        return ImageSets(pool, pool, validation)

    # Cloud: score, plan, prune and recover.

    def plan(self, title: str, sets: ImageSets, prune: PruneConfig, budget: Budget) -> Found:
        """Which units stay under a budget, and why: their scores on the metric dataset.

        Raises:
          InputError: a budget that cannot be met.
        """
        seed = self.seed

        def compute_scores(step, scratch):
            workers = self.config.data.workers
            found = score(
                self.dense,
                self.source,
                sets.metric,
                prune,
                seed=seed,
                workers=workers,
                on_share=step.advance,
            )
            return score_arrays(*found), {}

        inputs = {
            "dense": self._dense.key,
            **self._images_key(sets.metric),
            "neurons": to_plain(prune.neurons),
            "layers": to_plain(prune.layers),
            "batch_size": prune.batch_size,
            "seed": seed,
        }
        scores = self._stage("score", f"{title}: score", UNITS["score"], inputs, compute_scores)
        units, layers = scores_from_arrays(scores.arrays, prune.layers.sparsity)
        return self._allocated(scores.key, units, layers, prune.allocate, budget)

    def _allocated(
        self,
        scores: str,
        units: Scores,
        layers: LayerScores | None,
        options: AllocateConfig,
        budget: Budget,
    ) -> Found:
        def compute():
            return allocate(self.dense, units, layers, budget, config=options).keep, {}

        inputs = {"scores": scores, "budget": to_plain(budget), "allocate": to_plain(options)}
        found = self.stages.run("plan", inputs, compute)
        return Found(found.key, Plan(self.dense.config, found.arrays))

    def unit_scores(
        self, title: str, metric: Int[np.ndarray, "m"], criterion: str, prune: PruneConfig
    ) -> Found:
        """Scores of all units by a criterion of the registry; `prune.neurons` says how for ours."""
        most = prune.neurons.max_batches
        own = criterion in get_args(Method)
        options = prune.neurons if own else CriterionConfig(max_batches=most)
        score = neuron_importance if own else functools.partial(unit_importance, method=criterion)

        def compute(step, scratch):
            found = self._scoring_batches(metric, prune, most)
            return score(self.dense, found, config=options, seed=self.seed), {}

        inputs = {
            "dense": self._dense.key,
            **self._images_key(metric),
            "criterion": criterion,
            "options": to_plain(options),
            "batch_size": prune.batch_size,
            "seed": self.seed,
        }
        found = self._stage("units", f"{title}: score units", UNITS["score"] / 4, inputs, compute)
        return Found(found.key, found.arrays)

    def layer_scores(
        self, title: str, metric: Int[np.ndarray, "m"], units: Found, prune: PruneConfig
    ) -> Found:
        """What pruning each branch by these unit scores does to the output."""

        def compute(step, scratch):
            found = self._scoring_batches(metric, prune, prune.layers.batches_read)
            layers = layer_importance(self.dense, found, units.value, config=prune.layers)
            return layers.arrays(), {}

        inputs = {
            "units": units.key,
            **self._images_key(metric),
            "layers": to_plain(prune.layers),
            "batch_size": prune.batch_size,
        }
        found = self._stage("layers", f"{title}: score layers", UNITS["score"], inputs, compute)
        return Found(found.key, LayerScores(prune.layers.sparsity, **found.arrays))

    def plan_from(
        self, units: Found, layers: Found | None, options: AllocateConfig, budget: Budget
    ) -> Found:
        """Which units stay under a budget; without layer scores all layers lose the same share.

        Raises:
          InputError: a budget that cannot be met.
        """
        key = content_hash([units.key, layers and layers.key])
        return self._allocated(key, units.value, layers and layers.value, options, budget)

    def _scoring_batches(
        self, metric: Int[np.ndarray, "m"], prune: PruneConfig, most: int
    ) -> Iterator[dict[str, np.ndarray]]:
        size = even_batch_size(len(metric), prune.batch_size)
        return self._even_batches(metric[: most * size], prune.batch_size)

    def _even_batches(
        self, metric: Int[np.ndarray, "m"], most: int
    ) -> Iterator[dict[str, np.ndarray]]:
        preprocess, workers = self.config.data.preprocess, self.config.data.workers
        size = even_batch_size(len(metric), most)
        return scoring_batches(self.source, metric, preprocess, size, workers=workers)

    def pruned(self, plan: Found) -> Found:
        """The masked model without any recovery."""
        return Found(plan.key, apply_masks(self.dense, plan.value))

    def compensate(
        self,
        title: str,
        plan: Found,
        metric: Int[np.ndarray, "m"],
        options: RecoverConfig,
        batch_size: int,
    ) -> Found:
        """The masked model, in dense shapes, after closed-form recovery on the metric dataset."""
        if options.method == "none":
            return self.pruned(plan)
        # Every process needs a batch of its own.
        most = max(1, min(batch_size, len(metric) // distributed.process_count()))

        def compute(step, scratch):
            found = recover(
                self.dense,
                plan.value,
                self._even_batches(metric, most),
                config=options,
                on_share=step.advance,
            )
            return _to_arrays(found.params), {}

        inputs = {
            "plan": plan.key,
            "dense": self._dense.key,
            **self._images_key(metric),
            "recover": to_plain(options),
            "batch_size": most,
        }
        found = self._stage(
            "compensate", f"{title}: closed-form recovery", UNITS["compensate"], inputs, compute
        )
        return Found(found.key, self.dense.replace(params=_to_params(found.arrays)))

    def peer(self, title: str, metric: Int[np.ndarray, "m"], name: str, budget: Budget) -> Found:
        """The smaller model that an external package makes of the dense one, see `peers`.

        Raises:
          InputError: a package that is not installed, or a budget that it does not reach.
        """

        def compute(step, scratch):
            method, embedding = peers.settings(name)
            found = peers.torch_pruning(
                self.dense,
                self.source.load(metric, self.config.data.preprocess),
                self.source.labels[metric],
                budget,
                method=method,
                embedding=embedding,
                seed=self.seed,
            ).model
            meta = {"family": backbone.family(found.config), "config": to_plain(found.config)}
            return _to_arrays(found.params), meta

        inputs = {
            "dense": self._dense.key,
            **self._images_key(metric),
            "peer": name,
            "budget": to_plain(budget),
            "seed": self.seed,
        }
        found = self._stage("peer", f"{title}: prune", UNITS["peer"], inputs, compute)
        config = backbone.read_config(found.meta["family"], found.meta["config"], "peer")
        return Found(found.key, self.dense.replace(config=config, params=_to_params(found.arrays)))

    def recover(
        self,
        title: str,
        d: int,
        plan: Found | None,
        sets: ImageSets,
        options: TrainConfig,
        recover_on: str,
        start: Found | None = None,
    ) -> tuple[Found, int]:
        """The fine-tuned model and its best epoch.

        Args:
          title: for the progress.
          d: the device.
          plan: which units stay; None for a `start` that is small already.
          sets: images.
          options: the recipe.
          recover_on: see `ExperimentConfig`.
          start: parameters to start from, in dense shapes if there is a plan; None is the dense
            model's.
        """
        masked = plan is not None and recover_on == "masked"
        initial = self.dense if start is None else start.value
        if plan is not None and not masked:
            initial = reshape(initial, plan.value)
        options = self._recipe(options)

        def compute(step, scratch):
            result = train(
                initial.config,
                initial.params,
                self._train_data(sets.finetune, sets.validation),
                options,
                seed=self._recovery_seed(d),
                masks=plan_masks(plan.value) if masked else None,
                teacher=Teacher(self.dense.config, self.dense.params),
                classes=self._likely_classes(sets),
                checkpoints=scratch,
                on_epoch=_report_epochs(step, options),
            )
            meta = {"best_epoch": result.best_epoch, "record": result.record}
            return _to_arrays(result.params), meta

        inputs = self._recovery_inputs(d, plan, sets, start) | {
            "recover": to_plain(options),
            "recover_on": recover_on,
        }
        found = self._stage("recover", f"{title}: recover", UNITS["recover"], inputs, compute)
        model = initial.replace(params=_to_params(found.arrays))
        return Found(found.key, model), found.meta["best_epoch"]

    def recover_together(
        self,
        title: str,
        members: Sequence[tuple[int, Found, ImageSets]],
        place: int,
        options: TrainConfig,
        starts: Sequence[Found | None] | None = None,
    ) -> tuple[Found, int]:
        """As `recover`, masked, for one of several (device, plan, images) in one program."""
        options = self._recipe(options)
        starts = [None] * len(members) if starts is None else starts

        def compute(step, scratch):
            variants = [
                Variant(
                    (self.dense if start is None else start.value).params,
                    sets.finetune,
                    sets.validation,
                    plan_masks(plan.value),
                    self._recovery_seed(d),
                    self._likely_classes(sets),
                )
                for (d, plan, sets), start in zip(members, starts, strict=True)
            ]
            share = 1.0 / max(options.epochs * len(members), 1)
            results = train_variants(
                self.dense.config,
                variants,
                self.source,
                self.config.data.preprocess,
                options,
                teacher=Teacher(self.dense.config, self.dense.params),
                workers=self.config.data.workers,
                checkpoints=scratch,
                on_epoch=lambda variant, epoch, metrics: step.advance(share),
            )
            arrays = {
                f"{i}/{name}": array
                for i, result in enumerate(results)
                for name, array in _to_arrays(result.params).items()
            }
            return arrays, {
                "best_epoch": [result.best_epoch for result in results],
                "record": [result.record for result in results],
            }

        inputs = {
            "members": [
                self._recovery_inputs(*member, start)
                for member, start in zip(members, starts, strict=True)
            ],
            "recover": to_plain(options),
        }
        found = self._stage(
            "recover_together", f"{title}: recover", UNITS["recover"], inputs, compute
        )
        prefix = f"{place}/"
        arrays = {n[len(prefix) :]: a for n, a in found.arrays.items() if n.startswith(prefix)}
        key = content_hash({"together": found.key, "place": place})
        model = self.dense.replace(params=_to_params(arrays))
        return Found(key, model), found.meta["best_epoch"][place]

    def _likely_classes(self, sets: ImageSets) -> Bool[np.ndarray, "c"] | None:
        """The classes that fine-tuning distils, by what the dense model makes of the metric set."""
        if self.config.likely_share is None:
            return None
        found = predict(
            Teacher(self.dense.config, self.dense.params),
            self.source,
            sets.metric,
            self.config.data.preprocess,
            _BATCH,
            workers=self.config.data.workers,
        )
        return likely_classes(found, self.config.likely_share)

    def _recipe(self, options: TrainConfig) -> TrainConfig:
        # Every variant gets as many steps: the whole pool is sampled afresh every epoch.
        return dataclasses.replace(options, images_per_epoch=self.config.select.finetune_count)

    def _recovery_seed(self, d: int) -> int:
        return self.seed + 100 + d

    def _recovery_inputs(
        self, d: int, plan: Found | None, sets: ImageSets, start: Found | None
    ) -> dict[str, Any]:
        # A start of its own is named, so that the keys of runs without one are what they were.
        named = {} if start is None else {"start": start.key}
        if self.config.likely_share is not None:
            named["likely"] = self.config.likely_share, self._images_key(sets.metric)
        return named | {
            "plan": plan and plan.key,
            "dense": self._dense.key,
            "finetune": self._images_key(sets.finetune),
            "validation": self._images_key(sets.validation),
            "seed": self._recovery_seed(d),
        }

    def top1(self, model: Found, indices: np.ndarray) -> float:
        """Accuracy of a model on some images."""

        def compute():
            found = evaluate_indices(
                model.value.config,
                model.value.params,
                self.source,
                indices,
                self.config.data.preprocess,
                _BATCH,
                workers=self.config.data.workers,
            )
            return {}, {"top1": found.top1}

        inputs = {"model": model.key, **self._images_key(indices)}
        return self.stages.run("evaluate", inputs, compute).meta["top1"]

    def dense_top1(self, d: int) -> float:
        """Accuracy of the dense model on a device's test images."""
        return self.top1(self._dense, self.parts.devices[d].private_test)

    def reshaped(
        self, d: int, plan: Found, recovered: Model, recover_on: str
    ) -> tuple[Model, float]:
        """The smaller model, and how far masking and reshaping differ on real images."""
        test = self.parts.devices[d].private_test
        images = self.source.load(test[:64], self.config.data.preprocess)
        if recover_on == "masked":
            return reshape_checked(recovered, plan.value, images)
        return recovered, reshape_checked(self.dense, plan.value, images)[1]

    def latency(self, title: str, small: Model, batch: int) -> dict[str, dict[str, float]]:
        """Milliseconds of the dense and the pruned model on this machine, measured once."""

        def compute(step, scratch):
            return {}, latencies({"dense": self.dense, "pruned": small}, batch)

        inputs = {
            "dense": to_plain(self.dense.config),
            "pruned": to_plain(small.config),
            "batch": batch,
            "backend": jax.default_backend(),
        }
        found = self._stage("latency", f"{title}: latency", UNITS["latency"], inputs, compute)
        return dict(found.meta)


def described(job: Job) -> dict[str, Any]:
    """What a report says about the data, the dense model and the machine."""
    return {
        "libraries": library_versions(),
        "backend": jax.default_backend(),
        "class_names": list(job.files.class_names),
        "sizes": {
            "public_pool": len(job.parts.public_pool),
            "public_validation": len(job.parts.public_validation),
        },
        "dense": dataclasses.asdict(cost(job.dense.config)),
    }


def on_main(action: Callable[[], Any]) -> None:
    """Do something on the first process; where it fails, all fail, and none goes on before."""
    all_succeed(lambda: action() if distributed.is_main() else None)


def keep_ratios(plan: Plan) -> dict[str, list[float]]:
    """Share of the units that every block keeps, by kind."""
    blocks = range(len(plan.config.blocks))
    return {kind: [plan.keep_ratio(i, kind) for i in blocks] for kind in ("mlp", "qk", "vo")}


def _save_payload(gmm: Gmm, path: Path, extractor: str) -> None:
    with file_lock(path.with_name(f".{path.name}.lock")) as locked:
        if locked:
            remove_leftovers(path)
        gmm.save(path, extractor=extractor)


def _gmm_arrays(gmm: Gmm) -> dict[str, np.ndarray]:
    return {"weights": gmm.weights, "means": gmm.means, "covariances": gmm.covariances}


def _to_arrays(params: Params) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


def _to_params(arrays: Mapping[str, np.ndarray]) -> Params:
    return unflatten({tuple(name.split("/")): jax.numpy.asarray(a) for name, a in arrays.items()})


def _report_epochs(step: Step, options: TrainConfig):
    return lambda epoch, metrics: step.advance(1.0 / options.epochs)

"""The stages of an experiment, from images to evaluated models, for runs and sweeps.

Every stage is cached under a hash of what it depends on and nothing else, so that jobs which differ
only in a budget or a seed of their own share all that they can.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from experiments import peers
from experiments.config import ExperimentConfig, identity
from experiments.hardware import hardware
from experiments.preparation import (
    UNITS,
    Found,
    ImageSets,
    Preparation,
    to_arrays,
    to_params,
)
from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash
from tapvit_jax.importance.layers import LayerScores, layer_importance
from tapvit_jax.models import backbone
from tapvit_jax.models.registry import Model
from tapvit_jax.pipeline import (
    PruneConfig,
    even_batch_size,
    latencies,
    plan_masks,
    reshape_checked,
    score_units,
    scoring_batches,
)
from tapvit_jax.progress import Step
from tapvit_jax.prune.allocate import allocate
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost, images_at_once
from tapvit_jax.prune.mask import Plan, apply_masks
from tapvit_jax.prune.recover import RecoverConfig, move_prior, recover
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.stages import from_main
from tapvit_jax.structs import to_plain
from tapvit_jax.train.classes import likely_classes
from tapvit_jax.train.evaluate import evaluate_indices
from tapvit_jax.train.finetune import Teacher, TrainConfig, train
from tapvit_jax.train.variants import Variant, train_variants
from tapvit_jax.versions import library_versions

# What the methods of a job are told rather than read from its config.
_OF_UNITS = ("name", "budgets", "prune", "compensate", "recover", "recover_on")
_OF_UNITS += ("recover_together", "comparisons", "latency_batch")


@dataclasses.dataclass(frozen=True, eq=False)
class Pruned:
    """A device's pruned model before fine-tuning.

    Attributes:
      device: its number.
      plan: which units stay; None for a `start` that is small already.
      sets: images.
      start: parameters to start from, dense shapes if there is a plan; None is the dense model's.
      recovery: what closed-form recovery they had; if it moved the classes' prior, the teacher's is
        moved as well.
    """

    device: int
    plan: Found | None
    sets: ImageSets
    start: Found | None = None
    recovery: RecoverConfig = RecoverConfig("none")


class Job(Preparation):
    """All stages for one set of images, dense model, extractor and selection."""

    @staticmethod
    def shared_key(config: ExperimentConfig) -> str:
        """The same for configs whose units can use one job."""
        plain = identity(config)
        return content_hash({name: plain[name] for name in plain if name not in _OF_UNITS})

    def plan(
        self,
        title: str,
        device: int,
        sets: ImageSets,
        prune: PruneConfig,
        budget: Budget,
        *,
        probe: bool = True,
    ) -> Found:
        """Which units stay under a budget, by their scores on the metric dataset.

        Args:
          title: for the progress.
          device: its number.
          sets: images.
          prune: how units and layers are scored and widths chosen.
          budget: what must be met.
          probe: layers are probed where widths read that; without, all lose the same share.

        Raises:
          InputError: a budget that cannot be met.
        """
        units, layers = self.unit_scores(title, device, sets.metric, prune), None
        if probe and prune.allocate.reads_layers:
            layers = self.layer_scores(title, sets.metric, units, prune)
        options, latency = prune.allocate, self.latency_for(budget)

        def compute():
            found = layers and layers.value
            plan = allocate(self.dense, units.value, found, budget, config=options, latency=latency)
            return plan.keep, {}

        scores = content_hash([units.key, layers and layers.key])
        inputs = {"scores": scores, "budget": to_plain(budget), "allocate": to_plain(options)}
        if latency is not None:
            inputs["latency"] = to_plain(latency)
        found = self.stages.run("plan", inputs, compute)
        return Found(found.key, Plan(self.dense.config, found.arrays))

    def unit_scores(
        self, title: str, device: int, metric: Int[np.ndarray, "m"], prune: PruneConfig
    ) -> Found:
        """Scores of all units."""
        seed = self._scoring_seed(device, prune.criterion == "random")

        def compute(step, scratch):
            found = self._scoring_batches(step, metric, prune, prune.neurons.max_batches)
            return score_units(self.dense, found, prune, seed), {}

        inputs = {
            "dense": self._dense.key,
            **self._images_key(metric),
            **_scored_by(prune),
            "batch_size": prune.batch_size,
            "seed": seed,
        }
        found = self._stage("units", f"{title}: score units", UNITS["units"], inputs, compute)
        return Found(found.key, found.arrays)

    def layer_scores(
        self, title: str, metric: Int[np.ndarray, "m"], units: Found, prune: PruneConfig
    ) -> Found:
        """What pruning each branch by these unit scores does to the output."""

        def compute(step, scratch):
            found = self._scoring_batches(step, metric, prune, prune.layers.batches_read)
            layers = layer_importance(self.dense, found, units.value, config=prune.layers)
            return layers.arrays(), {}

        inputs = {
            "units": units.key,
            **self._images_key(metric),
            "layers": to_plain(prune.layers),
            "batch_size": prune.batch_size,
        }
        found = self._stage("layers", f"{title}: score layers", UNITS["layers"], inputs, compute)
        return Found(found.key, LayerScores(prune.layers.sparsity, **found.arrays))

    def _scoring_batches(
        self, step: Step, metric: Int[np.ndarray, "m"], prune: PruneConfig, most: int
    ) -> Iterator[dict[str, np.ndarray]]:
        size = even_batch_size(len(metric), prune.batch_size)
        count = min(len(metric) // size, most)
        for batch in self._batches(metric[: count * size], size):
            yield batch
            step.advance(distributed.process_count() / count)

    def _even_batches(
        self, metric: Int[np.ndarray, "m"], most: int
    ) -> Iterator[dict[str, np.ndarray]]:
        return self._batches(metric, even_batch_size(len(metric), most))

    def _batches(self, metric: Int[np.ndarray, "m"], size: int) -> Iterator[dict[str, np.ndarray]]:
        preprocess, workers = self.config.data.preprocess, self.config.data.workers
        return scoring_batches(self.source, metric, preprocess, size, workers=workers)

    def pruned(self, plan: Found) -> Found:
        """The masked model without any recovery."""
        return Found(plan.key, apply_masks(self.dense, plan.value))

    def compensate(
        self,
        title: str,
        plan: Found,
        sets: ImageSets,
        options: RecoverConfig,
        batch_size: int,
    ) -> Found:
        """The masked model, in dense shapes, after closed-form recovery on the metric dataset."""
        if options.method == "none":
            return self.pruned(plan)
        metric = sets.metric
        prior = self.class_prior(sets, options.prior) if options.moves_prior else None
        # Every process needs a batch of its own.
        most = max(1, min(batch_size, len(metric) // distributed.process_count()))

        def compute(step, scratch):
            found = recover(
                self.dense,
                plan.value,
                self._even_batches(metric, most),
                config=options,
                prior=prior and prior.value,
                on_share=step.advance,
            )
            return to_arrays(found.params), {}

        inputs = {
            "plan": plan.key,
            "dense": self._dense.key,
            **self._images_key(metric),
            "recover": to_plain(options),
            "batch_size": most,
        }
        if prior is not None:
            inputs["prior"] = prior.key
        found = self._stage(
            "compensate", f"{title}: closed-form recovery", UNITS["compensate"], inputs, compute
        )
        model = self.dense.replace(params=to_params(found.arrays), prior=options.moves_prior)
        return Found(found.key, model)

    def peer(
        self, title: str, device: int, metric: Int[np.ndarray, "m"], name: str, budget: Budget
    ) -> Found:
        """The smaller model that an external package makes of the dense one, see `peers`.

        Raises:
          InputError: a package that is not installed, or a budget that it does not reach.
        """
        method, embedding = peers.settings(name)
        latency, seed = self.latency_for(budget), self._scoring_seed(device, method == "random")

        def compute(step, scratch):
            found = peers.torch_pruning(
                self.dense,
                self.source.load(metric, self.config.data.preprocess),
                self.source.labels[metric],
                budget,
                latency=latency,
                method=method,
                embedding=embedding,
                seed=seed,
            ).model
            meta = {"family": backbone.family(found.config), "config": to_plain(found.config)}
            return to_arrays(found.params), meta

        inputs = {
            "dense": self._dense.key,
            **self._images_key(metric),
            "peer": name,
            "budget": to_plain(budget),
            "seed": seed,
        }
        if latency is not None:
            inputs["latency"] = to_plain(latency)
        found = self._stage("peer", f"{title}: prune", UNITS["peer"], inputs, compute)
        config = backbone.read_config(found.meta["family"], found.meta["config"], "peer")
        return Found(found.key, self.dense.replace(config=config, params=to_params(found.arrays)))

    def with_prior(self, model: Found, sets: ImageSets, options: RecoverConfig) -> Found:
        """A model under the classes' prior, if these options move it, and not changed otherwise."""
        if not options.moves_prior:
            return model
        prior = self.class_prior(sets, options.prior)
        key = content_hash({"model": model.key, "prior": prior.key})
        return Found(key, move_prior(model.value, prior.value))

    def recover(
        self,
        title: str,
        pruned: Pruned,
        options: TrainConfig,
        recover_on: str,
    ) -> tuple[Found, int]:
        """The fine-tuned model and its best epoch.

        Args:
          title: for the progress.
          pruned: what is fine-tuned.
          options: the recipe.
          recover_on: see `ExperimentConfig`.
        """
        plan, sets, initial = pruned.plan, pruned.sets, self._start(pruned)
        masked = plan is not None and recover_on == "masked"
        if plan is not None and not masked:
            initial = reshape(initial, plan.value)
        options = self._recipe(options)

        def compute(step, scratch):
            result = train(
                initial.config,
                initial.params,
                self._train_data(sets.finetune, sets.validation),
                options,
                seed=self._recovery_seed(pruned),
                masks=plan_masks(plan.value) if masked else None,
                teacher=Teacher(self.dense.config, self.dense.params),
                **self._class_weights(pruned),
                checkpoints=scratch,
                on_share=step.advance,
            )
            meta = {"best_epoch": result.best_epoch, "record": result.record}
            return to_arrays(result.params), meta

        inputs = self._recovery_inputs(pruned) | {
            "recover": options.identity(),
            "recover_on": recover_on,
        }
        found = self._stage("recover", f"{title}: recover", UNITS["recover"], inputs, compute)
        model = initial.replace(params=to_params(found.arrays))
        return Found(found.key, model), found.meta["best_epoch"]

    def recover_together(
        self,
        title: str,
        members: Sequence[Pruned],
        place: int,
        options: TrainConfig,
    ) -> tuple[Found, int]:
        """As `recover`, masked, for one of several in one program.

        Raises:
          InputError: its training diverged, or what they share cannot be trained on or read.
        """
        options = self._recipe(options)

        def compute(step, scratch):
            variants = [
                Variant(
                    self._start(pruned).params,
                    pruned.sets.finetune,
                    pruned.sets.validation,
                    plan_masks(pruned.plan.value),
                    self._recovery_seed(pruned),
                    **self._class_weights(pruned),
                )
                for pruned in members
            ]
            results = train_variants(
                self.dense.config,
                variants,
                self.source,
                self.config.data.preprocess,
                options,
                teacher=Teacher(self.dense.config, self.dense.params),
                workers=self.config.data.workers,
                checkpoints=scratch,
                on_share=step.advance,
            )
            done = [None if isinstance(found, InputError) else found for found in results]
            arrays = {
                f"{i}/{name}": array
                for i, result in enumerate(done)
                if result is not None
                for name, array in to_arrays(result.params).items()
            }
            failed = [str(found) if isinstance(found, InputError) else None for found in results]
            return arrays, {
                "best_epoch": [result and result.best_epoch for result in done],
                "record": [result and result.record for result in done],
                "failed": failed,
            }

        inputs = {
            "members": [self._recovery_inputs(pruned) for pruned in members],
            "recover": options.identity(),
        }
        found = self._stage(
            "recover_together", f"{title}: recover", UNITS["recover"], inputs, compute
        )
        best_epoch = found.meta["best_epoch"][place]
        if best_epoch is None:
            raise InputError(found.meta["failed"][place])
        prefix = f"{place}/"
        arrays = {n[len(prefix) :]: a for n, a in found.arrays.items() if n.startswith(prefix)}
        key = content_hash({"together": found.key, "place": place})
        model = self._start(members[place]).replace(params=to_params(arrays))
        return Found(key, model), best_epoch

    def _start(self, pruned: Pruned) -> Model:
        return self.dense if pruned.start is None else pruned.start.value

    def _class_weights(self, pruned: Pruned) -> dict[str, np.ndarray]:
        """What fine-tuning is told of the classes that the device sees."""
        weights = {}
        if (share := self.config.likely_share) is not None:
            weights["classes"] = likely_classes(self.predictions(pruned.sets.metric), share)
        if pruned.recovery.moves_prior:
            weights["prior"] = self.class_prior(pruned.sets, pruned.recovery.prior).value
        return weights

    def _recipe(self, options: TrainConfig) -> TrainConfig:
        # Every variant gets as many steps: the whole pool is sampled afresh every epoch.
        return dataclasses.replace(options, images_per_epoch=self.config.select.finetune_count)

    def _scoring_seed(self, device: int, random: bool) -> int:
        # One draw for all devices would count as many. What else is drawn differs with the images,
        # and devices that have these in common share their scores.
        if not random:
            return self.seed
        return int(np.random.SeedSequence([self.seed, device]).generate_state(1)[0])

    def _recovery_seed(self, pruned: Pruned) -> int:
        return self.seed + 100 + pruned.device

    def _recovery_inputs(self, pruned: Pruned) -> dict[str, Any]:
        plan, sets, start = pruned.plan, pruned.sets, pruned.start
        # A start of its own is named, so that the keys of runs without one are what they were.
        named = {} if start is None else {"start": start.key}
        if self.config.likely_share is not None:
            named["likely"] = self.config.likely_share, self._images_key(sets.metric)
        if pruned.recovery.moves_prior:
            named["prior"] = self.class_prior(sets, pruned.recovery.prior).key
        return named | {
            "plan": plan and plan.key,
            "dense": self._dense.key,
            "finetune": self._images_key(sets.finetune),
            "validation": self._images_key(sets.validation),
            "seed": self._recovery_seed(pruned),
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
                images_at_once(model.value.config, len(indices)),
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
            found = latencies({"dense": self.dense, "pruned": small}, batch)
            return {}, {name: dataclasses.asdict(times) for name, times in found.items()}

        inputs = {
            "dense": to_plain(self.dense.config),
            "pruned": to_plain(small.config),
            "batch": batch,
            # One machine's for all processes, which share the artefact.
            "hardware": from_main(hardware()),
        }
        found = self._stage("latency", f"{title}: latency", UNITS["latency"], inputs, compute)
        return dict(found.meta)


def _scored_by(prune: PruneConfig) -> dict[str, Any]:
    """What unit scores depend on."""
    if prune.criterion is None:
        return {"neurons": to_plain(prune.neurons)}
    return {
        "criterion": prune.criterion,
        "max_batches": prune.neurons.max_batches,
        "deletion_images": prune.deletion_images,
    }


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


def keep_ratios(plan: Plan) -> dict[str, list[float]]:
    """Share of the units that every block keeps, by kind."""
    blocks = range(len(plan.config.blocks))
    return {kind: [plan.keep_ratio(i, kind) for i in blocks] for kind in ("mlp", "qk", "vo")}

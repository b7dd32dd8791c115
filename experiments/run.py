"""The main job: the whole path for many devices, from private images to smaller models.

    python -m experiments.run --config=configs/digits.py --workdir=runs/digits

Any field of the config can be overridden: --config.seed=1 --config.recover.epochs=5. A job that was
interrupted continues when the same command is given again.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import report
from experiments.config import ExperimentConfig, read
from tapvit_jax.convert.timm import params_of
from tapvit_jax.convert.weights import fingerprint, read_weights
from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.partition import Partition, partition
from tapvit_jax.data.pipeline import load_all
from tapvit_jax.data.sources import MemorySource, open_source
from tapvit_jax.errors import InputError
from tapvit_jax.files import write_json
from tapvit_jax.models import backbone, convnet, store
from tapvit_jax.models.backbone import Config
from tapvit_jax.models.params import Params, flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.pipeline import (
    evaluate_model,
    latencies,
    plan_masks,
    reshape_checked,
    score,
    score_arrays,
    scores_from_arrays,
)
from tapvit_jax.progress import Progress, Step
from tapvit_jax.proxy.density import log_likelihood
from tapvit_jax.proxy.features import Extractor, build_extractor, embedding_network
from tapvit_jax.proxy.gmm import Gmm, fit_report
from tapvit_jax.proxy.select import select, selection_report
from tapvit_jax.prune.allocate import allocate, check_budget
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.mask import Plan, apply_masks
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.runtime import run_program, set_up_jax
from tapvit_jax.stages import Stages, claim_workdir
from tapvit_jax.structs import to_plain
from tapvit_jax.train.finetune import Teacher, TrainConfig, TrainData, train
from tapvit_jax.versions import library_versions

SELECTED = "selected"

# Rough costs of the steps, in seconds on two cores; only their ratios matter, for the ETA.
_UNITS = {"data": 1, "dense": 60, "extractor": 10, "device": 1, "select": 3, "score": 8}
_UNITS |= {"recover": 10, "latency": 3, "report": 3}


class Experiment:
    """One experiment in one work directory."""

    def __init__(self, config: ExperimentConfig, workdir: Path, quiet: bool = False):
        claim_workdir(workdir, to_plain(config))
        self.config = config
        self.workdir = workdir
        self.stages = Stages(workdir / "stages")
        devices = config.data.partition.num_devices
        variants = 1 + len(config.comparisons)
        total = sum(_UNITS[name] for name in ("data", "dense", "extractor", "select", "report"))
        total += devices * (_UNITS["device"] + _UNITS["latency"])
        total += devices * variants * (_UNITS["score"] + _UNITS["recover"])
        self.progress = Progress(total, quiet)

    def run(self) -> dict[str, Any]:
        """Do everything, and return what `results.json` holds."""
        start = time.monotonic()
        config = self.config
        with self.progress.step("read and partition the images", _UNITS["data"]):
            self._read_data()
        for device in range(len(self.parts.devices)):
            # Before any work: a budget that cannot be met is refused now.
            check_budget(self._dense_config(), config.budget(device), config.prune.allocate)
        with self.progress.step("dense model", _UNITS["dense"]) as step:
            self.dense, self.dense_key = self._dense_model(step)
        with self.progress.step("feature extractor", _UNITS["extractor"]) as step:
            self.extractor, self.extractor_key = self._extractor(step)
        gmms, payload_bytes = [], []
        for d in range(len(self.parts.devices)):
            with self.progress.step(f"device {d}: mixture and payload", _UNITS["device"]):
                gmm, size = self._device_payload(d)
                gmms.append(gmm)
                payload_bytes.append(size)
        with self.progress.step("score the pool, select", _UNITS["select"]):
            chosen = self._select(gmms)
        rows = []
        for d in range(len(self.parts.devices)):
            rows.append(self._device_row(d, payload_bytes[d], chosen))
        with self.progress.step("report", _UNITS["report"]):
            results = self._results(rows)
            results["seconds"] = round(time.monotonic() - start, 1)
            write_json(self.workdir / "results.json", results)
            report.write(results, self.workdir)
        self.progress.close()
        return results

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
        everything = np.arange(len(self.files))
        if len(self.files) * data.preprocess.image_size**2 * data.preprocess.channels * 4 < 2**30:
            # Small sets are decoded once, not once an epoch.
            images, labels = load_all(self.files, everything, data.preprocess)
            self.source = MemorySource(images, labels, self.files.class_names, self.files.name)

    def _dense_config(self) -> Config:
        return self.config.dense.network(self.config.data.preprocess, len(self.files.class_names))

    def _train_data(self, train_on: np.ndarray, validation: np.ndarray) -> TrainData:
        return TrainData(self.source, self.config.data.preprocess, train_on, validation)

    # Cloud: the dense model and the extractor.

    def _dense_model(self, step: Step) -> tuple[Model, str]:
        config, dense = self.config, self.config.dense
        shapes = self._dense_config()
        public = self._train_data(self.parts.public_pool, self.parts.public_validation)

        def compute():
            if dense.weights is not None:
                found = read_weights(dense.weights)
                return _to_arrays(params_of(shapes, found)), {"weights": found.source, "record": []}
            result = train(
                shapes,
                backbone.init(shapes, jax.random.key(config.seed)),
                public,
                dense.train,
                seed=config.seed,
                checkpoints=self.stages.scratch("dense"),
                on_epoch=_report_epochs(step, dense.train),
            )
            return _to_arrays(result.params), {"weights": None, "record": result.record}

        inputs = {"data": self.data_key, "dense": to_plain(dense)}
        if dense.weights is not None:
            inputs["weights"] = fingerprint(dense.weights)
        found = self.stages.run("dense", inputs, compute)
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
        store.save(model, self.workdir / "models" / "dense")
        return model, found.key

    def _extractor(self, step: Step) -> tuple[Extractor, str]:
        config = self.config
        options, preprocess = config.extractor, config.data.preprocess
        public = self._train_data(self.parts.public_pool, self.parts.public_validation)
        directory = self.workdir / "extractor"
        network = params = None
        inputs = {
            "data": self.data_key,
            "extractor": to_plain(options),
            "train": to_plain(config.extractor_train),
            "dense": None if options.kind == "embedding" else self.dense_key,
        }
        if options.kind == "embedding":
            network = embedding_network(options, preprocess, len(self.files.class_names))

            def compute():
                result = train(
                    network,
                    convnet.init(network, jax.random.key(config.seed + 1)),
                    public,
                    config.extractor_train,
                    seed=config.seed + 1,
                    forward=convnet.apply,
                    checkpoints=self.stages.scratch("extractor"),
                    on_epoch=_report_epochs(step, config.extractor_train),
                )
                return _to_arrays(result.params), {"record": result.record}

            params = _to_params(self.stages.run("extractor", inputs, compute).arrays)
        extractor = build_extractor(
            options,
            self.source,
            self.parts.public_pool,
            preprocess,
            model=self.dense,
            network=network,
            params=params,
        )
        extractor.save(directory)
        return extractor, extractor.fingerprint

    # Device: nothing but the payload leaves this method.

    def _device_payload(self, d: int) -> tuple[Gmm, int]:
        path = self.workdir / "payloads" / f"device_{d}.gmm"
        split = self.parts.devices[d]

        def compute():
            features = self.extractor.features(self.source, split.private_train)
            gmm_config = dataclasses.replace(
                self.config.gmm, seed=self.config.seed + self.config.gmm.seed + d
            )
            gmm, table = fit_report(features, gmm_config)
            return _gmm_arrays(gmm), {"bic": table}

        inputs = {
            "extractor": self.extractor_key,
            "data": self.data_key,
            "images": split.private_train.tolist(),
            "gmm": to_plain(self.config.gmm),
            "seed": self.config.seed,
        }
        found = self.stages.run(f"gmm_{d}", inputs, compute)
        gmm = Gmm(**found.arrays, covariance_type=self.config.gmm.covariance_type)
        gmm.save(path, extractor=self.extractor_key)
        # The cloud reads the file, as it would from a real device, and trusts nothing in it.
        received = Gmm.load(path, dim=self.extractor.dim, extractor=self.extractor_key)
        return received, path.stat().st_size

    # Cloud: one pass over the pool for all devices.

    def _select(self, gmms: list[Gmm]) -> dict[str, Any]:
        config, pool = self.config.select, self.parts.public_pool

        def compute():
            features = self.extractor.features(self.source, pool)
            positions = select(
                gmms,
                features,
                config.metric_count,
                method=config.method,
                seed=self.config.seed + config.seed,
                finetune_count=config.finetune_count,
                task_share=config.task_share,
            )
            validation = self.parts.public_validation
            keep = max(1, round(self.config.validation_share * len(validation)))
            likely = log_likelihood(gmms, self.extractor.features(self.source, validation))
            order = np.argsort(-np.asarray(likely), axis=1, kind="stable")[:, :keep]
            reports = [
                self._selection_report(d, gmm, positions[d], features) for d, gmm in enumerate(gmms)
            ]
            arrays = {"finetune": pool[positions], "validation": np.sort(validation[order])}
            return arrays, {"reports": reports}

        inputs = {
            "extractor": self.extractor_key,
            "data": self.data_key,
            "gmms": [[array.tolist() for array in _gmm_arrays(gmm).values()] for gmm in gmms],
            "select": to_plain(config),
            "validation_share": self.config.validation_share,
        }
        found = self.stages.run("select", inputs, compute)
        return {**found.arrays, "reports": found.meta["reports"], "key": found.key}

    def _selection_report(
        self, d: int, gmm: Gmm, positions: np.ndarray, features: np.ndarray
    ) -> dict[str, Any]:
        # Held-out private features exist only in simulation; they are reported, never used.
        split = self.parts.devices[d]
        return selection_report(
            positions[: self.config.select.metric_count],
            self.files.labels[self.parts.public_pool],
            len(self.files.class_names),
            gmm,
            features,
            held_out=self.extractor.features(self.source, split.private_test),
        )

    # Cloud: score, plan, prune and recover for one device and one choice of images.

    def _device_row(self, d: int, payload_bytes: int, chosen: dict[str, Any]) -> dict[str, Any]:
        config, split = self.config, self.parts.devices[d]
        budget = config.budget(d)
        test = split.private_test
        variants = {}
        for variant in (SELECTED, *config.comparisons):
            sets = self._image_sets(d, variant, chosen)
            with self.progress.step(f"device {d}, {variant}: score and plan", _UNITS["score"]):
                plan, plan_key = self._plan(d, variant, sets)
            with self.progress.step(f"device {d}, {variant}: recover", _UNITS["recover"]) as step:
                recovered, best_epoch = self._recover(d, variant, plan, plan_key, sets, step)
            masked = apply_masks(self.dense, plan)
            variants[variant] = {
                "pruned": evaluate_model(masked, self.source, test).top1,
                "recovered": evaluate_model(recovered, self.source, test).top1,
                "best_epoch": best_epoch,
            }
            if variant == SELECTED:
                selected_plan = plan
                small, difference = self._reshape(recovered, plan, test)
        small = small.replace(
            name=f"{config.name}-device{d}",
            history={**small.history, "budget": str(budget), "device": d},
        )
        directory = self.workdir / "models" / f"device_{d}"
        store.save(small, directory)
        with self.progress.step(f"device {d}: latency", _UNITS["latency"]):
            times = latencies({"dense": self.dense, "pruned": small}, config.latency_batch)
        return {
            "device": d,
            "classes": list(split.classes),
            "private_train": len(split.private_train),
            "private_test": len(test),
            "payload_bytes": payload_bytes,
            "budget": str(budget),
            "limits": budget.limits(self.dense.config),
            "cost": dataclasses.asdict(cost(small.config)),
            "dense": evaluate_model(self.dense, self.source, test).top1,
            "variants": variants,
            "latency_ms": times,
            "reshape_difference": difference,
            "keep_ratios": _keep_ratios(selected_plan),
            "selection": chosen["reports"][d],
            "model": str(directory.relative_to(self.workdir)),
        }

    def _reshape(self, recovered: Model, plan: Plan, test: np.ndarray) -> tuple[Model, float]:
        """The smaller model, and how far masking and reshaping differ on real images."""
        images = self.source.load(test[:64], self.config.data.preprocess)
        if self.config.recover_on == "masked":
            return reshape_checked(recovered, plan, images)
        return recovered, reshape_checked(self.dense, plan, images)[1]

    def _image_sets(self, d: int, variant: str, chosen: dict[str, Any]) -> dict[str, Any]:
        """Metric, fine-tuning and validation images of a variant."""
        config, pool = self.config, self.parts.public_pool
        if variant == SELECTED:
            finetune, validation = chosen["finetune"][d], chosen["validation"][d]
            metric = finetune[: config.select.metric_count]
        elif variant == "random":
            order = np.random.default_rng([config.seed, d]).permutation(pool)
            finetune, validation = (
                order[: config.select.finetune_count],
                self.parts.public_validation,
            )
            metric = finetune[: config.select.metric_count]
        else:
            metric = finetune = pool
            validation = self.parts.public_validation
        return {"metric": metric, "finetune": finetune, "validation": validation}

    def _plan(self, d: int, variant: str, sets: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
        config = self.config

        def compute():
            return score_arrays(
                *score(self.dense, self.source, sets["metric"], config.prune, seed=config.seed)
            ), {}

        inputs = {
            "dense": self.dense_key,
            "metric": sets["metric"].tolist(),
            "prune": to_plain(config.prune),
            "seed": config.seed,
        }
        # The whole pool gives every device the same scores: its stage carries no device.
        name = "score_pool" if variant == "pool" else f"score_{variant}_{d}"
        found = self.stages.run(name, inputs, compute)
        units, layers = scores_from_arrays(found.arrays, config.prune.layers.sparsity)
        budget = config.budget(d)
        plan = allocate(self.dense, units, layers, budget, config=config.prune.allocate)
        return plan, {"score": found.key, "budget": str(budget)}

    def _recover(
        self,
        d: int,
        variant: str,
        plan: Plan,
        plan_key: dict[str, Any],
        sets: dict[str, Any],
        step: Step,
    ) -> tuple[Model, int]:
        config = self.config
        masked = config.recover_on == "masked"
        start = self.dense if masked else reshape(self.dense, plan)
        # Every variant gets as many steps: the whole pool is sampled afresh every epoch.
        options = dataclasses.replace(config.recover, images_per_epoch=config.select.finetune_count)
        name = f"recover_{variant}_{d}"

        def compute():
            result = train(
                start.config,
                start.params,
                self._train_data(sets["finetune"], sets["validation"]),
                options,
                seed=config.seed + 100 + d,
                masks=plan_masks(plan) if masked else None,
                teacher=Teacher(self.dense.config, self.dense.params),
                checkpoints=self.stages.scratch(name),
                on_epoch=_report_epochs(step, options),
            )
            meta = {"best_epoch": result.best_epoch, "record": result.record}
            return _to_arrays(result.params), meta

        inputs = {
            "plan": plan_key,
            "finetune": sets["finetune"].tolist(),
            "validation": sets["validation"].tolist(),
            "recover": to_plain(options),
            "recover_on": config.recover_on,
            "seed": config.seed,
        }
        found = self.stages.run(name, inputs, compute)
        return start.replace(params=_to_params(found.arrays)), found.meta["best_epoch"]

    # Results.

    def _results(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "name": self.config.name,
            "config": to_plain(self.config),
            "libraries": library_versions(),
            "backend": jax.default_backend(),
            "seed": self.config.seed,
            "class_names": list(self.files.class_names),
            "sizes": {
                "public_pool": len(self.parts.public_pool),
                "public_validation": len(self.parts.public_validation),
            },
            "dense": dataclasses.asdict(cost(self.dense.config)),
            "devices": rows,
        }


def _keep_ratios(plan: Plan) -> dict[str, list[float]]:
    blocks = range(len(plan.config.blocks))
    return {kind: [plan.keep_ratio(i, kind) for i in blocks] for kind in ("mlp", "qk", "vo")}


def _gmm_arrays(gmm: Gmm) -> dict[str, np.ndarray]:
    return {"weights": gmm.weights, "means": gmm.means, "covariances": gmm.covariances}


def _to_arrays(params: Params) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


def _to_params(arrays: Mapping[str, np.ndarray]) -> Params:
    return unflatten({tuple(name.split("/")): jax.numpy.asarray(a) for name, a in arrays.items()})


def _report_epochs(step: Step, options: TrainConfig):
    return lambda epoch, metrics: step.advance(1.0 / options.epochs)


_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results and unfinished work are kept.")


def _config_problem(error: Exception) -> str:
    text = str(error.args[0] if error.args else error)
    if isinstance(error, KeyError):
        text = f"has no field {text}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"--config: {' '.join(lines[:4])}"


def main(argv: list[str]) -> None:
    """Run the experiment that the arguments name and print its table.

    Raises:
      InputError: unknown or missing arguments, or anything wrong in the config or the data.
    """
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections reports unknown fields and unreadable config files through all of these,
        # the cause in the first line and its own call stack behind it.
        raise InputError(_config_problem(error)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: fields are set as --config.FIELD=VALUE")
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing")
    try:
        config = read(_CONFIG.value)
    except OSError as error:
        # A config file that cannot be loaded shows itself only when the config is first used.
        raise InputError(_config_problem(error)) from error
    set_up_jax()
    workdir = Path(_WORKDIR.value)
    results = Experiment(config, workdir).run()
    print(report.table(results))
    print(f"\nreport: {workdir / 'report.html'}   models: {workdir / 'models'}")


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv)))

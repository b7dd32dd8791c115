"""Task-adaptive pruning of vision transformers for many devices.

The public face, one line each, in the order of use:

    tap.set_up_jax()                                     # first; memory, compile cache, other hosts
    model  = tap.load_timm("deit_small_patch16_224", "model.safetensors")
    source = tap.open_source("path/of/images")
    fresh  = tap.new_classifier(model, source.class_names)                  # to be trained
    extractor = tap.build_extractor(tap.ExtractorConfig("pooled"), source, indices,
                                    model.preprocess, model=model)
    gmm    = tap.Gmm.fit(extractor.features(source, indices))
    gmm.save(path, extractor=extractor.fingerprint); tap.Gmm.load(path)
    features = tap.pool_features(extractor, source, indices, directory)     # out of core, cached
    logp   = tap.log_likelihood([gmm, ...], features)
    chosen = tap.select([gmm, ...], features, count=640)
    batches = list(tap.batches(source, chosen[0], model.preprocess, 64))
    rows   = tap.rows_for_classes(len(features), classes)                   # enough of the pool
    shares = tap.mixture_shares(gmm, tap.fit_classes(features[rows], predictions))
    units  = tap.unit_importance(model, batches, method="tap")              # any of tap.CRITERIA
    layers = tap.layer_importance(model, batches, units, sparsity=(0.5, 0.7, 0.9))
    plan   = tap.allocate(model, units, layers, tap.Budget(macs=0.5))
    masked = tap.apply_masks(model, plan)
    better = tap.recover(model, plan, batches)                              # closed form
    small  = tap.reshape(better, plan)
    tuned  = tap.train_variants(model.config, [tap.Variant(better.params, train, validation,
                                masks=tap.plan_masks(plan)), ...], source, model.preprocess,
                                tap.TrainConfig(epochs=20))      # a TrainResult each, or InputError
    tap.save(small, directory); tap.load(directory)
    tap.export_onnx(small, path, images=images); tap.export_stablehlo(...); tap.export_timm(...)

Whatever is not used is not imported: processes that only read images start without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapvit_jax.convert.timm import load_timm, save_timm
    from tapvit_jax.data.pipeline import batches
    from tapvit_jax.data.preprocess import Preprocess
    from tapvit_jax.data.sources import open_source
    from tapvit_jax.errors import InputError
    from tapvit_jax.export.latency import measure_latency_model
    from tapvit_jax.export.onnx import export_onnx
    from tapvit_jax.export.stablehlo import export_stablehlo, load_stablehlo
    from tapvit_jax.export.timm import export_timm
    from tapvit_jax.importance.criteria import CRITERIA, CriterionConfig, unit_importance
    from tapvit_jax.importance.layers import LayerConfig, LayerScores, layer_importance
    from tapvit_jax.importance.neurons import NeuronConfig, neuron_importance
    from tapvit_jax.models.presets import list_models
    from tapvit_jax.models.registry import Model, new_classifier
    from tapvit_jax.models.store import load, save
    from tapvit_jax.pipeline import PruneConfig, evaluate_model, plan_masks
    from tapvit_jax.proxy.density import log_likelihood
    from tapvit_jax.proxy.features import Extractor, ExtractorConfig, build_extractor
    from tapvit_jax.proxy.gmm import Gmm, GmmConfig
    from tapvit_jax.proxy.pool_features import pool_features
    from tapvit_jax.proxy.select import SelectConfig, select
    from tapvit_jax.proxy.shares import (
        class_shares,
        fit_classes,
        mixture_shares,
        rows_for_classes,
    )
    from tapvit_jax.prune.allocate import AllocateConfig, RoundTo, allocate, check_budget
    from tapvit_jax.prune.budget import Budget
    from tapvit_jax.prune.cost import Cost, cost
    from tapvit_jax.prune.latency import LatencyModel, fit_latency
    from tapvit_jax.prune.mask import Plan, apply_masks
    from tapvit_jax.prune.recover import RecoverConfig, move_prior, recover
    from tapvit_jax.prune.reshape import reshape
    from tapvit_jax.runtime import set_up_jax
    from tapvit_jax.train.classes import likely_classes, prior_weights
    from tapvit_jax.train.evaluate import Teacher, predict
    from tapvit_jax.train.finetune import TrainData
    from tapvit_jax.train.step import TrainConfig
    from tapvit_jax.train.variants import Variant, train_variants

_HOMES = {
    "convert.timm": "load_timm save_timm",
    "data.pipeline": "batches",
    "data.preprocess": "Preprocess",
    "data.sources": "open_source",
    "errors": "InputError",
    "export.latency": "measure_latency_model",
    "export.onnx": "export_onnx",
    "export.stablehlo": "export_stablehlo load_stablehlo",
    "export.timm": "export_timm",
    "importance.criteria": "CRITERIA CriterionConfig unit_importance",
    "importance.layers": "LayerConfig LayerScores layer_importance",
    "importance.neurons": "NeuronConfig neuron_importance",
    "models.presets": "list_models",
    "models.registry": "Model new_classifier",
    "models.store": "load save",
    "pipeline": "PruneConfig evaluate_model plan_masks",
    "proxy.density": "log_likelihood",
    "proxy.features": "Extractor ExtractorConfig build_extractor",
    "proxy.gmm": "Gmm GmmConfig",
    "proxy.pool_features": "pool_features",
    "proxy.select": "SelectConfig select",
    "proxy.shares": "class_shares fit_classes mixture_shares rows_for_classes",
    "prune.allocate": "AllocateConfig RoundTo allocate check_budget",
    "prune.budget": "Budget",
    "prune.cost": "Cost cost",
    "prune.latency": "LatencyModel fit_latency",
    "prune.mask": "Plan apply_masks",
    "prune.recover": "RecoverConfig move_prior recover",
    "prune.reshape": "reshape",
    "runtime": "set_up_jax",
    "train.classes": "likely_classes prior_weights",
    "train.evaluate": "Teacher predict",
    "train.finetune": "TrainData",
    "train.step": "TrainConfig",
    "train.variants": "Variant train_variants",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "CRITERIA",
    "AllocateConfig",
    "Budget",
    "Cost",
    "CriterionConfig",
    "Extractor",
    "ExtractorConfig",
    "Gmm",
    "GmmConfig",
    "InputError",
    "LatencyModel",
    "LayerConfig",
    "LayerScores",
    "Model",
    "NeuronConfig",
    "Plan",
    "Preprocess",
    "PruneConfig",
    "RecoverConfig",
    "RoundTo",
    "SelectConfig",
    "Teacher",
    "TrainConfig",
    "TrainData",
    "Variant",
    "allocate",
    "apply_masks",
    "batches",
    "build_extractor",
    "check_budget",
    "class_shares",
    "cost",
    "evaluate_model",
    "export_onnx",
    "export_stablehlo",
    "export_timm",
    "fit_classes",
    "fit_latency",
    "layer_importance",
    "likely_classes",
    "list_models",
    "load",
    "load_stablehlo",
    "load_timm",
    "log_likelihood",
    "measure_latency_model",
    "mixture_shares",
    "move_prior",
    "neuron_importance",
    "new_classifier",
    "open_source",
    "plan_masks",
    "pool_features",
    "predict",
    "prior_weights",
    "recover",
    "reshape",
    "rows_for_classes",
    "save",
    "save_timm",
    "select",
    "set_up_jax",
    "train_variants",
    "unit_importance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The published protocol on any data set: devices that own classes, five budgets of the encoder.

What configs for whole data sets have in common. "honest" (default) keeps the parts of the data
apart and uses this package's defaults; "as_published" computes what the authors' code computes,
leaks in the splits included (TAP-ViTs, arXiv 2601.02437).
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from experiments.config import ExperimentConfig, complete, grid
from tapvit_jax.errors import InputError
from tapvit_jax.pipeline import PruneConfig
from tapvit_jax.prune.recover import RecoverConfig
from tapvit_jax.structs import to_plain
from tapvit_jax.train.finetune import TrainConfig

MODELS = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
}
MODES = ("honest", "as_published")
DEVICES = 10
BUDGETS = tuple(f"encoder_params={share}" for share in (0.9, 0.8, 0.7, 0.6, 0.5))

# What ImageNet's checkpoints of DeiT and Swin expect, whatever they are fine-tuned on.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGE_SIZE = 224

# Of weights behind a new classifier.
_FINE_TUNING = TrainConfig(
    learning_rate=1e-4,
    warmup_epochs=1.0,
    layer_decay=0.75,
    weight_decay=0.05,
    label_smoothing=0.1,
    flip=True,
)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """What differs between data sets.

    Attributes:
      name: of the experiment.
      source: where the images are if the argument does not say.
      crop_pct: of the resized image; small images are enlarged whole.
    """

    name: str
    source: str
    crop_pct: float = 1.0


def config(data_set: DataSet, argument: str) -> ConfigDict:
    """The config for MODEL[,DATA[,WEIGHTS[,MODE]]], empty parts standing for the defaults.

    Raises:
      InputError: an unknown model or mode, or too many parts.
    """
    parts = [*argument.split(","), "", "", ""]
    if len(parts) > 7 or any(parts[4:]):
        raise InputError(f"{argument!r}: expected MODEL[,DATA[,WEIGHTS[,MODE]]]")
    model, source, weights, mode = parts[:4]
    mode = mode or MODES[0]
    for what, value, known in (("model", model, tuple(MODELS)), ("mode", mode, MODES)):
        if value not in known:
            raise InputError(f"{argument!r}: {what} is {value!r}, expected {', '.join(known)}")
    published = mode == "as_published"
    return complete(
        {
            "name": f"{data_set.name}-{model}" + ("-as-published" if published else ""),
            "seed": 2025,
            "data": {
                "source": source or data_set.source,
                "preprocess": {
                    "image_size": _IMAGE_SIZE,
                    "mean": _MEAN,
                    "std": _STD,
                    "crop_pct": data_set.crop_pct,
                },
                # The dense model was trained on the train split: private images are of the other.
                "partition": {
                    "kind": "disjoint",
                    "num_devices": DEVICES,
                    "private_split": "val",
                    "leaks": published,
                },
            },
            "dense": {
                "model": MODELS[model],
                "weights": weights or None,
                "train": to_plain(_FINE_TUNING if weights else TrainConfig()),
            },
            "budgets": BUDGETS,
            **(_as_published() if published else _honest()),
        }
    )


def _as_published() -> dict[str, Any]:
    return {
        # 128 features under full covariances identify members of the private set. The published
        # extractor is a ResNet-18 trained on the same classes; ours is what is in the config.
        "extractor": {"kind": "pooled", "dim": 128},
        "gmm": {"covariance_type": "full", "components": tuple(range(2, 11)), "min_members": 1},
        "select": {"method": "top", "metric_count": 640, "finetune_count": 6400},
        "prune": to_plain(PruneConfig.as_published()),
        "compensate": to_plain(RecoverConfig("none")),
        "recover": to_plain(TrainConfig.as_published()),
        "comparisons": (),
    }


def _honest() -> dict[str, Any]:
    return {
        "extractor": {"kind": "pooled", "dim": 32},
        "select": {"method": "importance", "metric_count": 640, "finetune_count": 6400},
        # A probe costs a third of a forward pass: 128 images settle which layers matter.
        "prune": {"layers": {"max_batches": 2}},
        "compensate": {"prior": "mixture"},
        "recover": {
            "epochs": 20,
            "batch_size": 64,
            "learning_rate": 1e-4,
            "warmup_epochs": 1.0,
            "distill": 0.5,
            "shift": 8,
            "flip": True,
            "patience": 5,
        },
    }


def sweep(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Every device under every published budget."""
    devices = range(config.data.partition.num_devices)
    return grid({"device": devices, "budget": BUDGETS})

"""Back to timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""

import functools
import os
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float

from tapvit_jax.convert.timm import load_timm, timm_model
from tapvit_jax.export.check import TOLERANCES, check_artefact, exact_logits
from tapvit_jax.files import atomic_directory, write_json
from tapvit_jax.models.registry import Model, preprocess_of
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.models.swin import SwinConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def export_timm(
    model: Model,
    directory: str | os.PathLike,
    *,
    images: Float[np.ndarray, "n s s ch"] | None = None,
) -> None:
    """Write model.safetensors and config.json as timm's own models on the hub have them.

    timm has arguments for few pruned widths (see `timm_model`); a model that is masked and not yet
    reshaped always fits. With `images`, prepared ones, the folder is read back before it gets its
    name and must give the model's logits on them.

    Raises:
      InputError: timm cannot represent the widths, the model has no preprocessing, the check fails,
        or the directory cannot be written.

    Source: the names and the format are timm's; the check is ours.
    """
    name, arguments, state = timm_model(model)
    record = {
        "architecture": name,
        "num_classes": model.config.num_classes,
        "num_features": model.config.pooled_dim,
        "model_args": {key: value for key, value in arguments.items() if value is not None},
        "pretrained_cfg": _pretrained_cfg(model),
    }
    if model.class_names:
        record["label_names"] = list(model.class_names)
    with atomic_directory(directory) as partial:
        safetensors.numpy.save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, record)
        if images is not None:
            again = load_timm(name, partial / WEIGHTS_FILE)
            run = functools.partial(exact_logits, again)
            check_artefact(model, run, images, TOLERANCES["float32"], str(directory))


def _pretrained_cfg(model: Model) -> dict[str, Any]:
    prepare, config = preprocess_of(model), model.config
    classifier, first = "head", "patch_embed.proj"
    if isinstance(config, ResNetConfig):
        classifier, first = "fc", "conv1"
    elif isinstance(config, SwinConfig):
        classifier = "head.fc"
    elif config.distilled:
        classifier = ["head", "head_dist"]
    return {
        "input_size": [config.in_channels, config.image_size, config.image_size],
        "num_classes": config.num_classes,
        "mean": list(prepare.mean),
        "std": list(prepare.std),
        "crop_pct": prepare.crop_pct,
        "crop_mode": "center",
        "interpolation": prepare.interpolation,
        "first_conv": first,
        "classifier": classifier,
    }

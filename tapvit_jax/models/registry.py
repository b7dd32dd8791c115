"""A model as users hold it, and the presets they know by timm's names."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models import vit
from tapvit_jax.models.params import Params
from tapvit_jax.models.vit import ViTConfig, vit_config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network with its parameters and all that is needed to use it.

    Attributes:
      config: every shape and width.
      params: plain nested dict of arrays.
      preprocess: how an image file becomes an input, or None when nobody said.
      class_names: names of the classes, or empty.
      name: what the user calls it.
      history: how it came about (source file and hash, plan, budget, training), for the record.
    """

    config: ViTConfig
    params: Params
    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] = ()
    name: str = "vit"
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b c"]:
        """Logits of a batch of images."""
        return jitted_apply(self.config, self.params, images)

    def replace(self, **changes: Any) -> "Model":
        """The same model with some fields changed."""
        return dataclasses.replace(self, **changes)


jitted_apply = functools.partial(jax.jit, static_argnums=0)(vit.apply)


_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _presets() -> dict[str, dict[str, Any]]:
    presets = {}
    for size, widths in _SIZES.items():
        common = {"img_size": 224, "patch_size": 16, "num_classes": 1000} | widths
        presets[f"vit_{size}_patch16_224"] = common | {
            "crop_pct": 0.9,
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        }
        if size != "large":
            imagenet = {"crop_pct": 0.9, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
            presets[f"deit_{size}_patch16_224"] = common | imagenet
            presets[f"deit_{size}_distilled_patch16_224"] = common | imagenet | {"distilled": True}
    return presets


PRESETS = _presets()

# timm's constructor arguments that users know, and our fields for them.
_RENAMED = {"img_size": "image_size", "in_chans": "in_channels", "global_pool": "pool"}
_POOLS = {"token": "cls", "avg": "mean"}


def list_models() -> list[str]:
    """Names of all presets."""
    return sorted(PRESETS)


def create(name: str, **overrides: Any) -> tuple[ViTConfig, Preprocess]:
    """Config and preprocessing of a preset; overrides carry timm's argument names.

    Raises:
      InputError: an unknown preset or argument.
    """
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}, expected one of {', '.join(list_models())}")
    fields = dict(PRESETS[name])
    known = {f.name for f in dataclasses.fields(ViTConfig)} - {"blocks", "head_dim"}
    known |= set(fields) | set(_RENAMED) | {"mlp_ratio"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise InputError(f"{name}: unknown argument {', '.join(unknown)}")
    fields |= overrides
    fields = {_RENAMED.get(key, key): value for key, value in fields.items()}
    if "pool" in fields:
        fields["pool"] = _POOLS.get(fields["pool"], fields["pool"])
    crop_pct, mean, std = (fields.pop(key) for key in ("crop_pct", "mean", "std"))
    config = vit_config(**fields)
    return config, Preprocess(
        image_size=config.image_size,
        channels=config.in_channels,
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=crop_pct,
        interpolation="bicubic",
    )

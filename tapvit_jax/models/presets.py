"""Architectures under timm's names, and timm's constructor arguments in terms of our configs."""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import Config
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.models.swin import swin_config
from tapvit_jax.models.vit import vit_config
from tapvit_jax.structs import from_plain

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

_VIT_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
# Patch sizes, then sizes of the ViTs that timm has for them.
_VITS = {
    (8, 224): ("small", "base"),
    (14, 224): ("large", "huge"),
    (16, 224): ("tiny", "small", "base", "large"),
    (16, 384): ("tiny", "small", "base", "large"),
    (32, 224): ("small", "base", "large"),
    (32, 384): ("small", "base", "large"),
}
_DEIT3 = {
    (16, 224): ("small", "medium", "base", "large"),
    (16, 384): ("small", "base", "large"),
    (14, 224): ("huge",),
}
_DEITS = {(16, 224): ("tiny", "small", "base"), (16, 384): ("base",)}
_SWIN_SIZES = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
_SWINS = {(7, 224): ("tiny", "small", "base", "large"), (12, 384): ("base", "large")}
_RESNETS = {
    "resnet18": {"bottleneck": False, "depths": (2, 2, 2, 2)},
    "resnet34": {"bottleneck": False, "depths": (3, 4, 6, 3)},
    "resnet50": {"bottleneck": True, "depths": (3, 4, 6, 3)},
    "resnet101": {"bottleneck": True, "depths": (3, 4, 23, 3)},
}
# timm's names of trained weights that are prepared for in another way than their architecture's
# default; all other names are ignored. With the architecture in front, only of that one's weights.
_TAGS: dict[str, dict[str, Any]] = {
    "augreg_in21k": {"num_classes": 21843},
    "ms_in22k": {"num_classes": 21841},
    "mae": IMAGENET,
    "dino": IMAGENET,
    "fb_in22k_ft_in1k": {"crop_pct": 1.0},
    "a3_in1k": {"img_size": 160},
    "resnet50.a1h_in1k": {"img_size": 176, "crop_pct": 0.9},
    "tv2_in1k": {"img_size": 176, "crop_pct": 0.875, "interpolation": "bilinear"},
    "ra4_e3600_r224_in1k": {**HALF, "crop_pct": 0.9},
    "tv_in1k": {"crop_pct": 0.875, "interpolation": "bilinear"},
    "fb_ssl_yfcc100m_ft_in1k": {"crop_pct": 0.875, "interpolation": "bilinear"},
    "fb_swsl_ig1b_ft_in1k": {"crop_pct": 0.875, "interpolation": "bilinear"},
    "gluon_in1k": {"crop_pct": 0.875},
    "am_in1k": {"crop_pct": 0.875},
    "bt_in1k": {"crop_pct": 0.875},
    "ra_in1k": {"crop_pct": 0.875},
    "ram_in1k": {"crop_pct": 0.875},
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """One architecture: how its config is made, and timm's arguments for it."""

    build: Callable[..., Config]
    arguments: Mapping[str, Any]


def _crop_pct(image_size: int) -> float:
    return 0.9 if image_size == 224 else 1.0


def _presets() -> dict[str, Preset]:
    found = {}

    def add(name: str, build: Callable[..., Config], image_size: int, **fields: Any) -> None:
        common = {
            "img_size": image_size,
            "num_classes": 1000,
            "crop_pct": _crop_pct(image_size),
            "interpolation": "bicubic",
        }
        found[name] = Preset(build, common | fields)

    for (patch, image), sizes in _VITS.items():
        for size in sizes:
            name = f"vit_{size}_patch{patch}_{image}"
            # timm's default weights of this one are DINO's.
            norm = IMAGENET if name == "vit_small_patch8_224" else HALF
            add(name, vit_config, image, patch_size=patch, **norm, **_VIT_SIZES[size])
    for (patch, image), sizes in _DEITS.items():
        for size in sizes:
            fields = {"patch_size": patch, **IMAGENET, **_VIT_SIZES[size]}
            add(f"deit_{size}_patch{patch}_{image}", vit_config, image, **fields)
            name = f"deit_{size}_distilled_patch{patch}_{image}"
            add(name, vit_config, image, distilled=True, **fields)
    for (patch, image), sizes in _DEIT3.items():
        for size in sizes:
            fields = {"patch_size": patch, **IMAGENET, **_VIT_SIZES[size]}
            fields |= {"init_values": 1e-6, "no_embed_class": True}
            add(f"deit3_{size}_patch{patch}_{image}", vit_config, image, **fields)
    for size in ("small", "base", "large"):
        fields = {"patch_size": 14, "init_values": 1e-5, **IMAGENET, **_VIT_SIZES[size]}
        add(f"vit_{size}_patch14_dinov2", vit_config, 518, **fields)
    for (window, image), sizes in _SWINS.items():
        for size in sizes:
            fields = {"patch_size": 4, "window_size": window, **IMAGENET, **_SWIN_SIZES[size]}
            add(f"swin_{size}_patch4_window{window}_{image}", swin_config, image, **fields)
    for name, fields in _RESNETS.items():
        add(name, ResNetConfig, 224, **(fields | IMAGENET | {"crop_pct": 0.95}))
    return found


PRESETS = _presets()

_POOLS = {"token": "cls", "avg": "mean", "cls": "cls", "mean": "mean"}
_RENAMED = {"img_size": "image_size", "in_chans": "in_channels"}
# Arguments of timm's that say nothing about inference at the network's own image size.
_IGNORED = {
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "dynamic_img_size", "strict_img_size"),
}
_COMMON = {"img_size", "in_chans", "num_classes", "global_pool", "dtype"}
_TRANSFORMER = _COMMON | {
    "patch_size",
    "embed_dim",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "layer_norm_eps",
}
_KNOWN = {
    vit_config: _TRANSFORMER
    | {"depth", "class_token", "distilled", "init_values", "no_embed_class"},
    swin_config: _TRANSFORMER | {"depths", "window_size", "head_dim"},
    ResNetConfig: _COMMON | {"depths", "bottleneck", "width", "batch_norm_eps"},
}
_PREPARE = ("crop_pct", "mean", "std", "interpolation")


def list_models() -> list[str]:
    """Names of all presets. Source: timm."""
    return sorted(PRESETS)


def architecture(name: str) -> str:
    """A preset's name without the tag of its weights.

    Raises:
      InputError: an unknown preset.
    """
    found = name.partition(".")[0]
    if found not in PRESETS:
        raise InputError(f"unknown model {name!r}, expected one of {', '.join(list_models())}")
    return found


def create(name: str, /, **overrides: Any) -> tuple[Config, Preprocess]:
    """Config and preprocessing of a preset; overrides carry timm's argument names.

    Args:
      name: timm's name, with or without the tag of the weights (".fb_in1k").
      **overrides: img_size, patch_size, num_classes, in_chans, embed_dim, depth(s), num_heads,
        mlp_ratio, window_size, global_pool, mean, std, crop_pct, interpolation ...

    Raises:
      InputError: an unknown preset or argument, or sizes that do not fit together.
    """
    preset = PRESETS[architecture(name)]
    overrides = {key: value for key, value in overrides.items() if key not in _IGNORED}
    unknown = sorted(set(overrides) - _KNOWN[preset.build] - set(_PREPARE))
    if unknown:
        known = sorted(_KNOWN[preset.build] | set(_PREPARE))
        raise InputError(
            f"{name}: unknown argument {', '.join(unknown)}, expected some of {', '.join(known)}"
        )
    tag = _TAGS.get(name) or _TAGS.get(name.partition(".")[2], {})
    if preset.arguments["img_size"] == 384:
        # Of weights for larger images, the tag's preparation is their architecture's.
        tag = {key: value for key, value in tag.items() if key == "num_classes"}
    fields = {**preset.arguments, **tag, **overrides}
    prepare = {key: fields.pop(key) for key in _PREPARE}
    config = _build(name, preset.build, fields)
    for key in ("mean", "std"):
        if key not in overrides and config.in_channels == 1:
            # One channel is prepared as the mean of the three.
            prepare[key] = (sum(prepare[key]) / len(prepare[key]),)
    plain = prepare | {"image_size": config.image_size, "channels": config.in_channels}
    return config, from_plain(Preprocess, plain, f"{name}: preprocessing")


def _build(name: str, build: Callable[..., Config], fields: dict[str, Any]) -> Config:
    # Lists come from JSON, and configs must hash.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    for key in ("img_size", "patch_size", "window_size"):
        fields = fields | {key: _side(name, key, fields[key])} if key in fields else fields
    fields = _typed(name, build, fields)
    pool = fields.pop("global_pool", None)
    if pool is not None:
        expected = list(_POOLS) if build is vit_config else ["avg"]
        if pool not in expected:
            raise InputError(f"{name}: global_pool is {pool!r}, expected one of {expected}")
        fields |= {"pool": _POOLS[pool]} if build is vit_config else {}
    if build is vit_config:
        fields["layer_scale"] = fields.pop("init_values", None) is not None
        fields["prefix_positions"] = not fields.pop("no_embed_class", False)
    try:
        return build(**{_RENAMED.get(key, key): value for key, value in fields.items()})
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except OverflowError as error:
        raise InputError(f"{name}: an argument is too large ({error})") from error


def _typed(name: str, build: Callable[..., Config], fields: dict[str, Any]) -> dict[str, Any]:
    # They come from a command line or a config.json, where "no" might count as True.
    kinds = typing.get_type_hints(build)
    kinds = typing.get_type_hints(kinds.get("return", build)) | kinds
    kinds |= {"global_pool": str | None, "init_values": float | None, "no_embed_class": bool}
    return {
        key: from_plain(kinds[_RENAMED.get(key, key)], value, f"{name}: {key}")
        for key, value in fields.items()
    }


def _side(name: str, key: str, value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    if not value or any(side != value[0] for side in value):
        raise InputError(f"{name}: {key} is {value}, expected a square: one number")
    return value[0]

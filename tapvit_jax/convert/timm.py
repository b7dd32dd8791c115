"""timm's parameter names to ours and back; one table an architecture serves both directions."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from tapvit_jax.convert import resample, resnet
from tapvit_jax.convert.identify import describe, sizes
from tapvit_jax.convert.rules import Rule, attention, conv, dense, mlp, norm, same
from tapvit_jax.convert.weights import Weights, read_weights
from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_file
from tapvit_jax.models.backbone import CLASSIFIERS, Config, check_prunable, param_shapes
from tapvit_jax.models.params import Params, check_params, flatten, unflatten
from tapvit_jax.models.presets import architecture, create
from tapvit_jax.models.registry import Model
from tapvit_jax.models.resnet import ResNetConfig
from tapvit_jax.models.swin import SwinConfig
from tapvit_jax.models.vit import ViTConfig
from tapvit_jax.structs import from_plain

StateDict = Mapping[str, np.ndarray]

_MOST_PROBLEMS = 3
# Entries of a resampled tensor; a ViT-H's positions at 1,022 pixels are 7 million.
_MOST_RESAMPLED = 2**26
# What to do about a classifier that does not fit, or is not there.
_NEW = (
    "new_classifier=True (--new-classifier of tapvit train and extractor) makes a new one, to be "
    "trained"
)


def rules(config: Config) -> list[Rule]:
    """The table of an architecture: every timm tensor and what it holds of ours."""
    if isinstance(config, ResNetConfig):
        return resnet.rules(config)
    table = _swin_rules(config) if isinstance(config, SwinConfig) else _vit_rules(config)
    side = config.patch_size
    path = ("patch_embed",)
    return [
        conv("patch_embed.proj", path, side, side, config.in_channels, config.embed_dim),
        same("patch_embed.proj.bias", (*path, "bias"), (config.embed_dim,)),
        *table,
    ]


def _vit_rules(config: ViTConfig) -> list[Rule]:
    d = config.embed_dim
    table = [same("pos_embed", ("pos_embed",), (1, config.num_positions, d))]
    if config.class_token:
        table.append(same("cls_token", ("cls_token",), (1, 1, d)))
    if config.distilled:
        table.append(same("dist_token", ("dist_token",), (1, 1, d)))
    for i in range(len(config.blocks)):
        table += _block_rules(config, i, f"blocks.{i}")
    table += norm(config.final_norm, (config.final_norm,), d)
    for head in ("head", "head_dist") if config.distilled else ("head",):
        table += dense(head, (head,), d, config.num_classes)
    return table


def _swin_rules(config: SwinConfig) -> list[Rule]:
    table = norm("patch_embed.norm", ("patch_norm",), config.embed_dim)
    for i in range(len(config.blocks)):
        stage, place = config.position(i)
        d = config.stage_dim(stage)
        if config.block_spec(i).merge:
            path, theirs = (f"blocks_{i}", "merge"), f"layers.{stage}.downsample"
            table += norm(f"{theirs}.norm", (*path, "norm"), 2 * d)
            table += dense(f"{theirs}.reduction", (*path, "reduction"), 2 * d, d, bias=False)
        table += _block_rules(config, i, f"layers.{stage}.blocks.{place}")
    table += norm("norm", ("norm",), config.pooled_dim)
    return table + dense("head.fc", ("head",), config.pooled_dim, config.num_classes)


def _block_rules(config: ViTConfig | SwinConfig, i: int, theirs: str) -> list[Rule]:
    spec, ours = config.block_spec(i), (f"blocks_{i}",)
    widths, d = spec.widths, spec.embed_dim
    table = []
    if widths.attn:
        table += norm(f"{theirs}.norm1", (*ours, "norm1"), d)
        table += attention(
            f"{theirs}.attn",
            (*ours, "attn"),
            dim=d,
            num_heads=widths.num_heads,
            qk_dim=widths.qk_dim,
            v_dim=widths.v_dim,
            qkv_bias=spec.qkv_bias,
        )
        if spec.window:
            shape = ((2 * spec.window - 1) ** 2, widths.num_heads)
            bias = f"{theirs}.attn.relative_position_bias_table"
            table.append(same(bias, (*ours, "attn", "rel_pos_bias"), shape))
        if spec.layer_scale:
            table.append(same(f"{theirs}.ls1.gamma", (*ours, "ls1", "gamma"), (d,)))
    if widths.mlp:
        table += norm(f"{theirs}.norm2", (*ours, "norm2"), d)
        table += mlp(f"{theirs}.mlp", (*ours, "mlp"), d, widths.mlp_dim)
        if spec.layer_scale:
            table.append(same(f"{theirs}.ls2.gamma", (*ours, "ls2", "gamma"), (d,)))
    return table


def rename_old(config: Config, state: StateDict) -> dict[str, np.ndarray]:
    """Names of older checkpoints under timm's present ones, without buffers that timm drops too.

    The original Swin merges patches at the end of a stage and calls its classifier "head"; the
    original DeiT-III calls its layer scales "gamma_1" and "gamma_2".
    """
    if isinstance(config, ResNetConfig):
        return {k: v for k, v in state.items() if not k.endswith(resnet.IGNORED_SUFFIXES)}
    if isinstance(config, ViTConfig):
        return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in state.items()}
    buffers = ("relative_position_index", "attn_mask")
    state = {k: v for k, v in state.items() if not k.endswith(buffers)}
    if "layers.0.downsample.reduction.weight" in state:
        state = {
            re.sub(
                r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", k
            ): v
            for k, v in state.items()
        }
    return {re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", k): v for k, v in state.items()}


def resize(config: Config, state: StateDict) -> dict[str, np.ndarray]:
    """Resample what depends on image, patch or window size to the config's, as timm does.

    Position embeddings: bicubic, antialiased; patch kernels: the pseudo-inverse of FlexiViT;
    relative position bias: on a grid that is denser in its middle. Tensors that fit stay as they
    are; tensors that make no square grid are left for `from_timm` to refuse, and so are those that
    would become larger than any network's.
    """
    state = dict(state)
    if isinstance(config, ResNetConfig):
        return state
    for rule in rules(config):
        found = state.get(rule.timm)
        if found is None or found.shape == rule.shape or found.ndim != len(rule.shape):
            continue
        if math.prod(rule.shape) > _MOST_RESAMPLED:
            continue
        if 0 in found.shape or (rule.timm == "pos_embed" and found.shape[0] != 1):
            continue
        if rule.timm == "patch_embed.proj.weight" and found.shape[:2] == rule.shape[:2]:
            state[rule.timm] = resample.resample_patch_embed(_float32(found), config.patch_size)
        elif rule.timm == "pos_embed" and found.shape[-1] == rule.shape[-1]:
            prefix = config.num_positions - config.num_patches
            if _is_square(found.shape[1] - prefix):
                grid = config.image_size // config.patch_size
                state[rule.timm] = resample.resample_pos_embed(_float32(found), grid, prefix)
        elif rule.timm.endswith("bias_table") and found.shape[1] == rule.shape[1]:
            window = (round(rule.shape[0] ** 0.5) + 1) // 2
            if _is_square(found.shape[0]):
                state[rule.timm] = resample.resample_rel_pos_bias(_float32(found), window)
    return state


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count


def from_timm(config: Config, state: StateDict, name: str = "state dict") -> Params:
    """Turn a timm state dict into our parameters, in float32.

    Raises:
      InputError: tensors missing, unexpected, of another shape or not finite; how many and the
        first of them, under timm's name and ours, what architecture the tensors look like, and
        timm's arguments for sizes that differ.
    """
    table = rules(config)
    # What is wrong, by timm's name.
    problems: dict[str, str] = {}
    leaves = {}
    for rule in table:
        ours = ", ".join("/".join(path) for path in rule.paths)
        if rule.timm not in state:
            problems[rule.timm] = f"missing {rule.timm} (ours: {ours})"
            continue
        array = np.asarray(state[rule.timm])
        if array.shape != rule.shape:
            problems[rule.timm] = (
                f"{rule.timm} (ours: {ours}) has shape {array.shape}, expected {rule.shape}"
            )
            continue
        # JAX's test, since NumPy does not know bfloat16.
        if not jnp.issubdtype(array.dtype, jnp.floating):
            problems[rule.timm] = (
                f"{rule.timm} (ours: {ours}) has dtype {array.dtype}, expected a float type"
            )
            continue
        with np.errstate(over="ignore"):  # A float64 too large is infinity then, and said to be.
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            problems[rule.timm] = f"{rule.timm} (ours: {ours}) holds NaN or infinity"
            continue
        parts = rule.ours(array)
        leaves |= dict(zip(rule.paths, map(np.ascontiguousarray, parts), strict=True))
    known = {rule.timm for rule in table}
    problems |= {key: f"unexpected {key}" for key in state if key not in known}
    if problems:
        # As shapes: a config.json may ask for more than there is memory.
        present = {key: np.shape(array) for key, array in state.items()}
        expected = {rule.timm: rule.shape for rule in table}
        found, wanted = describe(present), describe(expected)
        looks = "" if found == wanted else f"looks like {found}, expected {wanted}; "
        more = len(problems) - _MOST_PROBLEMS
        listed = [*problems.values()][:_MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(
            f"{name}: {looks}{len(problems)} problems: {'; '.join(listed)}"
            f"{_to_type(sizes(present), sizes(expected))}"
            f"{f'; {_NEW}' if problems.keys() <= {r.timm for r in _classifier(config)} else ''}"
        )
    return unflatten(leaves)


def _to_type(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The options under which tensors of other sizes fit, if they are of the same family."""
    if not (found and expected) or ("depths" in found) != ("depths" in expected):
        return ""
    options = {name: value for name, value in found.items() if value != expected.get(name)}
    # What shapes do not tell, where the preset's value is hardly right.
    if "embed_dim" in options:
        options.setdefault("num_heads", "?")
    if "window_size" in options:
        options.setdefault("img_size", "?")
    text = " ".join(f"--set {n}={str(value).replace(' ', '')}" for n, value in options.items())
    return f"; its sizes are those of {text}" if options else ""


def to_timm(config: Config, params: Params) -> dict[str, np.ndarray]:
    """Turn our parameters into a state dict under timm's names; the inverse of `from_timm`."""
    leaves = flatten(params)
    state = {
        rule.timm: np.ascontiguousarray(
            rule.theirs(*(np.asarray(leaves[path]) for path in rule.paths))
        )
        for rule in rules(config)
    }
    return state | resnet.extra(config) if isinstance(config, ResNetConfig) else state


def load_timm(
    name: str, weights: str | Path, *, new_classifier: bool = False, **overrides: Any
) -> Model:
    """Load a timm checkpoint into a preset.

    Args:
      name: a preset, such as "deit_small_patch16_224", with or without the tag of its weights.
      weights: a local .safetensors, .pth, .pt, .bin, .ckpt or .pth.tar, or a hub id such as
        "hf-hub:timm/deit_small_patch16_224.fb_in1k".
      new_classifier: put a classifier of zeros for num_classes classes in the place of the
        checkpoint's, which may have none: to be trained, or for features alone.
      **overrides: timm's own arguments where the checkpoint or the wish differs from the preset:
        img_size, patch_size, embed_dim, depth, num_heads, num_classes, window_size, mean, std ...;
        position embeddings, patch kernels and relative position tables are resampled to fit.

    Raises:
      InputError: unknown preset, unreadable file, or a file that does not fit the preset.

    Source: names, presets and resampling are timm's.
    """
    made_as = architecture(name)  # a wrong name is said before anything is read or downloaded
    found = read_weights(weights)
    arguments = _recorded_arguments(name, found, new_classifier) | overrides
    config, preprocess = create(name, **arguments)
    params = jax.tree.map(jnp.asarray, params_of(config, found, new_classifier=new_classifier))
    history = {"weights": {"name": name, **found.source}}
    names = () if new_classifier else _label_names(found, config.num_classes)
    return Model(
        config, params, preprocess, names, name=name, architecture=made_as, history=history
    )


def _label_names(weights: Weights, classes: int) -> tuple[str, ...]:
    """The checkpoint's own names of all classes, if it has them."""
    names = (weights.config or {}).get("label_names") or []
    if isinstance(names, dict):
        # By class, where some may have none.
        names = [names.get(str(i)) for i in range(classes)]
        names = [] if None in names else names
    if isinstance(names, list):
        names = [str(name) if type(name) is int else name for name in names]
    found = from_plain(tuple[str, ...], names, f"{weights.name}: label_names")
    return found if len(found) == classes else ()


def params_of(config: Config, weights: Weights, *, new_classifier: bool = False) -> Params:
    """A checkpoint's parameters: old names renamed, sizes resampled, then `from_timm`.

    With `new_classifier`, zeros stand in the place of its own classifier, if it has one.

    Raises:
      InputError: the checkpoint does not fit the config.
    """
    state = resize(config, rename_old(config, weights.state))
    if new_classifier:
        state |= {rule.timm: np.zeros(rule.shape, np.float32) for rule in _classifier(config)}
    return from_timm(config, state, weights.name)


def _classifier(config: Config) -> list[Rule]:
    return [rule for rule in rules(config) if rule.paths[0][0] in CLASSIFIERS]


_PREPARED = ("mean", "std", "crop_pct", "interpolation")


def _recorded_arguments(name: str, weights: Weights, new_classifier: bool) -> dict[str, Any]:
    """What the checkpoint's own config.json says about shapes and preprocessing.

    Nothing about classes with `new_classifier`.
    """
    record = weights.config
    if record is None:
        return {}
    if record["architecture"] != architecture(name):
        raise InputError(
            f"{weights.name}: its config.json says {record['architecture']!r}, "
            f"expected {architecture(name)!r}"
        )
    prepared = record.get("pretrained_cfg") or {}
    if prepared.get("crop_mode", "center") != "center":
        raise InputError(
            f"{weights.name}: crop_mode is {prepared['crop_mode']!r}, expected 'center'"
        )
    found = {key: prepared[key] for key in _PREPARED if prepared.get(key) is not None}
    size = prepared.get("input_size")
    if size is not None:
        if not isinstance(size, list) or len(size) != 3:
            raise InputError(f"{weights.name}: input_size is {size!r:.80}, expected three numbers")
        found |= {"in_chans": size[0], "img_size": tuple(size[1:])}
    found |= dict(record.get("model_args") or {})
    classes = record.get("num_classes", prepared.get("num_classes"))
    found = {"num_classes": classes} | found if classes is not None else found
    if new_classifier:
        found.pop("num_classes", None)
    elif found.get("num_classes") == 0:
        raise InputError(f"{weights.name}: was saved without a classifier (num_classes 0); {_NEW}")
    return found


def save_timm(path: str | Path, config: Config, params: Params) -> None:
    """Write our parameters as a .safetensors file under timm's names.

    Raises:
      InputError: the parameters do not match the config, or the file cannot be written.

    Source: the names are timm's.
    """
    check_params(param_shapes(config), params)
    with atomic_file(path) as partial:
        safetensors.numpy.save_file(to_timm(config, params), partial, metadata={"format": "pt"})


def timm_model(model: Model) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """What rebuilds a model in timm: architecture, constructor arguments and state dict.

    timm gives all blocks of a ViT, or of a Swin's stage, the same widths. A ViT's attention must be
    whole and blocks without both branches are left out; a Swin's heads may be pruned to a common
    number of common width, where timm's softmax scale is made up for in the queries.

    Raises:
      InputError: timm has no arguments for these widths; names the first such block.
    """
    config = model.config
    if isinstance(config, ResNetConfig):
        name = architecture(model.architecture or ("resnet50" if config.bottleneck else "resnet18"))
        preset, _ = create(name, **_image_arguments(config))
        if config != preset:
            raise InputError(f"timm's {name} has other depths or widths than {model.name}")
        return (
            name,
            _image_arguments(config, "num_classes", "in_chans"),
            to_timm(config, model.params),
        )
    check_prunable(config)
    if isinstance(config, SwinConfig):
        return _timm_swin(model, config)
    return _timm_vit(model, config)


def _image_arguments(config: Config, *names: str) -> dict[str, Any]:
    found = {
        "img_size": config.image_size,
        "num_classes": config.num_classes,
        "in_chans": config.in_channels,
    }
    return {name: found[name] for name in names or found}


def _check_eps(config: ViTConfig | SwinConfig, default: float) -> None:
    if config.layer_norm_eps != default:
        raise _refuse("it", f"has layer_norm_eps {config.layer_norm_eps}")


def _refuse(where: str, found: str) -> InputError:
    return InputError(
        f"timm cannot represent this pruned model: {where} {found}; export it as ONNX instead"
    )


def _mlp_ratio(where: str, mlp_dim: int, dim: int) -> float:
    # timm truncates dim * ratio, so that the nearest float may lose a unit.
    ratio = mlp_dim / dim
    while int(dim * ratio) < mlp_dim:
        ratio = float(np.nextafter(ratio, np.inf))
    if int(dim * ratio) != mlp_dim or mlp_dim == 0:
        raise _refuse(where, f"has {mlp_dim} MLP units")
    return ratio


def _timm_vit(model: Model, config: ViTConfig) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    _check_eps(config, 1e-6)
    kept = [i for i, block in enumerate(config.blocks) if block.attn or block.mlp]
    first = config.blocks[kept[0]] if kept else None
    for i in kept:
        block = config.blocks[i]
        if not (block.attn and block.mlp):
            raise _refuse(f"block {i}", "lacks one of its branches")
        if (block.qk_dim, block.v_dim) != (config.head_dim,) * 2:
            raise _refuse(f"block {i}", "has pruned attention dims")
        if block.num_heads * config.head_dim != config.embed_dim:
            raise _refuse(f"block {i}", "has pruned heads")
        if block != first:
            raise _refuse(f"block {i}", "has another MLP width than the first")
    if first is None:
        raise _refuse("it", "has no blocks left")
    default = "deit_tiny_distilled_patch16_224" if config.distilled else "vit_tiny_patch16_224"
    arguments = _image_arguments(config) | {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": len(kept),
        "num_heads": first.num_heads,
        "mlp_ratio": _mlp_ratio("every block", first.mlp_dim, config.embed_dim),
        "qkv_bias": config.qkv_bias,
        "class_token": config.class_token,
        "global_pool": "avg" if config.pool == "mean" else "token",
        "no_embed_class": not config.prefix_positions,
        "init_values": 1e-5 if config.layer_scale else None,
    }
    state = {}
    for key, value in to_timm(config, model.params).items():
        match = re.match(r"blocks\.(\d+)\.(.*)", key)
        state[f"blocks.{kept.index(int(match[1]))}.{match[2]}" if match else key] = value
    return architecture(model.architecture or default), arguments, state


def _timm_swin(
    model: Model, config: SwinConfig
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    _check_eps(config, 1e-5)
    params = flatten(model.params)
    heads, dims, ratios, start = [], [], [], 0
    for stage, depth in enumerate(config.depths):
        blocks, where = config.blocks[start : start + depth], f"stage {stage}"
        first = blocks[0]
        if any(not (block.attn and block.mlp) for block in blocks):
            raise _refuse(where, "lacks a branch")
        if any(block != first for block in blocks):
            raise _refuse(where, "has blocks of different widths")
        if first.qk_dim != first.v_dim or 0 in (first.qk_dim, first.num_heads):
            raise _refuse(where, f"has {first.qk_dim} qk dims and {first.v_dim} value dims a head")
        heads.append(first.num_heads)
        dims.append(first.v_dim)
        ratios.append(_mlp_ratio(where, first.mlp_dim, config.stage_dim(stage)))
        if first.qk_dim != config.head_dims[stage]:
            scale = np.float32((first.qk_dim / config.head_dims[stage]) ** 0.5)
            for i in range(start, start + depth):
                for name in ("kernel", "bias") if config.qkv_bias else ("kernel",):
                    path = (f"blocks_{i}", "attn", "q", name)
                    params[path] = np.asarray(params[path]) * scale
        start += depth
    arguments = _image_arguments(config) | {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": heads,
        "head_dim": dims,
        "window_size": config.window_size,
        "mlp_ratio": ratios,
        "qkv_bias": config.qkv_bias,
    }
    name = architecture(model.architecture or "swin_tiny_patch4_window7_224")
    return name, arguments, to_timm(config, unflatten(params))

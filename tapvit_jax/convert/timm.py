"""timm's parameter names to ours and back, for plain and distilled ViTs; one table serves both."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_file, file_hash, read_safetensors
from tapvit_jax.models.params import Params, flatten, unflatten
from tapvit_jax.models.params import Path as ParamPath
from tapvit_jax.models.registry import Model, create
from tapvit_jax.models.vit import ViTConfig

StateDict = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """One timm tensor and the parameters of ours that it holds, with both transforms."""

    timm: str
    paths: tuple[ParamPath, ...]
    shape: tuple[int, ...]
    ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    theirs: Callable[..., np.ndarray]


def _same(timm: str, path: ParamPath, shape: tuple[int, ...]) -> _Rule:
    return _Rule(timm, (path,), shape, lambda a: (a,), lambda a: a)


def _transposed(timm: str, path: ParamPath, shape: tuple[int, int]) -> _Rule:
    return _Rule(timm, (path,), shape[::-1], lambda a: (a.T,), lambda a: a.T)


def _norm(timm: str, path: ParamPath, dim: int) -> list[_Rule]:
    names = {"weight": "scale", "bias": "bias"}
    return [_same(f"{timm}.{a}", (*path, b), (dim,)) for a, b in names.items()]


def _dense(timm: str, path: ParamPath, inputs: int, outputs: int) -> list[_Rule]:
    return [
        _transposed(f"{timm}.weight", (*path, "kernel"), (inputs, outputs)),
        _same(f"{timm}.bias", (*path, "bias"), (outputs,)),
    ]


def _rules(config: ViTConfig) -> list[_Rule]:
    d, p, channels = config.embed_dim, config.patch_size, config.in_channels
    rules = [
        _Rule(
            "patch_embed.proj.weight",
            (("patch_embed", "kernel"),),
            (d, channels, p, p),
            lambda a: (a.transpose(2, 3, 1, 0),),
            lambda a: a.transpose(3, 2, 0, 1),
        ),
        _same("patch_embed.proj.bias", ("patch_embed", "bias"), (d,)),
        _same("pos_embed", ("pos_embed",), (1, config.num_tokens, d)),
    ]
    if config.class_token:
        rules.append(_same("cls_token", ("cls_token",), (1, 1, d)))
    if config.distilled:
        rules.append(_same("dist_token", ("dist_token",), (1, 1, d)))
    for i, block in enumerate(config.blocks):
        ours, theirs = f"blocks_{i}", f"blocks.{i}"
        if block.attn:
            rules += _norm(f"{theirs}.norm1", (ours, "norm1"), d)
            rules += _attention_rules(config, i)
        if block.mlp:
            rules += _norm(f"{theirs}.norm2", (ours, "norm2"), d)
            rules += _dense(f"{theirs}.mlp.fc1", (ours, "mlp", "fc1"), d, block.mlp_dim)
            rules += _dense(f"{theirs}.mlp.fc2", (ours, "mlp", "fc2"), block.mlp_dim, d)
    rules += _norm(config.final_norm, (config.final_norm,), d)
    for head in ("head", "head_dist") if config.distilled else ("head",):
        rules += _dense(head, (head,), d, config.num_classes)
    return rules


def _attention_rules(config: ViTConfig, i: int) -> list[_Rule]:
    block, d = config.blocks[i], config.embed_dim
    h, k, v = block.num_heads, block.qk_dim, block.v_dim
    ours, theirs = (f"blocks_{i}", "attn"), f"blocks.{i}.attn"
    splits = (h * k, 2 * h * k)
    names, dims = ("q", "k", "v"), (k, k, v)

    def kernels(a: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = np.split(a, splits)
        return tuple(part.T.reshape(d, h, dim) for part, dim in zip(parts, dims, strict=True))

    def biases(a: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = np.split(a, splits)
        return tuple(part.reshape(h, dim) for part, dim in zip(parts, dims, strict=True))

    rules = [
        _Rule(
            f"{theirs}.qkv.weight",
            tuple((*ours, name, "kernel") for name in names),
            (h * (2 * k + v), d),
            kernels,
            lambda *parts: np.concatenate([part.reshape(d, -1).T for part in parts]),
        )
    ]
    if config.qkv_bias:
        rules.append(
            _Rule(
                f"{theirs}.qkv.bias",
                tuple((*ours, name, "bias") for name in names),
                (h * (2 * k + v),),
                biases,
                lambda *parts: np.concatenate([part.reshape(-1) for part in parts]),
            )
        )
    rules.append(
        _Rule(
            f"{theirs}.proj.weight",
            ((*ours, "proj", "kernel"),),
            (d, h * v),
            lambda a: (a.T.reshape(h, v, d),),
            lambda a: a.reshape(h * v, d).T,
        )
    )
    rules.append(_same(f"{theirs}.proj.bias", (*ours, "proj", "bias"), (d,)))
    return rules


def from_timm(config: ViTConfig, state: StateDict, name: str = "state dict") -> Params:
    """Turn a timm state dict into our parameters, in float32.

    Raises:
      InputError: tensors missing, unexpected or of another shape; all of them in one message, under
        timm's name and ours.
    """
    rules = _rules(config)
    problems, leaves = [], {}
    for rule in rules:
        ours = ", ".join("/".join(path) for path in rule.paths)
        if rule.timm not in state:
            problems.append(f"missing {rule.timm} (ours: {ours})")
            continue
        array = np.asarray(state[rule.timm])
        if array.shape != rule.shape:
            problems.append(
                f"{rule.timm} (ours: {ours}) has shape {array.shape}, expected {rule.shape}"
            )
            continue
        # JAX's test, since NumPy does not know bfloat16.
        if not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(
                f"{rule.timm} (ours: {ours}) has dtype {array.dtype}, expected a float type"
            )
            continue
        parts = rule.ours(array.astype(np.float32))
        leaves |= dict(zip(rule.paths, map(np.ascontiguousarray, parts), strict=True))
    known = {rule.timm for rule in rules}
    problems += [f"unexpected {key}" for key in state if key not in known]
    if problems:
        raise InputError(f"{name}: {len(problems)} problems: " + "; ".join(problems))
    return unflatten(leaves)


def to_timm(config: ViTConfig, params: Params) -> dict[str, np.ndarray]:
    """Turn our parameters into a state dict under timm's names; the inverse of `from_timm`."""
    leaves = flatten(params)
    return {
        rule.timm: np.ascontiguousarray(
            rule.theirs(*(np.asarray(leaves[path]) for path in rule.paths))
        )
        for rule in _rules(config)
    }


def load_timm(name: str, weights: str | Path, **overrides: Any) -> Model:
    """Load a timm checkpoint (.safetensors) into a preset.

    Args:
      name: a preset, such as "deit_small_patch16_224".
      weights: path of the file.
      **overrides: timm's own arguments where the checkpoint differs from the preset: img_size,
        patch_size, embed_dim, depth, num_heads, num_classes, ...

    Raises:
      InputError: unknown preset, unreadable file, or a file that does not fit the preset.
    """
    config, preprocess = create(name, **overrides)
    path = Path(weights)
    params = from_timm(config, read_safetensors(path), str(path))
    history = {"weights": {"name": name, "file": path.name, "sha256": file_hash(path)}}
    return Model(config, params, preprocess, name=name, history=history)


def save_timm(path: str | Path, config: ViTConfig, params: Params) -> None:
    """Write our parameters as a .safetensors file under timm's names."""
    with atomic_file(path) as partial:
        safetensors.numpy.save_file(to_timm(config, params), partial)

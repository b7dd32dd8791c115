"""Rules that tie timm's tensors to our parameters, one table an architecture, used both ways."""

import dataclasses
from collections.abc import Callable

import numpy as np

from tapvit_jax.models.params import Path


@dataclasses.dataclass(frozen=True)
class Rule:
    """One timm tensor and the parameters of ours that it holds.

    Attributes:
      timm: timm's name.
      paths: our parameters, in the order that both transforms use.
      shape: shape of timm's tensor.
      ours: from timm's tensor to our parameters.
      theirs: the inverse, exact to the bit.
    """

    timm: str
    paths: tuple[Path, ...]
    shape: tuple[int, ...]
    ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    theirs: Callable[..., np.ndarray]


def same(timm: str, path: Path, shape: tuple[int, ...]) -> Rule:
    """A tensor that both sides store alike."""
    return Rule(timm, (path,), shape, lambda a: (a,), lambda a: a)


def transposed(timm: str, path: Path, shape: tuple[int, int]) -> Rule:
    """A matrix that is (outputs, inputs) there and (inputs, outputs) here."""
    return Rule(timm, (path,), shape[::-1], lambda a: (a.T,), lambda a: a.T)


def norm(timm: str, path: Path, dim: int) -> list[Rule]:
    """Scale and bias of a normalisation."""
    names = {"weight": "scale", "bias": "bias"}
    return [same(f"{timm}.{theirs}", (*path, ours), (dim,)) for theirs, ours in names.items()]


def dense(timm: str, path: Path, inputs: int, outputs: int, *, bias: bool = True) -> list[Rule]:
    """A dense layer."""
    kernel = transposed(f"{timm}.weight", (*path, "kernel"), (inputs, outputs))
    return [kernel, same(f"{timm}.bias", (*path, "bias"), (outputs,))] if bias else [kernel]


def conv(timm: str, path: Path, height: int, width: int, inputs: int, outputs: int) -> Rule:
    """A convolution's kernel: (outputs, inputs, height, width) there, the reverse order here."""
    return Rule(
        f"{timm}.weight",
        ((*path, "kernel"),),
        (outputs, inputs, height, width),
        lambda a: (a.transpose(2, 3, 1, 0),),
        lambda a: a.transpose(3, 2, 0, 1),
    )


def attention(
    timm: str,
    path: Path,
    *,
    dim: int,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    qkv_bias: bool,
) -> list[Rule]:
    """Attention: one matrix for queries, keys and values there, one each by heads here."""
    splits = (num_heads * qk_dim, 2 * num_heads * qk_dim)
    rows = num_heads * (2 * qk_dim + v_dim)
    dims = {"q": qk_dim, "k": qk_dim, "v": v_dim}

    def kernels(a: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = zip(np.split(a, splits), dims.values(), strict=True)
        return tuple(part.T.reshape(dim, num_heads, width) for part, width in parts)

    def biases(a: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = zip(np.split(a, splits), dims.values(), strict=True)
        return tuple(part.reshape(num_heads, width) for part, width in parts)

    rules = [
        Rule(
            f"{timm}.qkv.weight",
            tuple((*path, name, "kernel") for name in dims),
            (rows, dim),
            kernels,
            lambda *parts: np.concatenate([part.reshape(dim, -1).T for part in parts]),
        )
    ]
    if qkv_bias:
        rules.append(
            Rule(
                f"{timm}.qkv.bias",
                tuple((*path, name, "bias") for name in dims),
                (rows,),
                biases,
                lambda *parts: np.concatenate([part.reshape(-1) for part in parts]),
            )
        )
    rules.append(
        Rule(
            f"{timm}.proj.weight",
            ((*path, "proj", "kernel"),),
            (dim, num_heads * v_dim),
            lambda a: (a.T.reshape(num_heads, v_dim, dim),),
            lambda a: a.reshape(num_heads * v_dim, dim).T,
        )
    )
    rules.append(same(f"{timm}.proj.bias", (*path, "proj", "bias"), (dim,)))
    return rules


def mlp(timm: str, path: Path, dim: int, mlp_dim: int) -> list[Rule]:
    """Two dense layers."""
    rules = dense(f"{timm}.fc1", (*path, "fc1"), dim, mlp_dim)
    return rules + dense(f"{timm}.fc2", (*path, "fc2"), mlp_dim, dim)

"""Parameter trees: plain nested dicts of arrays, addressed by paths."""

import hashlib
from typing import Any

import jax
import numpy as np

from tapvit_jax.errors import InputError

Params = dict[str, Any]
Path = tuple[str, ...]


def flatten(tree: Params) -> dict[Path, jax.Array]:
    """Turn a nested parameter dict into {path: leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: dict[Path, jax.Array]) -> Params:
    """The inverse of `flatten`.

    Raises:
      InputError: a path that continues another one.
    """
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for i, name in enumerate(path[:-1]):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise InputError(f"names {'/'.join(path[: i + 1])} as an array and as a group")
        if path[-1] in node:
            raise InputError(f"names {'/'.join(path)} as an array and as a group")
        node[path[-1]] = leaf
    return tree


def tree_hash(tree: Params) -> str:
    """SHA-256 (hex) over the path, type, shape and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.asarray(leaf)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_params(shapes: Params, params: Params, name: str = "params") -> None:
    """Check a parameter tree against the shapes and dtypes that it should have.

    Raises:
      InputError: parameters missing, extra, of another shape or another dtype; all in one message.
    """
    expected, found = flatten(shapes), flatten(params)
    problems = _other_paths(expected, found)
    for path in expected.keys() & found.keys():
        want, have = expected[path], found[path]
        if tuple(have.shape) != want.shape:
            problems.append(
                f"{'/'.join(path)} has shape {tuple(have.shape)}, expected {want.shape}"
            )
        elif have.dtype != want.dtype:
            problems.append(f"{'/'.join(path)} has dtype {have.dtype}, expected {want.dtype}")
    if problems:
        raise InputError(f"{name}: does not match its config: " + "; ".join(sorted(problems)))


def check_masks(shapes: Params, masks: Params, name: str = "masks") -> None:
    """Check a tree of masks against the shapes of the parameters that it masks.

    Raises:
      InputError: masks missing, extra, or of a shape that does not broadcast to the parameter's;
        all in one message.
    """
    expected, found = flatten(shapes), flatten(masks)
    problems = _other_paths(expected, found)
    for path in expected.keys() & found.keys():
        want, have = expected[path].shape, np.shape(found[path])
        # An axis that the mask lacks, or has once, stands for all of the parameter's.
        axes = zip(reversed(have), reversed(want), strict=False)
        fits = len(have) <= len(want) and all(mine in (1, whole) for mine, whole in axes)
        if not fits:
            problems.append(f"{'/'.join(path)} has shape {have}, expected one that fits {want}")
    if problems:
        raise InputError(f"{name}: does not match its config: " + "; ".join(sorted(problems)))


def _other_paths(expected: dict[Path, Any], found: dict[Path, Any]) -> list[str]:
    problems = [f"missing {'/'.join(path)}" for path in expected if path not in found]
    return problems + [f"unexpected {'/'.join(path)}" for path in found if path not in expected]

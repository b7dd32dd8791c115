"""Weights for another image, patch or window size, as timm changes them when it loads a checkpoint.

Every resampling here is separable: one matrix (new, old) for rows and the same one for columns.
"""

import math

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError


def resample_pos_embed(
    table: Float[np.ndarray, "1 n d"], new_grid: int, num_prefix_tokens: int
) -> Float[np.ndarray, "1 m d"]:
    """Resample a square grid of position embeddings; rows of prefix tokens stay as they are.

    Raises:
      InputError: the positions without the prefix are no square grid.
    """
    _check_size("new_grid", new_grid)
    prefix, positions = np.split(table, [num_prefix_tokens], axis=1)
    old_grid = _side("position embedding", positions.shape[1])
    if old_grid == new_grid:
        return table
    grid = positions.reshape(old_grid, old_grid, table.shape[2])
    found = _apply(bicubic_matrix(old_grid, new_grid), grid)
    positions = found.reshape(1, new_grid**2, -1).astype(table.dtype)
    return np.concatenate([prefix, positions], axis=1)


def resample_patch_embed(
    kernel: Float[np.ndarray, "o i p p"], new_size: int
) -> Float[np.ndarray, "o i q q"]:
    """Resample patch-embedding kernels so that resized patches keep their embeddings.

    FlexiViT (Beyer et al. 2023, arXiv 2212.08013, section 3.4): where B resizes a patch, the new
    kernel is the pseudo-inverse of B's transpose times the old kernel. It is exact for larger
    patches and the least-squares solution for smaller ones.

    Raises:
      InputError: kernels that are not square.
    """
    _check_size("new_size", new_size)
    height, width = kernel.shape[2:]
    if height != width:
        raise InputError(f"patch embedding has {height} x {width} kernels, expected square ones")
    if height == new_size:
        return kernel
    # The pseudo-inverse of a Kronecker product is that of its factors.
    inverse = np.linalg.pinv(bicubic_matrix(height, new_size)).T
    found = _apply(inverse, np.moveaxis(kernel, (2, 3), (0, 1)))
    return np.ascontiguousarray(np.moveaxis(found, (0, 1), (2, 3)), kernel.dtype)


def resample_rel_pos_bias(
    table: Float[np.ndarray, "n h"], new_window: int
) -> Float[np.ndarray, "m h"]:
    """Resample a window's table of relative position biases, (2 window - 1)^2 rows.

    BEiT's scheme (Bao et al. 2021, arXiv 2106.08254) with timm's linear interpolation: old offsets
    are spread geometrically over the new range, so that near neighbours keep their biases almost.
    Since steps never shrink, a smaller window keeps little more than the middle of the table.

    Raises:
      InputError: the table's rows are not those of a square window.
    """
    _check_size("new_window", new_window)
    old, new = _side("relative position bias", table.shape[0]), 2 * new_window - 1
    if old % 2 == 0:
        raise InputError(
            f"relative position bias has {table.shape[0]} rows, expected (2 window - 1)^2 of them"
        )
    if old == new:
        return table
    found = _apply(_offset_matrix(old // 2, new // 2), table.reshape(old, old, -1))
    return found.reshape(new**2, -1).astype(table.dtype)


def bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """What PyTorch's antialiased bicubic interpolation (pixel centres at halves) does to an axis.

    Keys' kernel with a = -1/2, widened when the axis shrinks, and normalised where it reaches over
    an edge.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centres) / stretch
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def _offset_matrix(old: int, new: int) -> Float[np.ndarray, "2*new+1 2*old+1"]:
    """Linear interpolation from geometrically spread offsets -old..old to the integers -new..new.

    Beyond the outermost old offset its bias stays.
    """
    ratio = _progression_ratio(old, new)
    half = np.cumsum(ratio ** np.arange(old))
    places = np.concatenate([-half[::-1], [0.0], half])
    wanted = np.arange(-new, new + 1)
    return np.stack([np.interp(wanted, places, unit) for unit in np.eye(len(places))], axis=1)


def _progression_ratio(old: int, new: int) -> float:
    """Ratio at which `old` steps, the first of them 1, add up to `new`, if it is in 1.01 .. 1.5."""
    low, high = 1.01, 1.5
    ratio = high
    # The bounds, and with them what happens outside, are part of the scheme.
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (ratio**old - 1) / (ratio - 1) > new:
            high = ratio
        else:
            low = ratio
    return ratio


def _apply(
    matrix: Float[np.ndarray, "new old"], grid: Float[np.ndarray, "old old ..."]
) -> Float[np.ndarray, "new new ..."]:
    grid = grid.astype(np.float64)
    return np.einsum("ai,bj,ij...->ab...", matrix, matrix, grid, optimize=True)


def _side(name: str, count: int) -> int:
    side = math.isqrt(count)
    if count < 1 or side**2 != count:
        raise InputError(f"{name} has {count} rows, expected a square number of them")
    return side


def _check_size(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} is {value}, expected 1 or more")

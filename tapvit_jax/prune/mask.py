"""Plans (which units stay), and parameter-tree masks made from them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig, param_shapes
from tapvit_jax.models.params import Params, flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.units import unit_key, unit_table

UnitMasks = dict[str, Float[Array, "..."]]
"""Unit masks by group key; the leading axes, if any, are variants."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What to keep of a dense model.

    Attributes:
      config: the dense model's config.
      keep: boolean mask per group key of the unit table; a group that is not named is kept whole.

    Raises:
      InputError: a key that the unit table does not have, or a mask of another shape.
    """

    config: TransformerConfig
    keep: Mapping[str, Bool[np.ndarray, "..."]]

    def __post_init__(self):
        groups = {group.key: group for group in unit_table(self.config)}
        unknown = sorted(set(self.keep) - set(groups))
        if unknown:
            raise InputError(f"plan names units the model does not have: {', '.join(unknown)}")
        full = {}
        for key, group in groups.items():
            mask = np.asarray(self.keep.get(key, np.ones(group.shape, bool)))
            if mask.shape != group.shape or mask.dtype != bool:
                raise InputError(
                    f"plan's mask for {key} is {mask.dtype}{list(mask.shape)}, "
                    f"expected bool{list(group.shape)}"
                )
            full[key] = mask
        object.__setattr__(self, "keep", full)

    def counts(self) -> dict[str, int]:
        """Number of kept units in every group."""
        return {key: int(mask.sum()) for key, mask in self.keep.items()}

    def keep_ratio(self, block: int, kind: str) -> float:
        """Share of the block's units of one kind that stay; 0 where the branch is absent.

        Units of a head or a branch that goes go with it.
        """
        mask = self.keep.get(unit_key(block, kind))
        if mask is None or not mask.size:
            return 0.0
        if kind in ("qk", "vo"):
            mask = mask & self.keep[unit_key(block, "head")][:, None]
        branch = "mlp_branch" if kind == "mlp" else "attn_branch"
        return float((mask & self.keep[unit_key(block, branch)]).mean())

    def to_plain(self) -> dict[str, Any]:
        """Kept indices per group as JSON values (flat indices for two-dimensional groups)."""
        return {key: np.flatnonzero(mask).tolist() for key, mask in self.keep.items()}

    @classmethod
    def from_plain(cls, config: TransformerConfig, kept: Mapping[str, Iterable[int]]) -> "Plan":
        """The inverse of `to_plain`.

        Raises:
          InputError: an index outside its group, or one that is named twice.
        """
        shapes = {group.key: group.shape for group in unit_table(config)}
        keep = {}
        for key, indices in kept.items():
            if key not in shapes:
                raise InputError(f"plan names units the model does not have: {key}")
            flat = np.zeros(int(np.prod(shapes[key], dtype=int)), bool)
            indices = list(indices)
            if any(type(i) is not int or not 0 <= i < flat.size for i in indices):
                raise InputError(f"plan: kept indices of {key} must lie in 0..{flat.size - 1}")
            if len(set(indices)) != len(indices):
                raise InputError(f"plan: kept indices of {key} name a unit twice")
            flat[indices] = True
            keep[key] = flat.reshape(shapes[key])
        return cls(config, keep)


def top_k_mask(scores: Float[np.ndarray, "..."], count: int) -> Bool[np.ndarray, "..."]:
    """Mask with exactly `count` ones at the highest scores, over all axes together.

    Ties go to the lower index. (A threshold, `scores >= kth`, would keep too many under ties.)

    Raises:
      InputError: a score is NaN, or `count` is outside 0..size.
    """
    scores = np.asarray(scores)
    if np.isnan(scores).any():
        raise InputError("scores hold NaN: the metric batches or the parameters are not finite")
    if not 0 <= count <= scores.size:
        raise InputError(f"cannot keep {count} of {scores.size} units")
    order = np.argsort(-scores.ravel(), kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def unit_masks(plan: Plan, dtype: Any = jnp.float32) -> UnitMasks:
    """The plan's masks as arrays of zeros and ones, ready to be stacked over variants."""
    return {key: jnp.asarray(mask, dtype) for key, mask in plan.keep.items()}


def param_masks(config: TransformerConfig, masks: UnitMasks) -> Params:
    """Masks for every parameter, of shapes that broadcast against the parameters'.

    The mask of a parameter is the product of the masks of all units it belongs to. Parameters that
    no unit in `masks` covers get the scalar one. Pure and traceable: vmap it over variants.
    """
    ranks = {path: len(leaf.shape) for path, leaf in flatten(param_shapes(config)).items()}
    result = {path: jnp.ones((), jnp.float32) for path in ranks}
    for group in unit_table(config):
        if group.key not in masks:
            continue
        for member in group.members:
            shape = [1] * ranks[member.path]
            for axis, size in zip(member.axes, group.shape, strict=True) if member.axes else ():
                shape[axis] = size
            mask = jnp.reshape(masks[group.key], shape)
            result[member.path] = result[member.path] * mask
    return unflatten(result)


def mask_params(config: TransformerConfig, params: Params, masks: UnitMasks) -> Params:
    """Parameters with the pruned units' entries set to zero. Pure and traceable."""
    return jax.tree.map(lambda p, m: p * m.astype(p.dtype), params, param_masks(config, masks))


def apply_masks(model: Model, plan: Plan) -> Model:
    """The dense model with all pruned units set to zero: same shapes, the smaller model's outputs.

    Raises:
      InputError: the plan was made for another config.

    Source: ours.
    """
    check_plan(model, plan)
    return model.replace(params=mask_params(model.config, model.params, unit_masks(plan)))


def check_plan(model: Model, plan: Plan) -> None:
    """Refuse a plan that was made for a model of other shapes.

    Raises:
      InputError: the plan was made for another config.
    """
    if plan.config != model.config:
        raise InputError(f"the plan was made for another config than that of {model.name}")

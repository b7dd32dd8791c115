"""The table of prunable units: which parameters belong to which unit, along which axes.

Scores, masks, reshaping, costs and optimizer moments all read this one table. Kinds:

    mlp          hidden units of an MLP                                   shape (f,)
    qk           dimensions of queries and keys, in each head             shape (h, k)
    vo           dimensions of values and of the projection's inputs      shape (h, v)
    head         whole heads                                              shape (h,)
    attn_branch  the attention branch of a block with its norm            shape ()
    mlp_branch   the MLP branch of a block with its norm                  shape ()

A head takes its column of the relative position bias along, where there is one; a branch its layer
scale.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig, check_prunable
from tapvit_jax.models.layers import BlockSpec
from tapvit_jax.models.params import Path

Kind = Literal["mlp", "qk", "vo", "head", "attn_branch", "mlp_branch"]

WIDTH_FIELDS: dict[Kind, str] = {
    "mlp": "mlp_dim",
    "qk": "qk_dim",
    "vo": "v_dim",
    "head": "num_heads",
}
"""The width in `BlockConfig` that units of a kind make up."""

WIDTH_KINDS: tuple[Kind, ...] = ("mlp", "qk", "vo")
"""Kinds whose counts a budget turns into widths, where attention is pruned dim by dim."""

HEAD_KINDS: tuple[Kind, ...] = ("mlp", "head")
"""The same where it is pruned head by head."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A parameter that shrinks with a unit: unit axis i indexes the parameter's `axes[i]`."""

    path: Path
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class UnitGroup:
    """All units of one kind in one block.

    Attributes:
      block: position of the block.
      kind: see the module's table.
      shape: shape of the units' scores and masks.
      members: parameters that belong to them.
    """

    block: int
    kind: Kind
    shape: tuple[int, ...]
    members: tuple[Member, ...]

    @property
    def key(self) -> str:
        """Name of the group in scores, masks and plans, such as "blocks_3/mlp"."""
        return unit_key(self.block, self.kind)

    @property
    def size(self) -> int:
        """Number of units."""
        return int(np.prod(self.shape, dtype=int))


def unit_key(block: int, kind: Kind) -> str:
    """Name of a group of units in scores, masks and plans."""
    return f"blocks_{block}/{kind}"


@functools.lru_cache(maxsize=256)
def unit_table(config: TransformerConfig) -> tuple[UnitGroup, ...]:
    """All prunable units of a model, block after block. Source: ours.

    Raises:
      InputError: a backbone without prunable units.
    """
    check_prunable(config)
    groups = []
    for i, block in enumerate(config.blocks):
        if block.attn:
            groups += _attention_groups(config.block_spec(i), i)
        if block.mlp:
            groups += _mlp_groups(config.block_spec(i), i)
    return tuple(groups)


def _attention_groups(spec: BlockSpec, i: int) -> list[UnitGroup]:
    block = spec.widths
    heads = block.num_heads
    attn = (f"blocks_{i}", "attn")

    def members(names: tuple[str, ...], kernel_axes, bias_axes) -> list[Member]:
        found = [Member((*attn, name, "kernel"), kernel_axes) for name in names]
        if spec.qkv_bias:
            found += [Member((*attn, name, "bias"), bias_axes) for name in names]
        return found

    dims = {"kernel_axes": (1, 2), "bias_axes": (0, 1)}
    per_head = {"kernel_axes": (1,), "bias_axes": (0,)}
    whole = {"kernel_axes": (), "bias_axes": ()}
    proj = (*attn, "proj", "kernel")
    branch = members(("q", "k", "v"), **whole)
    branch += [Member(proj, ()), Member((*attn, "proj", "bias"), ())]
    branch += [Member((f"blocks_{i}", "norm1", name), ()) for name in ("scale", "bias")]
    branch += [Member((f"blocks_{i}", "ls1", "gamma"), ())] if spec.layer_scale else []
    vo = (*members(("v",), **dims), Member(proj, (0, 1)))
    head = [*members(("q", "k", "v"), **per_head), Member(proj, (0,))]
    if spec.window:
        table = (*attn, "rel_pos_bias")
        head.append(Member(table, (1,)))
        branch.append(Member(table, ()))
    return [
        UnitGroup(i, "qk", (heads, block.qk_dim), tuple(members(("q", "k"), **dims))),
        UnitGroup(i, "vo", (heads, block.v_dim), vo),
        UnitGroup(i, "head", (heads,), tuple(head)),
        UnitGroup(i, "attn_branch", (), tuple(branch)),
    ]


def _mlp_groups(spec: BlockSpec, i: int) -> list[UnitGroup]:
    mlp = (f"blocks_{i}", "mlp")
    hidden = (
        Member((*mlp, "fc1", "kernel"), (1,)),
        Member((*mlp, "fc1", "bias"), (0,)),
        Member((*mlp, "fc2", "kernel"), (0,)),
    )
    branch = [Member(member.path, ()) for member in hidden]
    branch += [Member((*mlp, "fc2", "bias"), ())]
    branch += [Member((f"blocks_{i}", "norm2", name), ()) for name in ("scale", "bias")]
    branch += [Member((f"blocks_{i}", "ls2", "gamma"), ())] if spec.layer_scale else []
    return [
        UnitGroup(i, "mlp", (spec.widths.mlp_dim,), hidden),
        UnitGroup(i, "mlp_branch", (), tuple(branch)),
    ]


def check_unit_scores(
    config: TransformerConfig, units: Mapping[str, Any], kinds: Sequence[Kind] = tuple(WIDTH_FIELDS)
) -> dict[str, Float[np.ndarray, "..."]]:
    """The scores of all groups of these kinds by group key, in float64. Source: ours.

    Raises:
      InputError: scores missing, of another shape, or not finite.
    """
    groups = [group for group in unit_table(config) if group.kind in kinds]
    missing = [group.key for group in groups if group.key not in units]
    if missing:
        raise InputError(f"no scores for {', '.join(missing)}")
    scores = {}
    for group in groups:
        found = np.asarray(units[group.key], np.float64)
        if found.shape != group.shape:
            raise InputError(
                f"scores of {group.key} have shape {found.shape}, expected {group.shape}"
            )
        if not np.isfinite(found).all():
            raise InputError(
                f"scores of {group.key} are not finite: parameters, activations or gradients "
                "hold NaN or infinity"
            )
        scores[group.key] = found
    return scores

"""Physical reshaping: gather what a plan keeps into a really smaller model.

The reshaped model computes what the masked model computes, up to the order of floating-point sums.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.models.layers import BlockConfig
from tapvit_jax.models.params import Params, flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.mask import Plan, check_plan
from tapvit_jax.prune.units import unit_key, unit_table
from tapvit_jax.structs import to_plain


@dataclasses.dataclass(frozen=True)
class _HeadGather:
    """Which dims each kept head contributes; ragged heads are padded to the widest one."""

    heads: Int[np.ndarray, "h"]
    dims: Int[np.ndarray, "h k"]
    real: Bool[np.ndarray, "h k"]


def _gather(heads: np.ndarray, keep: Bool[np.ndarray, "h k"]) -> _HeadGather:
    counts = keep[heads].sum(axis=1)
    width = int(counts.max(initial=0))
    dims = np.zeros((len(heads), width), int)
    for row, head in enumerate(heads):
        dims[row, : counts[row]] = np.flatnonzero(keep[head])
    return _HeadGather(heads, dims, np.arange(width) < counts[:, None])


def _kept_heads(plan: Plan, block: int) -> np.ndarray:
    # A head without value dims adds nothing to the branch, so it goes too.
    heads = plan.keep[unit_key(block, "head")]
    values = plan.keep[unit_key(block, "vo")].any(axis=1)
    return np.flatnonzero(heads & values)


def reshaped_config(plan: Plan) -> TransformerConfig:
    """Config of the smaller model. Ragged heads count at the width of the widest."""
    blocks = []
    for i, block in enumerate(plan.config.blocks):
        attn = block.attn and bool(plan.keep[unit_key(i, "attn_branch")])
        mlp = block.mlp and bool(plan.keep[unit_key(i, "mlp_branch")])
        num_heads = qk_dim = v_dim = 0
        if attn:
            heads = _kept_heads(plan, i)
            num_heads = len(heads)
            qk_dim = _gather(heads, plan.keep[unit_key(i, "qk")]).dims.shape[1]
            v_dim = _gather(heads, plan.keep[unit_key(i, "vo")]).dims.shape[1]
        mlp_dim = int(plan.keep[unit_key(i, "mlp")].sum()) if mlp else 0
        blocks.append(BlockConfig(num_heads, qk_dim, v_dim, mlp_dim, attn, mlp))
    return dataclasses.replace(plan.config, blocks=tuple(blocks))


def reshape_tree(plan: Plan, tree: Params) -> Params:
    """Gather the kept entries of any tree with the dense parameters' structure and shapes.

    Serves parameters, gradients and optimizer moments alike. Padding of ragged heads is zero. Runs
    on the host: it happens once, and every plan has other shapes, so compiling would not pay.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    for i, block in enumerate(plan.config.blocks):
        for kind, present in (("attn_branch", block.attn), ("mlp_branch", block.mlp)):
            if present and not plan.keep[unit_key(i, kind)]:
                _drop_branch(plan, leaves, unit_key(i, kind))
    done = set()
    for group in unit_table(plan.config):
        members = [m for m in group.members if m.path in leaves and m.path not in done]
        if group.kind in ("qk", "vo"):
            gather = _gather(_kept_heads(plan, group.block), plan.keep[group.key])
            for member in members:
                leaves[member.path] = _take_heads(leaves[member.path], gather, member.axes)
                done.add(member.path)
        elif group.kind in ("mlp", "head"):
            # Of a head's parameters, those with dims inside the head are done by now.
            kept = plan.keep[group.key]
            kept = np.flatnonzero(kept) if group.kind == "mlp" else _kept_heads(plan, group.block)
            for member in members:
                leaves[member.path] = np.take(leaves[member.path], kept, member.axes[0])
    return unflatten(leaves)


def _drop_branch(plan: Plan, leaves: dict, key: str) -> None:
    group = next(group for group in unit_table(plan.config) if group.key == key)
    for member in group.members:
        del leaves[member.path]


def _take_heads(leaf: np.ndarray, gather: _HeadGather, axes: tuple[int, ...]) -> np.ndarray:
    # Heads and dims are neighbouring axes everywhere, so one advanced index keeps them in place.
    start = axes[0]
    index = (slice(None),) * start + (gather.heads[:, None], gather.dims)
    taken = leaf[index]
    tail = leaf.ndim - start - 2
    real = gather.real.reshape(gather.real.shape + (1,) * tail)
    return np.where(real, taken, np.zeros((), taken.dtype))


def reshape(model: Model, plan: Plan) -> Model:
    """The really smaller model: only the kept entries, and outputs equal to the masked model's.

    Its history records the plan, so that every kept unit can be traced to the dense model.

    Raises:
      InputError: the plan was made for another config.

    Source: ours.
    """
    check_plan(model, plan)
    history = {**model.history, "kept": plan.to_plain(), "dense_config": to_plain(plan.config)}
    params = jax.tree.map(jnp.asarray, reshape_tree(plan, model.params))
    return model.replace(config=reshaped_config(plan), params=params, history=history)

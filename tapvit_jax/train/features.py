"""Features of student and teacher, matched where pruning leaves their shapes alone."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import Params
from tapvit_jax.train.evaluate import Forward, Teacher

Blocks = tuple[int, ...] | None
"""Blocks whose outputs are the features, negative ones from the end; None is what the classifier
sees."""


def apply_with_features(
    config: backbone.TransformerConfig,
    params: Params,
    images: Float[Array, "b s s ch"],
    blocks: Blocks,
) -> tuple[Float[Array, "b c"], list[Float[Array, "b ..."]]]:
    """Logits and features of a batch, in one pass."""
    count = len(config.blocks)
    wanted = set() if blocks is None else {i % count for i in blocks}
    x, features = backbone.embed(config, params, images), []
    for i in range(count):
        x = backbone.apply_block(config.block_spec(i), backbone.block_params(params, i), x)
        if i in wanted:
            features.append(x)
    if blocks is None:
        features.append(backbone.pool(config, params, x))
    return backbone.classify(config, params, x), features


def feature_loss(
    student: Sequence[Float[Array, "b ..."]], teacher: Sequence[Float[Array, "b ..."]]
) -> Float[Array, "b"]:
    """||s - t||^2 / ||t||^2 of each image, averaged over the features; scale-free (ours)."""

    def one(s: Array, t: Array) -> Array:
        s, t = (x.astype(jnp.float32).reshape(len(x), -1) for x in (s, t))
        # An image without any features asks for none.
        return ((s - t) ** 2).sum(axis=1) / jnp.maximum((t**2).sum(axis=1), 1e-12)

    found = [one(s, t) for s, t in zip(student, teacher, strict=True)]
    return jnp.stack(found).mean(axis=0)


def check_features(forward: Forward, config: Any, teacher: Teacher, blocks: Blocks) -> None:
    """Refuse networks whose features cannot be matched.

    Raises:
      InputError: not a ViT or a Swin, no such block, or features of different shapes.
    """
    networks = (("student", forward, config), ("teacher", teacher.forward, teacher.config))
    shapes = []
    for name, apply, found in networks:
        if apply is not backbone.apply or not isinstance(found, backbone.TransformerConfig):
            raise InputError(
                f"feature_distill: the {name} is a {type(found).__name__}, expected a ViT or a "
                "Swin: other networks have no features to match"
            )
        if blocks is None:
            shapes.append((found.pooled_dim,))
            continue
        count = len(found.blocks)
        for i in blocks:
            if not -count <= i < count:
                raise InputError(
                    f"feature_blocks: {i} is no block of the {name}, expected -{count} to "
                    f"{count - 1}"
                )
        specs = [found.block_spec(i) for i in sorted({i % count for i in blocks})]
        shapes.append(tuple((spec.tokens, spec.embed_dim) for spec in specs))
    if shapes[0] != shapes[1]:
        raise InputError(
            f"feature_distill: features of the student have shapes {shapes[0]}, of the teacher "
            f"{shapes[1]}, expected the same"
        )

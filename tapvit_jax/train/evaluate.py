"""Exact evaluation: every example counts once, whatever the batch size."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import Params

Forward = Callable[[Any, Params, Float[Array, "b s s ch"]], Float[Array, "b c"]]
"""Logits from (config, params, images)."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Result of an evaluation.

    Attributes:
      top1: share of examples whose highest logit is their class.
      loss: mean cross-entropy.
      count: examples evaluated.
    """

    top1: float
    loss: float
    count: int


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_sums(forward: Forward, config: Any, params: Params, batch: Mapping) -> Float[Array, "4"]:
    logits = forward(config, params, batch["image"]).astype(jnp.float32)
    labels, mask = batch["label"], batch["mask"]
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    correct = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
    foreign = labels >= logits.shape[-1]
    return jnp.stack([(values * mask).sum() for values in (correct, loss, jnp.ones(()), foreign)])


def evaluate(
    config: Any,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    forward: Forward = backbone.apply,
) -> Metrics:
    """Top-1 and cross-entropy over batches with keys "image", "label" and "mask".

    Sums stay on the device until the end.

    Raises:
      InputError: no examples, or an example without a label or with one that the network does not
        have.
    """
    total = None
    for batch in batches:
        labels = np.asarray(batch["label"])
        if (labels[np.asarray(batch["mask"]) > 0] < 0).any():
            raise InputError("evaluation needs labels, found images without one")
        batch = {name: batch[name] for name in ("image", "label", "mask")}
        found = _batch_sums(forward, config, params, batch)
        total = found if total is None else total + found
    correct, loss, count, foreign = (0.0,) * 4 if total is None else map(float, total)
    if count == 0:
        raise InputError("evaluation needs at least one example")
    if foreign:
        raise InputError(
            f"{round(foreign)} of {round(count)} labels are beyond the network's classes"
        )
    return Metrics(top1=correct / count, loss=loss / count, count=round(count))

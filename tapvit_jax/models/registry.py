"""A model as users hold it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.backbone import Config
from tapvit_jax.models.params import Params
from tapvit_jax.structs import from_plain


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network with its parameters and all that is needed to use it.

    Attributes:
      config: every shape and width.
      params: plain nested dict of arrays.
      preprocess: how an image file becomes an input, or None when nobody said.
      class_names: names of the classes, or empty.
      name: what the user calls it.
      architecture: timm's name of what it was made as, for the way back (`export_timm`), or None.
      prior: whether its logits have a device's classes in them (see `prune.recover`), which count
        once.
      history: how it came about (source file and hash, plan, budget, training), for the record:
        nothing is decided by it.
    """

    config: Config
    params: Params
    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] = ()
    name: str = "vit"
    architecture: str | None = None
    prior: bool = False
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b c"]:
        """Logits, before any softmax, of preprocessed images."""
        return jitted_apply(self.config, self.params, images)

    def replace(self, **changes: Any) -> "Model":
        """The same model with some fields changed."""
        return dataclasses.replace(self, **changes)


def new_classifier(model: Model, class_names: Sequence[str]) -> Model:
    """The same model with a classifier of zeros for other classes, to be trained on them.

    Raises:
      InputError: no classes, or names that are no texts.

    Source: see `backbone.new_classifier`.
    """
    # A text alone would be a list of its letters.
    given = class_names if isinstance(class_names, str) else list(class_names)
    names = from_plain(tuple[str, ...], given, "class_names")
    config, params = backbone.new_classifier(model.config, model.params, len(names))
    return model.replace(config=config, params=params, class_names=names, prior=False)


def preprocess_of(model: Model) -> Preprocess:
    """How a model's images are prepared.

    Raises:
      InputError: it does not say.
    """
    if model.preprocess is None:
        raise InputError(f"{model.name}: does not say how its images are prepared")
    return model.preprocess


jitted_apply = functools.partial(jax.jit, static_argnums=0)(backbone.apply)

"""A small convolutional network: the feature extractor that devices run on their images."""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.layers import check_prepared, check_sizes
from tapvit_jax.models.params import Params
from tapvit_jax.structs import check_fields


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """Widths of the extractor.

    Attributes:
      widths: channels of each stage; every stage after the first halves the resolution.
      embed_dim: dimension of the embedding that is used as features.
      stem_stride: stride of the first convolution; 1 for very small images.
    """

    image_size: int
    num_classes: int
    in_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128)
    embed_dim: int = 64
    stem_stride: Literal[1, 2, 4] = 1

    def __post_init__(self):
        check_fields(self)
        check_sizes(self, ("image_size", "num_classes", "in_channels", "embed_dim"))
        if not self.widths or min(self.widths) < 1:
            raise InputError(f"widths is {self.widths}, expected one width or more, all positive")


class ConvNet(nn.Module):
    """Stages of two convolutions, global mean, embedding, classifier."""

    config: ConvNetConfig

    def setup(self):
        config = self.config
        convs, norms = [], []
        for i, width in enumerate(config.widths):
            stride = config.stem_stride if i == 0 else 2
            for step in (stride, 1):
                convs.append(nn.Conv(width, (3, 3), (step, step), use_bias=False))
                # Normalising each image alone keeps training and use identical.
                norms.append(nn.LayerNorm())
        self.convs, self.norms = convs, norms
        self.embed = nn.Dense(config.embed_dim)
        self.head = nn.Dense(config.num_classes)

    def embedding(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b e"]:
        """The embedding in front of the classifier."""
        check_prepared(images)
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.relu(norm(conv(x)))
        return self.embed(x.mean(axis=(1, 2)))

    def __call__(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b c"]:
        return self.head(nn.relu(self.embedding(images)))


def init(config: ConvNetConfig, key: Array) -> Params:
    """Draw fresh parameters."""
    images = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    return ConvNet(config).init(key, images)["params"]


def apply(
    config: ConvNetConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b c"]:
    """Logits, for training the extractor."""
    return ConvNet(config).apply({"params": params}, images)


def embedding(
    config: ConvNetConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b e"]:
    """The embedding in front of the classifier."""
    return ConvNet(config).apply({"params": params}, images, method="embedding")


def activation_peak(config: ConvNetConfig) -> int:
    """Most numbers that are live at once for one image: a convolution's input, output and norm."""
    side, inputs, found = config.image_size, config.in_channels, []
    for i, width in enumerate(config.widths):
        before, side = side, -(-side // (config.stem_stride if i == 0 else 2))
        found += [inputs * before**2 + 2 * width * side**2, 3 * width * side**2]
        inputs = width
    return max(found)


@functools.lru_cache(maxsize=16)
def param_shapes(config: ConvNetConfig) -> Params:
    """Shapes and dtypes of the parameter tree. Treat the result as frozen."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))

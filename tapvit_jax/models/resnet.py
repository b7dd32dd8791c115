"""ResNets as timm builds them: pretrained feature extractors, for inference only.

Letters: b batch, s image side, h and w rows and columns of a feature map, ch channels, e embedding,
c classes.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tapvit_jax.errors import InputError
from tapvit_jax.models.layers import (
    Dtype,
    check_depths,
    check_eps,
    check_prepared,
    check_sizes,
)
from tapvit_jax.models.params import Params
from tapvit_jax.structs import check_fields


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """Shape of one convolution of odd size, padded by size // 2 on every side, without bias.

    A batch norm follows each.
    """

    size: int
    stride: int
    inputs: int
    outputs: int

    def output_side(self, side: int) -> int:
        """Side of the output; the padding makes up for the kernel, so only the stride counts."""
        return -(-side // self.stride)


@dataclasses.dataclass(frozen=True)
class ResidualSpec:
    """Shapes of one residual block; `downsample` is the shortcut's projection where it has one."""

    convs: tuple[ConvSpec, ...]
    downsample: ConvSpec | None


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Everything that fixes a ResNet's shapes and arithmetic.

    Attributes:
      bottleneck: whether blocks are 1x1, 3x3, 1x1 convolutions with four times the width at their
        ends (ResNet-50 and deeper) instead of two 3x3 ones.
      depths: blocks of each stage; every stage after the first halves the resolution and doubles
        the width.
      width: channels of the stem and of the first stage's 3x3 convolutions.
      dtype: what the convolutions and the residual stream are computed in; parameters, batch norm
        and the classifier stay in float32.
    """

    image_size: int
    num_classes: int
    bottleneck: bool
    depths: tuple[int, ...]
    in_channels: int = 3
    width: int = 64
    batch_norm_eps: float = 1e-5
    dtype: Dtype = "float32"

    def __post_init__(self):
        check_fields(self)
        check_sizes(self, ("image_size", "num_classes", "in_channels", "width"))
        if not self.depths or min(self.depths) < 1:
            raise InputError(f"depths is {self.depths}, expected stages of one block or more")
        check_depths(self.depths)
        check_eps("batch_norm_eps", self.batch_norm_eps)

    @property
    def embed_dim(self) -> int:
        """Channels that the last stage hands to the classifier."""
        return self.width * 2 ** (len(self.depths) - 1) * (4 if self.bottleneck else 1)

    @property
    def pooled_dim(self) -> int:
        """Width of what the classifier sees."""
        return self.embed_dim

    @property
    def stem(self) -> ConvSpec:
        """The first convolution; a max-pooling by 2 follows it."""
        return ConvSpec(7, 2, self.in_channels, self.width)

    @property
    def stages(self) -> tuple[tuple[ResidualSpec, ...], ...]:
        """Shapes of the residual blocks, stage by stage."""
        stages, inputs = [], self.width
        for stage, depth in enumerate(self.depths):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_residual(inputs, self.width * 2**stage, stride, self.bottleneck))
                inputs = blocks[-1].convs[-1].outputs
            stages.append(tuple(blocks))
        return tuple(stages)


def _residual(inputs: int, width: int, stride: int, bottleneck: bool) -> ResidualSpec:
    outputs = 4 * width if bottleneck else width
    if bottleneck:
        convs = (
            ConvSpec(1, 1, inputs, width),
            ConvSpec(3, stride, width, width),
            ConvSpec(1, 1, width, outputs),
        )
    else:
        convs = (ConvSpec(3, stride, inputs, width), ConvSpec(3, 1, width, outputs))
    same = stride == 1 and inputs == outputs
    return ResidualSpec(convs, None if same else ConvSpec(1, stride, inputs, outputs))


def _conv(spec: ConvSpec, dtype: Dtype, name: str | None = None) -> nn.Conv:
    # "SAME" would pad strided convolutions of even maps on one side only.
    pad = spec.size // 2
    return nn.Conv(
        spec.outputs,
        (spec.size, spec.size),
        (spec.stride, spec.stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch norm with fixed statistics: one factor and one shift a channel, in float32.

    The statistics are parameters like the others, since nothing here ever updates them.
    """

    eps: float
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w ch"]) -> Float[Array, "b h w ch"]:
        shape, zeros = (x.shape[-1],), nn.initializers.zeros_init()
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", zeros, shape)
        mean = self.param("mean", zeros, shape)
        var = self.param("var", nn.initializers.ones_init(), shape)
        factor = scale / jnp.sqrt(var + self.eps)
        return (x * factor + (bias - mean * factor)).astype(x.dtype)


class Residual(nn.Module):
    """Convolutions with their norms, added to the shortcut."""

    spec: ResidualSpec
    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w ch"]) -> Float[Array, "b h2 w2 ch2"]:
        out, last = x, len(self.spec.convs)
        for i, conv in enumerate(self.spec.convs, start=1):
            # Fixed statistics do not normalise what fresh weights make: without zeros in the last
            # scale, the residual stream would grow with every block.
            init = nn.initializers.zeros_init() if i == last else nn.initializers.ones_init()
            out = _conv(conv, self.dtype, f"conv{i}")(out)
            out = BatchNorm(self.eps, init, name=f"bn{i}")(out)
            out = nn.relu(out) if i < last else out
        if self.spec.downsample is not None:
            x = _conv(self.spec.downsample, self.dtype, "downsample_conv")(x)
            x = BatchNorm(self.eps, name="downsample_bn")(x)
        return nn.relu(out + x)


class ResNet(nn.Module):
    """Stem, residual stages, global mean, classifier."""

    config: ResNetConfig

    def setup(self):
        config = self.config
        self.conv1 = _conv(config.stem, config.dtype)
        self.bn1 = BatchNorm(config.batch_norm_eps)
        for stage, specs in enumerate(config.stages, start=1):
            blocks = [Residual(spec, config.batch_norm_eps, config.dtype) for spec in specs]
            setattr(self, f"layer{stage}", blocks)
        self.fc = nn.Dense(config.num_classes)

    def pooled(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b e"]:
        """The mean over the last feature map, in float32."""
        check_prepared(images)
        x = nn.relu(self.bn1(self.conv1(images)))
        # Nothing is below zero here, so that zeros pad as well as -inf does.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
        for stage in range(1, len(self.config.depths) + 1):
            for block in getattr(self, f"layer{stage}"):
                x = block(x)
        return x.astype(jnp.float32).mean(axis=(1, 2))

    def __call__(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b c"]:
        return self.fc(self.pooled(images))


def init(config: ResNetConfig, key: Array) -> Params:
    """Draw fresh parameters (He)."""
    # They are the same for images of any size, and this one is quick.
    return ResNet(config).init(key, jnp.zeros((1, 1, 1, config.in_channels)))["params"]


def apply(
    config: ResNetConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b c"]:
    """Logits of a batch of images."""
    return ResNet(config).apply({"params": params}, images)


def pooled(
    config: ResNetConfig, params: Params, images: Float[Array, "b s s ch"]
) -> Float[Array, "b e"]:
    """What the classifier sees: the features of a pretrained network."""
    return ResNet(config).apply({"params": params}, images, method="pooled")


def _convs(config: ResNetConfig) -> list[tuple[ConvSpec, int]]:
    """Every convolution with the side of its output."""
    side = config.stem.output_side(config.image_size)
    found = [(config.stem, side)]
    side = -(-side // 2)
    for block in (block for stage in config.stages for block in stage):
        before = side
        for conv in block.convs:
            side = conv.output_side(side)
            found.append((conv, side))
        if block.downsample is not None:
            found.append((block.downsample, block.downsample.output_side(before)))
    return found


def activation_peak(config: ResNetConfig) -> int:
    """Most numbers that are live at once for one image: a convolution's input, output and shortcut.

    The shortcut is as large as the output at most.
    """
    return max(
        conv.inputs * (side * conv.stride) ** 2 + 2 * conv.outputs * side**2
        for conv, side in _convs(config)
    )


def cost(config: ResNetConfig) -> tuple[int, int]:
    """Count parameters and multiply-accumulates of one image, as published counts do.

    Batch norms count with scale and bias but without their statistics. MACs are those of the
    convolutions, padding included, and of the classifier.
    """
    found = _convs(config)
    weights = [conv.size**2 * conv.inputs * conv.outputs for conv, _ in found]
    macs = sum(n * side**2 for n, (_, side) in zip(weights, found, strict=True))
    params = sum(weights) + sum(2 * conv.outputs for conv, _ in found)
    head = config.embed_dim * config.num_classes
    return params + head + config.num_classes, macs + head

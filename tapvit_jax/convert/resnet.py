"""timm's names for a ResNet's tensors, as one table of rules for both ways."""

import numpy as np

from tapvit_jax.convert.rules import Rule, conv, dense, norm, same
from tapvit_jax.models.params import Path
from tapvit_jax.models.resnet import ConvSpec, ResNetConfig

COUNTER = ".num_batches_tracked"

# Counters of training steps, which inference has no use for.
IGNORED_SUFFIXES = (COUNTER,)


def _conv_norm(
    spec: ConvSpec, timm: tuple[str, str], path: Path, names: tuple[str, str]
) -> list[Rule]:
    """A convolution and the batch norm behind it."""
    kernel = conv(timm[0], (*path, names[0]), spec.size, spec.size, spec.inputs, spec.outputs)
    statistics = {"running_mean": "mean", "running_var": "var"}
    return [
        kernel,
        *norm(timm[1], (*path, names[1]), spec.outputs),
        *(
            same(f"{timm[1]}.{theirs}", (*path, names[1], ours), (spec.outputs,))
            for theirs, ours in statistics.items()
        ),
    ]


def rules(config: ResNetConfig) -> list[Rule]:
    """All tensors of a ResNet that hold parameters of ours."""
    found = _conv_norm(config.stem, ("conv1", "bn1"), (), ("conv1", "bn1"))
    for stage, blocks in enumerate(config.stages, start=1):
        for i, block in enumerate(blocks):
            timm, path = f"layer{stage}.{i}", (f"layer{stage}_{i}",)
            for j, spec in enumerate(block.convs, start=1):
                names = (f"conv{j}", f"bn{j}")
                found += _conv_norm(spec, tuple(f"{timm}.{n}" for n in names), path, names)
            if block.downsample is not None:
                theirs = (f"{timm}.downsample.0", f"{timm}.downsample.1")
                ours = ("downsample_conv", "downsample_bn")
                found += _conv_norm(block.downsample, theirs, path, ours)
    return found + dense("fc", ("fc",), config.embed_dim, config.num_classes)


def extra(config: ResNetConfig) -> dict[str, np.ndarray]:
    """Tensors of timm's that ours do not hold: every batch norm's counter, at zero."""
    variance = ".running_var"
    return {
        rule.timm.removesuffix(variance) + COUNTER: np.zeros((), np.int64)
        for rule in rules(config)
        if rule.timm.endswith(variance)
    }

"""What timm computes for ResNets and for resampled weights, kept for tests that run without torch.

Needs timm 1.0.31 and torch; run from the repository's root:

    python -m tests.peers.make_fixtures_resnet

writes tests/data/timm_resnet.npz, timm_resample.npz and timm_resnet.json (provenance). Inputs are
not stored: `draw` makes them from their names, here and in the tests.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np

from experiments.peers import import_timm
from tapvit_jax.models.resnet import ResNetConfig

DATA = Path(__file__).parents[1] / "data"

# Odd and even maps, stages with and without a projection in front.
CONFIGS = {
    "basic": ResNetConfig(
        image_size=40, num_classes=7, bottleneck=False, depths=(1, 2, 1, 1), width=8
    ),
    "bottleneck": ResNetConfig(
        image_size=37, num_classes=5, in_channels=2, bottleneck=True, depths=(2, 1, 1, 1), width=4
    ),
}
BATCH = 3

# (old grid, new grid, prefix tokens), (old patch, new patch), (old window, new window).
POSITIONS = ((4, 7, 1), (7, 4, 2), (5, 6, 0), (6, 5, 1), (3, 8, 1), (14, 5, 1))
PATCHES = ((4, 6), (8, 5), (16, 14), (14, 16), (4, 9), (9, 2))
WINDOWS = ((3, 5), (7, 12), (12, 7), (7, 8), (2, 7), (8, 2))
DIM = 3


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers uniform in [-1, 1), fixed by the name; bit streams outlive NumPy's versions."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    numbers = np.asarray(bits >> np.uint64(11), np.float64) * 2.0**-52 - 1
    return numbers.reshape(shape).astype(np.float32)


def timm_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a timm ResNet, as large as trained ones are, statistics far from 0 and 1."""
    if name.endswith("num_batches_tracked"):
        return np.full((), 123, np.int64)
    noise = draw(name, shape)
    if len(shape) == 4:
        return noise * np.float32(math.sqrt(6 / math.prod(shape[1:])))
    if len(shape) == 2:
        return noise * np.float32(math.sqrt(3 / shape[1]))
    if name.endswith("running_var"):
        return np.exp2(noise)
    if name.endswith("weight"):
        return np.float32(0.8) + noise / 2
    return noise / 2


def images(name: str) -> np.ndarray:
    """Inputs of one of the configs (NHWC)."""
    config = CONFIGS[name]
    return draw(f"{name} images", (BATCH, *(config.image_size,) * 2, config.in_channels))


def resample_cases() -> list[tuple[str, np.ndarray, tuple[int, ...]]]:
    """Key in the file, input, and arguments of each resampling."""
    cases = []
    for old, new, prefix in POSITIONS:
        key = f"pos_{old}_{new}_{prefix}"
        cases.append((key, draw(key, (1, old**2 + prefix, DIM)), (new, prefix)))
    for old, new in PATCHES:
        key = f"patch_{old}_{new}"
        cases.append((key, draw(key, (2, 1, old, old)), (new,)))
    for old, new in WINDOWS:
        key = f"window_{old}_{new}"
        cases.append((key, draw(key, ((2 * old - 1) ** 2, 2)), (new,)))
    return cases


def timm_resnet(torch, config: ResNetConfig):
    """The config as a timm model in evaluation mode, its tensors drawn by name."""
    from timm.models import resnet

    block = resnet.Bottleneck if config.bottleneck else resnet.BasicBlock
    channels = tuple(config.width * 2**i for i in range(4))
    model = resnet.ResNet(
        block,
        config.depths,
        num_classes=config.num_classes,
        in_chans=config.in_channels,
        channels=channels,
    )
    # timm's plain stem is 64 wide whatever the stages are.
    if config.width != 64:
        model.conv1 = torch.nn.Conv2d(config.in_channels, config.width, 7, 2, 3, bias=False)
        model.bn1 = torch.nn.BatchNorm2d(config.width)
        stages, _ = resnet.make_blocks((block,) * 4, channels, config.depths, config.width)
        for name, stage in stages:
            setattr(model, name, stage)
    return fill(torch, model)


def fill(torch, model):
    """Draw all tensors of a timm ResNet by name."""
    state = {
        name: torch.from_numpy(timm_tensor(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def resnet_arrays(torch) -> dict[str, np.ndarray]:
    """Names and shapes of timm's tensors, logits and pooled features."""
    arrays = {}
    for name, config in CONFIGS.items():
        model = timm_resnet(torch, config)
        batch = torch.from_numpy(images(name).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            features = model.forward_features(batch)
            arrays[f"{name}_logits"] = model.forward_head(features).numpy()
            arrays[f"{name}_pooled"] = model.forward_head(features, pre_logits=True).numpy()
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        arrays[f"{name}_shapes"] = np.array(json.dumps(shapes))
    return arrays


def resample_arrays(torch) -> dict[str, np.ndarray]:
    """timm's answer to every case."""
    from timm.layers import (
        resample_abs_pos_embed,
        resample_patch_embed,
        resize_rel_pos_bias_table,
    )

    arrays = {}
    for key, array, (new, *rest) in resample_cases():
        tensor, kind = torch.from_numpy(array), key.partition("_")[0]
        if kind == "pos":
            found = resample_abs_pos_embed(tensor, [new, new], num_prefix_tokens=rest[0])
        elif kind == "patch":
            found = resample_patch_embed(tensor, [new, new])
        else:
            shape = ((2 * new - 1) ** 2, array.shape[1])
            found = resize_rel_pos_bias_table(tensor, (new, new), shape)
        arrays[key] = found.numpy()
    return arrays


def main():
    torch, timm = import_timm()
    torch.manual_seed(0)
    files = {
        "timm_resnet.npz": resnet_arrays(torch),
        "timm_resample.npz": resample_arrays(torch),
    }
    hashes = {}
    for name, arrays in files.items():
        np.savez_compressed(DATA / name, **arrays)
        hashes[name] = hashlib.sha256((DATA / name).read_bytes()).hexdigest()
    provenance = {
        "made_by": "python -m tests.peers.make_fixtures_resnet",
        "what": "outputs of timm in float32 on CPU; inputs and weights are drawn by name",
        "timm": timm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "sha256": hashes,
    }
    (DATA / "timm_resnet.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()

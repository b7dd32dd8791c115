"""What timm computes for ViTs and Swins, kept for tests that run without torch.

Needs timm 1.0.31 and torch (requirements-peers.txt); run from the repository's root:

    python -m tests.peers.make_fixtures

writes tests/data/timm_transformers.npz, timm_presets.json and timm_transformers.json (provenance).
Inputs and weights are not stored: they are drawn from their names, here and in the tests.
"""

import hashlib
import json
import math

import numpy as np

from tapvit_jax.models.presets import PRESETS, list_models
from tests.peers.make_fixtures_resnet import DATA, draw, import_timm

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}

# Preset and timm's arguments. Windows of 4 on grids of 16 and 8 shift in both stages; of 8, the
# second stage is one window.
CASES = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "deit3": ("deit3_small_patch16_224", TINY),
    "mae": ("vit_base_patch16_224", TINY | {"global_pool": "avg"}),
    "swin4": ("swin_tiny_patch4_window7_224", TINY_SWIN | {"window_size": 4}),
    "swin8": ("swin_tiny_patch4_window7_224", TINY_SWIN | {"window_size": 8}),
}
# timm has arguments for these pruned shapes (see convert.timm.timm_model).
PRUNED = {
    "vit": {"mlp_ratio": 1.3125},
    "swin4": {"num_heads": (1, 3), "head_dim": (3, 2), "mlp_ratio": (0.875, 2.5)},
}
GRADIENTS = ("vit", "swin4")
NUM_CLASSES = 5
BATCH = 3


def timm_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a timm transformer, as large as trained ones are: attention and logits vary."""
    noise = draw(name, shape)
    if name.endswith("weight") and len(shape) > 1:
        return noise * np.float32(2.5 / math.sqrt(math.prod(shape[1:])))
    if name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
        return np.float32(0.9) + noise / 4
    return noise if "pos" in name or "token" in name else noise / 4


def images(side: int, count: int = BATCH) -> np.ndarray:
    """Inputs (NHWC)."""
    return 1.7 * draw(f"images {side}", (count, side, side, 3))


def labels(count: int = BATCH) -> np.ndarray:
    """Classes for the loss whose gradients are compared."""
    return np.arange(count) % NUM_CLASSES


def timm_model(timm, torch, name: str, **arguments):
    """A timm model in evaluation mode, its tensors drawn by name."""
    model = timm.create_model(name, **arguments)
    state = {
        key: torch.from_numpy(timm_tensor(key, tuple(tensor.shape)))
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def logits_of(torch, model, batch: np.ndarray):
    """Logits of NHWC images."""
    return model(torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))))


def gradients_of(torch, model, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the mean cross-entropy with `labels`."""
    target = torch.from_numpy(labels(len(batch)))
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits_of(torch, model, batch), target).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def transformer_arrays(torch, timm) -> dict[str, np.ndarray]:
    """Names and shapes of timm's tensors, logits, and gradients of some cases."""
    arrays = {}
    for case, (name, arguments) in CASES.items():
        batch = images(arguments["img_size"])
        model = timm_model(timm, torch, name, num_classes=NUM_CLASSES, **arguments)
        arrays[f"{case}/logits"] = logits_of(torch, model, batch).detach().numpy()
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        arrays[f"{case}/shapes"] = np.array(json.dumps(shapes))
        if case in GRADIENTS:
            for key, gradient in gradients_of(torch, model, batch).items():
                arrays[f"{case}/gradient/{key}"] = gradient
        if case in PRUNED:
            pruned = arguments | PRUNED[case]
            model = timm_model(timm, torch, name, num_classes=NUM_CLASSES, **pruned)
            arrays[f"{case}/pruned_logits"] = logits_of(torch, model, batch).detach().numpy()
            shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
            arrays[f"{case}/pruned_shapes"] = np.array(json.dumps(shapes))
    return arrays


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """SHA-256 over names and shapes of a state dict."""
    lines = [f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def preset_records(torch, timm) -> dict[str, dict]:
    """What timm builds for every preset of ours, and how it prepares images for it."""
    records = {}
    for name in list_models():
        # timm's own defaults may have no classes.
        classes = PRESETS[name].arguments["num_classes"]
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=classes)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        prepared = timm.get_pretrained_cfg(name)
        records[name] = {
            "digest": digest(shapes),
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "image_size": prepared.input_size[-1],
            "crop_pct": prepared.crop_pct,
            "interpolation": prepared.interpolation,
            "mean": prepared.mean,
            "std": prepared.std,
        }
    return records


def main():
    torch, timm = import_timm()
    np.savez_compressed(DATA / "timm_transformers.npz", **transformer_arrays(torch, timm))
    records = preset_records(torch, timm)
    (DATA / "timm_presets.json").write_text(json.dumps(records, indent=1) + "\n")
    names = ("timm_transformers.npz", "timm_presets.json")
    provenance = {
        "made_by": "python -m tests.peers.make_fixtures",
        "what": "outputs of timm in float32 on CPU; inputs and weights are drawn by name",
        "timm": timm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "sha256": {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in names},
    }
    (DATA / "timm_transformers.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()

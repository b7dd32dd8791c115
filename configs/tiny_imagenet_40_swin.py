"""Forty classes of Tiny-ImageNet and a small Swin, trained here; four devices of ten classes.

    python -m experiments.run --config=configs/tiny_imagenet_40_swin.py:DATA --workdir=runs/swin40

DATA is a folder in Tiny-ImageNet's own layout. The Swin is trained from scratch on the public part
of the train split, about half an hour on two cores; all else is as in tiny_imagenet_40.py.
"""

from configs import tiny_imagenet_40
from experiments.config import complete


def get_config(data="tiny-imagenet-40"):
    """The devices, metric sets and budgets of tiny_imagenet_40.py, with a Swin as dense model."""
    values = tiny_imagenet_40.get_config(f"{data},").to_dict()
    values["name"] = "tiny-imagenet-40-swin"
    values["dense"] = {
        "model": "swin_tiny_patch4_window7_224",
        "arguments": {
            "patch_size": 8,
            "embed_dim": 96,
            "depths": (2, 4),
            "num_heads": (3, 6),
            "window_size": 4,
        },
        "train": {
            "epochs": 30,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "warmup_epochs": 2.0,
            "weight_decay": 0.05,
            "label_smoothing": 0.1,
            "shift": 6,
            "flip": True,
            "checkpoint_epochs": 1,
        },
    }
    return complete(values)


def sweep(config):
    """Every device at five budgets, units ranked by the published criterion and the mended one."""
    return tiny_imagenet_40.sweep(config)

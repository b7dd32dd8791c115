"""Forty classes of Tiny-ImageNet and a trained ViT in timm's format; four devices of ten classes.

    python -m experiments.run --config=configs/tiny_imagenet_40.py:DATA,WEIGHTS --workdir=runs/tin40

DATA is a folder in Tiny-ImageNet's own layout, WEIGHTS a .safetensors file. The dense model was
trained on the train split, so that private images come from the val split alone.
"""

from experiments.config import complete, grid


def get_config(arg="tiny-imagenet-40,vit_tin40.safetensors"):
    """Four devices, ten classes each, half the MACs and less."""
    data, _, weights = arg.partition(",")
    return complete(
        {
            "name": "tiny-imagenet-40",
            "seed": 0,
            "data": {
                "source": data,
                "preprocess": {
                    "image_size": 64,
                    "mean": (0.485, 0.456, 0.406),
                    "std": (0.229, 0.224, 0.225),
                },
                "partition": {
                    "kind": "disjoint",
                    "num_devices": 4,
                    "validation_fraction": 0.1,
                    "private_test_fraction": 0.5,
                    "private_split": "val",
                },
            },
            "dense": {
                "model": "vit_tiny_patch16_224",
                "arguments": {"patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 4},
                "weights": weights,
            },
            "extractor": {"kind": "pooled", "dim": 32},
            # Tied covariances tell classes apart much better than diagonal ones, and give more
            # of the private images away (docs/results.md has both).
            "gmm": {"components": tuple(range(1, 11)), "covariance_type": "tied"},
            # A probe costs a third of a forward pass: 128 images settle which layers matter.
            "prune": {"layers": {"max_batches": 2}},
            "compensate": {"prior": "mixture"},
            "select": {"method": "top", "metric_count": 640, "finetune_count": 1600},
            "budgets": ("macs=0.5", "macs=0.35", "macs=0.5,params=0.45", "macs=0.25"),
            "recover": {
                "epochs": 10,
                "batch_size": 64,
                "learning_rate": 3e-4,
                "distill": 0.5,
                "shift": 4,
                "flip": True,
                "cutmix": 1.0,
            },
        }
    )


def sweep(config):
    """Every device at five budgets, units ranked by the published criterion and the mended one."""
    return grid(
        {
            "device": range(config.data.partition.num_devices),
            "criterion": ("tap", "tap_published"),
            "budget": tuple(f"macs={share}" for share in (0.8, 0.65, 0.5, 0.35, 0.25)),
        }
    )

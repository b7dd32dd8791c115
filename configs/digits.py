"""The embedded job: scikit-learn digits, a small ViT, four devices. Minutes on two cores.

python -m experiments.run --config=configs/digits.py --workdir=runs/digits
"""

from experiments.config import complete, grid


def get_config():
    """Four devices of four digits each (neighbours share some), four budgets."""
    return complete(
        {
            "name": "digits",
            "seed": 0,
            "data": {
                "source": "digits",
                "preprocess": {
                    "image_size": 8,
                    "channels": 1,
                    "mean": (0.3053,),
                    "std": (0.3761,),
                    "interpolation": "bilinear",
                },
                "partition": {
                    "kind": "overlap",
                    "num_devices": 4,
                    "classes_per_device": 4,
                    "public_fraction": 0.45,
                    "validation_fraction": 0.15,
                    "private_test_fraction": 0.6,
                },
            },
            "dense": {
                "model": "vit_tiny_patch16_224",
                "arguments": {"patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4},
                "train": {
                    "epochs": 40,
                    "batch_size": 32,
                    "learning_rate": 1e-3,
                    "warmup_epochs": 3.0,
                    "weight_decay": 0.05,
                    "label_smoothing": 0.1,
                    "shift": 1,
                    "checkpoint_epochs": 20,
                },
            },
            "extractor": {"kind": "embedding", "dim": 16, "widths": (16, 32), "embed_dim": 32},
            "extractor_train": {
                "epochs": 20,
                "batch_size": 32,
                "learning_rate": 3e-3,
                "shift": 1,
                "checkpoint_epochs": 20,
            },
            "gmm": {"components": tuple(range(1, 9)), "min_members": 4},
            "select": {"method": "importance", "metric_count": 128, "finetune_count": 384},
            "prune": {"batch_size": 64},
            "compensate": {"prior": "mixture"},
            "budgets": ("macs=0.5", "macs=0.4", "macs=0.5,params=0.45", "macs=0.35"),
            "recover": {
                "epochs": 10,
                "batch_size": 32,
                "learning_rate": 1e-3,
                "distill": 0.5,
                "shift": 1,
                "checkpoint_epochs": 5,
            },
            "recover_on": "masked",
            "latency_batch": 64,
        }
    )


def sweep(config):
    """Every device at four budgets, three criteria, with and without fine-tuning."""
    return grid(
        {
            "seed": (config.seed,),
            "device": range(config.data.partition.num_devices),
            "criterion": ("tap", "tap_published", "taylor"),
            "budget": ("macs=0.7", "macs=0.5", "macs=0.35", "macs=0.25"),
            "recovery": ("none", "finetune"),
        }
    )

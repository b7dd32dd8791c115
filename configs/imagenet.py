"""ImageNet-1k: ten devices of 100 classes, five budgets.

    python -m experiments.sweep --config=configs/imagenet.py:MODEL,DATA,WEIGHTS --workdir=DIR

MODEL is deit_tiny, deit_small, deit_base, swin_tiny or swin_small. DATA is
tfds:imagenet2012, prepared as ArrayRecord, or a folder with train/ and val/. WEIGHTS is a
checkpoint under timm's names; --config.dense.new_classifier=True fine-tunes one of other classes,
such as ImageNet-22k's, on the public pool, on which the dense model is trained from scratch
without. A fourth part, as_published, takes the authors' recipe, leaks in the splits included.
"""

from experiments import protocol
from experiments.protocol import sweep as sweep


def get_config(arg="deit_small"):
    """The published devices, budgets and image counts (640, 6,400); methods are ours."""
    return protocol.config(protocol.DataSet("imagenet", "tfds:imagenet2012", crop_pct=0.9), arg)

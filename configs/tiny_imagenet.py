"""Tiny-ImageNet, enlarged to 224: ten devices of 20 classes, five budgets.

    python -m experiments.sweep --config=configs/tiny_imagenet.py:MODEL,DATA,WEIGHTS --workdir=DIR

MODEL is deit_tiny, deit_small, deit_base, swin_tiny or swin_small. DATA is a folder in Tiny-
ImageNet's own layout. WEIGHTS is a checkpoint under timm's names, fine-tuned on these classes;
--config.dense.new_classifier=True fine-tunes any other, such as ImageNet's, on the public pool, on
which the dense model is trained from scratch without. A fourth part, as_published, takes the
authors' recipe, leaks in the splits included.
"""

from experiments import protocol
from experiments.protocol import sweep as sweep


def get_config(arg="deit_small"):
    """The published devices, budgets and image counts (640, 6,400); methods are ours."""
    return protocol.config(protocol.DataSet("tiny-imagenet", "tiny-imagenet-200"), arg)

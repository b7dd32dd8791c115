"""Where images come from: digits, image folders, Tiny-ImageNet, CIFAR, TFDS, arrays in memory."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from tapvit_jax.data.base import UNLABELLED, ImageSource, align_classes, check_indices
from tapvit_jax.data.cifar import CifarSource, is_cifar
from tapvit_jax.data.folders import FolderSource, TinyImageNetSource
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.data.tfds import TfdsSource
from tapvit_jax.errors import InputError


class MemorySource(ImageSource):
    """Images that were prepared before and lie in memory.

    Raises:
      InputError: arrays that do not fit each other, values that are not finite, or a label that is
        not among `class_names`.
    """

    in_memory = True

    def __init__(
        self,
        images: Float[np.ndarray, "n s s c"],
        labels: Int[np.ndarray, "n"],
        class_names: Sequence[str] = (),
        name: str = "memory",
    ):
        self.name = name
        self.images = np.asarray(images, np.float32)
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)
        self.splits = np.full(len(self.labels), "train")
        if len(self.images) != len(self.labels):
            raise InputError(f"{len(self.images)} images but {len(self.labels)} labels")
        if self.images.ndim != 4:
            raise InputError(f"{name}: images of shape {self.images.shape}, expected 4 dimensions")
        if not np.isfinite(self.images).all():
            raise InputError(f"{name}: images hold NaN or infinity, expected finite values")
        known = len(self.class_names)
        wrong = self.labels[(self.labels < UNLABELLED) | (self.labels >= known)]
        if wrong.size:
            raise InputError(
                f"{name}: label {wrong[0]} is out of range, expected one of {known} classes or -1"
            )

    def describe(self, index: int) -> str:
        """Position in the arrays."""
        return f"{self.name}[{index}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """One row; the preprocessing must be the one that the images went through."""
        return self.load(np.array([index]), preprocess)[0]

    def load(
        self, indices: Int[np.ndarray, "b"], preprocess: Preprocess
    ) -> Float[np.ndarray, "b s s c"]:
        """Rows; the preprocessing must be the one that the images went through.

        Raises:
          InputError: the preprocessing gives another shape, or an index is out of range.
        """
        indices = check_indices(indices, self)
        expected = (preprocess.image_size, preprocess.image_size, preprocess.channels)
        if self.images.shape[1:] != expected:
            raise InputError(
                f"{self.name}: prepared as {self.images.shape[1:]}, expected {expected}"
            )
        return self.images[indices]

    def fingerprint(self) -> str:
        """Hash of all pixels and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def images_fingerprint(self) -> str:
        """Hash of all pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest()


class DigitsSource(ImageSource):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey; they come with the package.

    Raises:
      InputError: a digit that is not among `class_names`.
    """

    def __init__(self, class_names: Sequence[str] | None = None):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.name = "digits"
        self.class_names, order = align_classes(
            [(str(d),) for d in range(10)], class_names, self.name
        )
        self.labels = order[digits.target]
        self.splits = np.full(len(self.labels), "train")
        self._images = (digits.images / 16.0).astype(np.float32)

    def describe(self, index: int) -> str:
        """Position in the set."""
        return f"digits[{index}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """One digit; nothing is rounded to bytes on the way."""
        return preprocess.array(Image.fromarray(self._images[index]))

    def fingerprint(self) -> str:
        """Hash of all pixels and labels."""
        return hashlib.sha256(self._images.tobytes() + self.labels.tobytes()).hexdigest()

    def images_fingerprint(self) -> str:
        """Hash of all pixels."""
        return hashlib.sha256(self._images.tobytes()).hexdigest()


def open_source(spec: str | os.PathLike, class_names: Sequence[str] | None = None) -> ImageSource:
    """Open "digits", "tfds:NAME", or a path: Tiny-ImageNet or CIFAR as published, or image folders.

    Raises:
      InputError: nothing there, not in a known layout, or a class not among `class_names`.

    Source: ours; the layouts are their publishers'.
    """
    spec = os.fspath(spec)
    if spec == "digits":
        return DigitsSource(class_names)
    if spec.startswith("tfds:"):
        return TfdsSource(spec.removeprefix("tfds:"), class_names=class_names)
    root = Path(spec)
    if not root.is_dir():
        raise InputError(f"{spec}: no such folder (expected a folder, 'digits' or 'tfds:NAME')")
    if (root / "wnids.txt").is_file():
        return TinyImageNetSource(root, class_names)
    if is_cifar(root):
        return CifarSource(root, class_names)
    return FolderSource(root, class_names)

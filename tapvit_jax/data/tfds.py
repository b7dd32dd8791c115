"""Images from TensorFlow Datasets, read without TensorFlow."""

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.data.base import SPLITS, UNLABELLED, ImageSource, align_classes, map_images
from tapvit_jax.data.preprocess import Preprocess, decode
from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_file, content_hash

# From so many images on, the labels of a split are kept in a cache.
_CACHED_FROM = 20_000


class TfdsSource(ImageSource):
    """A TensorFlow Datasets image classification set, read from ArrayRecord without TensorFlow.

    Args:
      name: such as "cifar100" or "tiny_imagenet:1.0.0".
      data_dir: where prepared sets lie; TFDS's own default otherwise.
      class_names: the classes that labels refer to, usually a model's; by default the set's.
      splits: the set's split to use as "train" and the one to use as "val"; by default "train" and
        the first of "val", "validation" and "test" that exists.

    Raises:
      InputError: unknown name, not prepared, prepared in another file format, or a class that is
        not among `class_names`.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | os.PathLike | None = None,
        class_names: Sequence[str] | None = None,
        splits: Mapping[str, str] | None = None,
    ):
        # Imported here: it takes seconds, and only this source needs it.
        import tensorflow_datasets as tfds

        self.name = f"tfds:{name}"
        try:
            builder = tfds.builder(name, data_dir=None if data_dir is None else str(data_dir))
        except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
            raise InputError(f"{self.name}: {(str(error).splitlines() or [''])[0]}") from error
        features = builder.info.features
        for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
            if key not in features or not isinstance(features[key], kind):
                raise InputError(f"{self.name}: feature {key!r} is no {kind.__name__}")
        found = [(name,) for name in features["label"].names or ()]
        self.class_names, order = align_classes(found, class_names, self.name)
        prepared = _splits(builder)
        wanted = {SPLITS[split]: split for split in reversed(SPLITS) if split in prepared}
        if splits is not None and prepared:
            wanted = dict(splits)
            missing = [split for split in wanted.values() if split not in prepared]
            if missing or not wanted or not set(wanted) <= {"train", "val"}:
                raise InputError(
                    f"{self.name}: splits {wanted}, expected 'train' and 'val' to name some of "
                    f"{', '.join(prepared)}"
                )
        if not wanted:
            raise InputError(
                f"{self.name}: is not prepared in {builder.data_dir}. Prepare it once, where "
                "TensorFlow may be installed: pip install tensorflow && "
                f"tfds build {name} --file_format=array_record"
            )
        raw = {"image": tfds.decode.SkipDecoding()}
        self._parts, labels, kinds = [], [], []
        self._prepared: dict[str, Any] = {"version": str(builder.info.version)}
        for ours, theirs in wanted.items():
            try:
                part = builder.as_data_source(theirs, decoders=raw)
                info = builder.info.splits[theirs]
                labels.append(_read_labels(part, info.filepaths))
                self._prepared[ours] = [theirs, info.num_bytes, list(info.shard_lengths)]
            except (
                NotImplementedError,
                ImportError,
                ValueError,
                AssertionError,
                LookupError,
                OSError,
                RuntimeError,
            ) as error:
                raise InputError(
                    f"{self.name}: cannot be read without TensorFlow ({error}); prepare it with "
                    "--file_format=array_record"
                ) from error
            self._parts.append(part)
            kinds += [ours] * len(part)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        theirs = np.concatenate(labels)
        wrong = theirs[(theirs < UNLABELLED) | (theirs >= len(order))]
        if wrong.size:
            raise InputError(
                f"{self.name}: label {wrong[0]} is out of range, expected 0 to {len(order) - 1}"
            )
        # The entry added is that of -1, which some sets have for images without a label.
        self.labels = np.append(order, np.int32(UNLABELLED))[theirs]
        self.splits = np.array(kinds)

    def describe(self, index: int) -> str:
        """Position in the set."""
        return f"{self.name}[{index}]"

    def read(self, index: int, preprocess: Preprocess) -> Float[np.ndarray, "s s c"]:
        """Decode and prepare one image.

        Raises:
          InputError: the image is damaged or absurdly large.
        """
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[part])
        return decode(
            lambda: io.BytesIO(self._parts[part][row]["image"]), self.describe(index), preprocess
        )

    def fingerprint(self) -> str:
        """Hash of the name, the version, all labels, and how many bytes the splits hold."""
        digest = hashlib.sha256(self.labels.tobytes()).hexdigest()
        return content_hash({"name": self.name, "labels": digest} | self._prepared)

    def images_fingerprint(self) -> str:
        """Hash of the name, the version, and how many images and bytes the splits hold."""
        return content_hash({"name": self.name} | self._prepared)


def _read_labels(part: Sequence[Any], files: Sequence[os.PathLike]) -> Int[np.ndarray, "n"]:
    """The set's own labels of all images in one split.

    Records hold labels and images together, so that this reads the whole split: minutes for
    ImageNet. The labels of large splits are therefore kept in the user's cache folder, by the name,
    size and time of the split's files.
    """
    cache = None
    if len(part) >= _CACHED_FROM:
        found = [(os.path.realpath(file), Path(file).stat()) for file in files]
        key = content_hash([[path, s.st_size, s.st_mtime_ns] for path, s in found])
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "tapvit_jax" / f"labels-{key}.npy"
        # One that is damaged is written again.
        with contextlib.suppress(OSError, ValueError, EOFError):
            labels = np.load(cache, allow_pickle=False)
            if labels.shape == (len(part),) and labels.dtype == np.int64:
                return labels
    labels = np.fromiter(map_images(lambda i: part[i]["label"], range(len(part))), np.int64)
    if cache is not None:
        # Without a place to write it is only slow.
        with (
            contextlib.suppress(InputError),
            atomic_file(cache) as partial,
            partial.open("wb") as file,
        ):
            np.save(file, labels)
    return labels


def _splits(builder) -> dict:
    return {} if builder.info.splits is None else dict(builder.info.splits)

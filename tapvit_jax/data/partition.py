"""Who owns which image: private parts of every device, the public pool, public-validation.

All parts are disjoint: the images that score a device's model have never been used to fit its
mixture, to choose its units, to fine-tune it, or to choose its epoch. Only `PartitionConfig.leaks`
changes that, to reproduce what was published.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from tapvit_jax.errors import InputError
from tapvit_jax.structs import check_fields

_DIRICHLET_DRAWS = 100
_LEAST_PRIVATE = 2
# More than any set of images is dealt to; each is a stage of its own.
_MOST_DEVICES = 2**16
# Far beyond either end the proportions are one-hot or equal, and then NaN.
_LEAST_ALPHA, _LARGEST_ALPHA = 1e-3, 1e6


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """How images are dealt out.

    Attributes:
      kind: "disjoint" classes (as published); "overlap", windows of classes that share some;
        "shards" of the images sorted by class; "dirichlet" class proportions; "iid".
      classes_per_device: for "overlap" needed; for "disjoint" by default all classes are dealt out.
      shards_per_device: for "shards".
      alpha: for "dirichlet"; smaller is less even.
      public_fraction: share of the images that goes into the public pool.
      validation_fraction: share that goes into public-validation.
      private_test_fraction: share of a device's images that only score it.
      private_split: take private images from this split alone and public ones from the others, for
        a dense model that was trained on those; None cuts the same pool of images.
      leaks: the published splits, for reproduction only: a device's images in `private_split` fit
        its mixture, choose its epoch and score it, and the public pool is all that the dense model
        was trained on. Accuracies are optimistic, and reports say so.
    """

    kind: Literal["disjoint", "overlap", "shards", "dirichlet", "iid"] = "disjoint"
    num_devices: int = 4
    classes_per_device: int | None = None
    shards_per_device: int = 2
    alpha: float = 0.5
    public_fraction: float = 0.5
    validation_fraction: float = 0.1
    private_test_fraction: float = 0.5
    private_split: str | None = None
    leaks: bool = False

    def __post_init__(self):
        check_fields(self)
        if not 1 <= self.num_devices <= _MOST_DEVICES:
            raise InputError(f"num_devices is {self.num_devices}, expected 1 to {_MOST_DEVICES}")
        if self.shards_per_device < 1:
            raise InputError(f"shards_per_device is {self.shards_per_device}, expected 1 or more")
        for field in ("public_fraction", "validation_fraction", "private_test_fraction"):
            if not 0 < getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}, expected between 0 and 1")
        if not _LEAST_ALPHA <= self.alpha <= _LARGEST_ALPHA:
            raise InputError(
                f"alpha is {self.alpha}, expected {_LEAST_ALPHA:g} to {_LARGEST_ALPHA:g}"
            )
        if self.kind == "overlap" and self.classes_per_device is None:
            raise InputError("kind 'overlap' needs classes_per_device")
        if self.classes_per_device is not None and self.classes_per_device < 1:
            raise InputError(f"classes_per_device is {self.classes_per_device}, expected 1 or more")
        if self.leaks and self.private_split is None:
            raise InputError("leaks needs private_split: the published splits have one")
        total = self.public_fraction + self.validation_fraction
        if self.private_split is None and total >= 1:
            raise InputError(
                f"public_fraction and validation_fraction add up to {total:g}: "
                "nothing is left for the devices"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceSplit:
    """One device's images.

    Attributes:
      private_train: what its mixture is fitted on.
      private_test: what scores its model, and is used for nothing else.
      classes: the classes it owns.
    """

    private_train: Int[np.ndarray, "n"]
    private_test: Int[np.ndarray, "m"]
    classes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """Indices of all parts, each sorted."""

    public_pool: Int[np.ndarray, "p"]
    public_validation: Int[np.ndarray, "q"]
    devices: tuple[DeviceSplit, ...]

    def parts(self) -> dict[str, Int[np.ndarray, "n"]]:
        """All parts by name."""
        found = {"public_pool": self.public_pool, "public_validation": self.public_validation}
        for d, split in enumerate(self.devices):
            found[f"device {d} private_train"] = split.private_train
            found[f"device {d} private_test"] = split.private_test
        return found


def partition(
    labels: Int[np.ndarray, "n"],
    config: PartitionConfig,
    seed: int,
    splits: np.ndarray | None = None,
) -> Partition:
    """Deal images out to the public and to devices; deterministic in its arguments.

    Raises:
      InputError: images without labels, classes or images too few for the devices, or a split that
        does not exist.

    Source: the kinds are TAP-ViTs' (arXiv 2601.02437); the four disjoint parts are ours, the
    original scores devices on the images that its mixtures were fitted on.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(
            f"a partition needs labels for every image, found {(labels < 0).sum()} without among "
            f"labels of shape {labels.shape} and type {labels.dtype}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}, expected a whole number of at least 0")
    if splits is not None and np.shape(splits) != labels.shape:
        raise InputError(f"{np.shape(splits)} splits, expected one for each of {len(labels)}")
    rng = np.random.default_rng([seed, 0])
    everything = np.arange(len(labels))
    fractions = [config.public_fraction, config.validation_fraction]
    if config.private_split is None:
        pool, validation, private = _stratified(labels, everything, fractions, rng)
    else:
        if splits is None or config.private_split not in set(splits):
            found = "none" if splits is None else ", ".join(sorted(set(splits)))
            raise InputError(
                f"private_split is {config.private_split!r}, the source's splits are: {found}"
            )
        is_private = np.asarray(splits) == config.private_split
        private = everything[is_private]
        share = config.validation_fraction
        pool, validation, _ = _stratified(
            labels, everything[~is_private], [1.0 - share, share], rng
        )
        if config.leaks:
            pool = everything[~is_private]
    owned, shares = _deal(labels, private, config, rng)
    devices = []
    for d, share in enumerate(shares):
        test_fraction = config.private_test_fraction
        test, train, _ = _stratified(labels, share, [test_fraction, 1.0 - test_fraction], rng)
        if config.leaks:
            test = train = np.sort(share)
        if len(test) == 0 or len(train) == 0:
            raise InputError(
                f"device {d} gets {len(share)} private images, too few for private-train and "
                "private-test: use fewer devices or a smaller public_fraction"
            )
        classes = owned[d] if owned is not None else np.unique(labels[share])
        devices.append(DeviceSplit(train, test, tuple(int(c) for c in classes)))
    if len(pool) == 0 or len(validation) == 0:
        raise InputError(
            f"{len(pool)} images for the public pool and {len(validation)} for public-validation: "
            "both need some"
        )
    return Partition(pool, validation, tuple(devices))


def _stratified(
    labels: np.ndarray, indices: np.ndarray, fractions: list[float], rng: np.random.Generator
) -> list[np.ndarray]:
    """Cut indices into parts of these fractions and the rest, class by class.

    Rounding is carried from class to class, so that small classes do not all round the same way.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    cumulative = np.cumsum(fractions)
    carried = np.zeros(len(fractions))
    for c in np.unique(labels[indices]):
        members = rng.permutation(indices[labels[indices] == c])
        ideal = cumulative * len(members) + carried
        # Classes of one part end where the next begin; the last cut may fall one past the end.
        cuts = np.clip(np.round(ideal + 1e-9), 0, len(members)).astype(int)
        cuts = np.maximum.accumulate(cuts)
        carried = ideal - cuts
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) if part else indices[:0] for part in parts]


def _deal(
    labels: np.ndarray, private: np.ndarray, config: PartitionConfig, rng: np.random.Generator
) -> tuple[list[np.ndarray] | None, list[np.ndarray]]:
    """Owned classes (None where they follow from the images) and private images of each device."""
    if config.kind in ("disjoint", "overlap"):
        owned = _owned_classes(np.unique(labels), config)
        return owned, _by_class(labels, private, owned, rng)
    if config.kind == "iid":
        return None, np.array_split(rng.permutation(private), config.num_devices)
    if config.kind == "shards":
        return None, _shards(labels, private, config, rng)
    return None, _dirichlet(labels, private, config, rng)


def _owned_classes(classes: np.ndarray, config: PartitionConfig) -> list[np.ndarray]:
    devices, width, total = config.num_devices, config.classes_per_device, len(classes)
    if config.kind == "disjoint":
        if width is None:
            if devices > total:
                raise InputError(f"{devices} devices cannot own disjoint sets of {total} classes")
            return np.array_split(classes, devices)
        if devices * width > total:
            raise InputError(
                f"{devices} devices with {width} classes each need {devices * width} classes, "
                f"found {total}"
            )
        return [classes[d * width : (d + 1) * width] for d in range(devices)]
    if width > total:
        raise InputError(f"classes_per_device is {width}, found {total} classes")
    starts = [d * total // devices for d in range(devices)]
    return [np.sort(np.take(classes, range(s, s + width), mode="wrap")) for s in starts]


def _by_class(
    labels: np.ndarray, private: np.ndarray, owned: list[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
    shares: list[list[np.ndarray]] = [[] for _ in owned]
    for c in np.unique(labels[private]):
        owners = [d for d, classes in enumerate(owned) if c in classes]
        members = rng.permutation(private[labels[private] == c])
        for d, piece in zip(owners, np.array_split(members, max(len(owners), 1)), strict=False):
            shares[d].append(piece)
    return [np.concatenate(share) if share else private[:0] for share in shares]


def _shards(
    labels: np.ndarray, private: np.ndarray, config: PartitionConfig, rng: np.random.Generator
) -> list[np.ndarray]:
    count = config.num_devices * config.shards_per_device
    if len(private) < count:
        raise InputError(f"{len(private)} private images cannot be cut into {count} shards")
    shuffled = rng.permutation(private)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(by_class, count)
    dealt = rng.permutation(count).reshape(config.num_devices, -1)
    return [np.concatenate([shards[i] for i in row]) for row in dealt]


def _dirichlet(
    labels: np.ndarray, private: np.ndarray, config: PartitionConfig, rng: np.random.Generator
) -> list[np.ndarray]:
    if len(private) < config.num_devices * _LEAST_PRIVATE:
        raise InputError(
            f"{len(private)} private images are too few for {config.num_devices} devices"
        )
    for _ in range(_DIRICHLET_DRAWS):
        shares: list[list[np.ndarray]] = [[] for _ in range(config.num_devices)]
        for c in np.unique(labels[private]):
            members = rng.permutation(private[labels[private] == c])
            proportions = rng.dirichlet(np.full(config.num_devices, config.alpha))
            cuts = np.round(np.cumsum(proportions)[:-1] * len(members)).astype(int)
            for share, piece in zip(shares, np.split(members, cuts), strict=True):
                share.append(piece)
        found = [np.concatenate(share) for share in shares]
        if all(_splittable(share, config) for share in found):
            return found
    raise InputError(
        f"alpha {config.alpha} leaves some of {config.num_devices} devices with hardly an image: "
        "use a larger alpha, fewer devices or more images"
    )


def _splittable(share: np.ndarray, config: PartitionConfig) -> bool:
    # Both private parts must get an image when the share is cut class by class.
    rare = min(config.private_test_fraction, 1.0 - config.private_test_fraction)
    return len(share) >= max(_LEAST_PRIVATE, np.ceil(1.0 / rare))

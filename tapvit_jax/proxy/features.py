"""Features of images: an extractor that the cloud makes and every device runs.

Three kinds, all followed by a PCA fitted on the public pool: the embedding of a small trained
convolutional network, the mean token that leaves one of the dense model's first blocks, or what a
whole pretrained network (a ResNet, ViT or Swin) hands to its classifier.

An extractor is a directory: extractor.json (kind, config, preprocessing) and params.safetensors
(the network and the PCA). Its fingerprint goes into every payload, so that the cloud notices
features from another extractor.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from tapvit_jax.data.base import ImageSource
from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.preprocess import Preprocess
from tapvit_jax.errors import InputError
from tapvit_jax.files import atomic_directory, content_hash, file_hash, write_json
from tapvit_jax.models import backbone, convnet
from tapvit_jax.models.backbone import Config, check_prunable, family, read_config
from tapvit_jax.models.convnet import ConvNetConfig
from tapvit_jax.models.params import Params, check_params, flatten
from tapvit_jax.models.registry import Model
from tapvit_jax.models.store import load_params, read_spec, save_params, spec_file
from tapvit_jax.prune.cost import images_at_once
from tapvit_jax.sharding import AXIS, data_mesh, fetch_ahead, replicate, shard_rows
from tapvit_jax.structs import check_fields, from_plain, to_plain

FORMAT = "tapvit-extractor"
VERSION = 1
SPEC_FILE = "extractor.json"
PARAMS_FILE = "params.safetensors"

Kind = Literal["embedding", "backbone", "pooled"]

# Enough for the axes of a few thousand features, and a GiB of them.
_FIT_ROWS = 2**16


@dataclasses.dataclass(frozen=True)
class ExtractorConfig:
    """Which features devices summarise.

    Attributes:
      kind: "embedding" of a small trained network, "backbone": the dense model's early features,
        or "pooled": the last features of a pretrained network.
      dim: dimensions that the PCA keeps.
      whiten: scale every kept dimension to unit variance over the pool, or all of them by one
        common factor.
      widths: channels of the embedding network's stages.
      embed_dim: the embedding network's dimension before the PCA.
      depth: how many of the backbone's blocks are run, for kind "backbone".
    """

    kind: Kind = "embedding"
    dim: int = 16
    whiten: bool = False
    widths: tuple[int, ...] = (32, 64, 128)
    embed_dim: int = 64
    depth: int = 2

    def __post_init__(self):
        check_fields(self)
        for name in ("dim", "embed_dim", "depth"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not self.widths or min(self.widths) < 1:
            raise InputError(f"widths is {self.widths}, expected one width or more, all positive")


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network and a linear map from its output to a few dimensions.

    Attributes:
      kind: which output of the network is used.
      network: the network's config; for "backbone" that of the dense model's first blocks.
      params: the network's parameters, without those it does not use.
      preprocess: how devices prepare their images.
      mean: mean of the network's output over the public pool.
      projection: the PCA's axes, scaled.
    """

    kind: Kind
    network: ConvNetConfig | Config
    params: Params
    preprocess: Preprocess
    mean: Float[np.ndarray, "e"]
    projection: Float[np.ndarray, "e d"]

    @property
    def dim(self) -> int:
        """Dimension of the features."""
        return self.projection.shape[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the features."""
        arrays = _flat_arrays(self)
        digests = {name: content_hash(_digest(array)) for name, array in sorted(arrays.items())}
        return content_hash({"spec": _spec(self), "arrays": digests})

    def __call__(self, images: Float[Array, "b s s ch"]) -> Float[Array, "b d"]:
        """Features of preprocessed images."""
        return _features(self.kind, self.network, self.params, self.mean, self.projection, images)

    def features(
        self,
        source: ImageSource,
        indices: Int[np.ndarray, "n"],
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        *,
        workers: int = 0,
    ) -> Float[np.ndarray, "n d"]:
        """Features of many images, in the order of `indices`, by all local devices.

        A device takes `batch_size` images at a time, by default as many as take little enough
        memory (see `images_at_once`). `workers` processes decode.

        Raises:
          InputError: an image cannot be read.
        """
        found = []
        for part in self.stream(source, indices, batch_size, workers=workers):
            found.append(part)
            if on_batch is not None:
                on_batch(len(part))
        return np.concatenate(found) if found else np.zeros((0, self.dim), np.float32)

    def stream(
        self,
        source: ImageSource,
        indices: Int[np.ndarray, "n"],
        batch_size: int | None = None,
        *,
        workers: int = 0,
    ) -> Iterator[Float[np.ndarray, "b d"]]:
        """Yield features of a few images after the other, in the order of `indices`.

        Every local device takes whole batches, on a grid that starts at the first index, so that a
        batch's features are the same on any number of devices. `workers` processes decode.

        Raises:
          InputError: an image cannot be read, or a number is out of range.
        """
        if batch_size is None:
            batch_size = images_at_once(self.network, len(indices))
        # No more devices than batches: a device without images would compute for nothing.
        useful = max(-(-len(indices) // max(batch_size, 1)), 1)
        mesh = data_mesh(jax.local_devices()[:useful])
        step = batch_size * mesh.shape[AXIS]
        parts = replicate((self.params, self.mean, self.projection), mesh)

        def steps() -> Iterator[tuple[jax.Array, int]]:
            for batch in batches(source, indices, self.preprocess, step, workers=workers):
                images, _ = shard_rows(batch["image"], mesh)
                found = _sharded_features(self.kind, self.network, *parts, images, mesh=mesh)
                yield found, int(batch["mask"].sum())

        for found, count in fetch_ahead(steps()):
            yield found[:count]

    def save(self, directory: str | os.PathLike) -> None:
        """Write the extractor to a directory, all or nothing."""
        with atomic_directory(directory) as partial:
            save_params(_tree(self), partial / PARAMS_FILE)
            spec = {"format": FORMAT, "version": VERSION} | _spec(self)
            spec["params_sha256"] = file_hash(partial / PARAMS_FILE)
            write_json(partial / SPEC_FILE, spec)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Extractor":
        """Read an extractor that `save` wrote.

        Raises:
          InputError: a missing, damaged or foreign file, or arrays that do not fit together.
        """
        directory = Path(directory)
        path = spec_file(directory, SPEC_FILE, "an extractor")
        spec = read_spec(path, FORMAT, VERSION)
        kind = from_plain(Kind, spec.get("kind"), f"{path}: kind")
        network = _read_network(kind, spec, path)
        preprocess = from_plain(Preprocess, spec.get("preprocess"), f"{path}: preprocess")
        prepared = (preprocess.image_size, preprocess.channels)
        if prepared != (network.image_size, network.in_channels):
            raise InputError(
                f"{path}: prepares images of {prepared[0]} pixels and {prepared[1]} channels, "
                f"expected {network.image_size} and {network.in_channels} for its network"
            )
        arrays = load_params(directory / PARAMS_FILE, spec.get("params_sha256"))
        check_params(_tree_shapes(kind, network, arrays), arrays, str(directory))
        pca = arrays["pca"]
        return cls(kind, network, arrays["network"], preprocess, pca["mean"], pca["projection"])


def _read_network(kind: Kind, spec: dict[str, Any], path: Path) -> ConvNetConfig | Config:
    if kind == "embedding":
        return from_plain(ConvNetConfig, spec.get("network"), f"{path}: network")
    network = read_config(spec.get("family"), spec.get("network"), f"{path}: network")
    if kind == "backbone":
        check_prunable(network)
    return network


def _tree(extractor: Extractor) -> Params:
    pca = {"mean": extractor.mean, "projection": extractor.projection}
    return {"network": extractor.params, "pca": pca}


def _width(network: ConvNetConfig | Config) -> int:
    return network.embed_dim if isinstance(network, ConvNetConfig) else network.pooled_dim


def _tree_shapes(kind: Kind, network: ConvNetConfig | Config, found: Params) -> Params:
    # Only the file knows how many dimensions were kept.
    projection = flatten(found).get(("pca", "projection"))
    kept = projection.shape[-1] if projection is not None and projection.ndim else 1
    width = _width(network)
    shapes = {"mean": (width,), "projection": (width, min(max(kept, 1), width))}
    pca = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return {"network": _used_shapes(kind, network), "pca": pca}


def _flat_arrays(extractor: Extractor) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(_tree(extractor))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _digest(array: np.ndarray) -> list[Any]:
    data = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [str(array.dtype), list(array.shape), data]


def _spec(extractor: Extractor) -> dict[str, Any]:
    network = extractor.network
    named = {} if isinstance(network, ConvNetConfig) else {"family": family(network)}
    return named | {
        "kind": extractor.kind,
        "network": to_plain(network),
        "preprocess": to_plain(extractor.preprocess),
    }


def _used_shapes(kind: Kind, network: ConvNetConfig | Config) -> Params:
    if isinstance(network, ConvNetConfig):
        shapes, unused = convnet.param_shapes(network), {"head"}
    else:
        shapes, unused = backbone.param_shapes(network), {*backbone.CLASSIFIERS}
        unused |= {"norm", "fc_norm"} if kind == "backbone" else set()
    return {name: leaf for name, leaf in shapes.items() if name not in unused}


def _raw(kind: Kind, network: ConvNetConfig | Config, params: Params, images: Array) -> Array:
    if isinstance(network, ConvNetConfig):
        return convnet.embedding(network, params, images)
    if kind == "pooled":
        return backbone.pooled(network, params, images)
    return backbone.apply_blocks(network, params, images).mean(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(
    kind: Kind, network: Any, params: Params, mean: Array, projection: Array, images: Array
) -> Array:
    raw = _raw(kind, network, params, images).astype(np.float32)
    return jax.numpy.matmul(raw - mean, projection, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("kind", "network", "mesh"))
def _sharded_features(
    kind: Kind,
    network: Any,
    params: Params,
    mean: Array,
    projection: Array,
    images: Array,
    *,
    mesh: Mesh,
) -> Array:
    everywhere, spread = PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(
        functools.partial(_features, kind, network),
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, spread),
        out_specs=spread,
        check_vma=False,
    )(params, mean, projection, images)


def embedding_network(
    config: ExtractorConfig, preprocess: Preprocess, num_classes: int
) -> ConvNetConfig:
    """Config of the small network that the cloud trains on the public pool for "embedding".

    Raises:
      InputError: no classes, as of a pool without labels.
    """
    if num_classes < 1:
        raise InputError(
            "kind 'embedding' trains on the pool's labels, and it has none: expected a folder of "
            "images per class, or kind 'backbone' or 'pooled'"
        )
    return ConvNetConfig(
        image_size=preprocess.image_size,
        num_classes=num_classes,
        in_channels=preprocess.channels,
        widths=config.widths,
        embed_dim=config.embed_dim,
        # Large images are shrunk at once: the features describe content, not detail.
        stem_stride=1 if preprocess.image_size <= 32 else 2 if preprocess.image_size <= 96 else 4,
    )


def _first_blocks(config: Config, depth: int) -> Config:
    check_prunable(config)
    if depth > len(config.blocks):
        raise InputError(f"depth is {depth}, expected 1 to {len(config.blocks)} blocks")
    return config.first_blocks(depth)


def build_extractor(
    config: ExtractorConfig,
    source: ImageSource,
    pool: Int[np.ndarray, "n"],
    preprocess: Preprocess,
    *,
    model: Model | None = None,
    network: ConvNetConfig | None = None,
    params: Params | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    on_share: Callable[[float], None] = lambda share: None,
) -> Extractor:
    """Fit the PCA on the public pool and put the extractor together.

    Of a pool of more than 65,536 images, as many are drawn, the same ones each time.

    Args:
      config: which features.
      source: images.
      pool: the public pool's indices.
      preprocess: how devices prepare their images.
      model: the dense model, for kind "backbone", or any pretrained one, for kind "pooled".
      network: the trained embedding network's config, for kind "embedding".
      params: its parameters.
      batch_size: images that a device takes at a time; None is `images_at_once`.
      workers: processes that decode; 0 decodes on threads of this process.
      on_share: called with every share of the work that is done.

    Raises:
      InputError: a part missing, a depth that the model does not have, a number out of range, an
        image that cannot be read, features that are not finite, or more dimensions asked than the
        network's output or the pool has.

    Source: ours.
    """
    if config.kind != "embedding":
        if model is None:
            raise InputError(f"kind {config.kind!r} needs a model")
        network, params = model.config, model.params
        if config.kind == "backbone":
            network = _first_blocks(network, config.depth)
    elif network is None or params is None:
        raise InputError("kind 'embedding' needs a trained network")
    params = {name: params[name] for name in _used_shapes(config.kind, network)}
    if len(pool) > _FIT_ROWS:
        rows = np.random.default_rng(0).choice(len(pool), _FIT_ROWS, replace=False)
        pool = np.asarray(pool)[np.sort(rows)]
    identity = np.eye(_width(network), dtype=np.float32)
    zero = np.zeros(_width(network), np.float32)
    raw = Extractor(config.kind, network, params, preprocess, zero, identity).features(
        source, pool, batch_size, lambda n: on_share(n / len(pool)), workers=workers
    )
    if not np.isfinite(raw).all():
        name = "network" if config.kind == "embedding" else model.name
        raise InputError(f"{name}: features hold NaN or infinity, expected finite numbers")
    # Once centred, n images span n - 1 dimensions.
    most = min(len(raw) - 1, raw.shape[1])
    if config.dim > most:
        raise InputError(
            f"the PCA keeps {config.dim} dimensions, expected 1 to {max(most, 0)} "
            f"({raw.shape[0]} pool images, {raw.shape[1]} features)"
        )
    # Imported here: it takes two seconds, and ready extractors do without.
    from sklearn.decomposition import PCA

    mean = raw.mean(axis=0, dtype=np.float64)
    # This solver has no randomness, so that the same pool gives the same extractor. It centres the
    # covariance, not the features: far from zero, digits would cancel.
    pca = PCA(config.dim, svd_solver="covariance_eigh").fit(raw - mean)
    scale = np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
    if not config.whiten:
        scale = np.full_like(scale, np.sqrt((scale**2).mean()))
    projection = (pca.components_.T / scale).astype(np.float32)
    return Extractor(config.kind, network, params, preprocess, mean.astype(np.float32), projection)

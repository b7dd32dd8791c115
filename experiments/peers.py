"""Torch-Pruning on our dense weights written back to timm, its results counted by our counter.

Needs requirements-peers.txt (`make peers`); nothing else of the package does.
"""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tapvit_jax.convert.timm import from_timm, timm_model
from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig, check_prunable
from tapvit_jax.models.layers import BlockConfig, check_images
from tapvit_jax.models.params import flatten, unflatten
from tapvit_jax.models.registry import Model
from tapvit_jax.models.swin import SwinConfig
from tapvit_jax.prune.budget import Budget, Limits, within
from tapvit_jax.prune.cost import Cost, Latency, cost

Embedding = Literal["cut", "whole"]


class _Method(NamedTuple):
    importance: str  # in torch_pruning.importance
    isomorphic: bool = False  # rank within groups of the same structure, not over the whole network
    needs_gradients: bool = False


_METHODS = {
    "group_taylor": _Method("GroupTaylorImportance", needs_gradients=True),
    "isomorphic": _Method("GroupTaylorImportance", isomorphic=True, needs_gradients=True),
    "l2": _Method("GroupMagnitudeImportance"),
    "random": _Method("RandomImportance"),
}
METHODS: tuple[str, ...] = tuple(_METHODS)

_SUFFIXES: dict[Embedding, str] = {"cut": "", "whole": "_whole"}
_PEERS: dict[str, tuple[str, Embedding]] = {
    f"tp_{method}{suffix}": (method, embedding)
    for embedding, suffix in _SUFFIXES.items()
    for method in METHODS
}
PEERS: tuple[str, ...] = tuple(_PEERS)
"""Rows of the comparison: a method, and "_whole" where the residual width is left alone."""

_BATCH = 64
# Small matrices: two threads take longer than one, many times longer on a busy machine.
_THREADS = 1
# What the ratio is tried at, gentlest first. Costs need not fall with the ratio: Torch-Pruning
# leaves a layer alone that it would have to remove altogether.
_GRID = (*(i / 20 for i in range(20)), 0.96, 0.97, 0.98, 0.99)
_REFINED = 41
_HALVINGS = 9


def available() -> bool:
    """Whether the peers' packages are installed; imports none of them."""
    names = ("torch", "timm", "torch_pruning")
    return all(importlib.util.find_spec(name) is not None for name in names)


@functools.cache
def import_timm() -> tuple[ModuleType, ModuleType]:
    """Import torch and timm where torchvision's compiled operators are missing, not needed here."""
    import torch

    try:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        library = None  # they are there
    import timm

    # The operators vanish with the library object.
    timm.tapvit_library = library
    return torch, timm


def settings(name: str) -> tuple[str, Embedding]:
    """Method and treatment of the embedding of a peer in `PEERS`.

    Raises:
      InputError: no such peer.
    """
    if name not in _PEERS:
        raise InputError(f"peer is {name!r}, expected one of {', '.join(PEERS)}")
    return _PEERS[name]


@dataclasses.dataclass(frozen=True, eq=False)
class PeerModel:
    """A network that another package has pruned.

    Attributes:
      network: the torch module, as that package left it.
      model: the same function as a model of ours, to be evaluated, fine-tuned and exported alike.
      cost: by our counter.
      ratio: the share of channels that the package was asked to remove.
    """

    network: Any
    model: Model
    cost: Cost
    ratio: float

    def predict(self, images: Float[np.ndarray, "n s s ch"]) -> Float[np.ndarray, "n c"]:
        """Logits, by torch."""
        return _logits(self.network, images)


def torch_pruning(
    model: Model,
    images: Float[np.ndarray, "n s s ch"],
    labels: Int[np.ndarray, "n"] | None,
    budget: Budget,
    *,
    method: str,
    embedding: Embedding,
    seed: int,
    latency: Latency | None = None,
) -> PeerModel:
    """Prune with Torch-Pruning as its own ViT examples do: one global ranking, in one shot.

    Every head of a layer keeps equally many dims, shared by queries, keys and values. Torch-Pruning
    takes a share of channels, not a budget: the smallest share is searched that meets the budget.

    Args:
      model: a dense ViT or Swin.
      images: the metric images, prepared as for the model; Taylor methods take all their gradients.
      labels: their classes, which Taylor methods need (cross-entropy, as theirs); else unused.
      budget: never exceeded.
      method: "group_taylor" (first-order Taylor, ranked over the whole network), "isomorphic" (the
        same, ranked within groups of equal structure), "l2" or "random".
      embedding: whether the residual width is cut as well, or left whole.
      seed: of the random method.
      latency: predicts the time of a forward pass, for bounds on latency; of networks with the
        residual width left whole alone.

    Raises:
      InputError: an unknown method, not installed, a network that timm or our counter cannot
        represent, images or labels that do not fit, or a budget out of reach (with what is
        reached).

    Source: DepGraph (CVPR 2023) and Isomorphic Pruning (ECCV 2024) as in torch-pruning 1.6.1.
    """
    _check(model, images, labels, method, embedding)
    limits = budget.limits(model.config, latency)
    with _seeded(seed):  # timm draws weights, which are then replaced
        network = _timm_network(model)
    if _METHODS[method].needs_gradients:
        _accumulate_gradients(network, images, labels)
    with _seeded(seed):
        pruner = _Pruner(network, model.config, method, embedding)
    name = f"torch-pruning {method}, embedding {embedding}"
    ratio = _search(lambda ratio: cost(pruner.config_at(ratio), latency), limits, name)
    config = pruner.prune(ratio)
    return PeerModel(network, _ours(network, config, model), cost(config), ratio)


def _check(
    model: Model, images: np.ndarray, labels: np.ndarray | None, method: str, embedding: str
) -> None:
    check_prunable(model.config)
    if method not in _METHODS:
        raise InputError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if embedding not in _SUFFIXES:
        raise InputError(f"embedding is {embedding!r}, expected one of {', '.join(_SUFFIXES)}")
    if embedding == "cut" and isinstance(model.config, SwinConfig):
        raise InputError(
            "embedding is 'cut', expected 'whole' for a Swin: every stage would get a width of its "
            "own, which is not that of any Swin of ours"
        )
    if not available():
        raise InputError("torch-pruning is not installed: make peers, or requirements-peers.txt")
    check_images(model.config, images)
    if not _METHODS[method].needs_gradients:
        return
    if labels is None:
        raise InputError(f"{method} needs the classes of its images, found none")
    labels, classes = np.asarray(labels), model.config.num_classes
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}, expected {len(images)} "
            "whole numbers"
        )
    if labels.size == 0 or labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"labels are not one or more numbers from 0 to {classes - 1}")


def _timm_network(model: Model) -> Any:
    torch, timm = import_timm()
    torch.set_num_threads(min(_THREADS, torch.get_num_threads()))
    name, arguments, state = timm_model(model)
    arguments = {key: value for key, value in arguments.items() if value is not None}
    network = timm.create_model(name, **arguments)
    network.load_state_dict({key: torch.tensor(np.asarray(value)) for key, value in state.items()})
    return network.eval()


def _nchw(images: np.ndarray) -> Any:
    torch, _ = import_timm()
    return torch.from_numpy(np.ascontiguousarray(np.float32(images).transpose(0, 3, 1, 2)))


def _logits(network: Any, images: np.ndarray) -> np.ndarray:
    torch, _ = import_timm()
    with torch.no_grad():
        parts = [
            network(_nchw(images[start : start + _BATCH])).numpy()
            for start in range(0, len(images), _BATCH)
        ]
    return np.concatenate(parts)


def _accumulate_gradients(network: Any, images: np.ndarray, labels: np.ndarray) -> None:
    """Leave the sum over batches of the mean cross-entropy's gradient in the network."""
    torch, _ = import_timm()
    targets = torch.from_numpy(np.int64(labels))
    for start in range(0, len(images), _BATCH):
        batch = slice(start, start + _BATCH)
        loss = torch.nn.functional.cross_entropy(network(_nchw(images[batch])), targets[batch])
        loss.backward()


def _attentions(network: Any) -> list[Any]:
    return [module for module in network.modules() if hasattr(module, "qkv")]


def _blocks(network: Any) -> list[Any]:
    return [m for m in network.modules() if hasattr(m, "attn") and hasattr(m, "mlp")]


def _ignored(network: Any, embedding: str) -> list[Any]:
    """What must keep its outputs: classifiers, and all that writes to a whole residual stream."""
    torch, _ = import_timm()
    heads = ("head", "head_dist")
    kept = [module for name, module in network.named_children() if name in heads]
    kept += [p for name, p in network.named_parameters() if name.endswith("bias_table")]
    if embedding == "whole":
        writers = ("patch_embed.proj", "attn.proj", "mlp.fc2", "downsample.reduction")
        kept += [module for name, module in network.named_modules() if name.endswith(writers)]
    return [m for m in kept if not isinstance(m, torch.nn.Identity)]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    torch, _ = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class _Pruner:
    """Torch-Pruning on one network: says what any ratio would leave, and prunes once.

    Groups and scores do not depend on the ratio and are computed once.
    """

    def __init__(self, network: Any, dense: TransformerConfig, method: str, embedding: str):
        import torch_pruning as tp

        torch, _ = import_timm()
        self._network, self._dense = network, dense
        size, channels = dense.image_size, dense.in_channels
        unwrapped = ("pos_embed", "cls_token", "dist_token", "gamma", "bias_table")
        parameters = network.named_parameters()
        self._pruner = tp.pruner.BasePruner(
            network,
            (torch.zeros(1, channels, size, size),),
            importance=_Once(getattr(tp.importance, _METHODS[method].importance)()),
            global_pruning=True,
            isomorphic=_METHODS[method].isomorphic,
            ignored_layers=_ignored(network, embedding),
            num_heads={module.qkv: module.num_heads for module in _attentions(network)},
            # The defaults are dicts that all pruners of a process share.
            in_channel_groups={},
            out_channel_groups={},
            unwrapped_parameters=[(p, p.ndim - 1) for n, p in parameters if n.endswith(unwrapped)],
        )
        graph = self._pruner.DG
        groups = list(graph.get_all_groups(self._pruner.ignored_layers))
        graph.get_all_groups = lambda **_: iter(groups)
        # The random method draws its scores here.
        self.config_at(0.5)

    def _step(self, ratio: float) -> Iterator[Any]:
        self._pruner.reset()
        self._pruner.per_step_pruning_ratio = [0.0, ratio]
        return self._pruner.step(interactive=True)

    def config_at(self, ratio: float) -> TransformerConfig:
        """The widths that a ratio would leave; nothing is pruned yet."""
        removed: dict[Any, int] = {}
        for group in self._step(ratio):
            for dependency, indices in group:
                if self._pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                    removed[dependency.target.module] = len(indices)
        return _config(self._network, self._dense, removed)

    def prune(self, ratio: float) -> TransformerConfig:
        """Prune the network itself, and say what it is now."""
        for group in self._step(ratio):
            group.prune()
        self._network.zero_grad(set_to_none=True)
        for module in _attentions(self._network):
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
            module.scale = module.head_dim**-0.5
        return _config(self._network, self._dense, {})


class _Once:
    """An importance that scores every group once."""

    def __init__(self, importance: Callable[[Any], Any]):
        self._importance = importance
        self._scores: dict[Any, Any] = {}

    def __call__(self, group: Any) -> Any:
        root = group[0].dep
        key = (root.target.module, root.handler)
        if key not in self._scores:
            self._scores[key] = self._importance(group)
        return self._scores[key]


def _config(
    network: Any, dense: TransformerConfig, removed: Mapping[Any, int]
) -> TransformerConfig:
    """The widths of a timm network once so many outputs of its layers are removed."""
    blocks = []
    for block in _blocks(network):
        qkv, fc1, heads = block.attn.qkv, block.mlp.fc1, block.attn.num_heads
        dim = (qkv.out_features - removed.get(qkv, 0)) // (3 * heads)
        blocks.append(BlockConfig(heads, dim, dim, fc1.out_features - removed.get(fc1, 0)))
    patches = network.patch_embed.proj
    width = patches.out_channels - removed.get(patches, 0)
    return dataclasses.replace(dense, blocks=tuple(blocks), embed_dim=width)


def _ours(network: Any, config: TransformerConfig, dense: Model) -> Model:
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    leaves = flatten(from_timm(config, state, "torch-pruning"))
    # timm scales by the dims that are left, we by those of the dense model: queries make up for it.
    for i, block in enumerate(_blocks(network)):
        factor = np.float32(block.attn.scale * config.block_spec(i).head_dim ** 0.5)
        for path in [path for path in leaves if path[:3] == (f"blocks_{i}", "attn", "q")]:
            leaves[path] = leaves[path] * factor
    return dense.replace(config=config, params=jax.tree.map(jnp.asarray, unflatten(leaves)))


def _search(cost_at: Callable[[float], Cost], limits: Limits, name: str) -> float:
    """The first ratio of the grid that meets the limits, then halving between it and the last.

    Where none does, the grid is refined around the one that came closest.
    """

    def excess(ratio: float) -> float:
        found = cost_at(ratio)
        return max(getattr(found, unit) / max(limit, 1) for unit, limit in limits.items())

    def scan(ratios: Sequence[float]) -> dict[float, float]:
        tried: dict[float, float] = {}
        for ratio in ratios:
            tried[ratio] = excess(ratio)
            if tried[ratio] <= 1:
                break
        return tried

    tried = scan(_GRID)
    if min(tried.values()) > 1:
        nearest = _GRID.index(min(tried, key=tried.__getitem__))
        ends = _GRID[max(nearest - 1, 0)], _GRID[min(nearest + 1, len(_GRID) - 1)]
        tried = scan(np.linspace(*ends, _REFINED).tolist())
    if min(tried.values()) > 1:
        smallest = cost_at(min(tried, key=tried.__getitem__))
        reached = ", ".join(
            f"{unit} {getattr(smallest, unit)} of at most {limit}" for unit, limit in limits.items()
        )
        raise InputError(f"{name}: the budget is out of reach; the smallest reached: {reached}")
    low, high = [0.0, *tried][-2:]
    for _ in range(_HALVINGS if high else 0):
        middle = (low + high) / 2
        if within(cost_at(middle), limits):
            high = middle
        else:
            low = middle
    return high

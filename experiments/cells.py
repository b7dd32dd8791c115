"""The cells of a comparison: which there are, and what each of them depends on."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import ExperimentConfig
from experiments.job import Job
from experiments.methods import PEER, RECOVERIES, Method, find_set
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash
from tapvit_jax.proxy.gmm import GmmConfig
from tapvit_jax.prune.budget import Budget
from tapvit_jax.structs import to_plain
from tapvit_jax.train.finetune import TrainConfig

DENSE = ("per_seed", "shared")

COLUMNS = ("set", "method", "device", "seed", "budget", "epochs")


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is compared; all combinations.

    Attributes:
      methods: by name; see `experiments.methods`.
      sets: metric sets, the first of which the methods are compared on.
      set_methods: names of the methods that see all sets; None is all. Others see the first alone.
      budgets: such as "macs=0.5", bounds of one budget joined by "+".
      devices: their numbers.
      seeds: of the split of the data and everything after it.
      epochs: of fine-tuning; 0 is none.
      dense: "per_seed" splits the data and trains the dense model anew for every seed; "shared"
        does both once, under the config's own seed. A checkpoint is the same model for all seeds.
    """

    methods: Mapping[str, Method]
    sets: tuple[str, ...]
    set_methods: tuple[str, ...] | None
    budgets: tuple[str, ...]
    devices: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: tuple[int, ...] = (0,)
    dense: str = "per_seed"

    def __post_init__(self):
        lists = ("methods", "sets", "budgets", "devices", "seeds", "epochs")
        for name in lists:
            if not getattr(self, name):
                raise InputError(f"--{name} is empty, expected at least one")
        for name in self.sets:
            find_set(name)
        for name, values, known in (
            ("set_methods", self.set_methods or (), self.methods),
            ("dense", (self.dense,), DENSE),
        ):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise InputError(f"--{name} names {unknown[0]!r}, expected {', '.join(known)}")
        for name, method in self.methods.items():
            if method.recipe_changes and not any(self.epochs):
                raise InputError(f"{name} changes how it is fine-tuned, which needs --epochs")
        for text in self.budgets:
            parse_budget(text)

    @property
    def reference(self) -> str:
        """The method that all others are compared with: ours, or the first one."""
        return "ours" if "ours" in self.methods else next(iter(self.methods))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method under one budget on one device's images of one kind.

    Attributes:
      key: hash of everything its result depends on but the contents of files, whatever else is
        compared.
      partners: positions of the cells that are fine-tuned with it in one program.
    """

    method: str
    set: str
    device: int
    seed: int
    budget: str
    epochs: int
    key: str
    partners: tuple[int, ...] = ()

    def labels(self) -> dict[str, Any]:
        """What tells it from the others."""
        return {name: getattr(self, name) for name in COLUMNS}


def parse_budget(text: str) -> Budget:
    """A budget from "macs=0.5" or "macs=0.5+params=0.45".

    Raises:
      InputError: an unknown unit, or a value that is no amount.
    """
    return Budget.parse(text.split("+"))


def as_published(config: ExperimentConfig) -> ExperimentConfig:
    """TAP-ViTs' protocol: leaking splits, full covariances, the likeliest images, its fine-tuning.

    The extractor stays the config's: the published one, a ResNet-18 trained on the same classes, is
    not in this package, and 128 features, as `experiments.protocol` takes, not in every network.
    How units are scored and widths chosen is the methods' part.

    Raises:
      InputError: a partition that cannot leak, for want of a private split.

    Source: TAP-ViTs (arXiv 2601.02437).
    """
    if config.data.partition.private_split is None:
        raise InputError(
            "--mode=as_published needs data.partition.private_split, a split of the source that "
            "devices own; of the config files all but digits.py have one"
        )
    partition = dataclasses.replace(config.data.partition, leaks=True)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, partition=partition),
        gmm=GmmConfig(tuple(range(2, 11)), "full", min_members=1),
        select=dataclasses.replace(config.select, method="top"),
        recover=TrainConfig.as_published(),
        likely_share=None,
    )


def cells_of(config: ExperimentConfig, grid: Grid) -> list[Cell]:
    """All cells, those that share most next to each other.

    Raises:
      InputError: a device that does not exist.
    """
    devices = config.data.partition.num_devices
    for device in grid.devices:
        if device >= devices:
            raise InputError(f"--devices names {device}, expected 0 to {devices - 1}")
    found: list[Cell] = []
    for seed in grid.seeds:
        base = seed_config(config, grid, seed)
        shared = {"job": Job.shared_key(base), "seed": seed}
        for images, (name, method) in itertools.product(grid.sets, grid.methods.items()):
            everywhere = grid.set_methods is None or name in grid.set_methods
            if not (everywhere or images == grid.sets[0]):
                continue
            for epochs in grid.epochs:
                first = len(found)
                for device, budget in itertools.product(grid.devices, grid.budgets):
                    labels = (name, images, device, seed, budget, epochs)
                    own = {
                        "set": images,
                        "device": device,
                        "budget": to_plain(parse_budget(budget)),
                    }
                    own |= shared | _content(base, method, epochs)
                    found.append(Cell(*labels, content_hash(own)))
                # Peers' models have shapes of their own, which no program has in common.
                if epochs and config.recover_together > 1 and method.widths != PEER:
                    found[first:] = _with_partners(found[first:], first, config.recover_together)
    return found


def seed_config(config: ExperimentConfig, grid: Grid, seed: int) -> ExperimentConfig:
    """What the split of the data and the dense model of a seed follow from."""
    return config if grid.dense == "shared" else dataclasses.replace(config, seed=seed)


def _content(config: ExperimentConfig, method: Method, epochs: int) -> dict[str, Any]:
    """What a method and its fine-tuning add to a cell's identity."""
    plain = to_plain(method)
    # Whatever was changed is in how it prunes, or in its recipe.
    del plain["changes"]
    content = {"method": plain, "prune": to_plain(method.prune(config.prune))}
    content["recover"] = to_plain(RECOVERIES[method.recover])
    if epochs:
        content["recipe"] = method.recipe(config.recover, epochs).identity()
        content |= {"recover_on": config.recover_on, "likely_share": config.likely_share}
    return content


def _with_partners(cells: Sequence[Cell], first: int, size: int) -> list[Cell]:
    """Join cells of one method, set, seed and recipe: no other list changes who they are."""
    result = []
    for start in range(0, len(cells), size):
        members = cells[start : start + size]
        partners = tuple(range(first + start, first + start + len(members)))
        keys = [member.key for member in members]
        result += [
            # Who is fine-tuned beside it changes the last bits of its result.
            dataclasses.replace(cell, partners=partners, key=content_hash([cell.key, keys]))
            for cell in members
        ]
    return result

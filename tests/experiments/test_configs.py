"""Configs for whole data sets: all of them load, and small versions of them run to the end."""

import dataclasses
import json
import sys
import typing

import numpy as np
import pytest
from PIL import Image

import tapvit_jax as tap
from configs import cifar100, imagenet, tiny_imagenet
from experiments import protocol
from experiments.config import ExperimentConfig, read
from experiments.methods import SETS
from experiments.run import Experiment
from experiments.sweep import resolve
from tapvit_jax.data.partition import PartitionConfig, partition
from tapvit_jax.errors import InputError
from tapvit_jax.importance.layers import LayerConfig
from tapvit_jax.pipeline import PruneConfig
from tapvit_jax.prune.allocate import AllocateConfig, RoundTo, check_budget
from tapvit_jax.prune.budget import Budget
from tapvit_jax.train.finetune import TrainConfig

MODULES = {"tiny_imagenet": tiny_imagenet, "cifar100": cifar100, "imagenet": imagenet}
CLASSES = {"tiny_imagenet": 200, "cifar100": 100, "imagenet": 1000}
# Models that differ from each other in what those of the configs do.
SMALL = {
    "deit_tiny": {"patch_size": 16, "depth": 1, "num_heads": 1, "embed_dim": 8},
    "deit_small": {"patch_size": 16, "depth": 1, "num_heads": 2, "embed_dim": 16},
    "deit_base": {"patch_size": 16, "depth": 1, "num_heads": 4, "embed_dim": 32},
    "swin_tiny": {"depths": (2, 1), "num_heads": (1, 2), "embed_dim": 8, "window_size": 2},
    "swin_small": {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 8, "window_size": 2},
}


@pytest.mark.parametrize("mode", protocol.MODES)
@pytest.mark.parametrize("model", protocol.MODELS)
@pytest.mark.parametrize("name", MODULES)
def test_every_config_loads_and_its_budgets_can_be_met(name, model, mode):
    config = read(MODULES[name].get_config(f"{model},images,weights.safetensors,{mode}"))
    assert (config.data.source, config.dense.weights) == ("images", "weights.safetensors")
    assert (config.select.metric_count, config.select.finetune_count) == (640, 6400)
    assert config.data.partition.leaks == (mode == "as_published")
    network = config.dense.network(config.data.preprocess, CLASSES[name])
    for share, text in zip((0.9, 0.8, 0.7, 0.6, 0.5), config.budgets, strict=True):
        assert Budget.parse(text).encoder_params == share
        check_budget(network, Budget.parse(text), config.prune.allocate)
    assert len(resolve(config, MODULES[name].sweep(config))) == 50


def test_as_published_is_the_authors_recipe():
    config = read(tiny_imagenet.get_config("deit_small,,,as_published"))
    assert config.prune == PruneConfig.as_published()
    assert config.recover == TrainConfig.as_published()
    assert config.compensate.method == "none"
    assert config.select.method == "top"
    assert config.gmm.covariance_type == "full"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("resnet", "model is 'resnet', expected deit_tiny"),
        ("deit_tiny,a,b,honestly", "mode is 'honestly', expected honest"),
        ("deit_tiny,a,b,honest,c", "expected MODEL"),
    ],
)
def test_bad_arguments_are_named(argument, message):
    with pytest.raises(InputError, match=message):
        imagenet.get_config(argument)


def test_published_splits_leak_and_others_do_not():
    labels = np.tile(np.arange(4), 30)
    splits = np.where(np.arange(120) < 80, "train", "val")
    config = PartitionConfig(num_devices=2, private_split="val", leaks=True)
    found = partition(labels, config, 0, splits)
    np.testing.assert_array_equal(found.public_pool, np.arange(80))
    for split in found.devices:
        np.testing.assert_array_equal(split.private_train, split.private_test)
        assert len(split.private_test) == 20
    honest = partition(labels, dataclasses.replace(config, leaks=False), 0, splits)
    whole = np.concatenate(list(honest.parts().values()))
    assert len(set(whole)) == len(whole) == 120
    with pytest.raises(InputError, match="needs private_split"):
        PartitionConfig(leaks=True)


def photographs(rng, count):
    """Images whose colour says something about their class."""
    return [
        Image.fromarray(rng.integers(60 * (i % 4), 60 * (i % 4) + 70, (32, 32, 3), dtype=np.uint8))
        for i in range(count)
    ]


def write_tiny_imagenet(root, rng):
    """Four classes in Tiny-ImageNet's layout."""
    names = [f"n{i:08}" for i in range(4)]
    root.mkdir()
    (root / "wnids.txt").write_text("\n".join(names))
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, image in enumerate(photographs(rng, 80)):
        folder = root / "train" / names[i % 4] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.JPEG")
    for i, image in enumerate(photographs(rng, 32)):
        image.save(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{names[i % 4]}\t0\t0\t31\t31")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))


def write_cifar100(root, rng):
    """CIFAR-100's binary layout, four of its classes."""
    root.mkdir()
    (root / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)))
    (root / "coarse_label_names.txt").write_text("\n".join(f"group{i}" for i in range(20)))
    for name, count in (("train.bin", 80), ("test.bin", 32)):
        records = [
            bytes([0, i % 4]) + np.asarray(image).transpose(2, 0, 1).tobytes()
            for i, image in enumerate(photographs(rng, count))
        ]
        (root / name).write_bytes(b"".join(records))


def write_folders(root, rng):
    """ImageNet's layout: train and val, a folder a class."""
    for split, count in (("train", 80), ("val", 32)):
        for i, image in enumerate(photographs(rng, count)):
            folder = root / split / f"n{i % 4:08}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.JPEG")


def small_config(name, argument, devices=1, **extractor):
    """A config on 32 pixels, few images and one epoch."""
    config = MODULES[name].get_config(argument)
    config.data.preprocess.image_size = 32
    config.data.partition.num_devices = devices
    config.data.partition.validation_fraction = 0.2
    config.dense.arguments = SMALL[argument.split(",")[0]]
    for recipe in (config.dense.train, config.extractor_train, config.recover):
        recipe.epochs, recipe.batch_size = 1, 16
    config.extractor.update({"dim": 4, **extractor})
    config.gmm.update({"components": (1, 2), "min_members": 1, "restarts": 1})
    config.select.update({"metric_count": 16, "finetune_count": 32})
    config.prune.batch_size = 16
    return config


# Every device compiles programs of its own: one data set is enough to have two.
RUNS = {
    "tiny_imagenet": (
        write_tiny_imagenet,
        "deit_tiny",
        "as_published",
        2,
        {"kind": "backbone", "depth": 1},
    ),
    "cifar100": (
        write_cifar100,
        "deit_small",
        "honest",
        1,
        {"kind": "embedding", "widths": (4, 4), "embed_dim": 8},
    ),
    "imagenet": (write_folders, "swin_tiny", "honest", 1, {"kind": "pooled"}),
}


def config_types(kind=ExperimentConfig):
    """All dataclasses below a config, itself included."""
    found = {kind}
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= config_types(part)
    return found


def watch(monkeypatch, kinds):
    """Note which fields of some dataclasses are read, other than to check, copy or compare them."""
    read_fields = set()

    def spy(self, name):
        caller = sys._getframe(1).f_code
        copied = caller.co_filename.endswith(("structs.py", "dataclasses.py"))
        generated = caller.co_filename.startswith("<")
        if not (copied or generated or caller.co_name == "__post_init__"):
            read_fields.add((type(self), name))
        return object.__getattribute__(self, name)

    for kind in kinds:
        monkeypatch.setattr(kind, "__getattribute__", spy)
    return read_fields


def test_small_versions_run_and_read_every_field(tmp_path, monkeypatch):
    kinds = config_types()
    read_fields = watch(monkeypatch, kinds)
    rng = np.random.default_rng(0)
    for name, (write, model, mode, devices, extractor) in RUNS.items():
        write(tmp_path / name, rng)
        plain = small_config(name, f"{model},{tmp_path / name},,{mode}", devices, **extractor)
        if name == "cifar100":
            plain.recover.feature_distill = 0.1
            plain.prune.allocate.update({"widths": "global", "per_cost": True, "normalize": True})
        if name == "imagenet":
            # Compiling the closed form for every block's shape takes as long as all else.
            plain.compensate.method = "none"
        experiment = Experiment(read(plain), tmp_path / f"run-{name}", True)
        results = experiment.run()
        assert len(results["devices"]) == devices
        # As published the epoch is chosen on what is reported, whatever images a device gets.
        private = experiment.job.parts.devices[0].private_test
        for kind in SETS:
            validation = experiment.job.image_sets(0, kind).validation
            assert np.isin(validation, private).all() == (mode == "as_published")
        for row in results["devices"]:
            assert row["cost"]["encoder_params"] <= row["limits"]["encoder_params"]
            assert 0 <= row["variants"]["selected"]["recovered"] <= 1
            workdir = tmp_path / f"run-{name}"
            small_one, dense = (tap.load(workdir / p) for p in (row["model"], "models/dense"))
            assert tap.cost(small_one.config).macs < tap.cost(dense.config).macs
            assert small_one.prior == (name == "cifar100") and not dense.prior
            assert small_one.architecture == dense.architecture == experiment.config.dense.model
            if name == "imagenet":
                assert small_one.config.depths == dense.config.depths == (2, 1)
                assert row["cost"]["encoder_params"] >= 0.98 * row["limits"]["encoder_params"]
                assert tap.Extractor.load(workdir / "extractor").kind == "pooled"
        page = (tmp_path / f"run-{name}" / "report.html").read_text()
        assert ("splits leak" in page) == (mode == "as_published")
    # The other ways to deal out images, to probe and to round.
    labels = np.tile(np.arange(4), 50)
    for kind in ("overlap", "shards", "dirichlet", "iid"):
        partition(labels, PartitionConfig(kind, num_devices=2, classes_per_device=2), 0)
    probes = LayerConfig(recovery="ridge", max_batches=1, recovery_batches=3)
    assert probes.batches_read == 3
    AllocateConfig(round_to=RoundTo.parse("mlp=8,qk=4,vo=4"), coupled=True)
    AllocateConfig(round_to=RoundTo.parse("8")).step("mlp")
    declared = {(kind, field.name) for kind in kinds for field in dataclasses.fields(kind)}
    unread = sorted(f"{kind.__name__}.{name}" for kind, name in declared - read_fields)
    # Only sweeps fine-tune together.
    assert unread == ["ExperimentConfig.recover_together"]


def test_comparisons_as_published_run_from_arguments_to_report(programs, tmp_path):
    write_tiny_imagenet(tmp_path / "images", np.random.default_rng(0))
    (tmp_path / "config.py").write_text(
        "from tests.experiments.test_configs import small_config\n"
        "def get_config(argument):\n"
        "    return small_config('tiny_imagenet', argument, kind='backbone', depth=1)\n"
    )
    arguments = [f"--config={tmp_path / 'config.py'}:deit_tiny,{tmp_path / 'images'}"]
    arguments += ["--mode=as_published", "--methods=tap_published", "--sets=selected"]
    arguments += ["--budgets=encoder_params=0.7", "--epochs=0,1", f"--workdir={tmp_path / 'run'}"]
    found = programs.run("experiments.compare", *arguments)
    assert found.returncode == 0, found.stderr
    results = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert [row["epochs"] for row in results["rows"]] == [0, 1]
    assert all(row["test_images"] == 32 for row in results["rows"])
    config = results["config"]
    assert results["mode"] == "as_published" and config["data"]["partition"]["leaks"]
    assert (config["gmm"]["covariance_type"], config["select"]["method"]) == ("full", "top")
    assert "comparison (as_published)" in (tmp_path / "run" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("name", "model"),
    [(n, m) for n, run in RUNS.items() for m in protocol.MODELS if m != run[1]],
)
def test_the_other_models_run_on_every_data_set(tmp_path, name, model):
    RUNS[name][0](tmp_path / "images", np.random.default_rng(0))
    config = small_config(name, f"{model},{tmp_path / 'images'}", kind="pooled")
    if "swin" in model:  # as above
        config.compensate.method = "none"
    (row,) = Experiment(read(config), tmp_path / "run", True).run()["devices"]
    assert row["cost"]["encoder_params"] <= row["limits"]["encoder_params"]
    assert 0 <= row["variants"]["selected"]["recovered"] <= 1
    small, dense = (tap.load(tmp_path / "run" / p) for p in (row["model"], "models/dense"))
    assert tap.cost(small.config).macs < tap.cost(dense.config).macs
    assert small.config.num_classes == (100 if name == "cifar100" else 4)


def test_a_field_that_nothing_reads_would_be_noticed(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Options:
        used: int = 1
        dead: int = 2

        def __post_init__(self):
            assert self.dead > 0

    read_fields = watch(monkeypatch, {Options})
    options = dataclasses.replace(Options(), used=3)
    assert options == Options(3)
    assert options.used == 3
    assert read_fields == {(Options, "used")}

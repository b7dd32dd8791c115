"""The main job on tiny shapes, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import tapvit_jax as tap
from configs import digits, tiny_imagenet_40, tiny_imagenet_40_swin
from experiments import job, preparation
from experiments.config import read
from experiments.methods import image_sets
from experiments.run import Experiment
from tapvit_jax.errors import InputError
from tapvit_jax.models import backbone
from tapvit_jax.models.params import flatten
from tapvit_jax.models.vit import vit_config
from tapvit_jax.progress import Progress
from tapvit_jax.prune.latency import FEATURES, LatencyModel
from tapvit_jax.prune.mask import Plan
from tapvit_jax.prune.reshape import reshaped_config
from tapvit_jax.stages import Stages
from tapvit_jax.structs import to_plain

ROOT = Path(__file__).parents[2]


def tiny():
    """The digits config, shrunk until it runs in seconds; everything it does is still done."""
    config = digits.get_config()
    config.dense.arguments.update({"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4})
    config.dense.train.epochs = 2
    config.extractor.update({"widths": (4,), "embed_dim": 8, "dim": 4})
    config.extractor_train.epochs = 1
    config.gmm.components = (1, 2)
    config.select.update({"metric_count": 32, "finetune_count": 64})
    config.recover.epochs = 1
    config.data.partition.num_devices = 2
    config.comparisons = ("pool", "random")
    config.budgets = ("macs=0.5", "macs=0.4,params=0.45")
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "digits"
    return Experiment(read(tiny()), workdir, quiet=True).run(), workdir


def test_every_promised_file_is_there(finished):
    results, workdir = finished
    assert json.loads((workdir / "results.json").read_text())["seed"] == 0
    assert (workdir / "results.csv").read_text().count("\n") == 3
    assert (workdir / "report.html").stat().st_size > 10_000
    assert results["config"] == json.loads((workdir / "config.json").read_text())
    for row in results["devices"]:
        payload = workdir / "payloads" / f"device_{row['device']}.gmm"
        assert payload.stat().st_size == row["payload_bytes"] < 20_000
        assert tap.load(workdir / row["model"]).history["budget"] == row["budget"]


def test_keep_ratios_count_heads_and_branches_that_are_gone():
    config = vit_config(
        image_size=8, patch_size=4, num_classes=2, depth=2, num_heads=4, embed_dim=8
    )
    keep = {"blocks_0/head": np.array([True, False, False, True])}
    keep |= {"blocks_1/attn_branch": np.array(False)}
    found = job.keep_ratios(Plan(config, keep))
    assert found == {"mlp": [1.0, 1.0], "qk": [0.5, 0.0], "vo": [0.5, 0.0]}


def test_budgets_on_latency_take_a_table(tmp_path):
    config = tiny()
    config.budgets, config.comparisons, config.recover.epochs = ("latency=0.7",), (), 0
    config.data.partition.num_devices = 1
    with pytest.raises(InputError, match="needs a latency model"):
        Experiment(read(config), tmp_path / "without", quiet=True).run()
    plain = read(config)
    dense = plain.dense.network(plain.data.preprocess, 10)
    # A microsecond for a thousand MACs of the dense layers, and a little for all else.
    coefficients = tuple(1e3 if name.endswith("macs") else 1e-4 for name in FEATURES)
    table = LatencyModel(dense, coefficients, 1, 1, 0.0, 0.0, (), {})
    table.save(tmp_path / "latency.json")
    config.latency_table = str(tmp_path / "latency.json")
    (row,) = Experiment(read(config), tmp_path / "with", quiet=True).run()["devices"]
    assert row["limits"] == {"latency_ms": pytest.approx(0.7 * table.predict(dense))}
    assert 0 < row["cost"]["latency_ms"] <= row["limits"]["latency_ms"]
    small = tap.load(tmp_path / "with" / row["model"])
    assert row["cost"]["latency_ms"] == pytest.approx(table.predict(small.config))


def test_budgets_are_kept_and_costs_are_those_of_the_saved_model(finished):
    results, workdir = finished
    for row in results["devices"]:
        small = tap.load(workdir / row["model"])
        assert dataclasses.asdict(tap.cost(small.config)) == row["cost"]
        for unit, limit in row["limits"].items():
            assert row["cost"][unit] <= limit


def test_accuracies_are_those_of_the_saved_models(finished):
    results, workdir = finished
    config = read(tiny())
    made = job.Job(config, Stages(workdir / "stages"), workdir, Progress(1, quiet=True))
    for row in results["devices"]:
        test = made.parts.devices[row["device"]].private_test
        images = made.source.load(test, config.data.preprocess)
        answers = np.asarray(tap.load(workdir / row["model"]).apply(images)).argmax(axis=1)
        accuracy = (answers == made.files.labels[test]).mean()
        assert accuracy == pytest.approx(row["variants"]["selected"]["recovered"])


def test_both_comparisons_are_made_under_the_same_budget(finished):
    results, workdir = finished
    config = read(tiny())
    made = job.Job(config, Stages(workdir / "stages"), workdir, Progress(1, quiet=True))
    for d, row in enumerate(results["devices"]):
        assert set(row["variants"]) == {"selected", "pool", "random"}
        for name, accuracies in row["variants"].items():
            plan = made.plan("", d, image_sets(made, d, name), config.prune, config.budget(d))
            found = dataclasses.asdict(tap.cost(reshaped_config(plan.value)))
            assert all(found[unit] <= limit for unit, limit in row["limits"].items())
            test = made.parts.devices[d].private_test
            assert made.top1(made.pruned(plan), test) == accuracies["pruned"]
    # These are the plans of the run.
    assert made.stages.computed == []


def test_a_second_run_computes_nothing_again(finished, monkeypatch):
    results, workdir = finished

    def refuse(*arguments, **options):
        raise AssertionError("training again")

    monkeypatch.setattr(preparation, "train", refuse)
    monkeypatch.setattr(job, "train", refuse)
    config = tiny()
    # How often a state is kept changes no result.
    for options in (config.dense.train, config.extractor_train, config.recover):
        options.update({"checkpoint_epochs": 3, "checkpoint_steps": 2})
    again = Experiment(read(config), workdir, quiet=True).run()
    for row, other in zip(results["devices"], again["devices"], strict=True):
        assert row["variants"] == other["variants"]


def test_a_killed_run_continues_to_the_same_result(finished, tmp_path, monkeypatch):
    results, _ = finished
    real, calls = job.train, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(preparation, "train", interrupted)
    monkeypatch.setattr(job, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Experiment(read(tiny()), tmp_path / "run", quiet=True).run()
    again = Experiment(read(tiny()), tmp_path / "run", quiet=True).run()
    for row, other in zip(results["devices"], again["devices"], strict=True):
        assert row["variants"] == other["variants"]
        assert row["cost"] == other["cost"]


def test_a_work_directory_of_another_config_is_refused(finished):
    _, workdir = finished
    config = tiny()
    config.seed = 7
    with pytest.raises(InputError, match=r"seed \(0 there, 7 here\)"):
        Experiment(read(config), workdir, quiet=True)


def test_an_infeasible_budget_is_refused_before_any_work(tmp_path):
    config = tiny()
    config.budgets = ("macs=0.0001",)
    with pytest.raises(InputError, match="smallest feasible"):
        Experiment(read(config), tmp_path / "run", quiet=True).run()
    assert not (tmp_path / "run" / "stages").exists()


def test_the_backbone_can_be_the_extractor(tmp_path):
    config = tiny()
    config.extractor = {"kind": "backbone", "depth": 1, "dim": 4}
    config.comparisons = ()
    config.data.partition.update({"num_devices": 1})
    results = Experiment(read(config), tmp_path / "run", quiet=True).run()
    assert len(results["devices"]) == 1
    dense = tap.load(tmp_path / "run" / "models" / "dense")
    found = tap.Extractor.load(tmp_path / "run" / "extractor")
    assert (found.kind, found.dim, len(found.network.blocks)) == ("backbone", 4, 1)
    assert len(dense.config.blocks) == 2
    own, whole = flatten(found.params), flatten(dense.params)
    for path, leaf in own.items():
        np.testing.assert_array_equal(leaf, whole[path])


def test_the_reshaped_model_can_be_recovered(finished, tmp_path):
    config = tiny()
    config.recover_on = "reshaped"
    # Every reshaped model compiles its own training step.
    config.comparisons = ()
    results = Experiment(read(config), tmp_path / "run", quiet=True).run()
    for row, other in zip(finished[0]["devices"], results["devices"], strict=True):
        assert row["cost"] == other["cost"]
        found, expected = other["variants"]["selected"], row["variants"]["selected"]
        # Masked and reshaped training are the same arithmetic in another order.
        assert found["pruned"] == expected["pruned"]
        assert found["recovered"] == pytest.approx(expected["recovered"], abs=0.05)


def test_weights_are_loaded_instead_of_trained(tmp_path):
    config = tiny()
    config.comparisons = ()
    shapes = read(config).dense.network(read(config).data.preprocess, 10)
    params = backbone.init(shapes, jax.random.key(9))
    tap.save_timm(tmp_path / "weights.safetensors", shapes, params)
    config.dense.weights = str(tmp_path / "weights.safetensors")
    Experiment(read(config), tmp_path / "run", quiet=True).run()
    dense = tap.load(tmp_path / "run" / "models" / "dense")
    np.testing.assert_array_equal(dense.params["head"]["kernel"], params["head"]["kernel"])


def test_weights_of_other_classes_are_trained_behind_a_new_classifier(tmp_path, monkeypatch):
    config = tiny()
    shapes = read(config).dense.network(read(config).data.preprocess, 7)
    params = backbone.init(shapes, jax.random.key(9))
    config.dense.update({"new_classifier": True, "weights": str(tmp_path / "a.safetensors")})
    tap.save_timm(tmp_path / "a.safetensors", shapes, params)

    def dense_of(name):
        stages = Stages(tmp_path / name / "stages")
        return job.Job(read(config), stages, tmp_path / name, Progress(1, quiet=True)).dense

    found = dense_of("run")
    assert found.history["weights"]["file"] == "a.safetensors"
    assert np.ptp(found.params["head"]["kernel"]) > 0
    moved = np.abs(found.params["pos_embed"] - params["pos_embed"]).max()
    assert 0 < moved < np.abs(params["pos_embed"]).max()
    # The same file elsewhere is the same start: nothing is trained again.
    (tmp_path / "b").mkdir()
    tap.save_timm(tmp_path / "b" / "a.safetensors", shapes, params)
    config.dense.weights = str(tmp_path / "b" / "a.safetensors")
    with monkeypatch.context() as patch:
        patch.delattr(preparation, "train")
        again = dense_of("run")
    np.testing.assert_array_equal(again.params["head"]["kernel"], found.params["head"]["kernel"])
    # Untrained, all but the classifier is the checkpoint's.
    config.dense.train.epochs = 0
    start = dense_of("none")
    assert not start.params["head"]["kernel"].any() and start.config.num_classes == 10
    np.testing.assert_array_equal(start.params["pos_embed"], params["pos_embed"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": {"new_classifier": True}}, "config.dense: new_classifier is True, expected wei"),
        ({"sede": 1}, "unknown field config.sede: did you mean seed"),
        ({"seed": 2**31}, "config: seed is 2147483648, expected 0 to 2147483647"),
        ({"latency_batch": 0}, "config: latency_batch is 0, expected 1 or more"),
        ({"budgets": ()}, "at least one"),
        ({"budgets": ("macs=2.0",)}, "at most 1.0"),
        ({"extractor": {"dim": 2.5}}, "config.extractor.dim is 2.5, expected int"),
        ({"comparisons": ("oracle",)}, "expected one of"),
    ],
)
def test_bad_configs_are_refused(change, message):
    config = digits.get_config()
    with config.ignore_type():
        config.update(change)
    with pytest.raises(InputError, match=message):
        read(config)


@pytest.mark.parametrize(
    "config",
    [
        digits.get_config(),
        tiny_imagenet_40.get_config("data,weights.safetensors"),
        tiny_imagenet_40_swin.get_config("data"),
    ],
)
def test_shipped_configs_are_valid(config):
    found = read(config)
    assert found.data.partition.num_devices >= 4
    assert len(set(found.budgets)) >= 4
    assert to_plain(found)["name"] == config.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py", "--config.foo=1"], "error: --config: has no field 'foo'\n"),
        (
            ["--config=configs/digits.py", "--config.gmm.componets=1"],
            "error: --config: has no field 'componets'; Did you mean \"components\"",
        ),
        (["--config=configs/digits.py", "--sets=pool"], "error: Unknown command line flag 'sets'"),
        (["--config=configs/tiny_imagenet.py:a", "--workdir=w"], "file: 'a': model is 'a', exp"),
        (["--config=configs/missing.py", "--workdir=w"], "missing.py"),
        (["--config=configs/digits.py"], "--workdir is missing"),
        (["--config=configs/digits.py", "--workdir=w", "seed=1"], "unexpected argument 'seed=1'"),
    ],
)
def test_bad_arguments_end_with_one_line_and_exit_code_2(programs, arguments, message):
    found = programs.run("experiments.run", *arguments)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert message in found.stderr
    assert not (ROOT / "w").exists()


@pytest.mark.parametrize("name", ["run", "sweep", "compare", "membership"])
def test_help_names_what_every_program_needs(programs, name):
    found = programs.run(f"experiments.{name}", "--help")
    assert "\n  --config: " in found.stdout and "\n  --workdir: " in found.stdout, found.stderr

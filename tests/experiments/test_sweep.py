"""Grids: what units are and share, what fails, and what workers, kills and full disks change."""

import collections
import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from configs import digits, tiny_imagenet_40, tiny_imagenet_40_swin
from experiments import joined, report
from experiments.cells import Grid
from experiments.compare import Comparison
from experiments.config import ExperimentConfig, grid, identity, read
from experiments.job import Job
from experiments.methods import find_methods, image_sets
from experiments.preparation import Found
from experiments.sweep import Sweep, default_grid, print_status, resolve
from tapvit_jax import files
from tapvit_jax.errors import InputError
from tapvit_jax.files import WriteError, file_lock, write_json
from tapvit_jax.importance.criteria import CRITERIA
from tapvit_jax.importance.neurons import NeuronConfig
from tapvit_jax.pipeline import PruneConfig, score
from tapvit_jax.progress import Progress
from tapvit_jax.prune.allocate import allocate as allocate_by
from tapvit_jax.prune.recover import RecoverConfig
from tapvit_jax.stages import claim_workdir, write_row
from tapvit_jax.structs import from_plain, to_plain
from tests.experiments import tiny_sweep

IMPOSSIBLE = {"device": 1, "budget": "macs=0.0001", "recovery": "none"}


def tiny() -> ExperimentConfig:
    return read(tiny_sweep.get_config())


def units(overrides, config=None):
    return resolve(config or tiny(), overrides)


def counts(sweep):
    return collections.Counter(sweep.stages.computed)


def rows(workdir):
    """Everything but times."""
    results = json.loads((workdir / "results.json").read_text())
    for row in results["units"]:
        del row["latency_ms"]
    return results


def checksums(workdir):
    """Of the arrays of all finished stages but times."""
    return {
        path.parent.name: json.loads(path.read_text())["sha256"]
        for path in (workdir / "stages").glob("*/stage.json")
        if not path.parent.name.startswith("latency-")
    }


# What a grid may say.


def test_a_grid_holds_all_combinations_the_first_field_slowest():
    found = grid({"seed": (0, 1), "device": range(2)})
    assert [tuple(unit.values()) for unit in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert set(found[0]) == {"seed", "device"}


def test_overrides_reach_the_config():
    overrides = {
        "device": 1,
        "budget": "params=0.4",
        "criterion": "tap_published",
        "recovery": "none",
        "seed": 7,
        "prune.neurons.loss": "entropy",
        "prune.layers.sparsity": (0.25,),
        "recover.epochs": 3,
        "dense.arguments.depth": 5,
    }
    (unit,) = units([overrides])
    config = unit.config
    assert (unit.device, unit.recovery, str(unit.budget)) == (1, "none", "params=0.4")
    published = NeuronConfig.as_published()
    assert config.prune.neurons == dataclasses.replace(
        published, loss="entropy", max_batches=tiny().prune.neurons.max_batches
    )
    assert config.prune.layers.sparsity == (0.25,)
    assert (config.seed, config.recover.epochs, config.dense.arguments["depth"]) == (7, 3, 5)
    assert config.data == tiny().data


def test_any_criterion_of_the_registry_can_rank_the_units():
    found = units(grid({"device": (0,), "criterion": tuple(CRITERIA)}))
    assert len({unit.key for unit in found}) == len(CRITERIA)
    base = tiny().prune
    for unit, name in zip(found, CRITERIA, strict=True):
        neurons, own = unit.config.prune.neurons, name in ("tap", "tap_published")
        assert neurons.max_batches == base.neurons.max_batches
        assert unit.config.prune.criterion == (None if own else name)
        assert unit.config.prune.layers == base.layers and (own or neurons == base.neurons)
    # Fields of a unit count together, whatever stands in the config.
    coupled = dataclasses.replace(tiny(), prune=PruneConfig.as_published())
    heads = {"device": 0, "criterion": "tap", "prune.layers.attention": "heads"}
    with pytest.raises(InputError, match=r"unit 0: config.*allocate\.attention is 'dims'"):
        units([heads | {"prune.layers.ragged": False}], coupled)
    for name in ("tap", "fisher"):
        (unit,) = units([{"device": 0, "criterion": name}], coupled)
        assert unit.config.prune.allocate.coupled


def test_recoveries_choose_the_closed_form_and_fine_tuning():
    options = RecoverConfig("mean", order="parallel", prior="metric")
    config = dataclasses.replace(tiny(), compensate=options)
    expected = {
        "none": ("none", False),
        "mean": ("mean", False),
        "ridge": ("ridge", False),
        "finetune": ("mean", True),
        "finetune_only": ("none", True),
    }
    found = units(grid({"device": (0,), "recovery": tuple(expected)}), config)
    for unit, (method, finetuned) in zip(found, expected.values(), strict=True):
        assert unit.config.compensate == dataclasses.replace(options, method=method)
        assert unit.finetuned == finetuned
    (default,) = units([{"device": 0}], config)
    assert default.key == found[3].key


def test_units_that_differ_have_different_keys_and_others_the_same():
    base = {"device": 0, "budget": "macs=0.5"}
    differing = [
        base,
        base | {"device": 1},
        base | {"budget": "macs=0.4"},
        *({**base, "recovery": name} for name in ("none", "mean", "ridge", "finetune_only")),
        *({**base, "criterion": name} for name in ("taylor", "taylor_squared", "fisher")),
        base | {"seed": 3},
        base | {"prune.batch_size": 32},
    ]
    keys = [unit.key for unit in units(differing)]
    assert len(set(keys)) == len(differing)
    same = units(
        [
            {"device": 0},
            base | {"recovery": "finetune"},
            base | {"data.workers": 2},
            base | {"recover.checkpoint_steps": 2, "dense.train.checkpoint_epochs": 9},
        ]
    )
    config = dataclasses.replace(tiny(), budgets=("macs=0.5",))
    assert {unit.key for unit in same} == {keys[0]} and units([{"device": 0}], config)[0].key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"device": 0, "sede": 1}, "unit 1: unknown field config.sede: did you mean seed?"),
        ({"device": 0, "prune.neuron.loss": "kl"}, "unit 1: unknown field config.prune.neuron"),
        ({"device": 0, "seed.x": 1}, "unit 1: unknown field seed.x: seed has no fields"),
        ({"device": 0, "recover.epochs": "3"}, "unit 1: config.recover.epochs is '3'"),
        ({"device": 2}, "unit 1: device is 2, expected 0 to 1"),
        ({"budget": "macs=0.5"}, "unit 1: device is None, expected 0 to 1"),
        ({"device": 0, "budget": "flops=1"}, "unit 1: .*flops"),
        (
            {"device": 0, "criterion": "magic"},
            "unit 1: criterion is 'magic', expected one of random",
        ),
        ({"device": 0, "recovery": "pray"}, "unit 1: recovery is 'pray', expected one of none, "),
        ([0], r"unit 1: is \[0\], expected a mapping"),
    ],
)
def test_impossible_units_are_refused_by_name(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        units([{"device": 0}, overrides])
    assert "\n" not in str(caught.value)


def test_a_grid_without_units_is_refused():
    with pytest.raises(InputError, match="no units"):
        units([])


def test_default_grid_takes_every_device():
    found = units(default_grid(tiny()))
    assert {unit.device for unit in found} == {0, 1}
    assert len({str(unit.budget) for unit in found}) * 2 == len(found) >= 6


@pytest.mark.parametrize("module", [digits, tiny_imagenet_40, tiny_imagenet_40_swin])
def test_shipped_grids_are_valid(module):
    plain = module.get_config()
    config = read(plain)
    found = units(module.sweep(config), config)
    assert len({unit.key for unit in found}) == len(found) >= 40
    plain.data.partition.num_devices = 2
    fewer = units(module.sweep(read(plain)), read(plain))
    assert {unit.device for unit in fewer} == {0, 1} and len(fewer) == len(found) / 2


def test_partners_follow_from_the_grid():
    config = dataclasses.replace(tiny(), recover_together=3)
    axes = {"device": (0, 1), "budget": ("macs=0.5", "macs=0.4"), "recovery": ("none", "finetune")}
    found = units(grid(axes), config)
    assert [unit.partners for unit in found[1::2]] == [(1, 3, 5), (1, 3, 5), (1, 3, 5), (7,)]
    assert [unit.partners for unit in found[::2]] == [(0,), (2,), (4,), (6,)]
    # Another seed means another dense model, which cannot be in one program with it.
    other = [{"device": 0}, {"device": 0, "seed": 1}, {"device": 1}]
    assert [unit.partners for unit in units(other, config)] == [(0, 2), (1,), (0, 2)]


# What units share.


OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
OPTIONS += ("jax_persistent_cache_min_entry_size_bytes",)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where compiled programs are kept."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    directory = tmp_path_factory.mktemp("compiled")
    tiny_sweep.compile_once(directory)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
    """One unit, then a grid around it."""
    workdir = tmp_path_factory.mktemp("sweep") / "work"
    first = Sweep(tiny(), [{"device": 0, "budget": "macs=0.5", "recovery": "none"}], workdir, True)
    assert first.run() == {}
    axes = {
        "device": (0,),
        "budget": tuple(f"macs={share}" for share in (0.7, 0.6, 0.5, 0.4, 0.3)),
        "recovery": ("none",),
    }
    more = [*grid(axes), {"device": 0, "budget": "macs=0.5"}, IMPOSSIBLE]
    second = Sweep(tiny(), more, workdir, quiet=True)
    return first, second, second.run()


def test_more_budgets_compute_no_shared_stage_again(finished):
    first, second, _ = finished
    assert counts(first) == {
        **dict.fromkeys(("dense", "extractor", "select", "units", "layers", "plan", "latency"), 1),
        **dict.fromkeys(("gmm", "evaluate"), 2),
    }
    # Four plans and models more, one of them recovered, for which the classes' prior is needed;
    # nothing that comes before a budget.
    expected = {"plan": 4, "latency": 4, "evaluate": 6, "compensate": 1, "recover": 1}
    expected |= {"classes": 1, "prior": 1}
    assert counts(second) == expected


def test_a_failing_unit_stops_no_other_and_says_why(finished, capsys):
    _, sweep, failed = finished
    assert list(failed) == [6] and "smallest feasible" in failed[6]
    assert [sweep.status(unit)[0] for unit in sweep.units] == ["done"] * 6 + ["failed"]
    print_status(sweep)
    lines = capsys.readouterr().out.splitlines()
    assert "failed" in lines[6] and "smallest feasible" in lines[6]
    assert lines[-1] == "7 units: 6 done, 1 failed, 0 running, 0 missing"
    results = rows(sweep.workdir)
    assert [row["unit"] for row in results["units"]] == list(range(6))
    assert results["failed"] == [{"unit": 6, "reason": failed[6]}]


def test_units_keep_their_budgets_and_recovery_is_what_was_asked(finished):
    results = rows(finished[1].workdir)["units"]
    for row in results:
        assert row["cost"]["macs"] <= row["limits"]["macs"]
    for row in results[:5]:
        assert row["recovered"] == row["compensated"] == row["pruned"] and row["best_epoch"] == 0
    assert results[5]["cost"] == results[2]["cost"] and results[5]["pruned"] == results[2]["pruned"]
    assert len({results[5][stage] for stage in ("pruned", "compensated", "recovered")}) == 3
    assert results[5]["recovered"] != results[2]["recovered"] and results[5]["best_epoch"] > 0


def test_a_finished_sweep_computes_nothing_and_joins_again(finished):
    _, sweep, failed = finished
    before = rows(sweep.workdir)
    (sweep.workdir / "results.json").unlink()
    again = Sweep(tiny(), [unit.overrides for unit in sweep.units], sweep.workdir, quiet=True)
    assert again.run() == failed and counts(again) == {}
    assert rows(sweep.workdir) == before
    assert not list(sweep.workdir.rglob("*.lock")) and not list(sweep.workdir.rglob("*.partial"))


def test_a_damaged_unit_is_computed_again(finished):
    _, sweep, _ = finished
    before = rows(sweep.workdir)
    path = sweep._path(sweep.units[2], ".json")
    path.write_text(path.read_text()[:40])
    assert sweep.status(sweep.units[2])[0] == "missing"
    assert sweep.run([2]) == {}
    assert rows(sweep.workdir) == before


def test_a_sweep_of_another_config_is_refused_by_field(finished):
    config = dataclasses.replace(tiny(), latency_batch=3)
    sweep = Sweep(config, [{"device": 0}], finished[1].workdir, quiet=True)
    for act in (sweep.run, lambda: print_status(sweep)):
        with pytest.raises(InputError, match=r"latency_batch \(64 there, 3 here\)"):
            act()


def test_the_status_of_no_sweep_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"mistyped/config\.json: no such file"):
        print_status(Sweep(tiny(), [{"device": 0}], tmp_path / "mistyped", quiet=True))
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_units_recovered_in_one_program_are_as_those_recovered_alone(finished, tmp_path):
    # In front, one that is no member: the others' places are not those in the grid.
    overrides = [IMPOSSIBLE | {"recovery": "finetune"}]
    overrides += [{"device": 0, "budget": budget} for budget in ("macs=0.5", "macs=0.3")]
    made, found = [], []
    for most in (1, 3):
        config = dataclasses.replace(tiny(), recover_together=most)
        workdir = tmp_path / str(most)
        # The same stages as far as they do not depend on what is recovered together.
        claim_workdir(workdir, {"program": "experiments.sweep", **to_plain(identity(config))})
        (workdir / "stages").symlink_to(finished[1].workdir / "stages")
        made.append(Sweep(config, overrides, workdir, quiet=True))
        assert list(made[-1].run()) == [0]
        found.append(rows(workdir)["units"])
    assert counts(made[1]) == {"recover_together": 1, "evaluate": 2}
    alone, together = found
    # Else members that changed places would not be noticed.
    assert abs(alone[0]["recovered"] - alone[1]["recovered"]) > 0.04
    for one, other in zip(alone, together, strict=True):
        assert one["best_epoch"] == other["best_epoch"] > 0
        assert math.isclose(one["recovered"], other["recovered"], abs_tol=0.02)


def test_a_unit_that_fails_takes_no_partner_along(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny(), recover_together=3)
    workdir, compensated = tmp_path / "work", Sweep._compensated
    claim_workdir(workdir, {"program": "experiments.sweep", **to_plain(identity(config))})
    (workdir / "stages").symlink_to(finished[1].workdir / "stages")

    def broken(self, job, unit, plan, sets):
        if unit.number == 0:
            raise InputError("cannot be solved")
        found = compensated(self, job, unit, plan, sets)
        if unit.number == 2:
            return found
        params = jax.tree.map(lambda leaf: leaf * np.nan, found.value.params)
        return Found("broken", found.value.replace(params=params))

    monkeypatch.setattr(Sweep, "_compensated", broken)
    overrides = [{"device": 0, "budget": f"macs={share}"} for share in (0.4, 0.3, 0.5)]
    sweep = Sweep(config, overrides, workdir, quiet=True)
    failed = sweep.run()
    assert list(failed) == [0, 1] and failed[0] == "cannot be solved"
    assert failed[1].startswith("the validation loss is nan before training")
    assert counts(sweep)["recover_together"] == 1
    (row,) = rows(workdir)["units"]
    assert row["unit"] == 2 and row["best_epoch"] > 0


def test_recovery_sees_no_more_images_than_criteria_read_at_most(finished):
    _, sweep, _ = finished
    neurons = dataclasses.replace(tiny().prune.neurons, max_batches=1)
    prune = dataclasses.replace(tiny().prune, neurons=neurons, batch_size=20)
    unit = dataclasses.replace(sweep.units[2], config=dataclasses.replace(tiny(), prune=prune))
    job = Job(unit.config, sweep.stages, sweep.workdir / "payloads" / "few", Progress(1.0, True))
    sets, _ = sweep._plan(job, unit)
    # As in a run and a comparison of the same config.
    np.testing.assert_array_equal(sets.metric, image_sets(job, 0, "selected").metric)
    assert len(sets.metric) == 20


def test_layers_are_probed_only_for_widths_that_read_them(finished):
    _, sweep, _ = finished
    allocate = dataclasses.replace(tiny().prune.allocate, widths="global")
    prune = dataclasses.replace(tiny().prune, allocate=allocate)
    unit = dataclasses.replace(sweep.units[2], config=dataclasses.replace(tiny(), prune=prune))
    before = counts(sweep)
    job = Job(unit.config, sweep.stages, sweep.workdir / "payloads" / "few", Progress(1.0, True))
    sets, plan = sweep._plan(job, unit)
    # The scores of units are those of all other widths.
    assert counts(sweep) - before == {"plan": 1}
    units, layers = score(job.dense, job.source, sets.metric, prune)
    assert layers is None
    again = allocate_by(job.dense, units, None, unit.budget, config=allocate)
    for name, kept in plan.value.keep.items():
        np.testing.assert_array_equal(kept, again.keep[name])


def test_fewer_pool_images_than_asked_for_are_refused(tmp_path):
    config = tiny_sweep.get_config()
    config.select.finetune_count = 10_000
    sweep = Sweep(read(config), [{"device": 0}], tmp_path / "work", quiet=True)
    assert "finetune_count is 10000, but the public pool has" in sweep.run()[0]


@pytest.mark.parametrize("changed", ["weights.safetensors", "table.json", "images/a/0.png"])
@pytest.mark.parametrize("program", ["sweep", "compare"])
def test_rows_do_not_outlive_the_files_that_they_came_from(tmp_path, program, changed):
    for name in ("weights.safetensors", "images/a/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"one")
    (tmp_path / "table.json").write_text("1")
    plain = to_plain(tiny()) | {"latency_table": str(tmp_path / "table.json")}
    plain["data"]["source"] = str(tmp_path / "images")
    plain["dense"]["weights"] = str(tmp_path / "weights.safetensors")
    config = from_plain(ExperimentConfig, plain)

    def found():
        if program == "sweep":
            made = Sweep(config, [{"device": 0}], tmp_path / "work", quiet=True)
            return made, made._result(made.units[0])
        methods = find_methods(["random"])
        only = Grid(methods, ("random",), None, ("macs=0.5",), (0,), (0,))
        made = Comparison(config, only, tmp_path / "work", quiet=True)
        return made, made._result(made.cells[0])

    made, before = found()
    if program == "sweep":
        path, key = made._path(made.units[0], ".json"), made.units[0].key
    else:
        path, key = made._path(made.cells[0]), made.cells[0].key
    write_row(path, key, {"top1": 1}, made._files.identity(config))
    assert before is None and found()[1] == {"top1": 1}
    (tmp_path / changed).write_text("22")
    assert found()[1] is None


# Workers and disks.


def test_a_unit_that_another_worker_holds_is_left_to_it(finished):
    _, sweep, _ = finished
    unit = sweep.units[3]
    with file_lock(sweep._path(unit, ".lock")):
        # Done is done, whoever holds the lock.
        assert sweep.status(unit)[0] == "done"
        path = sweep._path(unit, ".json")
        kept = path.read_text()
        path.unlink()
        assert sweep.status(unit)[0] == "running"
        assert not sweep._attempt(unit, {}, wait=False)
        path.write_text(kept)
    assert sweep._attempt(unit, {}, wait=False)


def test_a_failed_unit_is_tried_once_by_workers_of_one_time_and_again_later(tmp_path, monkeypatch):
    overrides = [IMPOSSIBLE, IMPOSSIBLE | {"device": 0}]
    one, other = (Sweep(tiny(), overrides, tmp_path / "work", quiet=True) for _ in "ab")
    tried = []

    def refuse(self, unit):
        tried.append((self is one, unit.number))
        if len(tried) == 1:
            # While the first worker is at the first unit, another takes the second.
            assert list(other.run([1])) == [1]
        raise InputError("too small")

    monkeypatch.setattr(Sweep, "_row", refuse)
    for _ in range(2):
        assert one.run() == {0: "too small", 1: "too small"}
        assert tried == [(True, 0), (False, 1)]
        # A later start tries both again.
        tried.clear()


def test_a_full_disk_stops_the_sweep_and_loses_nothing(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[1].workdir, tmp_path / "work")
    before = rows(workdir)["units"]
    more = [unit.overrides for unit in finished[1].units[:6]]
    more += [
        {"device": 1, "budget": budget, "recovery": "none"} for budget in ("macs=0.5", "macs=0.6")
    ]
    grown = Sweep(tiny(), more, workdir, quiet=True)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(WriteError, match="cannot be written: No space left on device"):
            grown.run()
    assert not list(workdir.rglob("*.partial"))
    assert [grown.status(unit)[0] for unit in grown.units] == ["done"] * 6 + ["missing"] * 2
    assert grown.run([6]) == {}
    assert rows(workdir)["units"][:6] == before and len(rows(workdir)["units"]) == 7


CONFIG = "--config=tests/experiments/tiny_sweep.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work_unit=3"], "--work_unit is 3, expected 0 to 2"),
        (["--config.sede=1"], "sede"),
    ],
)
def test_bad_arguments_end_with_one_line_and_exit_code_2(programs, tmp_path, arguments, message):
    found = programs.run("experiments.sweep", CONFIG, f"--workdir={tmp_path / 'w'}", *arguments)
    assert found.returncode == 2 and message in found.stderr
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_directory_that_cannot_be_written_ends_with_one_line(programs, tmp_path):
    (tmp_path / "file").write_text("")
    found = programs.run("experiments.sweep", CONFIG, f"--workdir={tmp_path / 'file' / 'w'}")
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert "lies below a file" in found.stderr


def test_list_computes_nothing(programs, tmp_path):
    found = programs.run("experiments.sweep", CONFIG, f"--workdir={tmp_path / 'w'}", "--list")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[2] == "   2  budget=macs=0.7  device=0  recovery=finetune"
    assert not (tmp_path / "w").exists()


def test_a_grid_follows_the_config_that_the_arguments_make(programs, tmp_path):
    arguments = ["--config=configs/digits.py", "--config.data.partition.num_devices=2"]
    arguments += ["--config.seed=7", f"--workdir={tmp_path / 'w'}", "--list"]
    found = programs.run("experiments.sweep", *arguments)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 48 and all("seed=7" in line for line in lines)
    assert "device=1" in lines[-1]


def test_killed_at_random_moments_the_results_are_the_same_bits(programs, tmp_path, compiled):
    arguments = (str(tmp_path / "w"), str(compiled), "20", "0")
    found = programs.run("tests.experiments.tiny_sweep", *arguments)
    assert found.returncode == 0, found.stderr
    word, killed, *directories = found.stdout.splitlines()[-1].split()
    assert (word, killed) == ("killed", "20")
    expected, bits = rows(tmp_path / "whole"), checksums(tmp_path / "whole")
    assert len(expected["units"]) == 3 and not expected["failed"]
    assert {"dense", "recover"} <= {name.rpartition("-")[0] for name in bits}
    for directory in map(Path, directories):
        assert rows(directory) == expected and checksums(directory) == bits
        # Nothing of the killed ones is left but locks that nobody holds.
        assert not list(directory.rglob("*.partial")) and not list(directory.rglob("*.old"))


# Reports.


def record(**values):
    base = {"source": "a", "unit": 0, "device": 0, "seed": 0, "budget": "macs=0.5"}
    base |= {"macs": 50, "dense_macs": 100, "params": 5, "dense_params": 10, "ms": 1.0}
    base |= {"dense_ms": 2.0, "dense_top1": 90.0, "pruned_top1": 50.0}
    base |= {"compensated_top1": 70.0, "recovered_top1": 80.0}
    base |= values
    shares = {f"{n}_percent": 100 * base[n] / base[f"dense_{n}"] for n in ("macs", "params", "ms")}
    return base | shares


def test_the_pareto_front_is_what_nothing_beats():
    costs, gains = [3, 1, 2, 2, 4, 1], [0.9, 0.5, 0.7, 0.8, 0.9, 0.4]
    assert joined.pareto(costs, gains) == [1, 3, 0]
    assert joined.pareto([], []) == []


def test_averages_are_over_devices_and_seeds_with_intervals():
    found = [
        record(device=d, seed=s, criterion=c, recovered_top1=80.0 + d + 2 * s)
        for d in (0, 1)
        for s in (0, 1)
        for c in ("tap", "taylor")
    ]
    found.append(record(criterion="tap", budget="macs=0.3"))
    rows = joined.averages(found)
    assert [(row["series"], row["units"]) for row in rows] == [
        ("tap", 4),
        ("taylor", 4),
        ("tap", 1),
    ]
    # Mean squares of 1 between devices and 4 between seeds: 25 / 17 degrees of freedom.
    half_width = stats.t.ppf(0.975, 25 / 17) * math.sqrt(5 / 4)
    assert rows[0]["recovered_top1"] == 81.5
    assert math.isclose(rows[0]["recovered_top1_interval"], half_width, abs_tol=1e-3)
    assert rows[2]["recovered_top1_interval"] is None
    # One mean is over one device and seed of four, the others over all of them.
    assert [row["absent"] for row in rows] == [0, 0, 3]


def test_runs_and_sweeps_are_joined(finished, tmp_path):
    workdir = finished[1].workdir
    found = report.join([workdir], tmp_path / "out")
    assert len(found) == 6
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "units.csv",
        "units.html",
        "units.json",
    ]
    assert (tmp_path / "out" / "units.csv").read_text().count("\n") == 7
    page = (tmp_path / "out" / "units.html").read_text()
    assert page.count("<svg") == 2 and "Pareto" in page and "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (workdir / "units.csv").read_text().splitlines()[1].startswith("digits,0,0,0,macs=0.7")


def put_results(directory, found, **more):
    """What a sweep leaves: a unit for every device and its accuracy in percent."""
    directory.mkdir(parents=True)
    cost = {"macs": 50, "params": 5}
    row = {"seed": 0, "budget": "macs=0.5", "dense": 0.9, "cost": cost, "dense_cost": cost}
    row["latency_ms"] = {name: {"median": 1.0} for name in ("dense", "pruned")}
    stages = ("pruned", "compensated", "recovered")
    rows = [
        {"unit": d, "device": d, **row, **dict.fromkeys(stages, top1 / 100)}
        for d, top1 in found.items()
    ]
    write_json(directory / "results.json", {"grid": len(rows), "units": rows, "failed": [], **more})
    return directory


def test_directories_of_one_name_stay_apart(tmp_path):
    one = put_results(tmp_path / "modelA" / "sweep", {0: 50})
    other = put_results(tmp_path / "modelB" / "sweep", {0: 90})
    third = put_results(tmp_path / "third", {0: 70})
    out = tmp_path / "out"
    found = report.join([one, other / ".." / "sweep", third], out)
    sources = ["modelA/sweep", "modelB/sweep", "third"]
    assert [record["source"] for record in found] == sources
    rows = json.loads((out / "units.json").read_text())["averages"]
    means = [(row["series"], row["units"], row["recovered_top1"]) for row in rows]
    assert means == [(sources[0], 1, 50.0), (sources[1], 1, 90.0), (sources[2], 1, 70.0)]
    # A row of panels for each, not one for all that have its number.
    page = (out / "units.html").read_text()
    assert "cost of 3 of 3 devices" in page and page.count(">device 0<") == 3
    with pytest.raises(InputError, match=r"third: named 2 times"):
        report.join([third, one, third], out)


def test_a_report_tells_what_it_lacks_and_which_means_do_not_compare(tmp_path):
    failed = [{"unit": 3, "reason": "too <small>"}]
    short = put_results(tmp_path / "short", {0: 95}, failed=failed, grid=4)
    whole = put_results(tmp_path / "whole", {0: 80, 1: 70})
    report.join([short, whole], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "units.json").read_text())
    assert found["failed"] == [{"source": "short", **failed[0]}] and found["unfinished"] == 2
    assert [row["absent"] for row in found["averages"]] == [1, 0]
    # Both cost the same, and the first is more accurate.
    assert [row["front"] for row in found["averages"]] == [["macs", "params", "ms"], []]
    page = (tmp_path / "out" / "units.html").read_text()
    assert "Units that failed: 1; not finished: 2." in page and "too &lt;small&gt;" in page
    assert "<small>1 absent</small>" in page and "do not compare" in page
    report.join([whole], tmp_path / "out")
    page = (tmp_path / "out" / "units.html").read_text()
    assert "failed" not in page and "bsent" not in page


def test_directories_without_results_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"results\.json: no such file"):
        report.join([tmp_path], tmp_path / "out")
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(InputError, match=r"is a comparison, .* in compare\.html"):
        report.join([tmp_path], tmp_path / "out")
    for text in ("[]", '{"units": [{}]}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match="holds no results"):
            report.join([tmp_path], tmp_path / "out")
    (tmp_path / "results.json").write_text('{"units": []}')
    with pytest.raises(InputError, match="no unit is finished"):
        report.join([tmp_path], tmp_path / "out")

"""Comparisons: statistics, what cells share, what fails, and what the report says."""

import collections
import csv
import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest

from configs import tiny_imagenet_40
from experiments import arguments, comparison
from experiments.cells import Grid, as_published, cells_of, parse_budget
from experiments.compare import Comparison
from experiments.config import identity, read
from experiments.job import Job, Pruned
from experiments.methods import METHODS, PEER, Method, find_methods, find_set, image_sets
from experiments.peers import PEERS
from tapvit_jax.errors import InputError
from tapvit_jax.files import file_lock
from tapvit_jax.importance.criteria import unit_importance
from tapvit_jax.importance.layers import LayerConfig
from tapvit_jax.importance.neurons import NeuronConfig
from tapvit_jax.pipeline import PruneConfig
from tapvit_jax.progress import Progress
from tapvit_jax.proxy.gmm import GmmConfig
from tapvit_jax.proxy.select import SelectConfig
from tapvit_jax.prune.allocate import AllocateConfig, allocate
from tapvit_jax.prune.recover import RecoverConfig
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.timing import Latency
from tapvit_jax.train.step import TrainConfig
from tests.experiments import tiny_sweep

IMPOSSIBLE = "macs=0.0001"
NAMES = ("magnitude_l2", "random_uniform_ridge")


def tiny():
    config = tiny_sweep.get_config()
    # What is compared need not be good.
    config.dense.train.epochs = 0
    return read(config)


def grid(methods=NAMES, **changes):
    options = {"sets": ("selected", "random"), "set_methods": None, "budgets": ("macs=0.6",)}
    options |= {"devices": (0, 1), "seeds": (0,)}
    return Grid(find_methods(methods), **(options | changes))


# Methods and grids.


def test_every_method_of_the_table_can_be_planned_with():
    base = PruneConfig()
    for method in METHODS.values():
        method.prune(base)
    assert METHODS["ours"] == METHODS["tap_prior"] == Method("tap", "sensitivity", "prior")
    assert METHODS["ours"].prune(base) == base
    published = METHODS["tap_published"]
    assert published.prune(base) == PruneConfig.as_published() and published.recover == "none"
    assert METHODS["taylor_softmax_mean"] == Method("taylor", "softmax", "mean")
    heads = METHODS["tap_loop_heads_ridge"].prune(base)
    assert heads.allocate == AllocateConfig(attention="heads")
    assert (heads.layers.attention, heads.layers.recovery) == ("heads", "ridge")
    ragged = dataclasses.replace(base, layers=LayerConfig(ragged=True))
    assert METHODS["tap_heads"].prune(ragged).layers == LayerConfig(attention="heads")
    fair = METHODS["taylor_global_per_cost"].prune(base).allocate
    assert fair == AllocateConfig(widths="global", per_cost=True, normalize=True)
    assert METHODS["tap_local"].prune(base).allocate == AllocateConfig(widths="local")
    assert not METHODS["tap_local"].probes(base) and METHODS["tap_heads"].probes(base)
    assert not METHODS["tap_uniform"].probes(base) and METHODS["tap_softmax"].probes(base)
    with pytest.raises(InputError, match="attention 'dims', expected the same"):
        PruneConfig(allocate=AllocateConfig(attention="heads"))


def test_methods_keep_the_configs_limits():
    base = tiny().prune
    prune = METHODS["tap_published"].prune(base)
    expected = dataclasses.replace(NeuronConfig.as_published(), max_batches=50)
    assert prune.neurons == expected and prune.layers.max_batches == 1
    coupled = Method("taylor", "published").prune(base)
    assert coupled.allocate == AllocateConfig.as_published()
    assert not coupled.neurons.couple_qk_vo


def test_a_name_can_carry_changes():
    base, plain = PruneConfig(), "tap_published"
    names = ("ours", "ours:relevance=0", "tap_published:standardize=True+bandwidth=mean")
    ours, without, mended = (m.prune(base).neurons for m in find_methods(names).values())
    assert (ours.mlp.relevance, without.mlp.relevance, without.attn.relevance) == (0.1, 0, 0)
    assert without.mlp.activation == ours.mlp.activation
    expected = dataclasses.replace(
        METHODS[plain].prune(base).neurons, standardize=True, bandwidth="mean"
    )
    assert mended == expected
    (fewer,) = find_methods(["ours:max_batches=3"]).values()
    assert fewer.prune(base).neurons.max_batches == 3
    select, gmm = SelectConfig("importance", 640, 6400), GmmConfig()
    assert find_set("selected").configs(select, gmm) == (select, gmm)
    changed = find_set("selected:method=quota+metric_count=7000+components=3+covariance_type=full")
    assert changed.configs(select, gmm) == (
        SelectConfig("quota", 7000, 7000),
        GmmConfig((3,), "full"),
    )
    keys = [cells_of(tiny(), grid((name,), **_ONE))[0].key for name in ("ours", *names)]
    assert len(set(keys)) == 3


def test_cells_know_what_they_depend_on():
    def keys(**changes):
        return [cell.key for cell in cells_of(tiny(), grid(("ours",), **changes))]

    (same,) = {tuple(keys(sets=("random",), devices=(0,))), tuple(keys(**_ONE))}
    assert same == tuple(cell.key for cell in cells_of(tiny(), grid(("tap_prior",), **_ONE)))
    others = [
        keys(**_ONE | {"devices": (1,)}),
        keys(**_ONE | {"sets": ("oracle",)}),
        keys(**_ONE | {"budgets": ("macs=0.5",)}),
        keys(**_ONE | {"seeds": (1,)}),
        keys(**_ONE | {"seeds": (1,), "dense": "shared"}),
        keys(**_ONE | {"epochs": (2,)}),
        [cell.key for cell in cells_of(tiny(), grid(("tap",), **_ONE))],
    ]
    assert len({same, *map(tuple, others)}) == 8
    # Fine-tuning does not matter to cells without.
    changed = dataclasses.replace(tiny(), recover=dataclasses.replace(tiny().recover, flip=True))
    assert tuple(c.key for c in cells_of(changed, grid(("ours",), **_ONE))) == same
    # Under the config's own seed both kinds of dense model are the same.
    assert tuple(keys(**_ONE | {"dense": "shared"})) == same


_ONE = {"sets": ("random",), "devices": (0,)}


def test_only_chosen_methods_see_all_sets():
    methods = find_methods(("tap", "taylor", "tp_l2"), PEERS)
    assert methods["tp_l2"] == Method("tp_l2", PEER)
    found = cells_of(
        tiny(), dataclasses.replace(grid(epochs=(0, 1)), methods=methods, set_methods=("tap",))
    )
    per_method = collections.Counter(cell.method for cell in found)
    # Two devices and two counts of epochs, and two sets for the one.
    assert per_method == {"tap": 8, "taylor": 4, "tp_l2": 4}


def test_partners_are_of_one_method_set_and_recipe():
    config = dataclasses.replace(tiny(), recover_together=3)
    options = {"budgets": ("macs=0.6", "macs=0.5"), "epochs": (0, 2)}
    found = cells_of(config, grid(("tap", "taylor"), **options))
    for number, cell in enumerate(found):
        if not cell.epochs:
            assert cell.partners == ()
            continue
        assert number in cell.partners and len(cell.partners) in (1, 3)
        alike = {(c.method, c.set, c.seed, c.epochs) for c in (found[n] for n in cell.partners)}
        assert len(alike) == 1
    fewer = {cell.key for cell in cells_of(config, grid(("taylor",), **options))}
    assert fewer < {cell.key for cell in found}


def test_recipes_differ_in_nothing_but_their_length():
    base = dataclasses.replace(tiny().recover, warmup_epochs=2.0)
    assert METHODS["ours"].recipe(base, 20) == dataclasses.replace(base, epochs=20)
    assert METHODS["ours"].recipe(base, 5).warmup_epochs == 1.0


def test_a_name_can_carry_its_own_recipe():
    names = (
        "tap",
        "tap:recover.ema=0.5",
        "tap:redundancy=0+recover.ema=0.5",
        "tp_l2:recover.ema=0.5",
    )
    methods = find_methods(names, PEERS)
    base = tiny().recover
    changed = dataclasses.replace(base, epochs=3, ema=0.5)
    assert [m.recipe(base, 3) == changed for m in methods.values()] == [False, True, True, True]
    assert methods[names[3]].criterion == "tp_l2" and methods[names[3]].widths == PEER
    scored = [m.prune(PruneConfig()).neurons for m in methods.values()]
    assert scored[0] == scored[1] and scored[2].mlp.redundancy == 0
    config = dataclasses.replace(tiny(), recover_together=2)
    tuned = dataclasses.replace(grid(("tap",), epochs=(0, 2), **_ONE), methods=methods)
    found = {(c.method, c.epochs): c for c in cells_of(config, tuned)}
    plain, own = (found[names[0], epochs].key for epochs in (0, 2)), found[names[1], 2]
    # Without fine-tuning it is the same; with it, a row of its own that shares no program.
    assert found[names[1], 0].key == next(plain) and own.key != next(plain)
    assert own.partners != found[names[0], 2].partners


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: find_methods(["magic"]), "method is 'magic', expected ours or CRITERION"),
        (lambda: find_methods([]), "no method is named"),
        (lambda: grid(sets=("private",)), "--sets names 'private', expected selected, random"),
        (lambda: find_methods(["ours:bandwith=fixed"]), "did you mean bandwidth"),
        (lambda: find_methods(["ours:relevance=-1"]), "term weights are"),
        (lambda: find_methods(["ours:relevance"]), "'relevance' is no change, expected FIELD="),
        (lambda: find_methods(["random:relevance=0"]), "random knows no changes but of the rec"),
        (
            lambda: find_methods(["tp_l2:relevance=0"], PEERS),
            "tp_l2 knows no changes but of the",
        ),
        (lambda: find_methods(["ours:recover.emma=0.9"]), "unknown field recover.emma"),
        (
            lambda: find_methods(["ours:recover.ema=2"]),
            "recover: ema is 2.0, expected between 0 and 1",
        ),
        (lambda: find_methods(["ours:recover.epochs=2"]), "recover.epochs is not a method's to ch"),
        (lambda: find_methods(["ours:recover.images_per_epoch=9"]), "select.finetune_count says"),
        (lambda: grid(("tap:recover.ema=0.5",)), "changes how it is fine-tuned, which needs --ep"),
        (lambda: grid(sets=("selected:k=3",)), "unknown field select.k"),
        (lambda: grid(sets=("random:method=top",)), "method changes nothing of 'random'"),
        (lambda: grid(sets=("pool:metric_count=3",)), "metric_count changes nothing of 'pool'"),
        (lambda: grid(sets=("selected:metric_count=none",)), "select.metric_count is 'none'"),
        (lambda: grid(set_methods=("ours",)), "--set_methods names 'ours', expected magnitude"),
        (lambda: grid(dense="both"), "--dense names 'both'"),
        (lambda: grid(budgets=()), "--budgets is empty"),
        (lambda: grid(budgets=("flops=1",)), "flops"),
        (lambda: cells_of(tiny(), grid(devices=(2,))), "--devices names 2, expected 0 to 1"),
        (lambda: arguments.numbers("seeds", ["0", "-1"]), "--seeds is '0,-1', expected whole"),
        (lambda: as_published(tiny()), "as_published needs .*private_split.* but digits.py"),
    ],
)
def test_impossible_grids_are_refused_by_name(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_arguments_name_each_number_once_and_budgets_join_bounds():
    assert arguments.numbers("seeds", ["3", "0", "3"]) == (3, 0)
    assert str(parse_budget("macs=0.5+params=0.4")) == "params=0.4, macs=0.5"


def test_as_published_takes_the_protocol_leaks_included():
    config = read(tiny_imagenet_40.get_config())
    found = as_published(config)
    assert found.data.partition.leaks and found.select.method == "top"
    assert found.gmm.covariance_type == "full" and found.gmm.components == tuple(range(2, 11))
    assert (found.recover.epochs, found.recover.schedule) == (50, "constant")
    assert found.select.metric_count == config.select.metric_count
    # What stands for the published features is the config's.
    assert found.extractor == config.extractor


# Running one.


def counts(found):
    return collections.Counter(found.stages.computed)


KEPT = ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")


@pytest.fixture(scope="module")
def compiled():
    """All programs are kept for the next run."""
    before = {name: getattr(jax.config, name) for name in KEPT}
    for name in KEPT:
        jax.config.update(name, 0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
    """Two methods, one of them recovered, two sets and devices, and an impossible budget."""
    workdir = tmp_path_factory.mktemp("compare") / "work"
    found = Comparison(
        tiny(), grid(budgets=("macs=0.6", IMPOSSIBLE)), workdir, command="told", quiet=True
    )
    return found, found.run()


def test_what_cells_share_is_computed_once(finished):
    found, _ = finished
    made = counts(found)
    once = ("dense", "extractor", "select")
    assert {name: made[name] for name in once} == dict.fromkeys(once, 1)
    # Two methods on two sets of two devices; uniform widths need no layer scores. Two models are
    # evaluated for every plan, the dense ones once a device.
    assert (made["units"], made["layers"], made["plan"]) == (8, 4, 8)
    assert made["compensate"] == 4
    assert made["evaluate"] == 8 + 2 and "recover" not in made


def test_a_failing_cell_is_reported_and_the_rest_is_there(finished):
    found, failed = finished
    assert len(failed) == 8 and all("smallest feasible" in reason for reason in failed.values())
    results = json.loads((found.workdir / "compare.json").read_text())
    assert len(results["rows"]) == len(results["failed"]) == 8 and results["missing"] == 0
    assert {cell["budget"] for cell in results["failed"]} == {IMPOSSIBLE}
    for row in results["rows"]:
        assert row["macs"] <= 0.6 * row["dense_macs"] and 0 <= row["top1"] <= 100
    table = list(csv.DictReader((found.workdir / "compare.csv").read_text().splitlines()))
    assert [float(row["top1"]) for row in table] == [row["top1"] for row in results["rows"]]
    assert results["command"] == "told" and results["seeds"] == [0]
    assert results["hardware"]["cores"] and results["libraries"]["jax"] == jax.__version__


def test_the_report_stands_on_its_own(finished):
    workdir = finished[0].workdir
    page, text = ((workdir / f"compare.{s}").read_text() for s in ("html", "md"))
    plots = [path.read_text() for path in workdir.glob("compare_*.svg")]
    assert page.count("<svg") == len(plots) == 5 and "<script" not in page and "src=" not in page
    assert all(plot in page for plot in plots)
    for word in (*NAMES, "Mean rank", "Metric sets", "Cells that failed"):
        assert word in page and word in text
    assert "    told" in text
    # Both devices fail alike: a line for each method and set.
    assert text.count("smallest feasible") == text.count("| 0, 1 |") == 4


def test_a_second_run_touches_nothing(finished):
    found, failed = finished
    before = {p: p.stat().st_mtime_ns for p in (found.workdir / "stages").rglob("*")}
    csv_before = (found.workdir / "compare.csv").read_bytes()
    (found.workdir / "compare.csv").unlink()
    again = Comparison(tiny(), found.grid, found.workdir, quiet=True)
    # Cells that failed are tried again, and fail before they cost anything.
    assert again.run() == failed and counts(again) == {}
    assert {p: p.stat().st_mtime_ns for p in (found.workdir / "stages").rglob("*")} == before
    assert (found.workdir / "compare.csv").read_bytes() == csv_before
    assert not list(found.workdir.rglob("*.lock")) and not list(found.workdir.rglob("*.partial"))


def test_a_cell_that_another_worker_holds_is_left_to_it(finished):
    found, _ = finished
    path = found._path(found.cells[0])
    kept = path.read_text()
    path.unlink()
    with file_lock(path.with_suffix(".lock")):
        assert not found._attempt(0, {}, wait=False)
    assert not path.exists()
    path.write_text(kept)
    with file_lock(path.with_suffix(".lock")):
        # Done is done, whoever holds the lock.
        assert found._attempt(0, {}, wait=False)


def test_a_grown_grid_computes_only_what_is_new(finished):
    found, _ = finished
    more = grid(budgets=("macs=0.6", "macs=0.7"), sets=("selected",))
    assert Comparison(tiny(), more, found.workdir, quiet=True).run() == {}
    shared = grid(("random_uniform",), sets=("random",), seeds=(0, 1), dense="shared")
    again = Comparison(tiny(), shared, found.workdir, quiet=True)
    assert again.run() == {}
    assert again.results({})["summary"]["dense"]["count"] == 2
    # The dense model of the config's seed serves both; the second seed has images of its own.
    # The first seed's plans are there, but were not evaluated without recovery.
    assert counts(again) == {"units": 2, "plan": 2, "evaluate": 4}


def test_another_config_is_refused_by_field(finished):
    config = dataclasses.replace(tiny(), validation_share=0.25)
    with pytest.raises(InputError, match=r"validation_share \(0.5 there, 0.25 here\)"):
        Comparison(config, grid(), finished[0].workdir, quiet=True).run()


@pytest.fixture(scope="module")
def job(finished):
    found, _ = finished
    workdir = found.workdir
    return Job(tiny(), found.stages, workdir / "payloads" / "job", Progress(1.0, quiet=True))


def test_metric_sets_are_what_they_are_called(job):
    split, most = job.parts.devices[1], job.config.select.metric_count
    sets = {name: image_sets(job, 1, name) for name in ("selected", "random", "pool", "oracle")}
    pool = set(job.parts.public_pool.tolist())
    assert [len(sets[n].metric) for n in ("selected", "random")] == [most, most]
    assert set(sets["pool"].metric.tolist()) == pool >= set(sets["random"].metric.tolist())
    assert set(sets["oracle"].metric.tolist()) <= set(split.private_train.tolist())
    for name, found in sets.items():
        # Nothing sees the images that score the device, and all are fine-tuned for as many steps.
        used = np.concatenate([found.metric, found.finetune, found.validation])
        assert not set(used.tolist()) & set(split.private_test.tolist())
        assert len(found.finetune) >= job.config.select.finetune_count, name
    labels = job.files.labels
    assert set(labels[sets["oracle"].validation]) == set(split.classes)
    # In an order of their own, the same for all devices.
    assert len(set(labels[sets["pool"].metric[:32]])) > 5
    np.testing.assert_array_equal(sets["pool"].metric, image_sets(job, 0, "pool").metric)


def test_changed_metric_sets_are_chosen_anew(job):
    plain = image_sets(job, 1, "selected")
    fewer, random = (image_sets(job, 1, f"{n}:metric_count=8") for n in ("selected", "random"))
    np.testing.assert_array_equal(random.metric, image_sets(job, 1, "random").metric[:8])
    assert len(fewer.metric) == 8 and len(fewer.finetune) == len(plain.finetune)
    few = image_sets(job, 1, "selected:metric_count=8+finetune_count=24").finetune
    assert len(few) == len(plain.finetune) and len(set(few.tolist())) == 24
    likely = image_sets(job, 1, "selected:method=top+components=1")
    assert set(likely.metric.tolist()) != set(plain.metric.tolist())
    # What others chose does not touch the config's own.
    np.testing.assert_array_equal(image_sets(job, 1, "selected").metric, plain.metric)
    with pytest.raises(InputError, match="metric_count is 9999, but the public pool has"):
        image_sets(job, 1, "random:metric_count=9999")


def test_likely_classes_are_those_of_the_metric_set(job, monkeypatch):
    sets = image_sets(job, 1, "selected")
    plain, *moved = (
        Pruned(1, None, sets, recovery=RecoverConfig(prior=prior))
        for prior in ("dense", "metric", "mixture")
    )
    assert job._class_weights(plain) == {}
    before, different = job._recovery_inputs(plain), set()
    for pruned in moved:
        weights = job._class_weights(pruned)["prior"]
        assert weights.shape == (job.dense.config.num_classes,) and np.ptp(weights) > 0.1
        assert job._recovery_inputs(pruned) != before
        different.add(str(job._recovery_inputs(pruned)))
    assert len(different) == 2
    np.testing.assert_array_equal(weights, job.class_prior(sets, "mixture").value)
    none = Pruned(1, None, sets, recovery=RecoverConfig("none", prior="mixture"))
    assert job._class_weights(none) == {} and job._recovery_inputs(none) == before
    for share, fewer in ((0.5, True), (1.0, False)):
        monkeypatch.setattr(job, "config", dataclasses.replace(job.config, likely_share=share))
        classes = job._class_weights(plain)["classes"]
        assert classes.shape == (job.dense.config.num_classes,)
        assert 0 < classes.sum() < len(classes) if fewer else classes.all()
        assert job._recovery_inputs(plain) != before


def test_the_prior_follows_the_mixture_or_the_images(job):
    names = ("selected", "selected:components=1", "random", "oracle")
    sets = {name: image_sets(job, 1, name) for name in names}
    found = {name: job.class_prior(images, "mixture") for name, images in sets.items()}
    assert len({prior.key for prior in found.values()}) == len(names)
    for name, prior in found.items():
        assert (sets[name].mixture is None) == (name in ("random", "oracle"))
        assert np.isfinite(prior.value).all() and (prior.value > 0).all()
        np.testing.assert_allclose(prior.value.mean(), 1.0)
    # The device's own images are of its classes.
    own = np.asarray(job.parts.devices[1].classes)
    others = np.setdiff1d(np.arange(len(found["oracle"].value)), own)
    assert found["oracle"].value[own].mean() > found["oracle"].value[others].mean()
    # What the images are does not matter where a mixture speaks for the device, only how many.
    shuffled = dataclasses.replace(sets["selected"], metric=sets["selected"].metric[::-1])
    assert job.class_prior(shuffled, "mixture").key == found["selected"].key
    fewer = dataclasses.replace(sets["selected"], metric=sets["selected"].metric[:4])
    assert np.ptp(job.class_prior(fewer, "mixture").value) < np.ptp(found["selected"].value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"likely_share": 1.5}, "likely_share is 1.5"),
        ({"likely_share": 0.5, "recover": TrainConfig()}, "needs recover.distill"),
    ],
)
def test_likely_classes_need_a_teacher(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny(), **changes)


def test_random_scores_are_drawn_anew_on_every_device(job):
    metric = image_sets(job, 0, "pool").metric
    found = {
        (name, device): job.unit_scores("", device, metric, METHODS[name].prune(job.config.prune))
        for name in ("random", "magnitude_l2")
        for device in (0, 1)
    }
    first, second = (found["random", device].value["blocks_0/mlp"] for device in (0, 1))
    assert np.corrcoef(first, second)[0, 1] < 0.9
    # What nothing is drawn for stays shared.
    assert found["magnitude_l2", 0].key == found["magnitude_l2", 1].key
    assert found["random", 0].key != found["random", 1].key


def test_fine_tuning_starts_where_it_is_told_to(job):
    sets, prune = image_sets(job, 0, "random"), METHODS["random_uniform"].prune(job.config.prune)
    plan = job.plan("", 0, sets, prune, parse_budget("macs=0.6"), probe=False)
    pruned = job.pruned(plan)
    moved = jax.tree.map(lambda leaf: 1.5 * leaf, pruned.value.params)
    start = dataclasses.replace(pruned, key="moved", value=pruned.value.replace(params=moved))
    options = dataclasses.replace(job.config.recover, epochs=0)
    members = [Pruned(0, plan, sets), Pruned(0, plan, sets, start)]
    alone, _ = job.recover("", members[1], options, "masked")
    together = [job.recover_together("", members, place, options)[0] for place in (0, 1)]
    for found, expected in ((alone, moved), (together[1], moved), (together[0], pruned)):
        expected = getattr(getattr(expected, "value", None), "params", expected)
        jax.tree.map(np.testing.assert_array_equal, found.value.params, expected)
    small, _ = job.recover("", members[1], options, "reshaped")
    assert small.value.config != pruned.value.config
    images = job.source.load(sets.metric[:4], job.config.data.preprocess)
    masked = np.asarray(start.value.apply(images))
    np.testing.assert_allclose(small.value.apply(images), masked, rtol=1e-3, atol=1e-3)


def test_times_are_measured_once_on_every_machine(job, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "experiments.job.latencies",
        lambda models, batch: measured.append(batch) or {"dense": Latency(2.0, 1.0, 3.0)},
    )
    for processor in ("one", "other", "one"):
        monkeypatch.setattr("experiments.job.hardware", lambda name=processor: {"processor": name})
        found = job.latency("", job.dense, 3)
        assert found == {"dense": {"median": 2.0, "low": 1.0, "high": 3.0}}
    assert measured == [3, 3]


def test_fine_tuned_cells_alone_and_together(finished, tmp_path):
    found, _ = finished
    (tmp_path / "stages").symlink_to(found.workdir / "stages")
    options = {"sets": ("random",), "devices": (0, 1), "epochs": (0, 1)}
    options["budgets"] = ("macs=0.6", IMPOSSIBLE)
    config = dataclasses.replace(tiny(), recover_together=4)
    claimed = {"program": "experiments.compare", "mode": "honest", **identity(config)}
    (tmp_path / "config.json").write_text(json.dumps(claimed))
    together = Comparison(config, grid(("random_uniform",), **options), tmp_path, quiet=True)
    # Two cells that can be met, without and with fine-tuning; who cannot be pruned is left out.
    assert len(together.run()) == 4 and counts(together)["recover_together"] == 1
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [(row["epochs"], row["device"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    page = (tmp_path / "compare.html").read_text()
    assert "after 1 epoch of fine-tuning" in page and "epochs of fine-tuning" in page


def test_peers_are_cells_like_others(finished, monkeypatch):
    """The pruner itself is tested where torch is."""
    calls = []

    def torch_pruning(model, images, labels, budget, *, method, embedding, seed, latency):
        assert latency is None
        calls.append((method, embedding, seed, len(images), len(labels)))
        if method == "l2":
            return types.SimpleNamespace(model=model)
        units = unit_importance(model, [], "random")
        plan = allocate(model, units, None, budget, config=AllocateConfig(widths="softmax"))
        return types.SimpleNamespace(model=reshape(model, plan))

    monkeypatch.setattr("experiments.peers.torch_pruning", torch_pruning)
    methods = find_methods(("tp_l2_whole", "tp_random", "tp_random_prior_only"), PEERS)
    assert methods["tp_random_prior_only"] == Method("tp_random", PEER, "prior_only")
    own = dataclasses.replace(grid(**_ONE, epochs=(0, 1)), methods=methods)
    found = Comparison(tiny(), own, finished[0].workdir, quiet=True)
    failed = found.run()
    # One promised what it did not keep, with and without fine-tuning.
    assert len(failed) == 2 and all("exceeds the budget" in reason for reason in failed.values())
    (_, _, drawn, *_) = calls[1]
    assert calls == [("l2", "whole", 0, 32, 32), ("random", "cut", drawn, 32, 32)] and drawn
    rows = found.results(failed)["rows"]
    names = ("tp_random", "tp_random_prior_only")
    assert {(row["method"], row["epochs"]) for row in rows} == set(itertools.product(names, (0, 1)))
    assert len({row["macs"] for row in rows}) == 1
    assert rows[0]["macs"] <= 0.6 * rows[0]["dense_macs"]
    # The small model is the same, its bias and its fine-tuning are not.
    computed = counts(found)
    assert {name: computed[name] for name in ("peer", "recover", "evaluate")} == {
        "peer": 2,
        "recover": 2,
        "evaluate": 4,
    }


# Tables.


def row(method, top1, **values):
    base = {"set": "selected", "method": method, "device": 0, "seed": 0, "budget": "macs=0.5"}
    base |= {"epochs": 0, "top1": top1, "dense_top1": 80.0}
    return base | {"macs_percent": 50.0, "params_percent": 50.0} | values


def test_a_summary_by_hand():
    found = [row("a", 70.0 + d, device=d, dense_top1=80.0 + d) for d in range(3)]
    found += [row("b", 68.0 + 2 * d, device=d, dense_top1=80.0 + d) for d in range(3)]
    found += [row("b", 60.0, budget="macs=0.25")]
    summary = comparison.summarize(found, "a")
    first = summary["accuracy"][0]
    assert (first["method"], first["top1"]["mean"], first["top1"]["count"]) == ("a", 71.0, 3)
    assert first["to_dense"]["mean"] == -10.0 and first["to_dense"]["half_width"] == 0.0
    assert first["percent_of_dense"] == pytest.approx(100 * 71 / 81)
    # At the smaller budget there is nothing to compare with.
    (pair,) = summary["paired"]
    assert (pair["method"], pair["difference"]["mean"], pair["wins"], pair["losses"]) == (
        *("b", 1.0, 2),
        0,
    )
    ranks = {r["method"]: r for r in summary["ranks"]}
    # a is ahead twice, the third is a tie.
    assert ranks["a"]["budgets"] == {"macs=0.5": pytest.approx(3.5 / 3)}
    assert ranks["b"]["budgets"] == {"macs=0.5": pytest.approx(5.5 / 3), "macs=0.25": 1.0}
    assert ranks["b"]["overall"] == pytest.approx(8.5 / 6) and ranks["a"]["overall"] is None
    assert summary["sets"] == []


def test_notes_say_what_chooses_the_epoch_of_fine_tuning():
    config = {"dense": {"weights": None}, "data": {"partition": {"leaks": False}}}
    results = {"seeds": [0], "dense": "per_seed", "missing": 0}
    results["config"] = config | {"validation_share": 0.5}
    names = ("selected:metric_count=8", "oracle")
    for epochs in (0, 2):
        rows = [row("a", 70.0, set=name, epochs=epochs) for name in names]
        found = comparison._notes(results | {"rows": rows})
        assert len(found) == 2 + bool(epochs)
    assert found[-1].endswith(
        "images: selected, the likeliest 50 %; oracle, those of the device's classes."
    )


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        ({"weights": None}, "a dense model for every seed."),
        ({"weights": "a.pth"}, "one dense model, from a checkpoint."),
        (
            {"weights": "a.pth", "new_classifier": True},
            "a dense model for every seed, trained from a checkpoint.",
        ),
    ],
)
def test_notes_say_where_the_dense_model_comes_from(dense, said):
    config = {"dense": dense, "data": {"partition": {"leaks": False}}, "validation_share": 0.5}
    results = {"seeds": [0], "dense": "per_seed", "missing": 0, "config": config}
    assert said in comparison._notes(results | {"rows": [row("a", 70.0)]})[0]


def test_a_dense_model_that_seeds_share_counts_once_on_every_device():
    found = [
        row("a", 70.0, device=d, seed=s, dense_top1=80.0 + d) for d in range(2) for s in range(3)
    ]
    counted = [
        comparison.summarize(found, "a", shared_dense=shared)["dense"]["count"]
        for shared in (False, True)
    ]
    assert counted == [6, 2]


def test_metric_sets_are_paired_over_devices():
    levels = {"random": 50.0, "selected": 56.0, "oracle": 60.0}
    found = [
        row("a", level + d + 0.1 * d * (name == "oracle"), set=name, device=d)
        for name, level in levels.items()
        for d in range(4)
    ]
    (table,) = comparison.summarize(found, "a")["sets"]
    assert table["over_random"]["selected"]["difference"]["mean"] == 6.0
    assert set(table["over_random"]) == {"selected", "oracle"}
    assert table["gap_closed"]["share"] == pytest.approx(6 / 10.15)


def test_changed_metric_sets_are_rows_beside_the_first():
    changed = "selected:method=quota"
    levels = {"selected": 56.0, "random": 50.0, changed: 57.5}
    found = [
        row("a", level + d, set=name, device=d) for name, level in levels.items() for d in (0, 1)
    ]
    found.append(row("a", 40.0, set="selected", budget="macs=0.25"))
    found.append(row("a", 41.0, set="random", budget="macs=0.25"))
    summary = comparison.summarize(found, "a")
    assert summary["sets"][0]["over_first"][changed]["difference"]["mean"] == 1.5
    (table,) = comparison._changed_sets_tables(summary["sets"])
    assert list(table.head[:3]) == ["metric set", "macs=0.5", "macs=0.25"]
    assert [cells[0] for cells in table.rows] == list(levels)
    assert [cells[2] for cells in table.rows] == ["40.0", "41.0", comparison._NONE]
    assert table.rows[0][3] == "" and table.rows[2][3].startswith("+1.5")
    plain = [r for r in found if r["set"] != changed]
    assert comparison._changed_sets_tables(comparison.summarize(plain, "a")["sets"]) == []


def test_no_difference_rounds_to_minus_zero():
    found = [row("a", 70.04, dense_top1=70.05), row("b", 68.85, dense_top1=70.05)]
    _, to_dense, *_ = comparison.tables(comparison.summarize(found, "a"))
    assert [cells[1][:4] for cells in to_dense.rows] == ["+0.0", "−1.2"]  # noqa: RUF001


def test_tables_say_what_is_not_there_and_escape_what_is():
    found = [row("a|<b>", 70.0), row("c", 60.0), row("c", 50.0, budget="macs=0.25")]
    for table in comparison.tables(comparison.summarize(found, "c")):
        lines = table.markdown().splitlines()[2:]
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert "<b>" not in table.html()
    text = comparison.tables(comparison.summarize(found, "c"))[0].markdown()
    assert "| a\\|<b> | 70.0 | – |" in text and "| c | 60.0 | 50.0 |" in text  # noqa: RUF001


# The program.


CONFIG = "--config=tests/experiments/tiny_sweep.py"
UNTRAINED = "--config.dense.train.epochs=0"


def test_the_program_says_what_failed_and_with_which_command(programs, finished):
    workdir = finished[0].workdir
    arguments = [CONFIG, UNTRAINED, f"--workdir={workdir}", f"--methods={','.join(NAMES)}"]
    arguments += ["--devices=0", "--sets=selected", f"--budgets=macs=0.6,{IMPOSSIBLE}"]
    found = programs.run("experiments.compare", *arguments)
    assert found.returncode == 1, found.stderr
    (line, other) = [x for x in found.stderr.splitlines() if x.startswith("failed: ")]
    assert "method=magnitude_l2 device=0 seed=0 budget=macs=0.0001 epochs=0: infeasible" in line
    assert "method=random_uniform" in other
    head = found.stdout.splitlines()[0]
    assert " ".join(head.split()) == "set method device seed budget epochs MACs % dense % top-1 %"
    results = json.loads((workdir / "compare.json").read_text())
    command = f"python -m experiments.compare {CONFIG} {UNTRAINED} --workdir="
    assert results["command"].startswith(command)
    assert len(results["rows"]) == 2

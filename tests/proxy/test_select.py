import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax.errors import InputError
from tapvit_jax.proxy import select as select_module
from tapvit_jax.proxy.density import component_log_likelihood, log_likelihood
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.proxy.select import SelectConfig, select, selection_report
from tapvit_jax.sharding import data_mesh
from tapvit_jax.structs import from_plain, to_plain

METHODS = ("top", "quota", "importance")
CENTRES = np.array([[0, 0], [5, 0], [0, 5], [-5, 0], [0, -5]], float)


def draw(classes, seed=0):
    rng = np.random.default_rng(seed)
    classes = np.asarray(classes)
    return (CENTRES[classes] + rng.normal(size=(len(classes), 2))).astype(np.float32)


def mixture(weights):
    """A device whose classes are the first centres, in the proportions `weights`."""
    count = len(weights)
    return Gmm(weights, CENTRES[:count], np.ones((count, 2)), "diag")


def labelled_pool(count=300, seed=1):
    labels = np.random.default_rng(seed).integers(0, 5, count)
    return draw(labels, seed), labels


@settings(max_examples=20, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    count=st.integers(1, 60),
    more=st.integers(0, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_lists_are_exact_distinct_nested_and_repeatable(method, count, more, seed):
    features, _ = labelled_pool(60)
    gmms = [mixture([0.7, 0.3]), mixture([0.1, 0.2, 0.7]), mixture([1.0])]
    total = min(60, count + more)
    chosen = select(gmms, features, count, method=method, seed=seed, finetune_count=total)
    assert chosen.shape == (3, total)
    for row in chosen:
        assert len(set(row.tolist())) == total
        assert row.min() >= 0 and row.max() < 60
    again = select(gmms, features, count, method=method, seed=seed, finetune_count=total)
    np.testing.assert_array_equal(chosen, again)
    alone = select(gmms, features, count, method=method, seed=seed)
    np.testing.assert_array_equal(alone, chosen[:, :count])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_on_one_device_and_on_all(method):
    features, _ = labelled_pool()
    gmms = [mixture([0.7, 0.3]), mixture([0.1, 0.2, 0.7])]
    one = select(gmms, features, 20, method=method, mesh=data_mesh(jax.devices()[:1]))
    np.testing.assert_array_equal(one, select(gmms, features, 20, method=method))


def test_top_takes_the_highest_density_and_ties_by_index():
    features, _ = labelled_pool(50)
    gmm = mixture([0.6, 0.4])
    chosen = select([gmm], features, 50, method="top")[0]
    values = log_likelihood([gmm], features)[0]
    assert (np.diff(values[chosen]) <= 0).all()
    doubled = np.concatenate([features, features, features])
    chosen = select([gmm], doubled, 150, method="top")[0]
    for triple in chosen.reshape(50, 3):
        assert triple[0] < 50
        np.testing.assert_array_equal(triple - triple[0], [0, 50, 100])


def owners_of(gmm, features):
    return component_log_likelihood([gmm], features)[0].argmax(axis=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_variance_too_small_for_products_leaves_nobody_without_images(method):
    features = np.pad(labelled_pool(50)[0], [(0, 0), (1, 0)])
    bad, good = (
        Gmm([1.0], np.zeros((1, 3)), np.array([[variance, 1, 1]]), "diag")
        for variance in (1e-40, 1.0)
    )
    chosen = select([bad, good], features, 20, method=method)
    assert chosen.shape == (2, 20)
    if method != "importance":
        # All images are the same in the one dimension in which the mixtures differ.
        np.testing.assert_array_equal(chosen[0], chosen[1])


def test_quotas_are_exact_at_both_sizes_and_filled_by_the_best():
    features, _ = labelled_pool(2000)
    gmm = mixture([0.55, 0.25, 0.15, 0.05])
    owners = owners_of(gmm, features)
    joint = component_log_likelihood([gmm], features)[0]
    chosen = select([gmm], features, 20, method="quota", finetune_count=200)[0]
    for size, expected in ((20, [11, 5, 3, 1]), (200, [110, 50, 30, 10])):
        part = chosen[:size]
        np.testing.assert_array_equal(np.bincount(owners[part], minlength=4), expected)
        for component, quota in enumerate(expected):
            own = np.flatnonzero(owners == component)
            best = own[np.argsort(-joint[component, own], kind="stable")[:quota]]
            assert set(part[owners[part] == component]) == set(best)


def test_every_beginning_of_a_quota_list_is_about_proportional():
    features, _ = labelled_pool(1000)
    gmm = mixture([0.5, 0.3, 0.2])
    owners = owners_of(gmm, features)
    chosen = select([gmm], features, 100, method="quota")[0]
    for size in (10, 30, 50, 90):
        share = np.bincount(owners[chosen[:size]], minlength=3)
        np.testing.assert_allclose(share, size * np.array([0.5, 0.3, 0.2]), atol=1.5)


def test_quotas_spill_to_the_next_best_unused_images():
    # Component 1 is asked for 40 of 50 but owns 10 images; the other 30 are its next best.
    features = draw([0] * 90 + [1] * 10, seed=4)
    gmm = mixture([0.2, 0.8])
    owners = owners_of(gmm, features)
    joint = component_log_likelihood([gmm], features)[0]
    chosen = select([gmm], features, 50, method="quota")[0]
    own = set(np.flatnonzero(owners == 1))
    assert len(own) < 40
    zeros = np.flatnonzero(owners == 0)
    first = zeros[np.argsort(-joint[0, zeros], kind="stable")[:10]]
    left = np.setdiff1d(zeros, first)
    spill = left[np.argsort(-joint[1, left], kind="stable")[: 40 - len(own)]]
    assert set(chosen) == own | set(first) | set(spill)


@settings(max_examples=300, deadline=None)
@given(
    raw=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    count=st.integers(1, 100),
    more=st.integers(0, 100),
)
def test_shares_sum_exactly_stay_near_proportional_and_nest(raw, count, more):
    raw[0] += 1
    weights = (np.asarray(raw) / sum(raw)).astype(np.float32)
    small = select_module._shares(weights, count, np.zeros(len(raw), int))
    large = select_module._shares(weights, count + more, small)
    assert small.sum() == count
    assert large.sum() == count + more
    assert (large >= small).all()
    exact = weights.astype(float) / weights.sum(dtype=float)
    assert (np.abs(small - exact * count) < 1).all()
    assert (np.abs(large - exact * (count + more)) < 2).all()
    assert (small[weights == 0] == 0).all()
    assert (large[weights == 0] == 0).all()


def test_shares_nest_where_largest_remainder_alone_would_not():
    # The Alabama paradox: with one place more, the third component would lose one.
    weights = np.array([6, 6, 2], np.float32) / 14
    small = select_module._shares(weights, 10, np.zeros(3, int))
    free = select_module._shares(weights, 11, np.zeros(3, int))
    np.testing.assert_array_equal(small, [4, 4, 2])
    np.testing.assert_array_equal(free, [5, 5, 1])
    large = select_module._shares(weights, 11, small)
    assert sorted(large.tolist()) == [2, 4, 5]
    assert large[2] == 2


@pytest.mark.parametrize("task_share", [0.0, 0.1])
def test_importance_moves_to_the_devices_region(task_share):
    features, labels = labelled_pool(1000)
    gmm = mixture([0.5, 0.5])
    chosen = select([gmm], features, 100, method="importance", task_share=task_share)[0]
    assert (labels < 2).mean() < 0.5
    assert (labels[chosen] < 2).mean() > 0.85


def test_importance_weights_images_by_the_ratio_of_the_densities():
    # Two kinds of image with p_device / p_pool of 1.6 and 0.4: over many seeds the first place
    # goes to the first kind four times in five.
    features = np.repeat(np.array([[-20.0, 0], [20.0, 0]], np.float32), 10, axis=0)
    device = Gmm([0.8, 0.2], [[-20, 0], [20, 0]], np.ones((2, 2)), "diag")
    flat = Gmm([0.5, 0.5], [[-20, 0], [20, 0]], np.ones((2, 2)), "diag")
    first = [
        select([device], features, 1, method="importance", seed=s, pool_gmm=flat, task_share=0.0)[
            0, 0
        ]
        for s in range(300)
    ]
    share = np.mean(np.asarray(first) < 10)
    assert abs(share - 0.8) < 0.08
    assert len(set(first)) == 20


def test_importance_depends_on_the_seed_and_on_the_position():
    features, _ = labelled_pool()
    gmms = [mixture([0.5, 0.5])] * 2
    chosen = select(gmms, features, 30, method="importance", seed=0)
    assert not np.array_equal(chosen[0], chosen[1])
    other = select(gmms, features, 30, method="importance", seed=1)
    assert not np.array_equal(chosen, other)
    first = select(gmms[:1], features, 30, method="importance", seed=0)
    np.testing.assert_array_equal(first[0], chosen[0])


def test_importance_with_one_image_or_equal_images():
    gmm = mixture([1.0])
    assert select([gmm], np.ones((1, 2)), 1, method="importance").tolist() == [[0]]
    chosen = select([gmm], np.ones((9, 2)), 9, method="importance")
    assert sorted(chosen[0]) == list(range(9))


def test_importance_where_all_rows_that_are_looked_at_are_equal(monkeypatch):
    monkeypatch.setattr(select_module, "_POOL_FIT_ROWS", 10)
    features = np.ones((200, 2))
    features[np.random.default_rng(0).choice(200, 10, replace=False)] = 0
    chosen = select([mixture([1.0])], features, 200, method="importance")
    assert sorted(chosen[0]) == list(range(200))


def test_importance_fits_the_pool_on_a_bounded_number_of_rows(monkeypatch):
    features, _ = labelled_pool(400)
    fitted = []
    real = Gmm.fit
    monkeypatch.setattr(select_module, "_POOL_FIT_ROWS", 100)
    monkeypatch.setattr(
        select_module.Gmm,
        "fit",
        lambda rows, config: fitted.append(len(rows)) or real(rows, config),
    )
    assert select([mixture([1.0])], features, 5, method="importance").shape == (1, 5)
    assert fitted == [100]


@pytest.mark.parametrize("method", METHODS)
def test_bad_selections(method):
    features, _ = labelled_pool(30)
    gmms = [mixture([1.0])]
    for count, options, message in (
        (0, {}, "count is 0, expected from 1 to 30"),
        (-3, {}, "count is -3"),
        (31, {}, "count is 31, expected from 1 to 30, the number of images in the pool"),
        (2.5, {}, "count is 2.5"),
        (5, {"finetune_count": 4}, "finetune_count is 4, expected at least the count, 5"),
        (5, {"finetune_count": 31}, "finetune_count is 31, expected from 1 to 30"),
        (5, {"seed": -1}, "seed is -1"),
        (5, {"task_share": 1.0}, "task_share is 1.0"),
        (5, {"task_share": float("nan")}, "task_share is nan"),
    ):
        with pytest.raises(InputError, match=message):
            select(gmms, features, count, method=method, **options)
    features[7] = np.nan
    with pytest.raises(InputError, match="the first is sample 7"):
        select(gmms, features, 5, method=method)
    with pytest.raises(InputError, match="features: 3 dimensions, expected the mixtures' 2"):
        select(gmms, np.ones((9, 3)), 5, method=method)
    with pytest.raises(InputError, match="gmms: an empty list"):
        select([], np.ones((9, 2)), 5, method=method)


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match="method is 'best', expected one of 'top', 'quota', 'imp"):
        select([mixture([1.0])], np.ones((9, 2)), 5, method="best")


def test_config():
    config = SelectConfig(method="quota", metric_count=5, finetune_count=5)
    assert from_plain(SelectConfig, json.loads(json.dumps(to_plain(config)))) == config
    for changes, message in (
        ({"method": "x"}, "method is 'x'"),
        ({"metric_count": 0}, "metric_count is 0"),
        ({"finetune_count": 639}, "finetune_count is 639, expected at least the metric_count, 640"),
        ({"task_share": -0.1}, "task_share is -0.1"),
        ({"seed": 1.5}, "seed is 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            SelectConfig(**changes)


@pytest.mark.parametrize("size", [1e-24, 1e19, 1e25])
def test_features_of_which_float32_holds_no_variances_are_named(size):
    features = labelled_pool(50)[0] * np.float32(size)
    for method in ("top", "quota"):
        assert select([mixture([1.0])], features, 5, method=method).shape == (1, 5)
    largest = re.escape(f"{np.abs(features).max():.1e}")
    with pytest.raises(InputError, match=f"^features: values up to {largest} in size, expected"):
        select([mixture([1.0])], features, 5, method="importance")


def test_the_report_tells_a_good_choice_from_a_poor_one():
    features, labels = labelled_pool(1000)
    gmm = mixture([0.5, 0.5])
    held_out = draw(np.arange(200) % 2, seed=9)
    good = select([gmm], features, 150, method="quota")[0]
    report = selection_report(good, labels, 5, gmm, features, held_out)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["count"] == 150
    assert sum(report["class_histogram"]) == 150
    np.testing.assert_array_equal(report["class_histogram"], np.bincount(labels[good], minlength=5))
    assert 1.9 < report["effective_components"] <= 2.0001
    assert report["energy_distance"] < 0.3 * report["pool_energy_distance"]
    one = np.flatnonzero(labels == 0)
    narrow = selection_report(one, labels, 5, gmm, features, held_out)
    assert 1 <= narrow["effective_components"] < 1.3
    assert narrow["energy_distance"] > 3 * report["energy_distance"]
    everything = selection_report(np.arange(1000), labels, 5, gmm, features, held_out)
    assert everything["energy_distance"] == everything["pool_energy_distance"]


def test_the_energy_distance_is_the_defined_one():
    rng = np.random.default_rng(0)
    first, second = 1000 + rng.normal(size=(7, 2)), 1001 + rng.normal(size=(5, 2))

    def mean_distance(a, b, pairs):
        return sum(np.linalg.norm(x - y) for x in a for y in b) / pairs

    expected = (
        2 * mean_distance(first, second, 35)
        - mean_distance(first, first, 42)
        - mean_distance(second, second, 20)
    )
    assert select_module._energy_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_the_energy_distance_samples_large_sets(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(900, 2)), 1 + rng.normal(size=(900, 2))
    whole = select_module._energy_distance(first, second)
    monkeypatch.setattr(select_module, "_DISTANCE_ROWS", 300)
    sampled = select_module._energy_distance(first, second)
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.3)


def test_the_report_without_held_out_features():
    features, labels = labelled_pool(30)
    report = selection_report([3], labels, 5, mixture([1.0]), features)
    assert report["energy_distance"] is None
    assert report["pool_energy_distance"] is None
    assert report["effective_components"] == 1
    report = selection_report([3], labels, 5, mixture([1.0]), features, features)
    assert report["energy_distance"] is None
    assert report["pool_energy_distance"] is not None


def test_a_report_of_a_file_reads_only_the_rows_that_count(tmp_path):
    features, labels = labelled_pool(5000)
    gmm, held_out, path = mixture([0.5, 0.5]), draw(np.arange(200) % 2, seed=9), tmp_path / "p.npy"
    chosen = select([gmm], features, 150)[0]
    expected = selection_report(chosen, labels, 5, gmm, features, held_out)
    seen = np.union1d(chosen, select_module._sample(5000, 0))
    unseen = np.setdiff1d(np.arange(5000), seen)
    features[unseen] = np.nan
    np.save(path, features)
    for pool in (path, np.load(path, mmap_mode="r")):
        assert selection_report(chosen, labels, 5, gmm, pool, held_out) == expected
    message = rf"p\.npy: 1 of the 1 samples .* .the first is sample {unseen[0]}\)"
    with pytest.raises(InputError, match=message):
        selection_report(unseen[:1], labels, 5, gmm, path)
    with pytest.raises(InputError, match=r"p\.npy: 2 dimensions, expected the mixtures' 3"):
        selection_report(chosen, labels, 5, Gmm([1.0], [[0, 0, 0]], [[1, 1, 1]], "diag"), path)


def test_bad_reports():
    features, labels = labelled_pool(30)
    gmm = mixture([1.0])
    for indices, classes, held_out, message in (
        ([], labels, None, "indices: "),
        ([0.5], labels, None, "indices: float64"),
        ([0, 30], labels, None, "indices: from 0 to 30, expected from 0 to 29"),
        ([-1], labels, None, "indices: from -1"),
        ([1, 1, 2], labels, None, "indices: 1 repeat"),
        ([1], labels[:9], None, "labels: int64 of shape .9,., expected 30 whole numbers"),
        ([1], labels + 1, None, "labels: from 1 to 5, expected from 0 to 4"),
        ([1], labels, np.ones((4, 3)), "held_out: features: 3 dimensions"),
        ([1], labels, features * np.nan, "held_out: features: 30 samples hold NaN"),
    ):
        with pytest.raises(InputError, match=message):
            selection_report(indices, classes, 5, gmm, features, held_out)

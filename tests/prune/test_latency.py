"""The latency model: fitted times, its errors, its file, and budgets that use it."""

import dataclasses
import json

import numpy as np
import pytest

from tapvit_jax.errors import InputError
from tapvit_jax.importance.layers import LayerScores
from tapvit_jax.models.registry import Model
from tapvit_jax.models.vit import vit_config
from tapvit_jax.pipeline import allocate_measured
from tapvit_jax.prune.allocate import AllocateConfig, allocate
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.latency import (
    FEATURES,
    LatencyModel,
    features,
    fit_latency,
    random_widths,
)
from tapvit_jax.prune.reshape import reshaped_config
from tapvit_jax.prune.units import unit_table

DENSE = vit_config(image_size=64, patch_size=8, num_classes=10, depth=4, num_heads=4, embed_dim=64)
# Milliseconds of each feature; counts are in units of 10^9.
TRUE = np.array([1.0, 0.1, 300.0, 500.0, 4000.0, 0.05, 200.0, 3000.0])


def measured(count=24, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    configs = [DENSE, *(random_widths(DENSE, rng) for _ in range(count))]
    times = [float(features(config) @ TRUE) for config in configs]
    return configs, [t * (1 + noise * rng.standard_normal()) for t in times]


@pytest.fixture(scope="module")
def fitted():
    return fit_latency(DENSE, *measured(), batch_size=2, threads=3, machine={"cores": 2})


def test_features_by_hand():
    found = dict(zip(FEATURES, features(DENSE), strict=True))
    n, d, h, k, f, blocks = 65, 64, 4, 16, 256, 4
    assert found["constant"] == 1
    assert found["attn_branches"] == found["mlp_branches"] == blocks
    assert found["attn_dense_macs"] == pytest.approx(blocks * n * d * 4 * h * k / 1e9)
    assert found["attn_product_macs"] == pytest.approx(blocks * 2 * n * n * h * k / 1e9)
    assert found["attn_logits"] == pytest.approx(blocks * n * n * h / 1e9)
    assert found["mlp_macs"] == pytest.approx(blocks * 2 * n * d * f / 1e9)
    assert found["mlp_units"] == pytest.approx(blocks * n * f / 1e9)


def test_exact_times_are_predicted(fitted):
    configs, times = measured(seed=5)
    found = [fitted.predict(config) for config in configs]
    np.testing.assert_allclose(found, times, rtol=1e-3)
    assert fitted.error_max < 0.01


def test_errors_come_from_left_out_measurements():
    # Sixteen measurements of pure noise can be followed closely, but not predicted.
    configs, _ = measured(15)
    noise = np.random.default_rng(1).uniform(1.0, 3.0, len(configs))
    found = fit_latency(DENSE, configs, noise)
    assert found.error_median > 0.1
    assert fit_latency(DENSE, *measured(noise=0.02)).error_median < 0.05


def test_wider_is_never_predicted_faster():
    found = fit_latency(DENSE, *measured(12, noise=0.3))
    assert min(found.coefficients) >= 0
    narrow = dataclasses.replace(DENSE.blocks[0], mlp_dim=10, qk_dim=3)
    smaller = dataclasses.replace(DENSE, blocks=(narrow, *DENSE.blocks[1:]))
    assert found.predict(smaller) <= found.predict(DENSE)


def test_files_round_trip(fitted, tmp_path, swin_model):
    fitted.save(tmp_path / "latency.json")
    assert LatencyModel.load(tmp_path / "latency.json") == fitted
    rng = np.random.default_rng(0)
    configs = [random_widths(swin_model.config, rng) for _ in range(6)]
    swin = fit_latency(swin_model.config, configs, [1.0, 2.0, 3.0, 2.0, 1.0, 2.0])
    swin.save(tmp_path / "swin.json")
    assert LatencyModel.load(tmp_path / "swin.json") == swin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not a tapvit-latency file"),
        ({"version": 2}, "has another version"),
        ({"features": ["constant"]}, "has another version"),
        ({"family": "convnet"}, "family is 'convnet', expected one of"),
        ({"coefficients": [0.0] * 8}, "not all zero"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"threads": 0}, "threads is 0, expected 1 or more"),
        ({"error_median": -0.1}, "error_median is -0.1, expected 0 or more"),
        ({"error_max": -1.0}, "error_max is -1.0, expected 0 or more"),
        ({"coefficients": [-1.0] * 8}, "none negative"),
        ({"coefficients": [1.0]}, "expected 8"),
        ({"batch_size": "1"}, "batch_size is '1', expected int"),
    ],
)
def test_damaged_files_are_refused(fitted, tmp_path, changes, message):
    path = tmp_path / "latency.json"
    fitted.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        LatencyModel.load(path)


def test_numbers_too_large_for_a_float_are_refused(fitted, tmp_path):
    path = tmp_path / "latency.json"
    dataclasses.replace(fitted, coefficients=(12345.0,) * 8).save(path)
    path.write_text(path.read_text().replace("12345.0", "1e999"))
    with pytest.raises(InputError, match="expected 8, finite"):
        LatencyModel.load(path)


def test_another_dense_model_is_refused(fitted):
    other = dataclasses.replace(DENSE, num_classes=11)
    with pytest.raises(InputError, match="measured for another dense model"):
        fitted.predict(other)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 2.0, 3.0], "3 measurements of 3 models, expected four or more"),
        ([1.0, 2.0, 3.0, 0.0], "positive and finite"),
        ([1.0, 2.0, 3.0, np.nan], "positive and finite"),
    ],
)
def test_useless_measurements_are_refused(times, message):
    configs, _ = measured()
    with pytest.raises(InputError, match=message):
        fit_latency(DENSE, configs[: len(times)], times)


def scores(seed=0):
    rng = np.random.default_rng(seed)
    units = {group.key: rng.random(group.shape) for group in unit_table(DENSE)}
    shape = (2, len(DENSE.blocks))
    divergence = np.sort(rng.random(shape), axis=0)
    return units, LayerScores((0.4, 0.8), divergence, divergence[:, ::-1].copy())


@pytest.mark.parametrize("widths", ["sensitivity", "softmax"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_plans_keep_to_predicted_latency(fitted, widths, share):
    units, layers = scores()
    dense_ms = fitted.predict(DENSE)
    for budget in (Budget(latency=share), Budget(latency_ms=share * dense_ms)):
        config = AllocateConfig(widths=widths)
        plan = allocate(DENSE, units, layers, budget, config=config, latency=fitted)
        found = fitted.predict(reshaped_config(plan))
        assert 0.97 * share * dense_ms <= found <= share * dense_ms


def test_bounds_on_latency_and_macs_hold_together(fitted):
    units, layers = scores()
    budget = Budget(latency=0.8, latency_ms=0.9 * fitted.predict(DENSE), macs=0.5)
    assert budget.limits(DENSE, fitted)["latency_ms"] == pytest.approx(0.8 * fitted.predict(DENSE))
    small = reshaped_config(allocate(DENSE, units, layers, budget, latency=fitted))
    assert cost(small).macs <= 0.5 * cost(DENSE).macs
    assert fitted.predict(small) <= 0.8 * fitted.predict(DENSE)


def test_infeasible_latencies_name_the_smallest(fitted):
    units, layers = scores()
    with pytest.raises(InputError, match=r"allows 0.5 latency_ms, the smallest feasible is \d"):
        allocate(DENSE, units, layers, Budget(latency_ms=0.5), latency=fitted)
    with pytest.raises(InputError, match="needs a latency model: measure one with tapvit"):
        allocate(DENSE, units, layers, Budget(latency=0.5))


@pytest.fixture
def model():
    return Model(DENSE, {})


class Machine:
    """Takes a given factor longer than predicted."""

    def __init__(self, fitted, slower):
        self.fitted, self.slower, self.calls = fitted, slower, 0

    def __call__(self, dense, pruned):
        self.calls += 1
        return self.fitted.predict(dense), self.slower * self.fitted.predict(pruned)


def measure_plan(fitted, model, slower, monkeypatch, budget):
    # Only shapes matter here.
    monkeypatch.setattr(
        "tapvit_jax.pipeline.reshape", lambda model, plan: Model(reshaped_config(plan), {})
    )
    machine = Machine(fitted, slower)
    units, layers = scores()
    plan, found = allocate_measured(
        model, units, layers, budget, fitted, measure=lambda a, b: machine(a.config, b.config)
    )
    return plan, found, machine.calls


def test_a_plan_that_measures_well_is_taken_at_once(fitted, model, monkeypatch):
    budget = Budget(latency=0.6)
    plan, found, calls = measure_plan(fitted, model, 0.99, monkeypatch, budget)
    assert calls == 1
    assert found["pruned_ms"] <= found["limit_ms"] == pytest.approx(0.6 * fitted.predict(DENSE))
    assert fitted.predict(reshaped_config(plan)) == found["predicted_ms"]


def test_a_plan_that_measures_slow_is_planned_again(fitted, model, monkeypatch):
    budget = Budget(latency=0.6)
    plan, found, calls = measure_plan(fitted, model, 1.2, monkeypatch, budget)
    assert calls == 2
    assert found["pruned_ms"] <= 0.6 * fitted.predict(DENSE)
    assert fitted.predict(reshaped_config(plan)) <= 0.5 * fitted.predict(DENSE)


def test_a_promise_that_cannot_be_kept_is_not_made(fitted, model, monkeypatch):
    with pytest.raises(InputError, match=r"latency=0.6 was not met: the last plan took .* ms"):
        measure_plan(fitted, model, 5.0, monkeypatch, Budget(latency=0.6))
    with pytest.raises(InputError, match="infeasible budget"):
        measure_plan(fitted, model, 1.0, monkeypatch, Budget(latency=0.01))

"""How long scoring takes beside what it could be compared with; prints ratios.

    python -m experiments.bench_scoring

Every pair is timed in turns in one process, so that a machine that slows down slows both.
"""

import time
from collections.abc import Callable

import jax
import numpy as np
from sklearn.mixture import GaussianMixture

from tapvit_jax.importance.layers import LayerConfig, layer_importance
from tapvit_jax.importance.neurons import NeuronConfig, neuron_importance
from tapvit_jax.models import backbone
from tapvit_jax.models.presets import create
from tapvit_jax.models.registry import Model
from tapvit_jax.proxy.density import log_likelihood
from tapvit_jax.proxy.gmm import Gmm
from tapvit_jax.prune.mask import Plan, apply_masks, top_k_mask
from tapvit_jax.prune.units import unit_key

BATCH, REPEATS, DEPTH = 16, 3, 4


def alternate(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of every run, after one warm-up each."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def report(title: str, times: dict[str, float]) -> None:
    """Print all times as multiples of the first."""
    base = next(iter(times.values()))
    print(title)
    for name, seconds in times.items():
        print(f"  {name:46} {1e3 * seconds:9.1f} ms   x {seconds / base:.2f}")


def neurons() -> None:
    """Composite scores of one batch against the plain forward pass."""
    config, _ = create("deit_tiny_patch16_224")
    model = Model(config, backbone.init(config, jax.random.key(0)))
    images = np.random.default_rng(0).standard_normal((BATCH, 224, 224, 3)).astype(np.float32)
    runs = {"forward pass": lambda: model.apply(images)}
    for name in ("tap_published", "tap", "taylor"):
        scoring = NeuronConfig.of_method(name)
        runs[name] = lambda scoring=scoring: neuron_importance(model, [images], config=scoring)
    report(f"neuron scores, DeiT-T, batch {BATCH}", alternate(runs))


def layers() -> None:
    """Layer scores with shared prefixes against one whole forward pass for every probe."""
    config, _ = create("deit_tiny_patch16_224", img_size=112, depth=DEPTH)
    model = Model(config, backbone.init(config, jax.random.key(0)))
    images = np.random.default_rng(0).standard_normal((BATCH, 112, 112, 3)).astype(np.float32)
    units = neuron_importance(model, [images])
    probes = LayerConfig(sparsity=(0.5,))
    masked = []
    for i, block in enumerate(config.blocks):
        for kind in ("mlp", "vo"):
            key = unit_key(i, kind)
            size = block.mlp_dim if kind == "mlp" else block.num_heads * block.v_dim
            mask = top_k_mask(units[key], size // 2)
            masked.append(apply_masks(model, Plan(config, {key: mask})))

    def one_by_one():
        return [(model.apply(images), variant.apply(images)) for variant in masked]

    report(
        f"layer scores, {DEPTH} blocks, one sparsity",
        alternate(
            {
                "one masked layer at a time, original rerun": one_by_one,
                "shared prefixes": lambda: layer_importance(model, [images], units, config=probes),
            }
        ),
    )


def density() -> None:
    """Log-likelihood of a pool against scikit-learn's score_samples, float32."""
    rng = np.random.default_rng(0)
    for devices, kind, g, d, rows in ((1, "full", 10, 128, 20_000), (20, "diag", 10, 64, 20_000)):
        features = rng.standard_normal((rows, d)).astype(np.float32)
        fitted = [
            GaussianMixture(g, covariance_type=kind, max_iter=2, random_state=i, tol=1.0).fit(
                features[:4000]
            )
            for i in range(devices)
        ]
        gmms = [Gmm(m.weights_, m.means_, m.covariances_, kind) for m in fitted]
        report(
            f"pool scoring, {devices} {kind} mixtures, K = {g}, d = {d}, {rows:,} rows",
            alternate(
                {
                    "scikit-learn, one mixture after the other": lambda fitted=fitted, x=features: [
                        m.score_samples(x) for m in fitted
                    ],
                    "log_likelihood, all at once": lambda g=gmms, x=features: log_likelihood(g, x),
                }
            ),
        )


def main() -> None:
    """Run all comparisons."""
    print(f"{jax.default_backend()}, {jax.local_device_count()} device(s)")
    neurons()
    layers()
    density()


if __name__ == "__main__":
    main()

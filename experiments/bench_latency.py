"""Half the MACs in ONNX Runtime: dense and pruned side by side, for presets with random weights.

python -m experiments.bench_latency
"""

import os

import jax
import numpy as np
from absl import app, flags

from experiments.bench import note, report
from tapvit_jax.export.latency import compare_latency
from tapvit_jax.models import backbone
from tapvit_jax.models.presets import create
from tapvit_jax.models.registry import Model
from tapvit_jax.prune.allocate import AllocateConfig, RoundTo, allocate
from tapvit_jax.prune.budget import Budget
from tapvit_jax.prune.cost import cost
from tapvit_jax.prune.reshape import reshape
from tapvit_jax.prune.units import WIDTH_KINDS, unit_table

_MODELS = flags.DEFINE_list(
    "models", ["deit_small_patch16_224", "swin_tiny_patch4_window7_224"], "Presets."
)
_BUDGET = flags.DEFINE_string("budget", "macs=0.5", "What the pruned models may cost.")
_ROUND_TO = flags.DEFINE_string("round_to", "mlp=16,qk=8,vo=8", "Multiples of the widths.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Batch sizes.")
_THREADS = flags.DEFINE_integer("threads", os.cpu_count() or 1, "Threads of ONNX Runtime.")
_REPEATS = flags.DEFINE_integer("repeats", 40, "Timed passes of each model.")


def main(argv):
    """Print medians and ratios."""
    del argv
    for name in _MODELS.value:
        dense = random_model(name)
        rng = np.random.default_rng(0)
        groups = [g for g in unit_table(dense.config) if g.kind in WIDTH_KINDS]
        # Which units stay does not matter for latency, and all layers are treated alike.
        scores = {group.key: rng.random(group.shape) for group in groups}
        config = AllocateConfig(widths="softmax", round_to=RoundTo.parse(_ROUND_TO.value))
        plan = allocate(dense, scores, None, Budget.parse(_BUDGET.value), config=config)
        small = reshape(dense, plan)
        share = cost(small.config).macs / cost(dense.config).macs
        for size in map(int, _BATCHES.value):
            found = compare_latency(
                {"dense": dense, "pruned": small},
                batch_size=size,
                threads=_THREADS.value,
                repeats=_REPEATS.value,
            )
            report(
                f"ONNX Runtime, {name}, {100 * share:.1f} % of the MACs, batch {size}, "
                f"{_THREADS.value} threads",
                {kind: latency.median / 1e3 for kind, latency in found.items()},
            )
            for kind, latency in found.items():
                note(f"{kind}: {latency.low:.1f} to {latency.high:.1f} ms")


def random_model(name: str) -> Model:
    """A preset with random weights of the usual scale."""
    config, preprocess = create(name)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: (0.02 * rng.standard_normal(s.shape)).astype(np.float32),
        backbone.param_shapes(config),
    )
    return Model(config, params, preprocess, name=name)


if __name__ == "__main__":
    app.run(main)

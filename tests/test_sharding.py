"""What waits for the devices."""

import numpy as np

from tapvit_jax import sharding
from tapvit_jax.sharding import Backlog
from tapvit_jax.train import loop
from tests.train.test_finetune import LONG, assert_trees_equal, long_run


def test_results_are_waited_for_when_batches_fill_the_memory(monkeypatch):
    waited = []
    monkeypatch.setattr(sharding.jax, "block_until_ready", waited.append)
    backlog = Backlog(most=250)
    for step in range(7):
        backlog.sent({"image": np.zeros(20, np.float32), "mask": np.zeros(20, np.uint8)}, step)
    assert waited == [2, 5]


def test_training_waits_now_and_then_and_ends_the_same(monkeypatch):
    expected, sizes = long_run(), []

    class Small(Backlog):
        def __init__(self):
            super().__init__(most=0)

        def sent(self, batch, result):
            super().sent(batch, result)
            sizes.append(batch["image"].nbytes)
            assert self._waiting == 0

    monkeypatch.setattr(loop, "Backlog", Small)
    found = long_run()
    assert len(sizes) == 3 * LONG.epochs and min(sizes) > 0
    assert found.record == expected.record
    assert_trees_equal(found.params, expected.params)

"""Runs that are killed, checkpoints that are damaged, and disks that are full."""

import dataclasses
import json
import logging
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from tapvit_jax.data import pipeline
from tapvit_jax.data.folders import FolderSource
from tapvit_jax.errors import InputError
from tapvit_jax.sharding import data_mesh
from tapvit_jax.stages import Scratch
from tapvit_jax.train import checkpoint, finetune
from tapvit_jax.train.checkpoint import Checkpoints
from tapvit_jax.train.loop import finished
from tests.train.test_finetune import LONG, StopError, assert_trees_equal, long_run, make_data

# Twelve images in batches of four: three steps an epoch, a checkpoint after every second step.
STEPS = dataclasses.replace(LONG, checkpoint_epochs=6, checkpoint_steps=2)


def kill_before(monkeypatch, directory, step):
    taken, original = [], finetune._step

    def killed(*arguments):
        if len(taken) == step:
            raise StopError
        taken.append(step)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(finetune, "_step", killed)
        long_run(directory, options=STEPS)


def count_steps(monkeypatch, directory):
    taken, original = [], finetune._step
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_step", lambda *a: taken.append(1) or original(*a))
        result = long_run(directory, options=STEPS)
    return len(taken), result


@pytest.fixture(scope="module")
def undisturbed():
    return long_run(options=STEPS)


def assert_same(found, expected):
    assert found.record == expected.record
    assert found.best_epoch == expected.best_epoch
    assert_trees_equal(found.params, expected.params)


@pytest.mark.parametrize(("killed", "resumed"), [(1, 0), (5, 4), (7, 6), (17, 16)])
def test_a_run_goes_on_within_an_epoch(tmp_path, monkeypatch, undisturbed, killed, resumed):
    kill_before(monkeypatch, tmp_path / "run", killed)
    taken, found = count_steps(monkeypatch, tmp_path / "run")
    assert taken == 18 - resumed
    assert_same(found, undisturbed)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_images_a_worker_reads_goes_on_within_an_epoch(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (3, 5), dtype=np.uint8)).save(path)
    order = rng.permutation(16)
    data = dataclasses.replace(
        make_data(),
        source=FolderSource(tmp_path / "images"),
        train=order[:12],
        validation=order[12:],
    )
    # Workers take their time to start, for every pass: one epoch of four steps.
    options = dataclasses.replace(STEPS, epochs=1, batch_size=3)
    expected = long_run(data=data, options=options)
    data, read, taken = dataclasses.replace(data, workers=1), [], []
    load, step = pipeline.load_in_workers, finetune._step

    def stopping(*arguments):
        taken.append(1)
        if len(taken) == 4:
            raise StopError
        return step(*arguments)

    monkeypatch.setattr(pipeline, "load_in_workers", lambda *a: read.append(len(a[1])) or load(*a))
    monkeypatch.setattr(finetune, "_step", stopping)
    with pytest.raises(StopError):
        long_run(tmp_path / "run", data=data, options=options)
    assert_same(long_run(tmp_path / "run", data=data, options=options), expected)
    # Validation, four steps, the two behind the checkpoint, validation.
    assert read == [2, 4, 2, 2] and len(taken) == 4 + 2


def test_orbax_is_silent_and_others_are_heard_afterwards(tmp_path, caplog):
    logger = logging.getLogger("absl")
    with caplog.at_level(logging.INFO, "absl"):
        with Checkpoints(tmp_path / "run", {}) as states:
            state = {"x": np.ones(3, np.float32)}
            states.save(1, state, {})
            assert states.restore(state) is not None
        assert logger.level == logging.INFO
    assert not [record for record in caplog.records if record.name == "absl"]


def test_a_run_goes_on_with_other_checkpoints(tmp_path, monkeypatch, undisturbed):
    kill_before(monkeypatch, tmp_path / "run", 5)
    finer = dataclasses.replace(STEPS, checkpoint_epochs=1, checkpoint_steps=1)
    assert_same(long_run(tmp_path / "run", options=finer), undisturbed)


def test_a_stage_starts_over_where_another_run_left_off(tmp_path, monkeypatch, caplog):
    kill_before(monkeypatch, tmp_path / "run", 9)
    with caplog.at_level(logging.WARNING, "tapvit_jax"):
        found = long_run(Scratch(tmp_path / "run"), options=STEPS, seed=6)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all("another run: seed (5 there, 6 here)" in text for text in told)
    assert_same(found, long_run(options=STEPS, seed=6))
    # Its own states lie there until the stage's artefact does: a kill in between costs no step.
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_step", lambda *_: pytest.fail("a step again"))
        assert_same(long_run(Scratch(tmp_path / "run"), options=STEPS, seed=6), found)
    with pytest.raises(InputError, match=r"fields differ: seed \(6 there, 5 here\)"):
        long_run(tmp_path / "run", options=STEPS)


def test_a_state_of_another_version_is_not_continued(tmp_path, monkeypatch, caplog):
    keeper = Checkpoints(tmp_path / "run", {})
    keeper.save(1, {"a": np.zeros(3)}, {})
    keeper.close()
    newer = checkpoint.library_versions() | {"tapvit-jax": "9.0.0"}
    monkeypatch.setattr(checkpoint, "library_versions", lambda: newer)
    with (
        pytest.raises(InputError, match=r"fields differ: version \('.*' there, '9.0.0' here\)"),
        Checkpoints(tmp_path / "run", {}) as keeper,
    ):
        keeper.restore({"a": np.ones(3)})
    with Checkpoints(Scratch(tmp_path / "run"), {}) as keeper:
        assert keeper.restore({"a": np.ones(3)}) is None
    assert "left aside, it was made by another run: version" in caplog.text


def truncate_files(step):
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])


def garble_files(step):
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * path.stat().st_size)


def damage_note(step):
    step.with_suffix(".json").write_text('{"layout": 1, "ident')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate_files, "truncated or missing"),
        (garble_files, "cannot be read"),
        (shutil.rmtree, "truncated or missing"),
        (damage_note, "not valid JSON"),
        (lambda step: step.with_suffix(".json").unlink(), "was not finished"),
        (lambda step: step.with_suffix(".json").write_text("[]"), "not of this version"),
    ],
    ids=["truncated", "garbled", "gone", "note", "no_note", "version"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path, monkeypatch, undisturbed, caplog, damage, reason
):
    kill_before(monkeypatch, tmp_path / "run", 9)
    damage(tmp_path / "run" / "step_000000008")
    with caplog.at_level(logging.WARNING, "tapvit_jax"):
        taken, found = count_steps(monkeypatch, tmp_path / "run")
    assert taken == 18 - 6
    assert_same(found, undisturbed)
    assert "step_000000008: left aside" in caplog.text
    assert reason in caplog.text


def test_without_a_whole_checkpoint_the_run_starts_over(tmp_path, monkeypatch, undisturbed, caplog):
    kill_before(monkeypatch, tmp_path / "run", 9)
    for step in (6, 8):
        truncate_files(tmp_path / "run" / f"step_{step:09}")
    taken, found = count_steps(monkeypatch, tmp_path / "run")
    assert taken == 18
    assert_same(found, undisturbed)


def test_a_state_of_other_shapes_is_left_aside(tmp_path, caplog):
    with Checkpoints(tmp_path / "run", {}) as keeper:
        keeper.save(1, {"a": np.zeros(3)}, {})
        assert keeper.restore({"a": np.zeros(4)}) is None
        assert "another number of devices" in caplog.text


def test_two_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path / "run", {}) as keeper:
        for step in range(1, 5):
            keeper.save(step, {"a": np.full(3, step)}, {"step": step})
        names = sorted(path.name for path in (tmp_path / "run").iterdir())
        states = [f"step_{n:09}{e}" for n in (3, 4) for e in ("", ".json")]
        assert names == [".checkpoints.lock", *states]
        assert json.loads((tmp_path / "run" / states[1]).read_text())["record"] == {"step": 3}


def test_what_else_is_in_a_directory_of_checkpoints_stays(tmp_path):
    (tmp_path / "model.json").write_text("years of work")
    for folder in ("step_by_step", "x.orbax-checkpoint-tmp-1"):
        (tmp_path / folder).mkdir()
    for file in ("step_000000001.png", ".step.json.1.partial"):
        (tmp_path / file).write_text("years of work")
    before = sorted(tmp_path.iterdir())
    with Checkpoints(tmp_path, {}) as keeper:
        for step in range(1, 5):
            keeper.save(step, {"a": np.zeros(3)}, {})
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["step_000000007", "step_000000007.json"])
def test_what_is_called_like_a_checkpoint_is_not_taken_for_one(tmp_path, name):
    if name.endswith("json"):
        (tmp_path / name).write_text('{"years": "of work"}')
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"holds '{name}', which is no checkpoint but is called"):
        Checkpoints(tmp_path, {})
    assert sorted(tmp_path.rglob("*")) == before
    # A stage's own folder holds nothing of the user's.
    with Checkpoints(Scratch(tmp_path), {}) as keeper:
        assert keeper.restore({"a": np.zeros(3)}) is None


def test_a_directory_is_one_runs_at_a_time(tmp_path):
    with Checkpoints(tmp_path / "run", {}) as keeper:
        keeper.save(1, {"a": np.zeros(3)}, {})
        with pytest.raises(InputError, match="another process keeps its checkpoints there"):
            Checkpoints(tmp_path / "run", {})
        assert keeper.restore({"a": np.ones(3)}) is not None
    with Checkpoints(tmp_path / "run", {}):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "left", ["step_000000008.orbax-checkpoint-tmp-3", ".step_000000008.json.x7.partial"]
)
def test_what_a_kill_left_is_taken_away(tmp_path, left):
    keeper = Checkpoints(tmp_path, {})
    keeper.save(6, {"a": np.zeros(3)}, {})
    keeper.close()
    if left.endswith("partial"):
        (tmp_path / left).write_text("{")
    else:
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("x")
    keeper = Checkpoints(tmp_path, {})
    assert not (tmp_path / left).exists()
    assert keeper.restore({"a": np.ones(3)}) is not None
    keeper.close()


@pytest.mark.parametrize("call", ["save", "restore"])
def test_an_interrupt_waits_for_what_orbax_does(tmp_path, monkeypatch, call):
    keeper, done = Checkpoints(tmp_path, {}), []
    keeper.save(1, {"a": np.zeros(3)}, {})
    original = getattr(keeper._orbax, call)

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        found = original(*arguments, **options)
        done.append(call)
        return found

    monkeypatch.setattr(keeper._orbax, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        keeper.save(2, {"a": np.ones(3)}, {}) if call == "save" else keeper.restore(
            {"a": np.ones(3)}
        )
    assert done == [call]
    keeper.close()
    with Checkpoints(tmp_path, {}) as keeper:
        # What was saved last has no note.
        np.testing.assert_array_equal(keeper.restore({"a": np.ones(3)})[0]["a"], np.zeros(3))


def test_a_kill_while_checkpoints_are_removed(tmp_path, monkeypatch):
    keeper = Checkpoints(tmp_path, {})
    keeper.save(1, {"a": np.zeros(3)}, {})

    def killed(path, **_):
        (path / "_CHECKPOINT_METADATA").unlink()
        raise StopError

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        keeper.close(delete=True)
    keeper._lock.close()
    with Checkpoints(tmp_path, {}) as keeper:
        assert keeper.restore({"a": np.ones(3)}) is None
    assert not tmp_path.exists()


def test_states_behind_the_present_one_do_not_count(tmp_path):
    keeper = Checkpoints(tmp_path / "run", {})
    for step in (8, 9):
        keeper.save(step, {"x": np.zeros(2)}, {})
        truncate_files(tmp_path / "run" / f"step_{step:09}")
    keeper.save(1, {"x": np.ones(2)}, {"step": 1})
    state, record = keeper.restore({"x": np.zeros(2)})
    keeper.close()
    np.testing.assert_array_equal(state["x"], np.ones(2))
    assert record == {"step": 1}


def test_a_full_disk_ends_with_one_line(tmp_path):
    keeper = Checkpoints(tmp_path / "run", {})
    keeper.save(1, {"a": np.zeros(3)}, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"run: cannot hold checkpoints \(.*\)") as caught:
            noise = np.random.default_rng(0).standard_normal(100_000)
            keeper.save(2, {"a": noise}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        keeper.close()
    assert "\n" not in str(caught.value)
    with Checkpoints(tmp_path / "run", {}) as keeper:
        assert keeper.restore({"a": np.ones(3)})[1] == {"step": 1}


@pytest.mark.parametrize("place", ["/proc/nothing/run", "file/run"])
def test_an_unwritable_directory_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot hold checkpoints"):
        long_run(tmp_path / place)


def test_patience():
    options = dataclasses.replace(LONG, epochs=9, patience=2)
    record = [{"epoch": e, "top1": t, "loss": 1.0} for e, t in enumerate((0.1, 0.3, 0.2, 0.3))]
    assert [finished(record[: n + 1], options) for n in range(4)] == [False, False, False, True]
    assert not finished(record, LONG)
    unhurried = long_run(options=dataclasses.replace(LONG, learning_rate=1.0))
    hurried = long_run(options=dataclasses.replace(LONG, learning_rate=1.0, patience=2))
    assert hurried.record == unhurried.record[: hurried.best_epoch + 3]


@pytest.mark.parametrize("devices", [2, 4])
def test_a_batch_spread_over_devices(devices):
    # Eleven images: the last batch holds one image of padding.
    data = make_data(seed=7, count=11)
    alone = long_run(data=data)
    spread = long_run(data=data, mesh=data_mesh(jax.devices()[:devices]))
    for one, other in zip(spread.record, alone.record, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (spread.params, alone.params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_accelerators_are_used_without_being_told(monkeypatch):
    data = make_data(seed=7, count=11)
    assert finetune._devices(None, 64) is None
    alone, used = long_run(data=data), []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    sizes = {1: 1, 4: 4, 7: 7, 11: 1, 12: 6, 64: 8}
    assert {batch: len(finetune._devices(None, batch)) for batch in sizes} == sizes
    mesh = finetune.data_mesh
    monkeypatch.setattr(finetune, "data_mesh", lambda d: used.append(len(d)) or mesh(d))
    spread = long_run(data=data)
    assert set(used) == {4}
    for one, other in zip(spread.record, alone.record, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_batch_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(InputError, match="batch_size is 4, expected a multiple of the 3 devices"):
        long_run(mesh=data_mesh(jax.devices()[:3]))

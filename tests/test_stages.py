import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tapvit_jax import stages as stages_module
from tapvit_jax.errors import InputError
from tapvit_jax.files import content_hash, file_hash, is_locked
from tapvit_jax.stages import Stages, claim_workdir, differences, read_row, write_row
from tapvit_jax.versions import library_versions
from tests.flags import CHEAP
from tests.processes import free_port

INPUTS = {"seed": 1, "options": {"epochs": 2, "names": ["a", "b"]}}
ARRAYS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 4), np.int64),
}
VERSION = library_versions()["tapvit-jax"]
META = {"best": 0.25, "record": [{"epoch": 1, "loss": 1e-7}], "bic": {10: 1.0, 9: 2.0}}


class Work:
    """Counts how often it is done."""

    def __init__(self, arrays=ARRAYS, meta=META):
        self.arrays, self.meta, self.times = arrays, meta, 0

    def __call__(self):
        self.times += 1
        return self.arrays, self.meta


def entries(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def check(artefact, cached):
    assert artefact.cached == cached
    assert artefact.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        found = artefact.arrays[name]
        assert found.dtype == array.dtype and found.shape == array.shape, name
        np.testing.assert_array_equal(found, array)
    # The same from the first run and from all later ones.
    assert artefact.meta == json.loads(json.dumps(META))


def test_the_second_run_is_cached(tmp_path, caplog):
    work, stages = Work(), Stages(tmp_path / "stages")
    first = stages.run("train", INPUTS, work)
    check(first, cached=False)
    reordered = json.loads(json.dumps(dict(reversed(INPUTS.items()))))
    for again in (stages, Stages(tmp_path / "stages")):
        found = again.run("train", reordered, work)
        check(found, cached=True)
        assert found.key == first.key
    assert work.times == 1 and not caplog.records
    (made,) = (tmp_path / "stages").iterdir()
    assert made.name == f"train-{first.key[:16]}"


def test_nothing_but_a_stage_without_arrays(tmp_path):
    work, stages = Work({}, {}), Stages(tmp_path)
    for cached in (False, True):
        found = stages.run("empty", {}, work)
        assert (dict(found.arrays), dict(found.meta), found.cached) == ({}, {}, cached)


def test_other_inputs_and_other_names_are_computed_anew(tmp_path):
    work, stages = Work(), Stages(tmp_path)
    keys = {
        stages.run(name, inputs, work).key
        for name, inputs in [
            ("train", INPUTS),
            ("score", INPUTS),
            ("train", INPUTS | {"seed": 2}),
            ("train", INPUTS | {"seed": "1"}),
            ("train", INPUTS | {"more": None}),
            ("train", {"seed": 1, "options": {"epochs": 2, "names": ["b", "a"]}}),
        ]
    }
    assert len(keys) == work.times == 6
    check(stages.run("train", INPUTS, work), cached=True)


class Explode:
    """Unpickling this leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def alter(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def delete(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def replace_by_pickle(path):
    path.write_bytes(pickle.dumps(Explode(path.parent.parent / "exploded")))


def edit_meta(path):
    # Valid JSON with another result in it.
    path.write_text(path.read_text().replace("0.25", "0.75"))


def other_stage(path):
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | {"key": "0" * 64}))


def no_mapping(path):
    path.write_text("[1, 2]")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(
            (file, damage)
            for file in ("stage.json", "arrays.safetensors")
            for damage in (truncate, empty, alter, delete, folder, replace_by_pickle)
        ),
        *(("stage.json", damage) for damage in (edit_meta, other_stage, no_mapping)),
    ],
)
def test_a_damaged_artefact_is_computed_again_and_that_is_said(tmp_path, caplog, file, damage):
    work, stages = Work(), Stages(tmp_path)
    key = stages.run("train", INPUTS, work).key
    path = tmp_path / f"train-{key[:16]}" / file
    damage(path)
    with caplog.at_level(logging.WARNING):
        check(stages.run("train", INPUTS, work), cached=False)
    (record,) = caplog.records
    assert str(path.parent) in record.getMessage()
    assert record.getMessage().endswith("; computing it again")
    check(stages.run("train", INPUTS, work), cached=True)
    assert work.times == 2 and len(caplog.records) == 1
    assert entries(path.parent) == ["arrays.safetensors", "stage.json"]
    assert list(tmp_path.iterdir()) == [path.parent]


def test_what_another_version_made_is_computed_again_and_that_is_said(
    tmp_path, caplog, monkeypatch
):
    work, stages, row = Work(), Stages(tmp_path), tmp_path / "row.json"
    stages.run("train", INPUTS, work)
    write_row(row, "key", {"top1": 1})
    assert read_row(row, "key") == {"top1": 1} and read_row(row, "other") is None
    newer = stages_module.library_versions() | {"tapvit-jax": "9.0.0"}
    monkeypatch.setattr(stages_module, "library_versions", lambda: newer)
    with caplog.at_level(logging.WARNING):
        check(stages.run("train", INPUTS, work), cached=False)
        assert read_row(row, "key") is None and read_row(row, "key", say=True) is None
    assert [record.getMessage().partition(": was made by ")[2] for record in caplog.records] == [
        f"tapvit-jax {VERSION}, this is 9.0.0; computing it again"
    ] * 2
    check(stages.run("train", INPUTS, work), cached=True)
    assert work.times == 2


@pytest.mark.parametrize("damage", [truncate, empty, no_mapping, other_stage])
def test_a_damaged_row_is_computed_again_and_that_is_said(tmp_path, caplog, damage):
    path = tmp_path / "row.json"
    write_row(path, "key", {"top1": 1}, {"images": "one"})
    # Files that were changed are no damage.
    assert read_row(path, "key", True, {"images": "two"}) is None and not caplog.records
    damage(path)
    assert read_row(path, "key") is None and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert read_row(path, "key", say=True) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: ")
    assert record.getMessage().endswith("; computing it again")


def test_a_pickle_with_matching_checksums_is_not_executed_either(tmp_path, caplog):
    work, stages = Work(), Stages(tmp_path)
    directory = tmp_path / f"train-{stages.run('train', INPUTS, work).key[:16]}"
    replace_by_pickle(directory / "arrays.safetensors")
    spec = json.loads((directory / "stage.json").read_text())
    del spec["spec_sha256"]
    spec["sha256"] = file_hash(directory / "arrays.safetensors")
    (directory / "stage.json").write_text(json.dumps(spec | {"spec_sha256": content_hash(spec)}))
    with caplog.at_level(logging.WARNING):
        check(stages.run("train", INPUTS, work), cached=False)
    assert "not a .safetensors file" in caplog.text
    assert not (tmp_path / "exploded").exists()
    # The trap is a trap.
    pickle.loads(pickle.dumps(Explode(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_killed_while_computing_leaves_nothing(tmp_path, stop):
    def compute():
        raise stop

    stages = Stages(tmp_path / "stages")
    with pytest.raises(stop):
        stages.run("train", INPUTS, compute)
    assert entries(tmp_path) == ["stages"]
    check(stages.run("train", INPUTS, Work()), cached=False)


def test_killed_while_writing_leaves_nothing(tmp_path, monkeypatch):
    save = safetensors.numpy.save_file

    def save_and_stop(arrays, path):
        save(arrays, path)
        raise KeyboardInterrupt

    stages = Stages(tmp_path / "stages")
    monkeypatch.setattr(safetensors.numpy, "save_file", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        stages.run("train", INPUTS, Work())
    assert entries(tmp_path) == ["stages"]
    monkeypatch.undo()
    check(stages.run("train", INPUTS, Work()), cached=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_results_that_are_no_numbers_are_not_cached(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Stages(tmp_path).run("train", INPUTS, Work(meta={"loss": value}))
    assert entries(tmp_path) == []


def test_scratch_lies_beside_the_artefacts(tmp_path):
    stages = Stages(tmp_path)
    assert stages.scratch("a", INPUTS) != stages.scratch("b", INPUTS) != stages.scratch("b", {})
    assert tmp_path in stages.scratch("a", INPUTS).path.parents
    assert entries(tmp_path) == []


def test_unfinished_work_stays_until_the_artefact_has_its_name(tmp_path, monkeypatch):
    stages = Stages(tmp_path)
    scratch = stages.scratch("train", INPUTS).path

    def compute():
        scratch.mkdir(parents=True, exist_ok=True)
        return ARRAYS, META

    def stop(arrays, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(safetensors.numpy, "save_file", stop)
        stages.run("train", INPUTS, compute)
    assert scratch.is_dir()
    check(stages.run("train", INPUTS, compute), cached=False)
    assert not scratch.exists()
    # As if it had been killed with the artefact there.
    scratch.mkdir()
    check(stages.run("train", INPUTS, compute), cached=True)
    assert not scratch.exists()


CONFIG = {"seed": 0, "train": {"epochs": 3, "rates": [0.1, 0.2]}, "name": "a"}


def test_a_work_directory_serves_one_configuration(tmp_path):
    workdir = tmp_path / "runs" / "a"
    claim_workdir(workdir, CONFIG)
    (workdir / "results.json").write_text("{}")
    claim_workdir(workdir, dict(reversed(CONFIG.items())))
    assert json.loads((workdir / "config.json").read_text()) == CONFIG
    other = {"seed": 1, "train": {"epochs": 3, "rates": [0.1, 0.3]}, "title": "a"}
    with pytest.raises(InputError) as caught:
        claim_workdir(workdir, other)
    assert str(caught.value) == (
        f"{workdir}: belongs to another configuration; these fields differ: "
        "name ('a' there, nothing here), seed (0 there, 1 here), title (nothing there, 'a' here), "
        "train.rates ([0.1, 0.2] there, [0.1, 0.3] here). "
        "Choose another --workdir or delete this one"
    )
    assert json.loads((workdir / "config.json").read_text()) == CONFIG


def test_a_work_directory_of_quite_another_configuration_names_a_few_fields(tmp_path):
    config = {"data": {f"a{i:02}": i for i in range(30)}, "program": "sweep", "seed": 0}
    claim_workdir(tmp_path, config)
    other = {"data": {f"a{i:02}": -i - 1 for i in range(30)}, "program": "compare", "seed": 1}
    with pytest.raises(InputError) as caught:
        claim_workdir(tmp_path, other)
    text = str(caught.value)
    assert (
        "differ: program ('sweep' there, 'compare' here), seed (0 there, 1 here), data.a00" in text
    )
    assert "data.a05 (5 there, -6 here) and 24 more. Choose another" in text and "a06" not in text


def test_an_empty_work_directory_is_claimed(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    assert entries(tmp_path) == ["config.json"]


def test_a_work_directory_that_was_half_claimed_can_be_claimed(tmp_path):
    (tmp_path / ".config.json.abc.partial").write_text("{")
    claim_workdir(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_work_directory_that_another_program_claims_meanwhile_is_shared(tmp_path, monkeypatch):
    iterdir = Path.iterdir

    def claimed_before(path):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", iterdir)
            claim_workdir(tmp_path, CONFIG)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", claimed_before)
    claim_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"seed \(0 there, 1 here\)"):
        claim_workdir(tmp_path, CONFIG | {"seed": 1})


def test_foreign_work_directories_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no config\.json"):
        claim_workdir(tmp_path, CONFIG)
    for text, message in (("{", "is not valid JSON"), ("[1]", "is not a configuration")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=rf"config\.json: {message}"):
            claim_workdir(tmp_path, CONFIG)
    assert entries(tmp_path) == ["config.json", "thesis.tex"]


def test_work_directories_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=rf"{workdir}/config\.json: lies below a file"):
            claim_workdir(workdir, CONFIG)
    assert entries(tmp_path) == ["file"]


def test_differences():
    assert differences(CONFIG, CONFIG) == []
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a ({'b': 1} there, 2 here)"]
    assert differences({"a": None}, {}) == ["a (None there, nothing here)"]


# Several programs in one directory, and several processes of one job.

WORKER = """
import sys, time
from pathlib import Path
import numpy as np
from tapvit_jax.stages import Stages

root = Path(sys.argv[1])

def compute():
    with open(root / "log", "a") as file:
        file.write("x")
    end = time.monotonic() + 60
    while not (root / "go").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return {"w": np.arange(3)}, {"worker": sys.argv[2]}

(root / sys.argv[2]).touch()
found = Stages(root / "stages").run("slow", {"a": 1}, compute)
print(found.meta["worker"], found.arrays["w"].tolist())
"""

JOB = """
import errno, sys
from pathlib import Path
import numpy as np
from tapvit_jax import distributed
from tapvit_jax.errors import InputError
from tapvit_jax.files import WriteError
from tapvit_jax.stages import Stages, all_succeed

distributed.initialize()
rank, root = distributed.process_index(), Path(sys.argv[1])
stages = Stages(root)
times = 0

def compute():
    global times
    times += 1
    # What a process has of its own is not what the stage holds.
    total = distributed.sum_over_processes(np.ones(1))
    return {"w": np.arange(3) + rank}, {"total": float(total[0])}

def refuse():
    if rank == 1:
        raise InputError("one host has bad luck")
    return {}, {}

for _ in range(2):
    found = stages.run("shared", {"a": 1}, compute)
    print(found.arrays["w"].tolist(), found.meta, times)
(root / "file").write_text("")
for stage, name in ((stages, "refused"), (Stages(root / "file" / "below"), "unwritable")):
    try:
        stage.run(name, {}, refuse)
    except InputError as error:
        print(type(error).__name__, str(error).replace(str(root), "ROOT"))
try:
    stages.run("own", {"a": {"device": rank, "seed": 1}}, compute)
except InputError as error:
    print(error)
found = stages.run("shared", {"a": 2}, compute)
print(found.arrays["w"].tolist(), times)

# The first process waits for the other's part, which never comes, in a section of its own or none.
def fail_before(collective):
    if rank == 1:
        raise OSError(errno.ENOSPC, "No space left on device", "image.png")
    collective()
    return {}, {}

def inner():
    distributed.sum_over_processes(np.ones(1))

for name, collective in (("sum", inner), ("section", lambda: all_succeed(inner)),
                         ("barrier", distributed.barrier)):
    try:
        stages.run(name, {}, lambda: fail_before(collective))
    except InputError as error:
        print(type(error).__name__, error)
print(distributed.sum_over_processes(np.ones(1)).tolist())
"""


def start(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": CHEAP, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, worker):
    while not path.exists():
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.01)


def test_two_workers_compute_a_stage_once(tmp_path):
    workers = [start(WORKER, tmp_path, name) for name in "ab"]
    for worker, name in zip(workers, "ab", strict=True):
        wait_for(tmp_path / name, worker)
    wait_for(tmp_path / "log", workers[0])
    # Both have asked for the stage and one computes it, for as long as it takes the other to do so.
    time.sleep(0.5)
    (tmp_path / "go").touch()
    texts = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], texts
    assert (tmp_path / "log").read_text() == "x"
    assert texts[0][0] == texts[1][0]
    assert len(entries(tmp_path / "stages")) == 3


def test_a_killed_worker_leaves_no_lock(tmp_path):
    worker = start(WORKER, tmp_path, "a")
    wait_for(tmp_path / "log", worker)
    worker.kill()
    worker.communicate()
    (lock,) = (tmp_path / "stages").iterdir()
    left = lock.with_name(lock.name.removesuffix(".lock") + ".abc.partial")
    left.mkdir()
    (left / "arrays.safetensors").write_text("half")
    assert not is_locked(lock)
    work = Work()
    Stages(tmp_path / "stages").run("slow", {"a": 1}, work)
    assert work.times == 1
    (made,) = (tmp_path / "stages").iterdir()
    assert made.is_dir() and made.name.startswith("slow-")


def test_processes_of_one_job_compute_together_and_read_the_same(tmp_path):
    with free_port() as port:
        job = [
            start(
                JOB,
                tmp_path,
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(rank),
            )
            for rank in range(2)
        ]
        texts = [process.communicate(timeout=240) for process in job]
    assert [process.returncode for process in job] == [0, 0], texts
    lines = [[x for x in text.splitlines() if "Gloo" not in x] for text, _ in texts]
    shared = ["[0, 1, 2] {'total': 2.0} 1"] * 2
    reason = "ROOT/file/below/.unwritable-"
    for found, refused, unwritable in (
        (lines[0], "InputError process 1: one host has bad luck", f"WriteError {reason}"),
        (lines[1], "InputError one host has bad luck", f"WriteError process 0: {reason}"),
    ):
        assert found[:3] == [*shared, refused]
        assert found[3].startswith(unwritable) and "lies below a file" in found[3]
        assert found.pop(4).endswith("fields differ between hosts: inputs.a.device")
        assert found[4] == "[0, 1, 2] 2"
        full = "cannot be written: No space left on device"
        told = f"WriteError image.png: {full}"
        if found is lines[0]:
            told = f"WriteError process 1: image.png: {full}"
        assert found[5:] == [told] * 3 + ["[2.0]"]
    assert not list(tmp_path.glob("own-*"))


def test_an_artefact_that_another_one_finished_first_wins(tmp_path):
    first, late = Work(), Work(meta={"late": True})

    def overtaken():
        Stages(tmp_path).run("train", INPUTS, first)
        return late()

    # As on file systems without locks: both compute.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "file_lock", lambda *_, **__: contextlib.nullcontext())
        found = Stages(tmp_path).run("train", INPUTS, overtaken)
    assert (first.times, late.times) == (1, 1)
    assert found.cached and found.meta == json.loads(json.dumps(META))

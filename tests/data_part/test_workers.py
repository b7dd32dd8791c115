import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tapvit_jax.data.pipeline import batches
from tapvit_jax.data.sources import FolderSource, MemorySource, Preprocess
from tapvit_jax.errors import InputError

PRE = Preprocess(6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=0.75)
COUNT = 11


class Watching(FolderSource):
    """Says which process reads, and what its JAX looks like, and dies where it is told to."""

    deadly = -1

    def read(self, index, preprocess):
        import jax
        from jax._src import xla_bridge

        (self.root / f"{os.getpid()}.pid").touch()
        assert jax.config.jax_platforms == "cpu" and not xla_bridge._backends
        assert "tensorflow" not in sys.modules
        if index == self.deadly:
            # What was read before may still be on its way.
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index, preprocess)


def write(root):
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return root


def alive(pids):
    def lives(pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    return [pid for pid in pids if lives(pid)]


def readers(root):
    return [int(path.stem) for path in root.glob("*.pid")]


def shared_memory():
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


def same(found, expected):
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            assert type(left[key]) is np.ndarray and left[key].dtype == right[key].dtype
            np.testing.assert_array_equal(left[key], right[key])


@pytest.mark.parametrize(
    ("workers", "options"),
    [(1, {"remainder": "short", "start": 1}), (2, {"part": (1, 2), "prefetch": 0})],
)
def test_workers_change_nothing_and_leave_nothing(tmp_path, workers, options):
    before = shared_memory()
    source = Watching(write(tmp_path))
    plain = FolderSource(tmp_path)
    order = np.random.default_rng(1).permutation(COUNT)
    found = list(batches(source, order, PRE, 4, workers=workers, **options))
    same(found, list(batches(plain, order, PRE, 4, **options)))
    assert len(readers(tmp_path)) == workers
    assert os.getpid() not in readers(tmp_path)
    assert not alive(readers(tmp_path))
    # It is unlinked on a thread of its own; other programs come and go too.
    left, deadline = shared_memory() - before, time.monotonic() + 10
    while left & shared_memory() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left & shared_memory()


def test_leaving_early_ends_the_workers(tmp_path):
    source = Watching(write(tmp_path))
    for _ in batches(source, np.arange(COUNT), PRE, 1, workers=2):
        break
    assert len(readers(tmp_path)) in (1, 2)
    assert not alive(readers(tmp_path))


def test_corrupt_image_in_a_worker(tmp_path):
    write(tmp_path)
    (tmp_path / "class0" / "6.png").write_bytes(b"damaged")
    source = Watching(tmp_path)
    bad = [path.name for path in source.paths].index("6.png")
    order = [*np.delete(np.arange(COUNT), bad)[:5], bad, 0, 1]
    seen = []
    with pytest.raises(InputError) as error:
        for batch in batches(source, order, PRE, 2, workers=2):
            seen += batch["index"].tolist()
    assert str(error.value).startswith(f"{tmp_path}/class0/6.png (image {bad}): image is corrupt")
    assert seen == order[:4]
    assert not alive(readers(tmp_path))


def test_a_worker_that_dies_is_one_clear_message(tmp_path):
    source = Watching(write(tmp_path))
    source.deadly = 5
    seen = []
    with pytest.raises(InputError, match=r"one of 2 worker processes died \(exit code -9; ") as e:
        for batch in batches(source, np.arange(COUNT), PRE, 2, workers=2):
            seen += batch["index"].tolist()
    assert "\n" not in str(e.value) and str(e.value).startswith(str(tmp_path))
    assert seen == [0, 1, 2, 3]
    assert not alive(readers(tmp_path))


def test_images_in_memory_need_no_workers(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    source = MemorySource(np.ones((3, 6, 6, 3), np.float32), [0, 0, 0], ("a",))
    assert len(list(batches(source, [0, 1, 2], PRE, 2, workers=2))) == 2


PROGRAM = """
import signal, sys, time
from test_workers import PRE, Watching
from tapvit_jax.data.pipeline import batches

if __name__ == "__main__":
    # A shell has what it starts in the background ignore interrupts, and so do all its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = Watching(sys.argv[1])
    found = batches(source, list(range(11)), PRE, 1, workers=2)
    next(found), next(found)
    print("reading", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["interrupt", "kill"])
def test_the_end_of_the_program_ends_the_workers(tmp_path, end):
    write(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "program.py", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "reading\n"
    if end == "interrupt":
        # As a terminal does: to every process of the group.
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, messages = process.communicate(timeout=60)
    assert process.returncode == {"interrupt": -2, "kill": -9}[end], messages
    assert messages.count("Traceback") == (end == "interrupt"), messages
    deadline = time.monotonic() + 20
    while alive(readers(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(readers(tmp_path)) == 2 and not alive(readers(tmp_path))


UNGUARDED = """
import sys
if __name__ != "__main__":
    raise SystemExit(3)
import numpy as np
from test_workers import PRE, Watching
from tapvit_jax.data.pipeline import batches

# More than a pipe holds.
order = np.resize(np.arange(11), 100_000)
try:
    next(batches(Watching(sys.argv[1]), order, PRE, 10, workers=2))
except ValueError as error:
    print(error)
"""


def test_a_worker_that_cannot_start_is_one_clear_message(tmp_path):
    write(tmp_path)
    (tmp_path / "program.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, "program.py", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "one of 2 worker processes died (exit code 3; " in done.stdout

import contextlib
import errno
import json
import os
import resource
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from tapvit_jax import files
from tapvit_jax.errors import InputError
from tapvit_jax.files import (
    WriteError,
    atomic_directory,
    atomic_file,
    check_directory,
    check_file,
    content_hash,
    file_hash,
    file_lock,
    is_locked,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)

STOPS = (RuntimeError, KeyboardInterrupt, SystemExit)


def below(folder):
    """Everything under a folder, hidden names included, with the contents of files."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def largest_file(size):
    """The kernel refuses to write more: the closest to a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "made" / "on the way" / "a.txt"
    write_text(path, "first, and longer")
    with atomic_file(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first, and longer"
        assert partial.parent == path.parent
    assert below(path.parent) == {"a.txt": b"second"}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("before", [None, "before"])
def test_file_that_is_not_finished_leaves_nothing(tmp_path, stop, before):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    found = below(tmp_path)
    with pytest.raises(stop), atomic_file(path) as partial:
        partial.write_text("half")
        raise stop
    assert below(tmp_path) == found


def test_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "made" / "d"
    with atomic_directory(path) as partial:
        (partial / "a").write_text("1")
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("2")
        assert not path.exists()
    with atomic_directory(path) as partial:
        (partial / "a").write_text("3")
        (partial / "sub").mkdir()
        assert (path / "a").read_text() == "1"
    assert below(tmp_path) == {"made": None, "made/d": None, "made/d/a": b"3", "made/d/sub": None}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("before", [False, True])
def test_directory_that_is_not_finished_leaves_nothing(tmp_path, stop, before):
    path = tmp_path / "d"
    if before:
        path.mkdir()
        (path / "a").write_text("before")
    found = below(tmp_path)
    with pytest.raises(stop), atomic_directory(path) as partial:
        (partial / "a").write_text("half")
        raise stop
    assert below(tmp_path) == found


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.EIO, "broken")])
def test_directory_comes_back_when_stopped_between_the_renames(tmp_path, monkeypatch, stop):
    path = tmp_path / "d"
    path.mkdir()
    (path / "a").write_text("before")
    replace = type(path).replace

    def stop_at_new(self, target):
        if self.suffix == ".partial":
            raise stop
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", stop_at_new)
    with pytest.raises((KeyboardInterrupt, InputError)), atomic_directory(path) as partial:
        (partial / "a").write_text("after")
    assert below(tmp_path) == {"d": None, "d/a": b"before"}


def test_directory_with_other_contents_is_not_replaced(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(InputError, match=r"d: holds 'thesis\.tex', which would be lost"),
        atomic_directory(tmp_path / "d") as partial,
    ):
        (partial / "model.json").write_text("{}")
    assert below(tmp_path) == {"d": None, "d/thesis.tex": b"years of work"}


def test_the_root_is_a_directory_with_other_contents():
    with pytest.raises(InputError, match=r"/: holds .*, which would be lost"):
        check_directory("/", ["model.json"])


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0])
def test_modes_are_those_of_the_umask(tmp_path, mask):
    with umask(mask):
        write_text(tmp_path / "a.txt", "x")
        with atomic_directory(tmp_path / "d") as partial:
            # This library writes files that only the user can read.
            safetensors.numpy.save_file({"a": np.zeros(1)}, partial / "a.safetensors")
            (partial / "sub").mkdir(mode=0o700)
        assert os.umask(mask) == mask
    assert mode(tmp_path / "a.txt") == 0o666 & ~mask
    assert mode(tmp_path / "d" / "a.safetensors") == 0o666 & ~mask
    assert mode(tmp_path / "d") == mode(tmp_path / "d" / "sub") == 0o777 & ~mask


def test_links_stay(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("before")
    (tmp_path / "d").symlink_to("real")
    (tmp_path / "f").symlink_to("real/a")
    write_text(tmp_path / "f", "between")
    assert (tmp_path / "f").is_symlink() and (tmp_path / "real" / "a").read_text() == "between"
    with atomic_directory(tmp_path / "d") as partial:
        (partial / "a").write_text("after")
    assert (tmp_path / "d").is_symlink() and (tmp_path / "real" / "a").read_text() == "after"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "f", "real"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
@pytest.mark.parametrize("below_file", ["x", "sub/x"])
def test_a_file_in_place_of_the_parent_is_refused(tmp_path, atomic, below_file):
    (tmp_path / "file").write_text("here")
    path = tmp_path / "file" / below_file
    with pytest.raises(InputError, match=rf"{path}: lies below a file"), atomic(path):
        pytest.fail("the body ran")
    assert below(tmp_path) == {"file": b"here"}


@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_parents_that_cannot_be_made_or_written_are_refused(atomic):
    # Not even root makes anything in /proc.
    for path in ("/proc/nothing/x", "/proc/x"):
        with pytest.raises(InputError, match=f"{path}: cannot be written: "), atomic(path):
            pytest.fail("the body ran")


def check_folder(path):
    check_directory(path, ["model.json"])


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_what_could_not_be_written_is_said_before_any_work(tmp_path, check):
    (tmp_path / "file").write_text("here")
    with pytest.raises(InputError, match="x: lies below a file"):
        check(tmp_path / "file" / "x")
    # Not even root makes anything in /proc.
    for path in ("/proc/nothing/x", "/proc/x"):
        with pytest.raises(InputError, match=f"{path}: cannot be written: "):
            check(path)
    check(tmp_path / "new" / "folder" / "x")
    assert below(tmp_path) == {"file": b"here"}


def test_files_are_not_checked_for_where_folders_stand(tmp_path):
    with pytest.raises(InputError, match="is a folder or a device, expected a file"):
        check_file(tmp_path)
    with pytest.raises(InputError, match="is a file, expected a folder"):
        check_folder(Path(__file__))


def test_the_wrong_kind_of_thing_in_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(InputError, match="file: is a file, expected a folder"),
        atomic_directory(tmp_path / "file"),
    ):
        pytest.fail("the body ran")
    for name in ("folder", "pipe"):
        with pytest.raises(InputError, match=f"{name}: is a folder or a device, expected a file"):
            write_text(tmp_path / name, "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_a_full_disk_is_an_input_error_that_names_the_path(tmp_path, atomic, code):
    path = tmp_path / "out"
    with pytest.raises(InputError) as caught, atomic(path):
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == f"{path}: cannot be written: {os.strerror(code)}"
    assert below(tmp_path) == {}


def test_writes_that_the_kernel_refuses_leave_nothing(tmp_path):
    path, big = tmp_path / "out", {"a": np.zeros(10**5)}
    with largest_file(10**4):
        with pytest.raises(InputError, match=f"^{path}: cannot be written: File too large$"):
            write_text(path, "x" * 10**5)
        with (
            pytest.raises(InputError, match=rf"^{path}: cannot be written: .*os error 27"),
            atomic_directory(path) as partial,
        ):
            safetensors.numpy.save_file(big, partial / "a.safetensors")
        # The name that the file would have had, not that of the hidden one.
        with (
            pytest.raises(InputError, match=f"^{path}/a.json: cannot be written: File too large$"),
            atomic_directory(path) as partial,
        ):
            write_json(partial / "a.json", ["x"] * 10**5)
    assert below(tmp_path) == {}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_a_file_system_that_cannot_rename_is_an_error_of_writing(
    tmp_path, monkeypatch, atomic, before
):
    def put(text):
        with atomic(tmp_path / "out") as partial:
            (partial / "a" if atomic is atomic_directory else partial).write_text(text)

    def refuse(self, target):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    if before:
        put("before")
    found = below(tmp_path)
    # As a bucket does that gcsfuse has mounted.
    monkeypatch.setattr(type(tmp_path), "replace", refuse)
    message = "out: cannot be written: renaming to it failed: Too many open files"
    with pytest.raises(WriteError, match=message):
        put("after")
    assert below(tmp_path) == found


def test_other_errors_of_the_body_pass(tmp_path):
    for atomic in (atomic_file, atomic_directory):
        with pytest.raises(FileNotFoundError), atomic(tmp_path / "out"):
            (tmp_path / "missing").read_text()
        with pytest.raises(safetensors.SafetensorError), atomic(tmp_path / "out"):
            safetensors.numpy.load(b"nothing of the kind")
    assert below(tmp_path) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_no_number(tmp_path, value):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": [value]})
    assert below(tmp_path).keys() == {"a.json"} and read_json(tmp_path / "a.json") == [1]
    (tmp_path / "a.json").write_text(json.dumps({"x": [value]}))
    with pytest.raises(InputError, match="is not a JSON number"):
        read_json(tmp_path / "a.json")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Any text, half characters too: that is how Python holds file names of another encoding.
    | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=40)
@given(value=VALUES)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "a.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a": 1} x',
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"[" * 10**5,
        b"1" * 10**4,
        b"\x80\x04cos\nsystem\n",
    ],
)
def test_what_is_not_json_is_an_input_error(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json: is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_json_that_is_missing_or_too_large(tmp_path):
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(InputError, match=f"{path}: no such file"):
            read_json(path)
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_json(tmp_path / "a.json", limit_bytes=6) == [1, 2]
    with pytest.raises(InputError, match="6 bytes, expected at most 5"):
        read_json(tmp_path / "a.json", limit_bytes=5)


@settings(max_examples=40)
@given(value=st.dictionaries(st.text(), VALUES, min_size=2))
def test_content_hash_is_the_same_for_any_order(value):
    other = dict(reversed(value.items()))
    assert list(other) != list(value)
    assert content_hash({"outer": [other]}) == content_hash({"outer": [value]})
    assert content_hash(json.loads(json.dumps(value))) == content_hash(value)


def test_content_hash_tells_values_apart():
    values = [None, True, 1, "1", [1], [1, 2], [2, 1], {"1": 1}, {"1": 2}, {"1": 1, "2": 1}, ""]
    assert len({content_hash(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_hash({"x": float("nan")})


def test_file_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_lock_keeps_others_out_and_vanishes(tmp_path):
    path = tmp_path / "below" / "lock"
    assert not is_locked(path)
    with file_lock(path) as held:
        assert held is True and is_locked(path)
        with file_lock(path, wait=False) as second:
            assert second is False
        assert path.exists()
    assert not path.exists() and not is_locked(path)
    # What a killed process leaves is no lock.
    path.touch()
    assert not is_locked(path)


def test_waiting_for_a_lock_is_said_once_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SILENT_SECONDS", 0.0)
    path, said = tmp_path / "lock", []
    first = contextlib.ExitStack()
    first.enter_context(file_lock(path))
    timer = threading.Timer(0.4, first.close)
    timer.start()
    with file_lock(path, on_wait=lambda: said.append(1)) as held:
        assert held is True and is_locked(path)
    timer.join()
    assert said == [1] and not path.exists()


def test_file_systems_without_locks_keep_nobody_out(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with file_lock(tmp_path / "lock") as first, file_lock(tmp_path / "lock") as second:
        assert first is None and second is None


def test_locks_that_cannot_be_made_name_their_path(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(WriteError, match="lies below a file"),
        file_lock(tmp_path / "file" / "lock"),
    ):
        pass


def test_leftovers_of_one_path_are_removed_and_no_others(tmp_path):
    for name in (".a[1].x.partial", ".a[1].y.old", ".a1.x.partial", "a[1].x.partial", ".a[1].b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    (tmp_path / ".a[1].z.partial").touch()
    remove_leftovers(tmp_path / "a[1]")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".a1.x.partial", "a[1].x.partial", ".a[1].b"}

import errno
import gc
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tapvit_jax import runtime, versions
from tapvit_jax.data.sources import open_source
from tapvit_jax.errors import InputError
from tapvit_jax.runtime import forget_programs, interrupts_wait, run_program, set_up_jax
from tests.processes import ROOT, free_port, run_together


def program(error):
    def main():
        raise error

    return main


def test_success_is_silent(capsys):
    ran = []
    assert run_program(lambda: ran.append(1)) == 0
    # What a program returns is not its exit code.
    assert run_program(lambda: 7) == 0
    assert ran == [1] and capsys.readouterr() == ("", "")


def test_wrong_input_is_one_line_and_2(capsys):
    assert run_program(program(InputError("a.gmm: weights sum to 2, expected 1"))) == 2
    assert capsys.readouterr() == ("", "error: a.gmm: weights sum to 2, expected 1\n")


def test_names_from_elsewhere_cannot_break_the_line_or_command_the_terminal(capsys):
    name = "a\nb\r\x1b[2J\u202e\udc80é中"
    assert run_program(program(InputError(f"unknown field {name}"))) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: unknown field a\\nb\\r\\x1b[2J\\u202e\\udc80é中\n")


def test_interruption_is_one_message_and_130(capsys):
    assert run_program(program(KeyboardInterrupt())) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.strip().splitlines() == [
        "interrupted: the same command continues where this stopped"
    ]


WRITER = """
import sys, time
from tapvit_jax.files import atomic_directory, atomic_file
from tapvit_jax.runtime import run_program

def main():
    with atomic_directory(sys.argv[1] + "/folder"), atomic_file(sys.argv[1] + "/file") as partial:
        partial.write_text("half")
        print("writing", flush=True)
        time.sleep(60)

sys.exit(run_program(main))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_told_to_end_leaves_nothing_half_written(tmp_path, number):
    # As in a terminal, however the tests were started.
    program = f"import signal; signal.signal({number:d}, signal.SIG_DFL)" + WRITER
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as running:
        assert running.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        running.send_signal(number)
        said = running.communicate(timeout=30)[1]
    assert running.returncode == 128 + number
    assert said == "\ninterrupted: the same command continues where this stopped\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_is_taken_away_is_taken_away_however_often_it_is_told_to_end(tmp_path, first):
    again = """
import pathlib, signal
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
unlink = pathlib.Path.unlink

def slow_unlink(*arguments, **options):
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
        signal.raise_signal(number)
    return unlink(*arguments, **options)

pathlib.Path.unlink = slow_unlink
"""
    program = again + WRITER.replace("time.sleep(60)", f"signal.raise_signal({first:d})")
    command = [sys.executable, "-c", program, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 128 + first
    assert found.stderr == "\ninterrupted: the same command continues where this stopped\n"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_waits_until_the_body_is_done():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]
    # The second one does not wait.
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        done.append(2)
        signal.raise_signal(signal.SIGINT)
        done.append(3)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(InputError), interrupts_wait():
        raise InputError("of the body")
    with interrupts_wait():
        done.append(4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_of_another_threads_body_do_not_wait():
    handlers = []

    def body():
        with interrupts_wait():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_a_process_of_a_job_is_told_to_end_too(tmp_path):
    program = WRITER.replace(
        "def main():\n",
        "def main():\n    from tapvit_jax.runtime import set_up_jax; set_up_jax()\n",
    ).replace("time.sleep(60)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    (ended,) = run_together(
        [["-c", program, str(tmp_path / "out")]], tmp_path / "cache", one_job=True
    )
    assert ended.returncode == 128 + signal.SIGTERM, ended.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_what_nohup_ignores_stays_ignored(tmp_path):
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + WRITER.replace(
        "time.sleep(60)", "signal.raise_signal(signal.SIGHUP)"
    )
    found = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=False)
    assert found.returncode == 0
    assert (tmp_path / "file").read_text() == "half"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_closed_disk_is_one_line_and_2(capsys, code):
    assert run_program(program(OSError(code, os.strerror(code), "x\ny"))) == 2
    assert run_program(program(OSError(code, os.strerror(code)))) == 2
    assert capsys.readouterr() == (
        "",
        f"error: x\\ny: {os.strerror(code)}\nerror: {os.strerror(code)}\n",
    )


def test_an_array_larger_than_the_memory_is_one_line_and_2(capsys):
    assert run_program(lambda: np.zeros(2**55)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: not enough memory (Unable to allocate 256. PiB")
    assert err.count("\n") == 1


def test_what_jax_has_no_memory_for_is_one_line_and_2(capsys):
    assert run_program(lambda: jnp.zeros(2**50, jnp.int8)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: not enough memory (RESOURCE_EXHAUSTED: Out of")
    assert err.endswith("; smaller batches take less\n") and err.count("\n") == 1


def test_only_the_first_line_of_what_an_accelerator_holds_is_printed(capsys):
    text = "RESOURCE_EXHAUSTED: Out of memory.\nLargest program allocations:\n\t1. 2.00G"
    assert run_program(program(jax.errors.JaxRuntimeError(text))) == 2
    assert capsys.readouterr().err == (
        "error: not enough memory (RESOURCE_EXHAUSTED: Out of memory.); smaller batches take less\n"
    )


def test_what_a_cpus_program_has_no_memory_for_is_one_line_and_2(capsys):
    images = jax.ShapeDtypeStruct((2**40, 64), jnp.float32)
    run = jax.jit(lambda key: jax.random.normal(key, images.shape)).lower(jax.random.key(0))
    assert run_program(lambda: run.compile()(jax.random.key(0)).block_until_ready()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: not enough memory (") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "INTERNAL: RESOURCE_EXHAUSTED no more"])
def test_other_errors_of_jax_keep_their_traceback(text):
    with pytest.raises(jax.errors.JaxRuntimeError):
        run_program(program(jax.errors.JaxRuntimeError(text)))


def test_a_path_that_is_too_long_is_one_line_and_2(capsys):
    assert run_program(lambda: open_source("x" * 300)) == 2
    assert capsys.readouterr().err == f"error: {'x' * 300}: {os.strerror(errno.ENAMETOOLONG)}\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_ends_the_program_in_silence(lines):
    code = f"""
import sys
from tapvit_jax.runtime import run_program
sys.stdin.read()
sys.exit(run_program(lambda: [print("x" * 9) for _ in range({lines})]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True
    ) as started:
        # The reader goes before anything is written.
        started.stdout.close()
        started.stdin.close()
        assert started.stderr.read() == ""
    assert started.returncode == 141


@pytest.mark.parametrize(
    "error", [ValueError("x"), BrokenPipeError("x"), FileNotFoundError("x"), SystemExit(3)]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        run_program(program(error))
    assert caught.value is error


@pytest.fixture
def settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_where_the_user_says(settings, monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    expected = {
        "HOME": tmp_path / ".cache" / "tapvit_jax",
        "XDG_CACHE_HOME": tmp_path / "tapvit_jax",
        "JAX_COMPILATION_CACHE_DIR": tmp_path,
    }
    for variable, directory in expected.items():
        monkeypatch.setenv(variable, str(tmp_path))
        set_up_jax()
        assert jax.config.jax_compilation_cache_dir == str(directory)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    set_up_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "tapvit_jax")
    assert list(tmp_path.iterdir()) == []


_FAULTS = """
import resource
import jax, jax.numpy as jnp
from tapvit_jax import runtime
runtime.set_up_jax()

@jax.jit
def run(x):
    stacked = jnp.stack([jnp.tanh(x + i) for i in range(8)])
    return jax.lax.scan(lambda c, y: (jnp.tanh(c + y), c * 2), x, stacked)[1].sum()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(jnp.ones((1000, 1000))).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# While the memory still grows, now and then a call finds less than it needs.
print(min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_temporaries_take_no_fresh_pages_once_they_have_been_there():
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env["XLA_FLAGS"] = ""

    def pages(**more):
        command = [sys.executable, "-c", _FAULTS]
        found = subprocess.run(command, env=env | more, cwd=ROOT, stdout=-1, check=True, text=True)
        return int(found.stdout)

    # Joining a job starts threads before JAX starts those that compute.
    with free_port() as port:
        job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "1"}
        assert pages(**job, JAX_PROCESS_ID="0") < 1000
    # Where users set something of their own, which here changes nothing, glibc is let alone.
    assert pages(MALLOC_PERTURB_="0") > 1000


def test_versions_name_what_decides_results(monkeypatch):
    found = versions.library_versions()
    assert found["python"] == platform.python_version()
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn"):
        assert found[name] == importlib.metadata.version(name)
    monkeypatch.setattr(versions, "_RECORDED", ("no-such-library", "numpy"))
    assert versions.library_versions.__wrapped__() == {
        "python": found["python"],
        "no-such-library": "not installed",
        "numpy": found["numpy"],
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps of memory are Linux's")
def test_programs_are_forgotten_before_there_are_too_many(tmp_path, monkeypatch):
    def maps():
        return len(Path("/proc/self/maps").read_text().splitlines())

    def compile_all():
        return [float(f(np.ones((4, 4), np.float32))) for f in programs]

    programs = [jax.jit(lambda x, i=i: jnp.tanh(x @ x + i).sum()) for i in range(40)]
    # What earlier tests of this process left would otherwise go at a moment of its own.
    jax.clear_caches()
    gc.collect()
    before = maps()
    values = compile_all()
    held = maps()
    assert held - before > 40
    most = tmp_path / "max_map_count"
    monkeypatch.setattr(runtime, "_MOST_MAPS", most)
    most.write_text(f"{2 * held + 100}\n")
    forget_programs()
    assert maps() == pytest.approx(held, abs=20)
    most.write_text(f"{2 * before}\n")
    forget_programs()
    assert maps() < held - 40
    # They can be called as before.
    assert compile_all() == values
    most.unlink()
    forget_programs()

"""What every program does first and last: JAX's caches, and errors that users can read."""

import contextlib
import ctypes
import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from tapvit_jax.distributed import initialize
from tapvit_jax.errors import InputError

# What is wrong is the machine's state or limits or the user's rights, not this program.
_MACHINE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
}

# Of <malloc.h>: one arena (M_ARENA_MAX), since all others are limited to 64 MiB; no blocks of their
# own from the system (M_MMAP_MAX); nothing trimmed off the end (M_TRIM_THRESHOLD).
_MALLOC_OPTIONS = {-8: 1, -4: 0, -1: -1}

_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def set_up_jax() -> None:
    """Join the other processes of a job; keep freed memory, and compiled programs on disk.

    The first thing that a program does: once JAX has computed anything, no job can be joined and
    memory goes on being handed back. A second run of a program does not compile again; the
    directory of the compiled programs is $JAX_COMPILATION_CACHE_DIR, or tapvit_jax in the user's
    cache directory.

    Raises:
      InputError: the job is not fully named, or its other processes cannot be reached.

    Source: ours.
    """
    # Joining starts threads, and threads that are there keep what memory they have apart.
    keep_freed_memory()
    initialize()
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not directory:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = str(Path(cache) / "tapvit_jax")
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of handing it back to the system.

    XLA allocates the temporaries of every call on the CPU anew, hundreds of megabytes at a time,
    and touching fresh pages takes longer than the arithmetic of a backward pass. To be called
    before other threads are started; does nothing elsewhere, or where the user has set MALLOC_
    variables.
    """
    if not sys.platform.startswith("linux") or any(n.startswith("MALLOC_") for n in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


def forget_programs() -> None:
    """Let compiled programs go once they take up half of the memory maps that a process may have.

    On Linux, CPU programs hold a map or more for each of their loops (a DeiT-T's training step
    holds 190), and beyond vm.max_map_count (65,530 as a rule) the compiler aborts the process. What
    is called again is compiled again, or read from the cache on disk. Call it between pieces of
    work. Does nothing elsewhere.

    Source: ours.
    """
    try:
        most = int(_MOST_MAPS.read_text())
        with _MAPS.open("rb") as file:
            count = sum(1 for _ in file)
    except (OSError, ValueError):
        return
    if count > most // 2:
        jax.clear_caches()


def one_line(text: str) -> str:
    """Text with escapes for all that is not printable.

    Names may come from files of others: they bring no line breaks and no terminal commands.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_program(
    main: Callable[[], object],
    interrupted: str = "the same command continues where this stopped",
) -> int:
    """Run a program; return its exit code. `interrupted` is what Ctrl-C means for the user.

    0 after success, 2 with one line on stderr when an input is wrong, the disk is full or closed to
    the user, a path is longer than it allows, or an array larger than the memory (an accelerator's
    too), 130 after Ctrl-C, 143 and 129 when the machine's scheduler or a closed terminal ends it,
    141 when nobody reads what it prints any more, as a shell says it (`| head`).
    """
    try:
        with _ends_like_ctrl_c():
            main()
        # What is left of its output; there may be none to write to.
        print(end="", flush=True)
    except InputError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if error.errno not in _MACHINE_ERRORS:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {one_line(where + error.strerror)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: not enough memory ({one_line(str(error))})", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        # Of this machine's memory or an accelerator's. Further lines, if any, list what is in it.
        first, *_ = str(error).splitlines() or [""]
        # A CPU's programs say it inside, where others have an error of its own.
        if not (first.startswith("RESOURCE_EXHAUSTED") or "Out of memory allocating" in first):
            raise
        print(
            f"error: not enough memory ({one_line(first)}); smaller batches take less",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        # Nobody may be there to read it, after a terminal was closed.
        with contextlib.suppress(OSError):
            print(f"\ninterrupted: {interrupted}", file=sys.stderr, flush=True)
        return 128 + (error.number if isinstance(error, _EndedError) else signal.SIGINT)
    return 0


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C and the system's signals wait until the body is done; the second one does not.

    For what goes on in threads of its own after the main one has left it.
    """
    before, came = {}, []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Not where it is ignored, or ends the process at once.
            if callable(handler := signal.getsignal(number)):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            before[number](number, None)


class _EndedError(KeyboardInterrupt):
    """The system asks the program to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """Let the system's signals end the body as Ctrl-C does, not at once, amid a file."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Not where it is ignored (nohup), or where somebody else handles it.
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: Any) -> None:
    # Schedulers repeat themselves, and a closed terminal tells both shell and system: what takes
    # away half-written files must not be ended itself.
    for other in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(other) is _end:
            signal.signal(other, signal.SIG_IGN)
    handled = sys.exc_info()[1]
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return
        handled = handled.__context__
    raise _EndedError(number)


def _nobody_reads() -> bool:
    """Whether standard output has been closed at its other end; nothing more is written then."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError):
        return False
    found = select.poll()
    found.register(output, 0)
    # Errors are told unasked.
    closed = any(events & (select.POLLERR | select.POLLHUP) for _, events in found.poll(0))
    if closed:
        # Else Python tries once more at its end, and says so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed

"""What every program does first and last: JAX's caches, and errors that users can read."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from tapvit_jax.errors import InputError


def set_up_jax() -> None:
    """Keep compiled programs on disk, so that a second run of a program does not compile again.

    The directory is $JAX_COMPILATION_CACHE_DIR, or tapvit_jax in the user's cache directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(cache) / "tapvit_jax"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def run_program(main: Callable[[], object]) -> int:
    """Run a program; return its exit code.

    0 after success, 2 with one line on stderr when an input is wrong, 130 after Ctrl-C.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues where this stopped", file=sys.stderr)
        return 130
    return 0

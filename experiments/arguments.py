"""The command-line arguments that the main job and sweeps have in common."""

import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from experiments.config import ExperimentConfig, read
from tapvit_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results and unfinished work are kept.")


def parse(argv: list[str]) -> tuple[ExperimentConfig, Path]:
    """The config and the work directory that the arguments name; other flags are set as well.

    Raises:
      InputError: unknown or missing arguments, or an unreadable or invalid config.
    """
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections reports unknown fields and unreadable config files through all of these,
        # the cause in the first line and its own call stack behind it.
        raise InputError(_config_problem(error)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: fields are set as --config.FIELD=VALUE")
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is None:
            raise InputError(f"--{flag.name} is missing")
    try:
        config = read(_CONFIG.value)
    except OSError as error:
        # A config file that cannot be loaded shows itself only when the config is first used.
        raise InputError(_config_problem(error)) from error
    return config, Path(_WORKDIR.value)


def numbers(name: str, texts: Iterable[str]) -> tuple[int, ...]:
    """The whole numbers of a flag that holds a list, each once.

    Raises:
      InputError: an empty list, or anything but whole numbers from 0 on.
    """
    texts = tuple(dict.fromkeys(texts))
    if not texts or not all(text.isdecimal() for text in texts):
        found = ",".join(texts)
        raise InputError(f"--{name} is {found!r}, expected whole numbers such as 0,1,2")
    return tuple(dict.fromkeys(map(int, texts)))


def sweep_of_config_file(config: ExperimentConfig) -> Iterable[Mapping[str, Any]] | None:
    """The grid of the function `sweep` beside `get_config` in the config file, if there is one."""
    name = config_flags.get_config_filename(flags.FLAGS["config"]).split(":", 1)[0]
    spec = importlib.util.spec_from_file_location("sweep_config", name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        return None
    # A grid that does not depend on the config needs no argument.
    return module.sweep(*[config] * bool(inspect.signature(module.sweep).parameters))


def _config_problem(error: Exception) -> str:
    cause = error.args[0] if error.args else error
    if isinstance(cause, KeyError):
        # An AttributeError around what looked the field up.
        missing = "; ".join(str(cause.args[0]).splitlines())
        return f"--config: has no field {missing}"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        # A config file that failed: what it says stands last.
        lines = [lines[0], lines[-1].removeprefix(f"{InputError.__module__}.InputError: ")]
    named = isinstance(error, flags.Error)
    return f"{'' if named else '--config: '}{' '.join(lines[:4])}"

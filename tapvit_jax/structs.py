"""Frozen config dataclasses to and from plain JSON values, strictly."""

import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from tapvit_jax.errors import InputError

T = TypeVar("T")

# Characters of a value or name in a message, and problems in one: files may hold any number.
_LONGEST = 100
_MOST_PROBLEMS = 20


def to_plain(value: Any, name: str = "value") -> Any:
    """Turn nested dataclasses, tuples and mappings into dicts and lists that JSON can hold.

    NumPy's scalars become Python's and paths become text.

    Raises:
      InputError: anything else, NaN and infinity included; names it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if dataclasses.is_dataclass(value):
        fields = (f.name for f in dataclasses.fields(value))
        return {field: to_plain(getattr(value, field), f"{name}.{field}") for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if not isinstance(value, str | int | float | None):
        raise InputError(f"{name} is {_show(value)}, expected what JSON can hold")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} is {value}, expected a finite number")
    return value


def from_plain(cls: type[T], value: Any, name: str = "config") -> T:
    """Build the dataclass `cls` from plain values, checking names and types all the way down.

    Raises:
      InputError: an unknown or missing field, or a value of another type; all problems at once.
    """
    problems: list[str] = []
    result = _convert(cls, value, name, problems)
    _refuse(problems)
    return result


def check_fields(config: Any) -> None:
    """Check the types of a frozen dataclass's fields as `from_plain` does, for `__post_init__`.

    What stands for another type becomes it, as there: whole numbers where floats are expected,
    NumPy's scalars, lists for tuples.

    Raises:
      InputError: a value of another type; all problems at once.
    """
    problems: list[str] = []
    for name, kind in _hints(type(config)).items():
        value = getattr(config, name)
        # Blocks are made by the thousand when widths are chosen. A float may be NaN.
        if type(value) is not kind or kind is float:
            object.__setattr__(config, name, _convert(kind, value, name, problems))
    _refuse(problems)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _refuse(problems: list[str]) -> None:
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise InputError("; ".join(problems[:_MOST_PROBLEMS] + rest))


def check_kind(config: Any, kind: type) -> None:
    """Refuse a config of another kind.

    Raises:
      InputError: names both kinds.
    """
    if not isinstance(config, kind):
        raise InputError(f"config is a {type(config).__name__}, expected a {kind.__name__}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _listing(options: tuple) -> str:
    return ", ".join(map(repr, options))


def _convert(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if origin in (types.UnionType, typing.Union):
        # As it is, where it can be: a whole number may mean another thing than a float.
        if type(value) in args and value == value:
            return value
        attempts = []
        for option in (a for a in args if a is not type(None)):
            found: list[str] = []
            result = _convert(option, value, name, found)
            if not found:
                return result
            attempts.append(found)
        problems.extend(min(attempts, key=len))
        return None
    if origin is typing.Literal:
        # Types too: True equals 1 but is no such number.
        if not any(type(value) is type(option) and value == option for option in args):
            problems.append(f"{name} is {_show(value)}, expected one of {_listing(args)}")
        return value
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, name, problems)
    if origin is tuple:
        return _convert_tuple(args, value, name, problems)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            problems.append(f"{name} is {_show(value)}, expected a mapping")
            return None
        return {k: _convert(args[1], v, f"{name}.{k}", problems) for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            problems.append(f"{name} is {_show(value)}, expected a smaller number")
            return value
    if kind is float and value != value:
        problems.append(f"{name} is nan, expected a number")
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(f"{name} is {_show(value)}, expected {kind.__name__}")
    return value


def _convert_tuple(args: tuple, value: Any, name: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        problems.append(f"{name} is {_show(value)}, expected a list")
        return None
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{name}[{i}]", problems) for i, v in enumerate(value))
    if len(args) != len(value):
        problems.append(f"{name} has {len(value)} entries, expected {len(args)}")
        return None
    return tuple(
        _convert(a, v, f"{name}[{i}]", problems)
        for i, (a, v) in enumerate(zip(args, value, strict=True))
    )


def _convert_dataclass(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        problems.append(f"{name} is {_show(value)}, expected a mapping of {kind.__name__}'s fields")
        return None
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = _hints(kind)
    before = len(problems)
    for key in [key for key in value if key not in fields][:_MOST_PROBLEMS]:
        text = str(key)[:_LONGEST]
        close = difflib.get_close_matches(text, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(fields)}"
        problems.append(f"unknown field {name}.{text}: {hint}")
    arguments = {}
    for key, field in fields.items():
        if key in value:
            arguments[key] = _convert(hints[key], value[key], f"{name}.{key}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"missing field {name}.{key}")
    if len(problems) > before:
        return None
    try:
        return kind(**arguments)
    except InputError as error:
        problems.append(f"{name}: {error}")
        return None

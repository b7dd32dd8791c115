"""What a device can afford."""

import dataclasses
import math
import re
from collections.abc import Iterable

from tapvit_jax.errors import InputError
from tapvit_jax.models.backbone import TransformerConfig
from tapvit_jax.prune.cost import Cost, Latency, cost
from tapvit_jax.structs import check_fields

Limits = dict[str, int | float]
"""Absolute bounds by the names of `Cost`'s fields."""

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Upper bounds on a model's cost; several hold together.

    A float is a fraction of the dense model's cost, above 0 and at most 1. An int is an absolute
    amount. Only `latency_ms` is always absolute, and `latency` always a fraction.

    Attributes:
      params: parameters of the whole model.
      macs: multiply-accumulates of one image.
      encoder_params: parameters of the transformer blocks alone, as TAP-ViTs states its budgets.
      model_bytes: bytes of all parameters in float32.
      activation_bytes: most bytes of live activations of one image, in float32.
      latency: predicted time of a forward pass as a fraction of the dense model's.
      latency_ms: the same in milliseconds; both need a latency model.

    Raises:
      InputError: zero, negative, a fraction above 1, or no bound at all.
    """

    params: float | int | None = None
    macs: float | int | None = None
    encoder_params: float | int | None = None
    model_bytes: float | int | None = None
    activation_bytes: float | int | None = None
    latency: float | None = None
    latency_ms: float | int | None = None

    def __post_init__(self):
        check_fields(self)
        bounds = self.bounds()
        if not bounds:
            units = ", ".join(f.name for f in dataclasses.fields(self))
            raise InputError(f"a budget needs at least one of {units}")
        for unit, value in bounds.items():
            if not value > 0:
                raise InputError(f"budget {unit} is {value}, expected more than 0")
            if not math.isfinite(value):
                raise InputError(f"budget {unit} is {value}, expected a finite number")
            if unit == "latency" and value > 1:
                raise InputError(
                    f"budget latency is {value}: expected a fraction of the dense model's time, "
                    "or latency_ms"
                )
            if isinstance(value, float) and value > 1 and unit != "latency_ms":
                raise InputError(
                    f"budget {unit} is {value}: a fraction is at most 1.0; "
                    f"give an absolute amount as an int (or as text, such as {unit}=1.2G)"
                )

    def bounds(self) -> dict[str, float | int]:
        """The bounds that are set, by unit."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {unit: value for unit, value in values.items() if value is not None}

    @classmethod
    def parse(cls, texts: str | Iterable[str]) -> "Budget":
        """Read "macs=0.5", "params=50%", "macs=1.2G", or several of them, comma-separated.

        Raises:
          InputError: an unknown unit, or a value that is no amount.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        units = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, float | int] = {}
        for text in (part for item in texts for part in item.split(",")):
            unit, equals, amount = (part.strip() for part in text.partition("="))
            if not equals or unit not in units:
                raise InputError(
                    f"budget {text!r}: expected UNIT=AMOUNT with unit one of "
                    f"{', '.join(sorted(units))}"
                )
            if unit in values:
                raise InputError(f"budget names {unit} twice")
            values[unit] = _parse_amount(unit, amount)
        return cls(**values)

    @property
    def needs_latency(self) -> bool:
        """Whether a latency model is needed."""
        return self.latency is not None or self.latency_ms is not None

    def limits(self, dense: TransformerConfig, latency: Latency | None = None) -> Limits:
        """Absolute bounds for a dense model, by the names of `Cost`. A fraction is rounded down.

        Raises:
          InputError: a bound on latency without a latency model.
        """
        if self.needs_latency and latency is None:
            raise InputError(
                f"budget {self} needs a latency model: measure one with tapvit bench-latency --fit "
                "(prune --latency-table, latency_table in configs)"
            )
        full = cost(dense, latency)
        limits: Limits = {}
        for unit, value in self.bounds().items():
            if unit == "latency":
                value = value * full.latency_ms
            elif isinstance(value, float) and unit != "latency_ms":
                value = int(value * getattr(full, unit))
            name = "latency_ms" if unit == "latency" else unit
            limits[name] = min(value, limits.get(name, value))
        return limits

    def tightened(self, factor: float) -> "Budget":
        """The same budget with its bounds on latency scaled."""
        changed = {
            unit: factor * value
            for unit in ("latency", "latency_ms")
            if (value := getattr(self, unit)) is not None
        }
        return dataclasses.replace(self, **changed)

    def __str__(self) -> str:
        return ", ".join(f"{unit}={_show(unit, value)}" for unit, value in self.bounds().items())


def _show(unit: str, value: float | int) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # What has no point is read as an amount, but of time.
    a_fraction = isinstance(value, float) and not unit.startswith("latency")
    return repr(value) if a_fraction and text == "1" else text


def _parse_amount(unit: str, amount: str) -> float | int:
    if amount == "1" and not unit.startswith("latency"):
        raise InputError(f"budget {unit}=1: is an amount of one; for all of it write {unit}=1.0")
    percent = re.fullmatch(r"(-?[0-9.]+)\s*%", amount)
    scaled = re.fullmatch(r"(-?[0-9.]+(?:[eE][0-9]+)?)\s*([kKmMgGtT]?)", amount)
    try:
        if percent and unit != "latency_ms":
            return float(percent[1]) / 100
        if scaled and scaled[2]:
            return int(float(scaled[1]) * _SUFFIXES[scaled[2].lower()])
        if scaled:
            return int(amount) if re.fullmatch(r"-?[0-9]+", amount) else float(amount)
    except (ValueError, OverflowError):
        pass
    raise InputError(
        f"budget {unit}={amount:.40}: expected a fraction (0.5), a percentage (50%) or an amount "
        "(1.2G)"
    )


def within(found: Cost, limits: Limits) -> bool:
    """Whether a cost keeps to all bounds."""
    return all(getattr(found, unit) <= limit for unit, limit in limits.items())

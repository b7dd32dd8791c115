"""Units of sweeps and runs in one table, one JSON file and one self-contained HTML page."""

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.statistics import CONFIDENCE, Values, crossed_interval
from experiments.tables import STAGES, STAGES_NOTE, amount, document, text_cell, to_table
from tapvit_jax.files import write_json, write_text
from tapvit_jax.runtime import one_line

Record = dict[str, Any]
"""One unit: its place, its overrides, its costs, and its accuracies in percent."""

# Averaged over, or the horizontal axis: these never tell two series apart.
_NOT_SERIES = ("unit", "device", "seed", "budget")
_COSTS = ("macs", "params", "ms")
_TOP1 = tuple(f"{stage}_top1" for stage in STAGES)


def records(results: Mapping[str, Any], source: str) -> list[Record]:
    """The units of a sweep's results, or the devices of a run's, as flat records."""
    if "units" in results:
        return [_record(row, {"source": source, "unit": row["unit"]}) for row in results["units"]]
    found = []
    for row in results["devices"]:
        # Only the selected variant has its widths stored.
        row = {**row, **row["variants"]["selected"]}
        row |= {"seed": results["seed"], "dense_cost": results["dense"]}
        found.append(_record(row, {"source": source, "unit": row["device"]}))
    return found


def gaps(results: Mapping[str, Any], source: str) -> tuple[list[Record], int]:
    """The units of a sweep that failed, and why, and how many are not finished."""
    failed = [{"source": source, **failure} for failure in results.get("failed", ())]
    grid = results.get("grid")
    return failed, 0 if grid is None else grid - len(results["units"]) - len(failed)


def _record(row: Mapping[str, Any], place: Mapping[str, Any]) -> Record:
    found = dict(place)
    found["device"], found["seed"] = row["device"], row["seed"]
    found["budget"] = row["budget"]
    for name, value in row.get("overrides", {}).items():
        if name not in found:
            found[name] = value if isinstance(value, str | int | float) else str(value)
    for name in ("macs", "params"):
        found[name] = row["cost"][name]
        found[f"dense_{name}"] = row["dense_cost"][name]
    for name in ("dense", "pruned"):
        key = "ms" if name == "pruned" else "dense_ms"
        found[key] = round(row["latency_ms"][name]["median"], 4)
    for name in _COSTS:
        found[f"{name}_percent"] = round(100 * found[name] / found[f"dense_{name}"], 3)
    for name in STAGES:
        found[f"{name}_top1"] = round(100 * row[name], 3)
    return found


def series_fields(found: Sequence[Record]) -> list[str]:
    """Fields in which records differ and which are neither averaged over nor measured."""
    measured = {"dense_macs", "dense_params", "macs", "params", "ms"}
    names = dict.fromkeys(name for record in found for name in record)
    return [
        name
        for name in names
        if name not in _NOT_SERIES
        and name not in measured
        and not name.endswith(("_percent", "_top1", "_ms"))
        and len({record.get(name) for record in found}) > 1
    ]


def series_of(record: Record, fields: Sequence[str]) -> str:
    """What tells a record's series from the others, in words."""
    return ", ".join(str(record[name]) for name in fields if name in record) or "pruned"


def averages(found: Sequence[Record]) -> list[Record]:
    """Means over devices and seeds for every series and budget, with 95 % intervals.

    The interval is for other devices and seeds (`statistics.crossed_interval`); one unit alone has
    none. `absent` says how many pairs of device and seed others average over and this one does not:
    with any, the means do not compare. `front` names the costs on whose Pareto front it lies.
    """
    fields = series_fields(found)
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in found:
        groups.setdefault((series_of(record, fields), record["budget"]), []).append(record)
    owners = [{(m["device"], m["seed"]) for m in members} for members in groups.values()]
    everyone = set().union(*owners)
    rows = []
    for ((series, budget), members), own in zip(groups.items(), owners, strict=True):
        row: Record = {"series": series, "budget": budget, "units": len(members)}
        row["absent"] = len(everyone - own)
        for name in _TOP1:
            values = {((m["source"], m["device"]), m["seed"]): m[name] for m in members}
            row[name], row[f"{name}_interval"] = _mean(values)
        for name in _COSTS:
            for column in (name, f"{name}_percent"):
                row[column] = round(float(np.mean([member[column] for member in members])), 4)
        rows.append(row)
    fronts = _fronts(rows)
    for i, row in enumerate(rows):
        row["front"] = [name for name in _COSTS if i in fronts[name]]
    return rows


def _mean(values: Values) -> tuple[float, float | None]:
    found = crossed_interval(values)
    return round(found.mean, 3), None if found.half_width is None else round(found.half_width, 3)


def pareto(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Positions of the points that no other equals or beats in both, the cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if not front or gains[i] > gains[front[-1]]:
            front.append(i)
    return front


def write(
    found: Sequence[Record],
    directory: Path,
    title: str,
    failed: Sequence[Record] = (),
    unfinished: int = 0,
) -> None:
    """Write units.csv, which holds the finished units alone, units.json and units.html.

    Args:
      found: the finished units.
      directory: where they go.
      title: of the page.
      failed: the units that failed, see `gaps`.
      unfinished: how many units are neither.

    Raises:
      InputError: the directory cannot be written.
    """
    names = list(dict.fromkeys(name for record in found for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_text(directory / "units.csv", text.getvalue())
    plain = {"units": list(found), "averages": averages(found)}
    plain |= {"failed": list(failed), "unfinished": unfinished}
    write_json(directory / "units.json", plain)
    write_text(directory / "units.html", page(found, title, failed, unfinished))


def page(
    found: Sequence[Record], title: str, failed: Sequence[Record] = (), unfinished: int = 0
) -> str:
    """The whole report as one HTML page without any outside reference."""
    fields = series_fields(found)
    mean_rows = averages(found)
    devices = len({(record["source"], record["device"]) for record in found})
    seeds = len({record["seed"] for record in found})
    name = html.escape(one_line(title))
    labels = [series_of(record, fields) for record in found]
    parts = [
        f"<h1>{name}: {len(found)} units</h1>",
        f"<p>{devices} device{'s' * (devices > 1)}, {seeds} seed{'s' * (seeds > 1)}. All "
        f"accuracies are top-1 on the devices' own test images. {STAGES_NOTE} The drawings show "
        "the last. Latency is that of JAX on the machine that computed the unit.</p>",
        _gaps_note(failed, unfinished),
        "<h2>Averaged over devices and seeds</h2>",
        f"<p>Bars: {100 * CONFIDENCE:.0f} % intervals of the mean. Rings and the grey steps: the "
        "Pareto front, which nothing both cheaper and at least as accurate beats. Dashed: the "
        "dense model.</p>",
        f"<figure>{figures.averaged(mean_rows, _fronts(mean_rows), _is_relative(found))}</figure>",
        _averages_table(mean_rows),
        "<h2>Every device</h2>",
        f"<figure>{figures.every_device(found, labels, pareto, _is_relative(found))}</figure>",
        "<h2>All units</h2>",
        _units_table(found, fields),
        *([_failed_table(failed)] if failed else []),
    ]
    return document(name, "".join(parts))


def _is_relative(found: Iterable[Record]) -> bool:
    """Whether all records have one dense model, so that shares of its cost compare."""
    return len({(record["dense_macs"], record["dense_params"]) for record in found}) == 1


def _fronts(rows: Sequence[Record]) -> dict[str, list[int]]:
    gains = [row["recovered_top1"] for row in rows]
    return {name: pareto([row[name] for row in rows], gains) for name in _COSTS}


def _gaps_note(failed: Sequence[Record], unfinished: int) -> str:
    if not failed and not unfinished:
        return ""
    return (
        f"<p><strong>Units that failed: {len(failed)}; not finished: {unfinished}.</strong> No "
        "mean counts them.</p>"
    )


def _averages_table(rows: Sequence[Record]) -> str:
    groups = [
        ("", ["series", "budget", "units"]),
        ("% of the dense model's", ["MACs", "params", "latency"]),
        ("top-1, %", list(STAGES)),
        ("on the Pareto front of", ["MACs", "params", "latency"]),
    ]
    body = []
    for row in rows:
        cells = [text_cell(html.escape(one_line(row[n]))) for n in ("series", "budget")]
        lacks = f"<br><small>{row['absent']} absent</small>" if row["absent"] else ""
        cells.append(f"{row['units']}{lacks}")
        cells += [f"{row[f'{name}_percent']:.1f}" for name in _COSTS]
        for name in _TOP1:
            interval = row[f"{name}_interval"]
            spread = "" if interval is None else f"<br><small>± {interval:.1f}</small>"
            cells.append(f"{row[name]:.1f}{spread}")
        cells += ["●" if name in row["front"] else "" for name in _COSTS]
        body.append(cells)
    note = (
        "<p><em>Absent</em>: devices and seeds that other means are over and this one is not, so "
        "that they do not compare.</p>"
    )
    table = to_table("Means over devices and seeds", groups, body)
    return table + note * any(row["absent"] for row in rows)


def _units_table(found: Sequence[Record], fields: Sequence[str]) -> str:
    groups = [
        ("", ["unit", *fields, "device", "seed", "budget"]),
        ("pruned model", ["MACs", "params", "ms"]),
        ("% of the dense model's", ["MACs", "params", "latency"]),
        ("top-1, %", list(STAGES)),
    ]
    body = []
    for record in found:
        cells = [str(record["unit"])]
        cells += [text_cell(html.escape(one_line(str(record.get(n, ""))))) for n in fields]
        cells += [str(record["device"]), str(record["seed"])]
        cells.append(text_cell(html.escape(record["budget"])))
        cells += [amount(record["macs"]), amount(record["params"])]
        cells += [f"{record['ms']:.2f}", *(f"{record[f'{n}_percent']:.1f}" for n in _COSTS)]
        cells += [f"{record[name]:.1f}" for name in _TOP1]
        cells[-1] = f"<strong>{cells[-1]}</strong>"
        body.append(cells)
    return to_table("All units", groups, body, text_heads=(*fields, "budget"))


def _failed_table(failed: Sequence[Record]) -> str:
    names = ["source", "unit", "reason"]
    rows = [[text_cell(html.escape(one_line(str(f[name])))) for name in names] for f in failed]
    return to_table("Units that failed", [("", names)], rows, text_heads=names)


class LiveTable:
    """Lines of a table of which not all rows are known yet.

    Args:
      fields: the overrides to show.
      widths: widest value of each.
    """

    _MEASURED = ("MACs %", "params %", *(f"{stage} %" for stage in STAGES))

    def __init__(self, fields: Sequence[str], widths: Sequence[int]):
        self._fields = fields
        self._widths = [min(max(len(f), w), 24) for f, w in zip(fields, widths, strict=True)]

    def head(self) -> str:
        """The heading."""
        names = [n[:w].ljust(w) for n, w in zip(self._fields, self._widths, strict=True)]
        return "  ".join(["unit", *names, *self._MEASURED])

    def line(
        self,
        number: int,
        overrides: Mapping[str, Any],
        row: Mapping[str, Any] | None,
        reason: str = "",
    ) -> str:
        """A unit's line: what it came to, or why it failed."""
        cells = [f"{number:4}"]
        for name, width in zip(self._fields, self._widths, strict=True):
            cells.append(one_line(str(overrides.get(name, "")))[:width].ljust(width))
        if row is None:
            return "  ".join([*cells, f"failed: {one_line(reason)}" if reason else "elsewhere"])
        shares = [100 * row["cost"][n] / row["dense_cost"][n] for n in ("macs", "params")]
        values = [*shares, *(100 * row[stage] for stage in STAGES)]
        for title, value in zip(self._MEASURED, values, strict=True):
            cells.append(f"{value:.1f}".rjust(len(title)))
        return "  ".join(cells)

"""What a comparison came to: summary, Markdown for the docs, CSV and one self-contained page."""

import csv
import dataclasses
import html
import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.methods import SETS, find_set
from experiments.preparation import ORACLE, SELECTED
from experiments.report import LEAKS
from experiments.statistics import Mean, Values, crossed_interval, gap_closed, mean_ranks, paired
from experiments.tables import document, text_cell, to_table
from tapvit_jax.files import write_json, write_text
from tapvit_jax.runtime import one_line

Row = Mapping[str, Any]
"""One cell: method, set, device, seed, budget, epochs, and what was measured, in percent."""

_RANDOM, _POOL = "random", "pool"
_NONE = "–"  # noqa: RUF001
_MINUS = "−"  # noqa: RUF001


def summarize(rows: Sequence[Row], reference: str, *, shared_dense: bool = False) -> dict[str, Any]:
    """Means, paired differences, ranks and metric sets, as JSON values; accuracies in percent.

    Pairs share device, seed, budget, metric set and epochs (for metric sets: the method instead).

    Args:
      rows: cells in the order in which methods, sets, budgets and epochs are to be listed.
      reference: the method that all others are compared with.
      shared_dense: all seeds share the split of the data and the dense model, which then counts
        once on every device.
    """
    cells: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        key = (row["set"], row["epochs"], row["budget"], row["method"])
        cells.setdefault(key, []).append(row)
    values = {
        key: {(row["device"], row["seed"]): row["top1"] for row in members}
        for key, members in cells.items()
    }
    dense = {
        (row["device"], None if shared_dense else row["seed"]): row["dense_top1"] for row in rows
    }
    return {
        "reference": reference,
        "dense": dataclasses.asdict(crossed_interval(dense)),
        "accuracy": [_accuracy(key, members) for key, members in cells.items()],
        "paired": [
            _labels(key) | found
            for key in values
            if key[3] != reference
            and (found := _paired(values.get((*key[:3], reference), {}), values[key]))
        ],
        "ranks": _ranks(values),
        "sets": _sets(values),
    }


def _labels(key: tuple[str, int, str, str]) -> dict[str, Any]:
    return dict(zip(("set", "epochs", "budget", "method"), key, strict=True))


def _accuracy(key: tuple[str, int, str, str], members: Sequence[Row]) -> dict[str, Any]:
    top1, dense = (
        {(row["device"], row["seed"]): row[name] for row in members}
        for name in ("top1", "dense_top1")
    )
    mean, dense_mean = (float(np.mean(list(found.values()))) for found in (top1, dense))
    return _labels(key) | {
        "top1": dataclasses.asdict(crossed_interval(top1)),
        "to_dense": dataclasses.asdict(paired(top1, dense).difference),
        "percent_of_dense": 100 * mean / dense_mean if dense_mean else None,
        "macs_percent": float(np.mean([row["macs_percent"] for row in members])),
        "params_percent": float(np.mean([row["params_percent"] for row in members])),
    }


def _paired(first: Values, second: Values) -> dict[str, Any] | None:
    return dataclasses.asdict(paired(first, second)) if first.keys() & second.keys() else None


def _ranks(values: Mapping[tuple[str, int, str, str], Values]) -> list[dict[str, Any]]:
    """Mean ranks over the devices and seeds that all methods of a budget have."""
    found = []
    for images, epochs in dict.fromkeys(key[:2] for key in values):
        own = {key[2:]: pairs for key, pairs in values.items() if key[:2] == (images, epochs)}
        methods = list(dict.fromkeys(method for _, method in own))
        budgets = list(dict.fromkeys(budget for budget, _ in own))
        by_budget: dict[str, dict[str, float]] = {}
        for budget in budgets:
            there = [method for method in methods if (budget, method) in own]
            shared = sorted(set.intersection(*(set(own[budget, method]) for method in there)))
            if shared:
                table = [[own[budget, method][k] for method in there] for k in shared]
                ranks = mean_ranks(np.array(table))
                by_budget[budget] = dict(zip(there, map(float, ranks), strict=True))
        for method in methods:
            ranks = {b: r[method] for b, r in by_budget.items() if method in r}
            # Who fails at a budget has no overall rank: the easy budgets alone would flatter it.
            whole = bool(ranks) and len(ranks) == len(by_budget)
            overall = float(np.mean(list(ranks.values()))) if whole else None
            found.append(
                {"set": images, "epochs": epochs, "method": method}
                | {"budgets": ranks, "overall": overall}
            )
    return found


def _sets(values: Mapping[tuple[str, int, str, str], Values]) -> list[dict[str, Any]]:
    """Metric sets side by side for every method, budget and number of epochs."""
    found = []
    for epochs, budget, method in dict.fromkeys(key[1:] for key in values):
        own = {key[0]: v for key, v in values.items() if key[1:] == (epochs, budget, method)}
        if len(own) < 2:
            continue
        row: dict[str, Any] = {"epochs": epochs, "budget": budget, "method": method}
        row["top1"] = {
            name: dataclasses.asdict(crossed_interval(pairs)) for name, pairs in own.items()
        }
        first = next(iter(own))
        for title, base in (("over_random", _RANDOM), ("over_first", first)):
            row[title] = {
                name: difference
                for name, pairs in own.items()
                if name != base and (difference := _paired(pairs, own.get(base, {})))
            }
        triple = [own.get(name, {}) for name in (_RANDOM, SELECTED, ORACLE)]
        row["gap_closed"] = None
        if set.intersection(*(set(pairs) for pairs in triple)):
            row["gap_closed"] = dataclasses.asdict(gap_closed(*triple))
        found.append(row)
    return found


# Tables, as rows of text that Markdown and HTML share.


@dataclasses.dataclass(frozen=True)
class Table:
    """A caption, a heading and rows of text; the first `words` columns are words."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def markdown(self) -> str:
        """As Markdown, the caption in front."""
        rule = ["---"] * self.words + ["---:"] * (len(self.head) - self.words)
        lines = [self.head, rule, *self.rows]
        text = "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)
        return f"**{self.caption}**\n\n{text}\n"

    def html(self) -> str:
        """As HTML."""
        rows = [
            [text_cell(html.escape(c)) for c in row[: self.words]]
            + [html.escape(c) for c in row[self.words :]]
            for row in self.rows
        ]
        head = [html.escape(cell) for cell in self.head]
        return to_table(html.escape(self.caption), [("", head)], rows, head[: self.words])


def _markdown_cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def _signed(value: float) -> str:
    # Adding zero makes a plain zero of what rounds to minus zero.
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", _MINUS)


def _mean_text(found: Mapping[str, Any], show: Callable[[float], str] = "{:.1f}".format) -> str:
    mean = Mean(**found)
    return show(mean.mean) + ("" if mean.half_width is None else f" ± {mean.half_width:.1f}")


def _range_text(found: Mapping[str, Any]) -> str:
    """A difference with both ends of its interval."""
    mean = Mean(**found)
    ends = "" if mean.low is None else f" [{_signed(mean.low)}, {_signed(mean.high)}]"
    return _signed(mean.mean) + ends


def _groups(found: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["set"], row["epochs"]) for row in found))


def _where(images: str, epochs: int) -> str:
    after = f"after {epochs} epoch{'s' * (epochs != 1)} of fine-tuning"
    return f"{images} images, {after if epochs else 'without fine-tuning'}"


def _by_budget(
    found: Iterable[Mapping[str, Any]], show: Callable[[Mapping[str, Any]], str]
) -> tuple[list[str], list[list[str]]]:
    """Budgets, and a row of texts for every method."""
    found = list(found)
    budgets = list(dict.fromkeys(row["budget"] for row in found))
    texts = {(row["method"], row["budget"]): show(row) for row in found}
    methods = dict.fromkeys(row["method"] for row in found)
    return budgets, [[m, *(texts.get((m, b), _NONE) for b in budgets)] for m in methods]


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """All tables of a summary."""
    result, reference = [], summary["reference"]
    for images, epochs in _groups(summary["accuracy"]):

        def here(name: str, group=(images, epochs)) -> list[Mapping[str, Any]]:
            return [row for row in summary[name] if (row["set"], row["epochs"]) == group]

        where = _where(images, epochs)
        budgets, rows = _by_budget(here("accuracy"), lambda row: _mean_text(row["top1"]))
        dense = ["dense", *[_mean_text(summary["dense"])] * len(budgets)]
        head = ["method", *budgets]
        result.append(Table(f"Top-1, %: {where}", head, [dense, *rows]))
        _, rows = _by_budget(
            here("accuracy"),
            lambda row: _mean_text(row["to_dense"], _signed) + _share(row["percent_of_dense"]),
        )
        caption = f"Points above dense, and % of it kept: {where}"
        result.append(Table(caption, head, rows))
        if pairs := here("paired"):
            own, rows = _by_budget(
                pairs, lambda row: f"{_range_text(row['difference'])} {row['wins']}:{row['losses']}"
            )
            caption = f"Points that {reference} is above, [95 % interval], won:lost"
            result.append(Table(f"{caption}: {where}", ["method", *own], rows))
        ranks = sorted(here("ranks"), key=lambda row: row["overall"] or np.inf)
        if len(ranks) > 1:
            rows = [
                [_rank(row["budgets"].get(b)) for b in budgets] + [_rank(row["overall"])]
                for row in ranks
            ]
            rows = [[row["method"], *cells] for row, cells in zip(ranks, rows, strict=True)]
            result.append(Table(f"Mean rank, 1 is best: {where}", [*head, "all budgets"], rows))
    if summary["sets"]:
        result.append(_sets_table(summary["sets"]))
        result += _changed_sets_tables(summary["sets"])
    return result


def _share(percent: float | None) -> str:
    return "" if percent is None else f" ({percent:.1f} %)"


def _rank(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _sets_table(found: Sequence[Mapping[str, Any]]) -> Table:
    names = [name for name in (_RANDOM, SELECTED, _POOL, ORACLE) if _any_has(found, name)]
    others = [name for name in names if name != _RANDOM]
    head = ["method", "budget", "epochs", *names]
    head += [f"{name} {_MINUS} {_RANDOM}" for name in others] + ["gap closed by selected"]
    rows = []
    for row in found:
        cells = [row["method"], row["budget"], str(row["epochs"])]
        cells += [_mean_text(row["top1"][n]) if n in row["top1"] else _NONE for n in names]
        for name in others:
            pair = row["over_random"].get(name)
            cells.append(_range_text(pair["difference"]) if pair else _NONE)
        rows.append([*cells, _gap(row["gap_closed"])])
    return Table("Metric sets, top-1 in %, paired over devices and seeds", head, rows, words=2)


def _changed_sets_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Sets that differ from those of the config, which are too many for columns: a row each."""
    result = []
    for method, epochs in dict.fromkeys((row["method"], row["epochs"]) for row in found):
        own = [row for row in found if (row["method"], row["epochs"]) == (method, epochs)]
        names = list(dict.fromkeys(name for row in own for name in row["top1"]))
        if all(name in SETS for name in names):
            continue
        budgets = [row["budget"] for row in own]
        head = ["metric set", *budgets, *(f"{b}: {_MINUS} {names[0]}" for b in budgets)]
        rows = []
        for name in names:
            top1 = [_mean_text(row["top1"][name]) if name in row["top1"] else _NONE for row in own]
            pairs = [row["over_first"].get(name) for row in own]
            rows.append([name, *top1, *(_range_text(p["difference"]) if p else "" for p in pairs)])
        after = f" after {epochs} epochs" * bool(epochs)
        result.append(Table(f"Changed metric sets, top-1 in %: {method}{after}", head, rows))
    return result


def _any_has(found: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in row["top1"] for row in found)


def _gap(found: Mapping[str, Any] | None) -> str:
    if found is None or found["share"] is None:
        return _NONE
    ends = "" if found["low"] is None else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    return f"{100 * found['share']:.0f} %{ends}"


# Files.


def write(results: Mapping[str, Any], directory: Path) -> None:
    """Write compare.csv, compare.json, compare.md, compare.html, and its plots as compare_*.svg.

    Raises:
      InputError: the directory cannot be written.
    """
    rows = results["rows"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory / "compare.csv", text.getvalue())
    write_json(directory / "compare.json", results)
    write_text(directory / "compare.md", markdown(results))
    plots = _plots(results["summary"])
    write_text(directory / "compare.html", page(results, plots))
    for plot in plots:
        write_text(directory / f"compare_{plot.name}.svg", plot.svg)


def _notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader has to know, a sentence or two each."""
    rows, config = results["rows"], results["config"]
    devices = len({row["device"] for row in rows})
    seeds = ", ".join(map(str, results["seeds"]))
    dense = "one dense model" if results["dense"] == "shared" else "a dense model for every seed"
    if config["dense"]["weights"] is not None:
        # Results of earlier versions do not know the other kind.
        fresh = config["dense"].get("new_classifier", False)
        dense = f"{dense}, trained from a" if fresh else "one dense model, from a"
        dense += " checkpoint"
    notes = [
        f"{len(rows)} cells: {devices} device{'s' * (devices != 1)}, seeds {seeds}, {dense}. "
        "Top-1 on the devices' own test images; every budget is counted by this package's cost "
        "model. ± and brackets: 95 % intervals for other devices and seeds (random effects of "
        "both; of gap shares by bootstrap).",
    ]
    kinds = {find_set(row["set"]).kind for row in rows}
    used = [name for name in SETS if name in kinds]
    notes.append("Metric sets: " + "; ".join(f"{name}, {SETS[name]}" for name in used) + ".")
    if config["data"]["partition"]["leaks"]:
        notes.append(LEAKS)
    elif any(row["epochs"] for row in rows):
        chosen_on = dict.fromkeys(SETS, "all") | {
            SELECTED: f"the likeliest {100 * config['validation_share']:g} %",
            ORACLE: "those of the device's classes",
        }
        notes.append(
            "Fine-tuning's epoch is chosen on public-validation images: "
            + "; ".join(f"{name}, {chosen_on[name]}" for name in used)
            + "."
        )
    if results["missing"]:
        notes.append(f"{results['missing']} cells are not there yet.")
    return notes


def _provenance(results: Mapping[str, Any]) -> list[str]:
    hardware = ", ".join(f"{name} {value}" for name, value in results["hardware"].items())
    libraries = ", ".join(
        f"{name} {version}"
        for name, version in results["libraries"].items()
        if version != "not installed"
    )
    return [f"Hardware: {hardware}.", f"Libraries: {libraries}."]


def _failures(results: Mapping[str, Any]) -> Table | None:
    """Cells that failed; devices on which it was for one reason share a row."""
    names = ["method", "set", "seed", "budget", "epochs", "reason"]
    devices: dict[tuple[str, ...], list[int]] = {}
    for cell in results["failed"]:
        devices.setdefault(tuple(str(cell[name]) for name in names), []).append(cell["device"])
    rows = [
        [*key[:-1], ", ".join(map(str, sorted(found))), key[-1]] for key, found in devices.items()
    ]
    head = [*names[:-1], "devices", names[-1]]
    return Table("Cells that failed", head, rows, words=len(head)) if rows else None


def markdown(results: Mapping[str, Any]) -> str:
    """The tables, ready for the docs."""
    parts = [f"## {one_line(results['name'])}: comparison ({results['mode']})"]
    parts.append(f"    {one_line(results['command'])}")
    parts += [*_notes(results), *_provenance(results)]
    parts += [table.markdown() for table in tables(results["summary"])]
    failures = _failures(results)
    parts += [failures.markdown()] if failures else []
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


@dataclasses.dataclass(frozen=True)
class _Plot:
    """A figure under a heading; its name is a file's."""

    name: str
    heading: str
    svg: str


def _plots(summary: Mapping[str, Any]) -> list[_Plot]:
    plots = []
    for images, epochs in _groups(summary["accuracy"]):
        where, name = _where(images, epochs), f"{_file_name(images)}_{epochs}"
        own = [r for r in summary["accuracy"] if (r["set"], r["epochs"]) == (images, epochs)]
        svg = figures.compared(own, summary["dense"], where)
        plots.append(_Plot(f"accuracy_{name}", where, svg))
        pairs = [r for r in summary["paired"] if (r["set"], r["epochs"]) == (images, epochs)]
        if pairs:
            svg = figures.differences(pairs, summary["reference"], where)
            plots.append(_Plot(f"differences_{name}", where, svg))
    if summary["sets"]:
        plots.append(_Plot("sets", "Metric sets", figures.metric_sets(summary["sets"])))
    if len({row["epochs"] for row in summary["accuracy"]}) > 1:
        for images in dict.fromkeys(row["set"] for row in summary["accuracy"]):
            own = [row for row in summary["accuracy"] if row["set"] == images]
            svg = figures.over_epochs(own, summary["dense"], images)
            plots.append(_Plot(f"epochs_{_file_name(images)}", "Fine-tuning", svg))
    return plots


def _file_name(images: str) -> str:
    return re.sub(r"[^\w.]+", "-", images)


def page(results: Mapping[str, Any], plots: Sequence[_Plot]) -> str:
    """Tables and plots as one HTML page without any outside reference."""
    name, summary = html.escape(one_line(results["name"])), results["summary"]
    parts = [f"<h1>{name}: comparison ({html.escape(results['mode'])})</h1>"]
    parts.append(f"<pre>{html.escape(one_line(results['command']))}</pre>")
    parts += [f"<p>{html.escape(note)}</p>" for note in _notes(results)]
    parts.append("<p>In plots, dashed: the dense model; bars: 95 % intervals.</p>")
    for heading, members in itertools.groupby(plots, key=lambda plot: plot.heading):
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts += [f"<figure>{plot.svg}</figure>" for plot in members]
    parts.append("<h2>Tables</h2>")
    parts += [table.html() for table in tables(summary)]
    failures = _failures(results)
    parts += [failures.html()] if failures else []
    parts.append("<h2>How this was run</h2>")
    parts += [f"<p>{html.escape(text)}</p>" for text in _provenance(results)]
    return document(name, "".join(parts))

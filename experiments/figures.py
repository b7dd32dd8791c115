"""The drawings of an experiment's report, as SVG that can stand in an HTML page."""

import html
import io
import itertools
import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from tapvit_jax.runtime import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"pool": "whole pool", "random": "random subset"}
_INK, _DENSE, _SELECTED, _OWN = "#111827", "#6b7280", "#2563eb", "#bfdbfe"
# Hollow and large: where it covers another mark, both are seen.
_SQUARE = {"s": 70, "marker": "s", "facecolors": "none", "edgecolors": _INK}
# Colours that are told apart with any colour vision; the shapes differ as well.
_MARKS = {"pool": ("#d97706", "^"), "random": ("#059669", "D")}
_WIDTH = 11.0
# Beyond as many, names or numbers inside a drawing would only overlap.
_NAMED_CLASSES, _NUMBERED_BLOCKS, _NUMBERED_DEVICES = 30, 16, 20


def accuracy(results: dict[str, Any]) -> str:
    """Accuracy against MACs: every device before and after recovery, and the dense model."""
    figure = _figure(4.4)
    axes = figure.subplots()
    x, dense, pruned, recovered = _series(results)
    axes.vlines(x, pruned, recovered, color=_SELECTED, alpha=0.35, zorder=1)
    axes.scatter(x, pruned, facecolors="white", edgecolors=_SELECTED, label="pruned", zorder=2)
    axes.scatter(x, recovered, color=_SELECTED, label="pruned and recovered", zorder=3)
    axes.scatter(np.full(len(x), 100.0), dense, label="dense", zorder=2, **_SQUARE)
    _percent_scale(axes, "y", [*dense, *pruned, *recovered])
    axes.set_xlim(min(x) - 4, 104)
    if len(x) <= _NUMBERED_DEVICES:
        _number(axes, x, recovered, [str(row["device"]) for row in results["devices"]])
        axes.set_title("numbers: devices", size=9, loc="right")
    axes.set_xlabel("MACs of the pruned model, % of the dense model's")
    axes.set_ylabel("top-1 on the device's test images, %")
    axes.grid(alpha=0.25)
    _legend(figure)
    return _svg(figure, f"Accuracy against MACs of {len(x)} devices")


def _series(results: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Share of MACs and accuracy of the dense, pruned and recovered model, in percent."""
    rows = results["devices"]
    selected = [row["variants"]["selected"] for row in rows]
    return (
        np.array([100 * row["cost"]["macs"] / results["dense"]["macs"] for row in rows]),
        np.array([100 * row["dense"] for row in rows]),
        np.array([100 * found["pruned"] for found in selected]),
        np.array([100 * found["recovered"] for found in selected]),
    )


def _percent_scale(axes: "Axes", direction: str, values: list[float]) -> None:
    low, high = min(values), max(values)
    edge = max(0.06 * (high - low), 2.0)
    getattr(axes, f"set_{direction}lim")(max(low - edge, -2.0), min(high + edge, 102.0))


def _cost_scale(axes: "Axes", least: float) -> None:
    """Show a span of `least` at least: models of one budget cost nearly the same."""
    low, high = axes.get_xlim()
    missing = max(least - (high - low), 0.0)
    axes.set_xlim(low - missing / 2, high + missing / 2)
    axes.ticklabel_format(axis="x", useOffset=False)


def _number(axes: "Axes", x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Write a name right of every point, moved up where it would cover another."""
    width, height = np.ptp(axes.get_xlim()) * 0.03, np.ptp(axes.get_ylim()) * 0.05
    placed: list[tuple[float, float]] = []
    for i in np.argsort(y):
        level = y[i]
        for other_x, other_level in sorted(placed, key=lambda p: p[1]):
            if abs(other_x - x[i]) < width and abs(other_level - level) < height:
                level = other_level + height
        placed.append((x[i], level))
        axes.annotate(
            names[i],
            (x[i], y[i]),
            xytext=(x[i] + width / 3, level),
            va="center",
            size=8,
            color=_INK,
            arrowprops={"arrowstyle": "-", "color": _DENSE, "lw": 0.5} if level > y[i] else None,
        )
    top = max(level for _, level in placed) + height / 2
    axes.set_ylim(top=max(axes.get_ylim()[1], top))


def devices(results: dict[str, Any]) -> str:
    """Accuracy of every device's models, the comparisons' too, a line for each device."""
    rows = results["devices"]
    figure = _figure(1.1 + _row_height(rows) * len(rows))
    axes = figure.subplots()
    at = np.arange(len(rows))
    _, dense, pruned, recovered = _series(results)
    values = [*dense, *pruned, *recovered]
    axes.hlines(at, pruned, recovered, color=_SELECTED, alpha=0.35, zorder=1)
    axes.scatter(pruned, at, facecolors="white", edgecolors=_SELECTED, label="pruned", zorder=3)
    axes.scatter(recovered, at, color=_SELECTED, label="pruned and recovered", zorder=4)
    for name, offset in zip(results["config"]["comparisons"], (-0.25, 0.25), strict=False):
        found = [100 * row["variants"][name]["recovered"] for row in rows]
        color, marker = _MARKS[name]
        label = f"recovered, {TITLES[name]}"
        axes.scatter(found, at + offset, s=18, color=color, marker=marker, label=label, zorder=2)
        values += found
    axes.scatter(dense, at, label="dense", zorder=5, **_SQUARE)
    _percent_scale(axes, "x", values)
    _name_devices(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("top-1 on the device's test images, %")
    axes.grid(alpha=0.25, axis="x")
    _legend(figure)
    return _svg(figure, f"Accuracy of the models of {len(rows)} devices")


def keep_ratios(results: dict[str, Any]) -> str:
    """Share of the units that every block keeps, a line for each device."""
    rows = results["devices"]
    kinds = {"mlp": "MLP units", "qk": "query-key dims", "vo": "value dims"}
    height = 1.2 + _row_height(rows) * len(rows)
    figure = _figure(height)
    grid = figure.subplots(1, len(kinds), sharey=True)
    for axes, (kind, title) in zip(grid, kinds.items(), strict=True):
        ratios = 100 * np.array([row["keep_ratios"][kind] for row in rows])
        image = axes.imshow(
            ratios, vmin=0, vmax=100, cmap="Blues", aspect="auto", interpolation="nearest"
        )
        if ratios.shape[1] <= _NUMBERED_BLOCKS:
            for (y, x), value in np.ndenumerate(ratios):
                color = "white" if value > 60 else _INK
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", size=7, color=color)
        axes.set_title(title, size=10)
        axes.set_xlabel("block")
        axes.set_xticks(range(0, ratios.shape[1], 1 + ratios.shape[1] // _NUMBERED_BLOCKS))
        axes.tick_params(labelsize=8)
        _name_devices(axes, rows)
    figure.colorbar(image, ax=grid, label="kept, %", fraction=0.02)
    return _svg(figure, f"Share of units that every block of {len(rows)} devices keeps")


def classes(results: dict[str, Any]) -> str:
    """Classes of every device's metric dataset; the device's own classes are shaded."""
    rows, names = results["devices"], results["class_names"]
    step = max(0.45, 2.4 / len(rows))
    figure = _figure(1.1 + step * len(rows))
    axes = figure.subplots()
    histograms = np.array([row["selection"]["class_histogram"] for row in rows])
    tallest = max(int(histograms.max()), 1)
    edges = np.arange(len(names) + 1) - 0.5
    # Bars with gaps between them, as one path however many they are.
    bar_edges = (np.arange(len(names))[:, None] + (-0.36, 0.36)).ravel()
    for at, (row, histogram) in enumerate(zip(rows, histograms, strict=True)):
        # Rows go down the page, hence bars up from at + 0.4 are negative.
        base = at + 0.4
        own = np.isin(np.arange(len(names)), row["classes"])
        style = {"baseline": base, "fill": True, "linewidth": 0}
        axes.stairs(base - 0.9 * own, edges, color=_OWN, **style)
        heights = np.stack([histogram, np.zeros_like(histogram)], axis=1).ravel()[:-1]
        axes.stairs(base - 0.85 * heights / tallest, bar_edges, color=_SELECTED, **style)
        axes.axhline(base, color=_DENSE, linewidth=0.5)
    _name_devices(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlim(edges[0], edges[-1])
    if len(names) <= _NAMED_CLASSES:
        # A "$" in a name is a dollar, not mathematics.
        axes.set_xticks(
            range(len(names)),
            [_shorten(one_line(name), 24) for name in names],
            rotation=0 if max(map(len, names)) * len(names) < 100 else 90,
            parse_math=False,
        )
        axes.set_xlabel("class")
    else:
        axes.set_xlabel("number of the class")
    axes.set_title(f"full height: {tallest} images", size=9, loc="right")
    return _svg(figure, f"Classes in the metric datasets of {len(rows)} devices")


_COSTS = {"macs": "MACs", "params": "parameters", "ms": "latency"}
# Told apart with any colour vision; the shapes differ as well. Further series repeat both.
_SERIES = [
    *[("#2563eb", "o"), ("#d97706", "^"), ("#059669", "D"), ("#db2777", "s")],
    *[("#7c3aed", "v"), ("#0891b2", "P"), ("#65a30d", "X"), ("#b91c1c", "<")],
]
_MOST_DEVICES = 24


def averaged(rows: list[dict[str, Any]], fronts: dict[str, list[int]], relative: bool) -> str:
    """Mean accuracy against three costs, a line for each series, the Pareto fronts marked."""
    figure = _figure(4.2)
    series = list(dict.fromkeys(row["series"] for row in rows))
    y = np.array([row["recovered_top1"] for row in rows])
    errors = np.array([row["recovered_top1_interval"] or 0.0 for row in rows])
    for axes, (cost, title) in zip(figure.subplots(1, 3, sharey=True), _COSTS.items(), strict=True):
        x = np.array([_cost(row, cost, relative) for row in rows])
        _front(axes, x[fronts[cost]], y[fronts[cost]])
        for i, name in enumerate(series):
            at = [k for k, row in enumerate(rows) if row["series"] == name]
            at.sort(key=lambda k, x=x: x[k])
            color, marker = _SERIES[i % len(_SERIES)]
            style = {"color": color, "marker": marker, "markersize": 5, "lw": 1, "capsize": 2}
            style["label"] = _shorten(one_line(name), 40)
            axes.errorbar(x[at], y[at], errors[at], elinewidth=0.8, **style)
        axes.axhline(np.mean([row["dense_top1"] for row in rows]), color=_DENSE, ls="--", lw=1)
        _cost_scale(axes, 4.0 if relative else 0.04 * axes.get_xlim()[1])
        axes.set_xlabel(_cost_label(title, cost, relative))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("mean top-1 on the devices' test images, %")
    _percent_scale(axes, "y", [*(y - errors), *(y + errors), *(row["dense_top1"] for row in rows)])
    _legend(figure)
    return _svg(figure, f"Mean accuracy against cost of {len(rows)} points")


def every_device(
    found: list[dict[str, Any]], labels: list[str], pareto: Any, relative: bool
) -> str:
    """Accuracy against three costs, a row of panels for each device of each source."""
    owners = list(dict.fromkeys((record["source"], record["device"]) for record in found))
    several = len({source for source, _ in owners}) > 1
    shown = owners[:_MOST_DEVICES]
    figure = _figure(0.6 + 2.2 * len(shown))
    grid = figure.subplots(len(shown), 3, sharex="col", squeeze=False)
    names = list(dict.fromkeys(labels))
    for row, (source, device) in zip(grid, shown, strict=True):
        own = [k for k, r in enumerate(found) if (r["source"], r["device"]) == (source, device)]
        y = np.array([found[k]["recovered_top1"] for k in own])
        dense = np.mean([found[k]["dense_top1"] for k in own])
        for axes, cost in zip(row, _COSTS, strict=True):
            x = np.array([_cost(found[k], cost, relative) for k in own])
            front = pareto(x, y)
            _front(axes, x[front], y[front])
            for i, name in enumerate(names):
                at = [j for j, k in enumerate(own) if labels[k] == name]
                color, marker = _SERIES[i % len(_SERIES)]
                label = _shorten(one_line(name), 40)
                axes.scatter(x[at], y[at], s=16, color=color, marker=marker, label=label, zorder=3)
            axes.axhline(dense, color=_DENSE, ls="--", lw=1)
            _percent_scale(axes, "y", [*y, dense])
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=8)
        above = f"{_shorten(one_line(source), 30)}\n" if several else ""
        row[0].set_ylabel(f"{above}device {device}\ntop-1, %", size=9, parse_math=False)
    for axes, (cost, title) in zip(grid[-1], _COSTS.items(), strict=True):
        # Panels above share the scale.
        _cost_scale(axes, 4.0 if relative else 0.04 * axes.get_xlim()[1])
        axes.set_xlabel(_cost_label(title, cost, relative), size=9)
    _legend(figure)
    return _svg(figure, f"Accuracy against cost of {len(shown)} of {len(owners)} devices")


_SETS = {"random": ("#059669", "D"), "selected": ("#2563eb", "o")}
_SETS |= {"pool": ("#d97706", "^"), "oracle": ("#db2777", "s")}


def compared(rows: list[dict[str, Any]], dense: dict[str, Any], where: str) -> str:
    """Mean accuracy of every method against the MACs that its models have."""
    figure = _figure(4.8)
    axes = figure.subplots()
    shown = [dense["mean"]]
    for i, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((r for r in rows if r["method"] == name), key=lambda r: r["macs_percent"])
        x = [row["macs_percent"] for row in own]
        y = [row["top1"]["mean"] for row in own]
        errors = [row["top1"]["half_width"] or 0.0 for row in own]
        axes.errorbar(x, y, errors, **_series_style(i, name))
        shown += [*np.subtract(y, errors), *np.add(y, errors)]
    axes.axhline(dense["mean"], color=_DENSE, ls="--", lw=1)
    _percent_scale(axes, "y", shown)
    _cost_scale(axes, 4.0)
    axes.set_xlabel("MACs, % of the dense model's")
    axes.set_ylabel("mean top-1 on the devices' test images, %")
    axes.grid(alpha=0.25)
    _legend(figure, columns=5)
    return _svg(figure, f"Accuracy of methods, {where}")


def differences(rows: list[dict[str, Any]], reference: str, where: str) -> str:
    """Points that the reference is above every other method, a panel for each budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = _figure(1.2 + 0.28 * len(methods))
    grid = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(grid, budgets, strict=True):
        own = [row for row in rows if row["budget"] == budget]
        x = [row["difference"]["mean"] for row in own]
        errors = [row["difference"]["half_width"] or 0.0 for row in own]
        at = [methods.index(row["method"]) for row in own]
        axes.errorbar(x, at, xerr=errors, fmt="o", color=_SELECTED, markersize=5, capsize=2)
        axes.axvline(0.0, color=_DENSE, lw=1)
        axes.set_title(budget, size=9, parse_math=False)
        axes.set_xlabel(f"points that {reference} is above", size=9)
        axes.grid(alpha=0.25, axis="x")
    grid[0].set_yticks(range(len(methods)), methods, size=8, parse_math=False)
    grid[0].set_ylim(len(methods) - 0.5, -0.5)
    return _svg(figure, f"Paired differences to {reference}, {where}")


def metric_sets(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy under every metric set, a line for each method, budget and epochs."""
    figure = _figure(1.3 + 0.28 * len(rows))
    axes = figure.subplots()
    shown = dict.fromkeys(name for row in rows for name in row["top1"])
    others = itertools.cycle(mark for mark in _SERIES if mark not in _SETS.values())
    for name in shown:
        color, marker = _SETS.get(name) or next(others)
        at = [i for i, row in enumerate(rows) if name in row["top1"]]
        x = [rows[i]["top1"][name]["mean"] for i in at]
        axes.scatter(x, at, color=color, marker=marker, s=28, label=name, alpha=0.85)
    names = [f"{row['method']}, {row['budget']}, {row['epochs']} epochs" for row in rows]
    axes.set_yticks(range(len(rows)), names, size=8, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("mean top-1 on the devices' test images, %")
    axes.grid(alpha=0.25)
    _legend(figure)
    return _svg(figure, f"Accuracy under {len(shown)} metric sets")


def over_epochs(rows: list[dict[str, Any]], dense: dict[str, Any], images: str) -> str:
    """Mean accuracy against epochs of fine-tuning, a panel for each budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    figure = _figure(4.4)
    grid = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(grid, budgets, strict=True):
        for i, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [r for r in rows if (r["method"], r["budget"]) == (name, budget)]
            own.sort(key=lambda row: row["epochs"])
            y = [row["top1"]["mean"] for row in own]
            errors = [row["top1"]["half_width"] or 0.0 for row in own]
            axes.errorbar([row["epochs"] for row in own], y, errors, **_series_style(i, name))
        axes.axhline(dense["mean"], color=_DENSE, ls="--", lw=1)
        axes.set_xscale("symlog")
        axes.set_title(budget, size=9, parse_math=False)
        axes.set_xlabel("epochs of fine-tuning")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("mean top-1, %")
    _legend(figure, columns=5)
    return _svg(figure, f"Accuracy over epochs, {images} images")


def _series_style(i: int, name: str) -> dict[str, Any]:
    color, marker = _SERIES[i % len(_SERIES)]
    # Beyond the colours, lines differ.
    line = ("-", "--", ":", "-.")[i // len(_SERIES) % 4]
    style = {"color": color, "marker": marker, "markersize": 5, "lw": 1, "ls": line}
    return style | {"capsize": 2, "elinewidth": 0.8, "label": _shorten(one_line(name), 40)}


def _cost(row: dict[str, Any], cost: str, relative: bool) -> float:
    return row[f"{cost}_percent"] if relative else row[cost]


def _cost_label(title: str, cost: str, relative: bool) -> str:
    if relative:
        return f"{title}, % of the dense model's"
    return f"{title}, ms" if cost == "ms" else title


def _front(axes: "Axes", x: np.ndarray, y: np.ndarray) -> None:
    axes.step(x, y, where="post", color=_DENSE, lw=2.5, alpha=0.35, zorder=1)
    axes.scatter(x, y, s=90, facecolors="none", edgecolors=_INK, linewidths=0.8, zorder=2)


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _row_height(rows: list[dict[str, Any]]) -> float:
    return 0.36 if len(rows) <= _NUMBERED_DEVICES else 0.22


def _name_devices(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(rows)), [f"device {row['device']}" for row in rows], size=8)


def _legend(figure: "Figure", columns: int | None = None) -> None:
    # Above the drawing, where it never covers a point.
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = columns or len(labels)
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8
    )


def _figure(height: float) -> "Figure":
    # Imported with the first drawing: programs that draw at their end, if at all, start sooner.
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _svg(figure: "Figure", label: str) -> str:
    import matplotlib

    text = io.StringIO()
    # Text stays text, so that it can be selected and found; no date, so that pages compare equal.
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    options = {"svg.fonttype": "none", "svg.hashsalt": label, "font.sans-serif": ["DejaVu Sans"]}
    with warnings.catch_warnings(), matplotlib.rc_context(options):
        # The browser has letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(text, format="svg", metadata=unsaid)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Every drawing has a figure_1; in one page, names must differ.
    prefix = re.sub(r"\W+", "-", label).lower()
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)

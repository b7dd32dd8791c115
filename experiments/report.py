"""Tables and the self-contained HTML page of one experiment."""

import csv
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tapvit_jax.files import atomic_file, write_text

matplotlib.use("Agg")

_DENSE, _SELECTED = "#6b7280", "#2563eb"
_PUBLIC = {"pool": "#d97706", "random": "#059669"}
_TITLES = {"pool": "whole pool", "random": "random subset"}


def columns(results: dict[str, Any]) -> list[str]:
    """Headings of the result table."""
    names = ["device", "classes", "payload bytes", "budget", "params", "MACs"]
    names += ["dense %", "pruned %", "recovered %"]
    names += [f"{_TITLES[c]} %" for c in results["config"]["comparisons"]]
    return [*names, "dense ms", "pruned ms"]


def cells(row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """One device's row of the result table; recovered accuracies for the comparisons."""
    dense, variants = results["dense"], row["variants"]
    found = [str(row["device"]), " ".join(results["class_names"][c] for c in row["classes"])]
    found += [f"{row['payload_bytes']:,}", row["budget"]]
    for unit in ("params", "macs"):
        amount = row["cost"][unit]
        found.append(f"{amount:,} ({100 * amount / dense[unit]:.1f} %)")
    found.append(_percent(row["dense"]))
    found += [_percent(variants["selected"][key]) for key in ("pruned", "recovered")]
    found += [_percent(variants[c]["recovered"]) for c in results["config"]["comparisons"]]
    return [*found, *(_milliseconds(row["latency_ms"][name]) for name in ("dense", "pruned"))]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _milliseconds(times: dict[str, float]) -> str:
    return f"{times['median']:.2f}"


def table(results: dict[str, Any]) -> str:
    """The result table as aligned text."""
    rows = [columns(results)] + [cells(row, results) for row in results["devices"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def write(results: dict[str, Any], workdir: Path) -> None:
    """Write results.csv and report.html into the work directory."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns(results))
    writer.writerows(cells(row, results) for row in results["devices"])
    write_text(workdir / "results.csv", text.getvalue())
    with atomic_file(workdir / "report.html") as partial:
        partial.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The whole report as one HTML page without any outside reference."""
    parts = [
        f"<h1>{html.escape(results['name'])}: task-adaptive pruning</h1>",
        f"<p>{_summary(results)}</p>",
        _html_table(results),
        "<h2>Accuracy against MACs</h2>",
        "<p>Each device on its own private-test images, before and after recovery.</p>",
        _svg(_accuracy_figure(results), "accuracy against MACs"),
        "<h2>What each device keeps</h2>",
        "<p>Share of units kept in every block.</p>",
        _svg(_keep_figure(results), "keep ratios per layer and device"),
        "<h2>What each metric dataset holds</h2>",
        "<p>Classes of the public images chosen for a device; its true classes are shaded. "
        "The cloud never sees those: they are shown because this is a simulation.</p>",
        _svg(_class_figure(results), "classes in the metric dataset"),
        _selection_table(results),
        "<h2>How this was run</h2>",
        _settings(results),
    ]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;"
        "color:#111827}table{border-collapse:collapse;margin:1em 0;font-size:13px}"
        "th,td{padding:.35em .6em;border-bottom:1px solid #e5e7eb;text-align:right;"
        "white-space:nowrap}th{border-bottom:2px solid #9ca3af}"
        "td:nth-child(2),td:nth-child(4){text-align:left}svg{max-width:100%;height:auto}"
        ".wide{overflow-x:auto}pre{background:#f3f4f6;padding:1em;overflow-x:auto;font-size:12px}"
    )
    title = html.escape(results["name"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _summary(results: dict[str, Any]) -> str:
    rows = results["devices"]

    def mean(values: list[float]) -> str:
        return f"{100 * float(np.mean(values)):.1f} %"

    recovered = mean([row["variants"]["selected"]["recovered"] for row in rows])
    dense = mean([row["dense"] for row in rows])
    worst = min(row["variants"]["selected"]["recovered"] - row["dense"] for row in rows)
    return (
        f"{len(rows)} devices. Mean accuracy on the devices' own test images: dense {dense}, "
        f"pruned and recovered {recovered}; the largest loss of any device is "
        f"{max(0.0, -100 * worst):.1f} points."
    )


def _rows_to_html(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _html_table(results: dict[str, Any]) -> str:
    note = (
        "<p>Columns after <em>recovered</em>: the same budget and the same number of fine-tuning "
        f"steps with other public images in place of the selected ones. Latency: median forward "
        f"pass of {results['config']['latency_batch']} images in JAX on this machine "
        f"({html.escape(results['backend'])}).</p>"
    )
    return _rows_to_html(columns(results), [cells(r, results) for r in results["devices"]]) + note


def _selection_table(results: dict[str, Any]) -> str:
    head = ["device", "true classes", "in its classes %", "mixture components in use"]
    head += ["distance to held-out features: chosen", "whole pool"]
    rows = []
    for row in results["devices"]:
        found = row["selection"]
        histogram = np.asarray(found["class_histogram"])
        inside = histogram[row["classes"]].sum() / max(histogram.sum(), 1)
        rows.append(
            [
                str(row["device"]),
                " ".join(results["class_names"][c] for c in row["classes"]),
                _percent(inside),
                f"{found['effective_components']:.1f}",
                _number(found["energy_distance"]),
                _number(found["pool_energy_distance"]),
            ]
        )
    return _rows_to_html(head, rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _settings(results: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {v}" for name, v in results["libraries"].items())
    config = html.escape(json.dumps(results["config"], indent=1))
    return (
        f"<p>Seed {results['seed']}; {results['seconds']} s in this run; "
        f"{html.escape(libraries)}.</p><details><summary>Resolved configuration</summary>"
        f"<pre>{config}</pre></details>"
    )


def _svg(figure: Figure, label: str) -> str:
    text = io.StringIO()
    # Text stays text, so that it can be selected and found; no date, so that pages compare equal.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1
    )


def _accuracy_figure(results: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 4.2))
    dense_macs = results["dense"]["macs"]
    for row in results["devices"]:
        x = 100 * row["cost"]["macs"] / dense_macs
        selected = row["variants"]["selected"]
        first = row is results["devices"][0]
        before, after = 100 * selected["pruned"], 100 * selected["recovered"]
        axes.plot([x, x], [before, after], color=_SELECTED, alpha=0.35, zorder=1)
        axes.scatter(
            x, before, facecolors="none", edgecolors=_SELECTED, label="pruned" if first else None
        )
        axes.scatter(x, after, color=_SELECTED, label="recovered" if first else None, zorder=3)
        for name, color in _PUBLIC.items():
            if name in row["variants"]:
                y = 100 * row["variants"][name]["recovered"]
                label = f"recovered, {_TITLES[name]}" if first else None
                axes.scatter(x, y, color=color, marker="_", s=120, label=label, zorder=2)
        axes.scatter(
            100, 100 * row["dense"], color=_DENSE, marker="s", label="dense" if first else None
        )
        axes.annotate(
            f"device {row['device']}", (x, after), xytext=(6, 5), textcoords="offset points", size=8
        )
    axes.set_xlabel("MACs, % of the dense model")
    axes.set_ylabel("top-1 on private-test, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _keep_figure(results: dict[str, Any]) -> Figure:
    rows = results["devices"]
    kinds = {"mlp": "MLP units", "qk": "query-key dims", "vo": "value dims"}
    figure, grid = plt.subplots(
        1, len(kinds), figsize=(11, 1.2 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    for axes, (kind, title) in zip(grid, kinds.items(), strict=True):
        ratios = np.array([row["keep_ratios"][kind] for row in rows])
        image = axes.imshow(ratios, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (y, x), value in np.ndenumerate(ratios):
            color = "white" if value > 0.6 else "#111827"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", size=7, color=color)
        axes.set_title(title, size=10)
        axes.set_xlabel("block")
        axes.set_xticks(range(ratios.shape[1]))
        axes.set_yticks(range(len(rows)), [f"device {row['device']}" for row in rows])
    figure.colorbar(image, ax=grid, label="keep ratio", fraction=0.02)
    return figure


def _class_figure(results: dict[str, Any]) -> Figure:
    rows, names = results["devices"], results["class_names"]
    figure, grid = plt.subplots(
        len(rows), 1, figsize=(11, 1.35 * len(rows)), sharex=True, squeeze=False
    )
    for axes, row in zip(grid[:, 0], rows, strict=True):
        histogram = row["selection"]["class_histogram"]
        for c in row["classes"]:
            axes.axvspan(c - 0.5, c + 0.5, color="#bfdbfe", zorder=0)
        axes.bar(range(len(histogram)), histogram, color=_SELECTED, width=0.7)
        axes.set_ylabel(f"device {row['device']}", size=9)
        axes.tick_params(labelsize=8)
    axes = grid[-1, 0]
    # Beyond a few dozen classes the names would only overlap.
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 4 else 90)
    axes.set_xlabel("class")
    axes.set_xlim(-0.5, len(names) - 0.5)
    return figure

"""Tables and the self-contained HTML page of one experiment; as a program, of many.

    python -m experiments.report runs/digits runs/sweep --out=runs/joined

joins the results of runs and sweeps into units.csv, units.json and units.html.
"""

import argparse
import csv
import html
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, joined
from experiments.figures import TITLES
from experiments.tables import STAGES, STAGES_NOTE, amount, document, text_cell, to_table
from tapvit_jax.errors import InputError
from tapvit_jax.files import read_json, write_text
from tapvit_jax.runtime import one_line, run_program

# In a table's cell; longer lists of classes are counted instead.
_LONGEST_LIST = 24
_NONE = "–"  # noqa: RUF001


LEAKS = (
    "As published, the splits leak: the images that score a device's model have fitted its mixture "
    "and chosen its epoch, and the public pool is what the dense model was trained on."
)


def leaks(results: dict[str, Any]) -> bool:
    """Whether an experiment used the published splits."""
    return bool(results["config"]["data"]["partition"].get("leaks"))


def record(row: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """One device's results as plain values, the columns of results.csv.

    Accuracies are top-1 on the device's own test images, in percent; those of the comparisons are
    after recovery.
    """
    dense, variants = results["dense"], row["variants"]
    found = {
        "device": row["device"],
        "classes": ";".join(_class_names(row, results)),
        "test_images": row["private_test"],
        "payload_bytes": row["payload_bytes"],
        "budget": row["budget"],
    }
    for unit in ("params", "macs"):
        found[unit] = row["cost"][unit]
        found[f"{unit}_percent"] = round(100 * row["cost"][unit] / dense[unit], 3)
    found["dense_top1"] = _percent(row["dense"])
    for stage in STAGES[1:]:
        found[f"{stage}_top1"] = _percent(variants["selected"][stage])
    for name in results["config"]["comparisons"]:
        found[f"recovered_{name}_top1"] = _percent(variants[name]["recovered"])
    for name in ("dense", "pruned"):
        found[f"{name}_ms"] = round(row["latency_ms"][name]["median"], 4)
    return found


def _percent(share: float) -> float:
    return round(100 * share, 3)


def _class_names(row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    return [one_line(results["class_names"][c]) for c in row["classes"]]


def table(results: dict[str, Any]) -> str:
    """The result table as aligned text."""
    comparisons = results["config"]["comparisons"]
    head = ["device", "classes", "payload", "budget", "params", "MACs"]
    head += [f"{stage} %" for stage in STAGES]
    head += [*(f"{TITLES[c]} %" for c in comparisons)]
    head += ["dense ms", "pruned ms"]
    lines = [head]
    for row in results["devices"]:
        found, names = record(row, results), _class_names(row, results)
        classes = " ".join(names)
        cells = [str(row["device"])]
        cells += [classes if len(classes) <= _LONGEST_LIST else f"{len(names)} classes"]
        cells += [f"{row['payload_bytes']:,} B", row["budget"]]
        for unit in ("params", "macs"):
            cells.append(f"{amount(found[unit])} ({found[f'{unit}_percent']:.1f} %)")
        stages = [*STAGES, *(f"recovered_{c}" for c in comparisons)]
        cells += [f"{found[f'{stage}_top1']:.1f}" for stage in stages]
        cells += [f"{found[name]:.2f}" for name in ("dense_ms", "pruned_ms")]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    # Classes and budgets are text, all else numbers.
    left = {1, 3}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write(results: dict[str, Any], workdir: Path) -> None:
    """Write results.csv and report.html into the work directory."""
    records = [record(row, results) for row in results["devices"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(workdir / "results.csv", text.getvalue())
    write_text(workdir / "report.html", page(results))


def page(results: dict[str, Any]) -> str:
    """The whole report as one HTML page without any outside reference."""
    name = _escape(results["name"])
    parts = [
        f"<h1>{name}: task-adaptive pruning</h1>",
        f"<p>{_summary(results)}</p>",
        *([f"<p><strong>{LEAKS}</strong></p>"] if leaks(results) else []),
        _result_table(results),
        "<h2>Accuracy against MACs</h2>",
        "<p>Each device on its own test images, before and after recovery.</p>",
        _figure(figures.accuracy(results)),
        "<h2>Accuracy of every device</h2>",
        _figure(figures.devices(results)),
        "<h2>What each device keeps</h2>",
        "<p>Share of the units that every block keeps, in percent.</p>",
        _figure(figures.keep_ratios(results)),
        "<h2>What each metric dataset holds</h2>",
        "<p>Classes of the public images chosen for a device; its true classes are shaded. "
        "The cloud never sees those: they are shown because this is a simulation.</p>",
        _figure(figures.classes(results)),
        _selection_table(results),
        "<h2>How this was run</h2>",
        _settings(results),
    ]
    return document(name, "".join(parts))


def _escape(text: str) -> str:
    return html.escape(one_line(text))


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _summary(results: dict[str, Any]) -> str:
    rows = results["devices"]

    def mean(values: list[float]) -> str:
        return f"{100 * float(np.mean(values)):.1f} %"

    pruned, compensated, recovered = (
        mean([row["variants"]["selected"][stage] for row in rows]) for stage in STAGES[1:]
    )
    dense = mean([row["dense"] for row in rows])
    worst = min(row["variants"]["selected"]["recovered"] - row["dense"] for row in rows)
    others = "".join(
        f", {mean([row['variants'][name]['recovered'] for row in rows])} with "
        f"{'the' if name == 'pool' else 'a'} {TITLES[name]} instead of selected images"
        for name in results["config"]["comparisons"]
    )
    loss = (
        f"The largest loss of any device is {-100 * worst:.1f} points."
        if worst < 0
        else "No device loses accuracy."
    )
    sizes, cost = results["sizes"], results["dense"]
    return (
        f"{len(rows)} device{'s' * (len(rows) > 1)}. Mean accuracy on the devices' own test "
        f"images: dense {dense}, pruned {pruned}, compensated in closed form {compensated}, "
        f"fine-tuned {recovered}{others}. {loss}<br>"
        f"Public pool: {sizes['public_pool']:,} images of {len(results['class_names'])} classes; "
        f"public validation: {sizes['public_validation']:,}. Dense model: {cost['params']:,} "
        f"parameters, {cost['macs']:,} MACs."
    )


def _classes_cell(row: dict[str, Any], results: dict[str, Any]) -> str:
    names = _class_names(row, results)
    listed = html.escape(", ".join(names))
    if len(", ".join(names)) <= _LONGEST_LIST:
        return text_cell(listed)
    return text_cell(
        f"<details><summary>{len(names)} classes</summary><small style='white-space:normal'>"
        f"{listed}</small></details>"
    )


def _result_table(results: dict[str, Any]) -> str:
    comparisons = results["config"]["comparisons"]
    groups = [
        ("", ["device", "classes", "test images", "payload, bytes", "budget", "params", "MACs"]),
        ("top-1, %", list(STAGES)),
        ("top-1, %, recovered with", [TITLES[c] for c in comparisons]),
        ("latency, ms", ["dense", "pruned"]),
    ]
    rows = []
    for row in results["devices"]:
        found = record(row, results)
        cells = [str(row["device"]), _classes_cell(row, results)]
        cells += [f"{row['private_test']:,}", f"{row['payload_bytes']:,}"]
        cells.append(text_cell("<br>".join(map(_escape, row["budget"].split(", ")))))
        for unit in ("params", "macs"):
            share = f"{found[f'{unit}_percent']:.1f} %"
            cells.append(f"{amount(found[unit])}<br><small>{share}</small>")
        cells += [f"{found[f'{stage}_top1']:.1f}" for stage in STAGES]
        cells[-1] = f"<strong>{cells[-1]}</strong>"
        cells += [f"{found[f'recovered_{c}_top1']:.1f}" for c in comparisons]
        for name in ("dense", "pruned"):
            times = row["latency_ms"][name]
            spread = f"{times['low']:.1f}–{times['high']:.1f}"  # noqa: RUF001
            cells.append(f"{times['median']:.2f}<br><small>{spread}</small>")
        rows.append(cells)
    compared = (
        "<em>Recovered with</em> another set: the same budget and the same number of fine-tuning "
        "steps with those public images in place of the selected ones. "
    )
    note = (
        f"<p>{STAGES_NOTE} Percentages under params and MACs: of the dense model. "
        f"{compared * bool(comparisons)}"
        f"Latency: median (and 10th to 90th percentile) of the forward pass of "
        f"{results['config']['latency_batch']} images in JAX on this machine "
        f"({_escape(results['backend'])}).</p>"
    )
    groups = [(title, heads) for title, heads in groups if heads]
    return to_table("Results, on every device's own test images", groups, rows) + note


def _selection_table(results: dict[str, Any]) -> str:
    groups = [
        ("", ["device", "images", "of its true classes, %", "mixture components in use"]),
        ("distance to its held-out features", ["chosen images", "whole pool"]),
    ]
    rows = []
    for row in results["devices"]:
        found = row["selection"]
        histogram = np.asarray(found["class_histogram"])
        inside = histogram[row["classes"]].sum() / max(histogram.sum(), 1)
        cells = [str(row["device"]), f"{found['count']:,}", f"{100 * inside:.1f}"]
        cells.append(f"{found['effective_components']:.1f}")
        cells += [_number(found[f"{which}energy_distance"]) for which in ("", "pool_")]
        rows.append(cells)
    note = (
        "<p>Distance: energy distance between features; the smaller, the more alike. Components "
        "in use: how many the chosen images spread over (exponential of the entropy).</p>"
    )
    return to_table("Metric datasets", groups, rows) + note


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _settings(results: dict[str, Any]) -> str:
    libraries = ", ".join(
        f"{name} {version}"
        for name, version in results["libraries"].items()
        if version != "not installed"
    )
    config = html.escape(json.dumps(results["config"], indent=1))
    names = ", ".join(f"{i}: {_escape(name)}" for i, name in enumerate(results["class_names"]))
    return (
        f"<p>Seed {results['seed']}; {results['seconds']:,} s in this run; "
        f"{_escape(libraries)}.</p>"
        f"<details><summary>Numbers and names of the classes</summary><p>{names}</p></details>"
        f"<details><summary>Resolved configuration</summary><pre>{config}</pre></details>"
    )


def join(directories: list[Path], out: Path) -> list[joined.Record]:
    """Write one report of several work directories of runs and sweeps.

    Raises:
      InputError: a directory without whole results of ours, one that is named twice, or an `out`
        that cannot be written.
    """
    records, failed, unfinished = [], [], 0
    for directory, source in zip(directories, _sources(directories), strict=True):
        path = directory / "results.json"
        if not path.exists() and (directory / "compare.json").exists():
            raise InputError(
                f"{directory}: is a comparison, which has its report in compare.html; expected "
                "work directories of runs and sweeps"
            )
        results = read_json(path)
        try:
            records += joined.records(results, source)
            own, missing = joined.gaps(results, source)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: holds no results of a run or a sweep") from error
        failed, unfinished = failed + own, unfinished + missing
    if not records:
        raise InputError(f"{directories[0]}: no unit is finished yet, expected one or more")
    title = ", ".join(dict.fromkeys(record["source"] for record in records))
    joined.write(records, out, title, failed, unfinished)
    return records


def _sources(directories: list[Path]) -> list[str]:
    """Every directory's name, after as many of those above it as tell it from the others."""
    paths = [directory.resolve() for directory in directories]
    names = []
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path}: named {paths.count(path)} times, expected once")
        ends = [path.parts[-count:] for count in range(1, len(path.parts) + 1)]
        own = (end for end in ends if sum(p.parts[-len(end) :] == end for p in paths) == 1)
        names.append(str(Path(*next(own))))
    return names


def main(argv: list[str]) -> None:
    """Join the directories that the arguments name.

    Raises:
      InputError: as `join`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Write one table and one HTML page of several work directories.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "directories", nargs="+", type=Path, help="work directories of runs and sweeps"
    )
    parser.add_argument("--out", required=True, type=Path, help="where the report goes")
    arguments = parser.parse_args(argv)
    records = join(arguments.directories, arguments.out)
    print(f"{len(records)} units: {arguments.out / 'units.html'}")


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:])))

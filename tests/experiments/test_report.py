import csv
import html.parser
import io
import itertools
import json
import math
import re

import numpy as np
import pytest

from experiments import figures, report

NAMES = ["cat", "<b>dog & co</b>", "$x_{", "line\nbreak\x1b[2J", "中文", "\udc80", *"ghijklmn"]


def results(devices=3, classes=14, comparisons=("pool", "random"), distances=True, depth=4):
    rng = np.random.default_rng(0)
    names = [*NAMES, *(f"class {i}" for i in range(classes))][:classes]

    def share():
        return float(rng.uniform(0.2, 0.9))

    def row(d):
        times = {"median": 9.5 + d, "low": 8.25, "high": 12.0}
        return {
            "device": d,
            "classes": sorted(rng.choice(classes, min(5, classes), replace=False).tolist()),
            "private_train": 100,
            "private_test": 1200,
            "payload_bytes": 1000 + d,
            "budget": "macs=0.5" if d % 2 else "params=0.45, macs=0.5",
            "cost": {"params": 4_100_000 + d, "macs": 650_000_000, "encoder_params": 4_000_000},
            "dense": 0.8125,
            "variants": {
                name: {**{stage: share() for stage in report.STAGES[1:]}, "best_epoch": 3}
                for name in ("selected", *comparisons)
            },
            "latency_ms": {"dense": times, "pruned": times | {"median": 4.0}},
            "keep_ratios": {kind: rng.random(depth).tolist() for kind in ("mlp", "qk", "vo")},
            "selection": {
                "count": 64,
                "class_histogram": rng.integers(0, 9, classes).tolist(),
                "effective_components": 3.7,
                "energy_distance": 0.125 if distances else None,
                "pool_energy_distance": 0.5 if distances else None,
            },
            "model": f"models/device_{d}",
        }

    return {
        "name": "a <script>alert(1)</script> name",
        "config": {
            "data": {"partition": {}},
            "comparisons": list(comparisons),
            "latency_batch": 8,
            "note": "</pre><i>",
        },
        "libraries": {"python": "3.11", "jax": "0.10", "tapvit-jax": "not installed"},
        "backend": "cpu",
        "seed": 5,
        "seconds": 1234.5,
        "class_names": names,
        "sizes": {"public_pool": 5000, "public_validation": 500},
        "dense": {"params": 8_200_000, "macs": 1_300_000_000, "encoder_params": 8_000_000},
        "devices": [row(d) for d in range(devices)],
    }


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects what the tests ask for."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.style = [], [], [], []
        self.rows, self.cell = [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> says something twice"
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        (self.style if "style" in self.open else self.text).append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def values(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def source():
    return report.page(results())


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_text_table_is_aligned():
    lines = report.table(results(devices=11)).splitlines()
    assert len(lines) == 2 + 11
    # The rule shows where the columns lie; every cell keeps to its own.
    spans = [match.span() for match in re.finditer("-+", lines[1])]
    assert len(spans) == 14
    for line in lines:
        between = [line[a:b] for (_, a), (b, _) in itertools.pairwise(spans)]
        assert set(between) == {"  "} and line.isprintable()
    cells = [[line[a:b] for a, b in spans] for line in lines]
    head = "device,classes,payload,budget,params,MACs,dense %,pruned %,compensated %,recovered %,"
    head += "whole pool %,random subset %,dense ms,pruned ms"
    assert ",".join(cell.strip() for cell in cells[0]) == head
    for row in cells[2:]:
        for i, cell in enumerate(row):
            assert not (cell.startswith(" ") if i in (1, 3) else cell.endswith(" ")), cell
    assert [c.strip() for c in cells[3]][2:7] == [
        "1,001 B",
        "macs=0.5",
        "4.10 M (50.0 %)",
        "650 M (50.0 %)",
        "81.2",
    ]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (93_926, "93.9 k"),
        (153_475, "153 k"),
        (999_700, "999,700"),
        (2_096_000, "2.10 M"),
        (1_300_000_000, "1.30 G"),
        (17_600_000_000, "17.6 G"),
    ],
)
def test_amounts_have_three_digits(number, expected):
    plain = results(devices=1)
    plain["devices"][0]["cost"]["macs"] = number
    assert f"  {expected} (" in report.table(plain)


def test_csv_holds_plain_numbers(tmp_path):
    found = results()
    report.write(found, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.csv"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text("utf-8"))))
    head = "device classes test_images payload_bytes budget params params_percent macs "
    head += "macs_percent dense_top1 pruned_top1 compensated_top1 recovered_top1 "
    assert (
        " ".join(rows[0]) == head + "recovered_pool_top1 recovered_random_top1 dense_ms pruned_ms"
    )
    for row, device in zip(rows, found["devices"], strict=True):
        assert row["classes"].count(";") == len(device["classes"]) - 1
        assert row["budget"] == device["budget"]
        numbers = {k: float(v) for k, v in row.items() if k not in ("classes", "budget")}
        assert numbers["device"] == device["device"]
        assert numbers["macs"] == 650_000_000 and numbers["macs_percent"] == 50
        for variant, column in (("selected", ""), ("pool", "_pool"), ("random", "_random")):
            expected = 100 * device["variants"][variant]["recovered"]
            assert math.isclose(numbers[f"recovered{column}_top1"], expected, abs_tol=1e-3)
        for stage in report.STAGES[1:]:
            expected = 100 * device["variants"]["selected"][stage]
            assert math.isclose(numbers[f"{stage}_top1"], expected, abs_tol=1e-3)
        assert numbers["pruned_ms"] == 4


def test_csv_and_page_do_without_comparisons_and_distances(tmp_path):
    report.write(results(comparisons=(), distances=False), tmp_path)
    head = (tmp_path / "results.csv").read_text("utf-8").splitlines()[0]
    assert "recovered_top1,dense_ms" in head and "pool" not in head
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    text = " ".join(page.text)
    assert "recovered with" not in text and "random subset" not in text
    assert [row[-2:] for row in page.rows[-3:]] == [["–", "–"]] * 3  # noqa: RUF001


def test_page_shows_every_device(page):
    bodies = [row for row in page.rows if row and row[0] in ("0", "1", "2")]
    assert len(bodies) == 2 * 3 and {len(row) for row in bodies} == {6, 15}
    for row, device in zip(bodies[:3], results()["devices"], strict=True):
        shown = [device["variants"]["selected"][stage] for stage in ("compensated", "recovered")]
        assert row[9:11] == [f"{100 * share:.1f}" for share in shown]
        assert row[-2:] == [f"{9.5 + device['device']:.2f}8.2–12.0", "4.008.2–12.0"]  # noqa: RUF001
    assert [row[-2:] for row in bodies[3:]] == [["0.125", "0.500"]] * 3
    text = " ".join(page.text)
    for expected in ("seed", "1,234.5 s", "jax 0.10", "5,000 images", "8,200,000", "(cpu)"):
        assert expected.lower() in text.lower(), expected
    assert "not installed" not in text


def test_headings_cover_their_columns(page):
    spans, tables = [], 0
    for tag, attrs in page.tags:
        if tag == "thead":
            tables += 1
            spans.append(0)
        if tag == "th" and attrs.get("scope") != "col":
            spans[-1] += int(attrs["colspan"])
        if tag == "th" and "rowspan" in attrs:
            spans[-1] += 1
    assert tables == 2 and spans == [15, 6]


def test_page_loads_nothing(page, source):
    loading = {"script", "link", "iframe", "img", "object", "embed", "base", "audio", "video"}
    assert not loading & {tag for tag, _ in page.tags}
    for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values(name))
    assert len(page.values("xlink:href")) > 3
    assert "@import" not in "".join(page.style)
    assert not re.search(r"url\((?!#)", source)
    # Namespaces are names, not addresses that anything is read from.
    rest = re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)
    assert "http:" not in rest and "https:" not in rest and not re.search(r'["(]//', rest)


def test_names_are_escaped(page, source):
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    text = "".join(page.text)
    for expected in ("a <script>alert(1)</script> name", "<b>dog & co</b>", "$x_{", "中文"):
        assert expected in text, expected
    for shown in ("line\\nbreak\\x1b[2J", "\\udc80"):
        assert shown in text
    assert "\x1b" not in source and source.encode("utf-8")
    # In the drawing too.
    assert any("dog" in text for text in re.findall(r"<text[^>]*>([^<]*)</text>", source))


def test_drawings_are_described_and_have_their_own_names(page):
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawings) == 4
    assert {attrs["role"] for attrs in drawings} == {"img"}
    labels = [attrs["aria-label"] for attrs in drawings]
    assert len(set(labels)) == 4 and all("3 devices" in label for label in labels)
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r"url\(#([^)]*)\)", json.dumps(page.tags))
    used += [value[1:] for value in page.values("xlink:href") if value.startswith("#")]
    assert used and set(used) <= set(ids)
    assert ("html", {"lang": "en"}) in page.tags


def test_the_same_results_give_the_same_page(source):
    assert report.page(results()) == source


def labels_at(source):
    """Where the numbers of the devices stand in the first drawing."""
    drawing = source[source.index("<svg") : source.index("</svg>")]
    found = re.findall(r'<text style="font-size: 8px[^>]*? x="(.*?)" y="(.*?)"[^>]*>\d+<', drawing)
    return [(float(x), float(y)) for x, y in found]


def test_many_devices_and_classes():
    found = results(devices=12, classes=200, depth=40)
    for row in found["devices"]:
        # All at one point: the numbers beside it must not cover each other.
        row["variants"]["selected"] |= {"pruned": 0.5, "recovered": 0.8}
    source = report.page(found)
    text = "".join(Page(source).text)
    assert text.count("5 classes") == 12 and "12 devices." in text
    at = labels_at(source)
    assert len(at) == 12
    for i, (x, y) in enumerate(at):
        for other_x, other_y in at[:i]:
            assert abs(x - other_x) > 8 or abs(y - other_y) > 7.5
    assert len(source) < 10**6


def test_one_device_and_two_classes():
    found = results(devices=1, classes=2, depth=1)
    found["devices"][0]["selection"]["class_histogram"] = [0, 0]
    text = "".join(Page(report.page(found)).text)
    assert "1 device." in text and "cat, <b>dog & co</b>" in text


def texts(svg):
    return re.findall(r">([^<>]+)</text>", svg)


def test_plots_of_one_budget_show_its_cost_and_no_offset():
    mean = {"mean": 70.0, "half_width": 1.0}
    rows = [
        {"method": m, "macs_percent": x, "top1": mean} for m, x in (("a", 49.983), ("b", 49.985))
    ]
    shown = texts(figures.compared(rows, {"mean": 76.0}, "somewhere"))
    assert "50.0" in shown and not any("e1" in text for text in shown)
    costs = {"macs_percent": 49.983, "params_percent": 52.001, "ms_percent": 60.0}
    found = [
        {"source": "s", "device": d, "recovered_top1": 70.0, "dense_top1": 76.0}
        | {name: value + 0.001 * d for name, value in costs.items()}
        for d in (0, 1)
    ]
    shown = texts(figures.every_device(found, ["a", "b"], lambda x, y: [0], True))
    assert shown.count("MACs, % of the dense model's") == 1
    assert {"50.0", "52.0", "60.0"} <= set(shown) and not any("e1" in text for text in shown)

"""Pieces of the reports' HTML pages, which load nothing from elsewhere."""

from collections.abc import Sequence

STAGES = ("dense", "pruned", "compensated", "recovered")
"""The models of one device whose accuracies stand side by side."""
STAGES_NOTE = (
    "<em>Pruned</em>: without any recovery; <em>compensated</em>: after the closed form; "
    "<em>recovered</em>: after fine-tuning too, where there is any."
)

_TEXT = ' class="text"'

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#111827;max-width:1180px;margin:2em auto;
padding:0 1em}
h1{line-height:1.2}h2{margin-top:2em}p{max-width:54em}
table{border-collapse:collapse;margin:1em 0;font-size:13px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3em 0}
th,td{padding:.35em .6em;border-bottom:1px solid #e5e7eb;text-align:right;vertical-align:top}
th{vertical-align:bottom}thead tr:last-child th{border-bottom:2px solid #9ca3af}
th[colspan]{text-align:center;border-bottom:1px solid #9ca3af}
th[rowspan]{border-bottom:2px solid #9ca3af}
.text{text-align:left}td{white-space:nowrap}td.text{max-width:20em;white-space:normal}
small{color:#4b5563;white-space:nowrap}
svg{width:100%;height:auto}figure{margin:1em 0}.wide{overflow-x:auto}
summary{cursor:pointer}pre{background:#f3f4f6;padding:1em;overflow-x:auto;font-size:12px}
"""


def document(title: str, body: str) -> str:
    """A page that needs nothing but itself; both arguments are HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def to_table(
    caption: str,
    groups: list[tuple[str, list[str]]],
    rows: list[list[str]],
    text_heads: Sequence[str] = ("classes", "budget", "series"),
) -> str:
    """A table with two rows of headings; cells that start with "<td" bring their own tag."""
    first = second = ""
    for title, heads in groups:
        if title:
            first += f'<th scope="colgroup" colspan="{len(heads)}">{title}</th>'
            second += "".join(f'<th scope="col">{head}</th>' for head in heads)
        else:
            first += "".join(
                f'<th scope="col" rowspan="2"{_TEXT * (head in text_heads)}>{head}</th>'
                for head in heads
            )
    body = "".join(
        "<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption>"
        f"<thead><tr>{first}</tr><tr>{second}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def text_cell(text: str) -> str:
    """A cell of words rather than numbers; `text` is HTML."""
    return f"<td{_TEXT}>{text}</td>"


def amount(number: int) -> str:
    """A count in three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            if number >= 999.5 * size:
                break
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:,}"

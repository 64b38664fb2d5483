"""The report as Markdown (GitHub's) and as one HTML file that needs no other."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from pipeline.evaluate.table import Cell, Column, Table


@dataclass(frozen=True)
class Picture:
    """A PNG with what stands above and below it; `link` is the name of its file, beside the page."""

    content: bytes
    link: str
    title: str
    caption: str


@dataclass(frozen=True)
class Page:
    """All that a report says, in order."""

    title: str
    intro: Sequence[str]  # paragraphs
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    left_out: Sequence[str]  # evaluations that are in no table


PICTURES = "Pictures"
LEFT_OUT = "Evaluations that are in no table"


# --- Markdown -----------------------------------------------------------------------------------


def markdown(page: Page) -> str:
    """Pictures are links."""
    blocks = [f"# {_md(page.title)}", *map(_md_prose, page.intro)]
    for name, tables in _by_name(page.tables):
        blocks.append(f"## {_md(name)}. {_md(tables[0].title)}")
        for table in tables:
            blocks += [f"### {_md(table.part)}"] if table.part else []
            blocks.append(_md_table(table))
            blocks += ["\n".join(f"- {_md_prose(note)}" for note in table.notes)] if table.notes else []
    if page.left_out:
        blocks += [f"## {LEFT_OUT}", "\n".join(f"- {_md_prose(line)}" for line in page.left_out)]
    if page.pictures:
        blocks.append(f"## {PICTURES}")
    for picture in page.pictures:
        blocks += [
            f"### {_md(picture.title)}",
            f"![{_md(picture.title)}]({quote(picture.link)})",
            _md_prose(picture.caption),
        ]
    return "\n\n".join(blocks) + "\n"


def _md(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return _escape_md(" ".join(text.split()))


def _escape_md(text: str) -> str:
    return re.sub(r"([\\`*_~\[\]<>|#])", r"\\\1", text)


def _md_prose(text: str) -> str:
    """The same outside tables, where what stands in backticks is code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else _escape_md(part) for i, part in enumerate(parts))


def _md_table(table: Table) -> str:
    header = [_md(title) for title in _flat_titles(table.columns)]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    lines = [header, rule, *([_md_cell(cell) for cell in row.cells] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flat_titles(columns: Sequence[Column]) -> list[str]:
    """Titles for one header line: what is measured, and "paper" alone where it stands beside ours."""
    ours = {column.group for column in columns if column.title == "ours"}
    titles = []
    for column in columns:
        alone = column.title if column.group in ours else f"{column.title}: {column.group}"
        titles.append(column.group if column.title == "ours" else alone if column.group else column.title)
    return titles


def _md_cell(cell: Cell) -> str:
    return f"**{_md(cell.text)}**" if cell.best else _md(cell.text)


# --- HTML ---------------------------------------------------------------------------------------


def html(page: Page) -> str:
    """Everything escaped, pictures embedded."""
    body = [f"<h1>{escape(page.title)}</h1>", *(f"<p>{_code(text)}</p>" for text in page.intro)]
    for name, tables in _by_name(page.tables):
        body.append(f"<h2>{escape(name)}. {escape(tables[0].title)}</h2>")
        for table in tables:
            body += [f"<h3>{escape(table.part)}</h3>"] if table.part else []
            body.append(_html_table(table))
            body += [_html_list(table.notes)] if table.notes else []
    if page.left_out:
        body += [f"<h2>{LEFT_OUT}</h2>", _html_list(page.left_out)]
    if page.pictures:
        body.append(f"<h2>{PICTURES}</h2>")
    for picture in page.pictures:
        data = base64.b64encode(picture.content).decode()
        body.append(
            f'<figure><h3>{escape(picture.title)}</h3><img alt="{escape(picture.title)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{_code(picture.caption)}</figcaption></figure>'
        )
    return _FRAME.format(title=escape(page.title), style=_STYLE, body="\n".join(body))


def _html_table(table: Table) -> str:
    rows = []
    for row in table.rows:
        parts = []
        for column, cell in zip(table.columns, row.cells, strict=True):
            text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
            parts.append(f"<td{_class(column)}>{text}</td>")
        rows.append(f'<tr class="{escape(row.kind)}">{"".join(parts)}</tr>')
    return (
        f'<div class="scroll"><table><thead>{_html_header(table.columns)}</thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _html_header(columns: Sequence[Column]) -> str:
    """Two lines: what is measured, over whose number it is."""
    upper, lower = [], []
    for group, run in itertools.groupby(columns, key=lambda column: column.group):
        members = list(run)
        if not group:
            upper += [f'<th rowspan="2"{_class(c)}>{escape(c.title)}</th>' for c in members]
            continue
        upper.append(f'<th class="group" colspan="{len(members)}">{escape(group)}</th>')
        lower += [f"<th{_class(c)}>{escape(c.title)}</th>" for c in members]
    return f"<tr>{''.join(upper)}</tr><tr>{''.join(lower)}</tr>"


def _class(column: Column) -> str:
    names = (["number"] if column.numeric else []) + (["paper"] if column.title == "paper" else [])
    return f' class="{" ".join(names)}"' if names else ""


def _html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_code(line)}</li>" for line in lines) + "</ul>"


def _code(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _by_name(tables: Sequence[Table]) -> list[tuple[str, list[Table]]]:
    return [(name, list(group)) for name, group in itertools.groupby(tables, key=lambda table: table.name)]


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-bottom: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #e3e5e8; }
th { font-weight: 600; vertical-align: bottom; }
thead tr:last-child th, th[rowspan] { border-bottom: 2px solid #9aa0a6; }
th.group { text-align: center; } .number { text-align: right; white-space: nowrap; } .paper { color: #6b7178; }
tr.baseline td { font-style: italic; } tr.summary td { border-top: 1px solid #9aa0a6; font-weight: 600; }
ul { color: #4a4f55; font-size: .85rem; margin: .5rem 0 1.5rem; padding-left: 1.2rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #4a4f55; font-size: .85rem; }
code { background: #f1f3f4; padding: 0 .25rem; border-radius: 3px; }
"""

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

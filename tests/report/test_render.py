"""Markdown that GitHub shows as meant, HTML that needs nothing else and runs nothing."""

import base64
from html.parser import HTMLParser

import pytest

from pipeline.evaluate.table import Cell, Column, Row, Table
from pipeline.report.render import Page, Picture, html, markdown


@pytest.fixture
def page():
    columns = (Column("method", numeric=False), Column("ours", "image mBO"), Column("paper", "image mBO"))
    rows = (
        Row((Cell("a|b <script>alert(1)</script>"), Cell("1.0", best=True), Cell("2.0"))),
        Row((Cell("colour_k*means*"), Cell("0.5"), Cell("–")), "baseline"),
    )
    table = Table("Table 1", "Scores & more", "MOVi-E", columns, rows, ("note <b>", "run `python -m x|y`"))
    picture = Picture(b"a picture", "figure 1.png", "Figure 1", "A <caption>")
    return Page("Title <i>", ["Intro [link](x)"], [table], [picture], ["left_out"])


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_whole_escaped_and_needs_no_other_file(page):
    reader = Reader()
    reader.feed(html(page))
    assert reader.open == []
    assert not {"script", "i", "caption"} & set(reader.tags)
    assert "a|b <script>alert(1)</script>" in reader.text
    assert reader.tags.count("b") == 1  # the best number; the note's is text
    assert "code" in reader.tags
    assert reader.sources == ["data:image/png;base64," + base64.b64encode(b"a picture").decode()]


def test_html_aligns_numbers_and_groups_ours_with_the_papers(page):
    text = html(page)
    assert '<th class="group" colspan="2">image mBO</th>' in text
    assert '<td class="number"><b>1.0</b></td><td class="number paper">2.0</td>' in text
    assert '<tr class="baseline">' in text


def test_markdown_tables_have_as_many_cells_as_columns(page):
    lines = [line for line in markdown(page).splitlines() if line.startswith("|")]
    assert lines == [
        "| method | image mBO | paper |",
        "| --- | ---: | ---: |",
        r"| a\|b \<script\>alert(1)\</script\> | **1.0** | 2.0 |",
        r"| colour\_k\*means\* | 0.5 | – |",
    ]


def test_markdown_links_pictures_relatively_and_keeps_code(page):
    text = markdown(page)
    assert "![Figure 1](figure%201.png)" in text
    assert "- run `python -m x|y`" in text
    assert r"Intro \[link\](x)" in text
    assert r"left\_out" in text

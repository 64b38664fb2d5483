"""A page of tables between the two marks of a document that says more than they do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.log import log
from pipeline.report.render import Picture


def update_document(stage: str, document: str, page: str, pictures: Sequence[Picture] = ()) -> None:
    """Puts the tables between two marks of a document, and the pictures beside it, named after it.

    Args:
        stage: whose page it is, as the marks name it.
        document: the file; `FILE.md#NAME` has marks of that name beside the stage's, where a file has several blocks.

    Raises:
        ValueError: the document has no such marks.
    """
    file, _, block = document.partition("#")
    path, name = Path(file), f"{stage} {block}".strip()
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = path.read_text(encoding="utf-8")
    stem = f"{path.stem}-{block}" if block else path.stem
    links = {picture.link: picture.link.replace(stage, stem, 1) for picture in pictures}
    for link, beside in links.items():
        page = page.replace(f"]({link})", f"]({beside})")
    body = re.sub(r"^#", "##", page.split("\n", 2)[2], flags=re.MULTILINE).strip()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{stage}.document: {path} has no {begin} … {end}")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{body}\n{end}", old), encoding="utf-8")
    for picture in pictures:
        path.with_name(links[picture.link]).write_bytes(picture.content)
    log(f"{stage}: wrote {path}")

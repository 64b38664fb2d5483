"""A page of tables between the two marks of a document that says more than they do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.log import log
from pipeline.report.render import Picture


def update_document(stage: str, document: Path, page: str, pictures: Sequence[Picture] = ()) -> None:
    """Puts the tables between a document's two marks, and the pictures beside it, named after it.

    Args:
        stage: whose page it is, as the marks name it.

    Raises:
        ValueError: the document has no such marks.
    """
    begin, end = f"<!-- {stage}: begin -->", f"<!-- {stage}: end -->"
    old = document.read_text(encoding="utf-8")
    links = {picture.link: picture.link.replace(stage, document.stem, 1) for picture in pictures}
    for link, beside in links.items():
        page = page.replace(f"]({link})", f"]({beside})")
    body = re.sub(r"^#", "##", page.split("\n", 2)[2], flags=re.MULTILINE).strip()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{stage}.document: {document} has no {begin} … {end}")
    document.write_text(pattern.sub(lambda _: f"{begin}\n{body}\n{end}", old), encoding="utf-8")
    for picture in pictures:
        document.with_name(links[picture.link]).write_bytes(picture.content)
    log(f"{stage}: wrote {document}")

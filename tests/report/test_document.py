"""A page of tables in a document that says more."""

import pytest

from pipeline.report.document import update_document
from pipeline.report.render import Picture

BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"


def test_the_documents_own_words_stay(tmp_path):
    document = tmp_path / "real.md"
    document.write_text(f"# What we saw\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    page = "# Evidence\n\nintro\n\n## Scores\n\n![Scores](evidence.png)\n![Curves](evidence-curves.png)\n"
    pictures = [Picture(f"{n}".encode(), f"{n}.png", "", "") for n in ("evidence", "evidence-curves")]
    update_document("evidence", str(document), page, pictures)
    text = document.read_text()
    assert "old" not in text
    assert text.startswith("# What we saw\n\nBefore.\n")
    assert text.endswith("After.\n")
    assert "### Scores" in text
    assert "![Scores](real.png)\n![Curves](real-curves.png)" in text, "two documents may lie side by side"
    assert (tmp_path / "real.png").read_bytes() == b"evidence"
    assert (tmp_path / "real-curves.png").read_bytes() == b"evidence-curves"
    document.write_text("no marks")
    with pytest.raises(ValueError, match="has no <!-- evidence: begin -->"):
        update_document("evidence", str(document), "# Evidence\n\nintro\n", [])


def test_one_of_a_documents_blocks(tmp_path):
    document = tmp_path / "page.md"
    block = "<!-- evidence real: begin -->\nold\n<!-- evidence real: end -->"
    document.write_text(f"{BEGIN}\nthe other\n{END}\n{block}\n")
    page = "# Evidence\n\nintro\n\n![Scores](evidence.png)\n"
    update_document("evidence", f"{document}#real", page, [Picture(b"png", "evidence.png", "", "")])
    text = document.read_text()
    assert text.startswith(f"{BEGIN}\nthe other\n{END}\n")
    assert "![Scores](page-real.png)" in text
    assert "old" not in text
    assert (tmp_path / "page-real.png").read_bytes() == b"png"

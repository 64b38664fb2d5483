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
    update_document("evidence", document, page, pictures)
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
        update_document("evidence", document, "# Evidence\n\nintro\n", [])

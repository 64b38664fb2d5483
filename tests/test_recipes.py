"""What the recipes of CONTRIBUTING ask for, where nothing else would notice that it was forgotten."""

from pathlib import Path
from typing import get_args

from layouts import WRITERS

from pipeline.config import Dataset, Distill, load_config
from pipeline.distill.run import student_terms
from pipeline.evaluate.records import METHODS

ROOT = Path(__file__).parents[1]


def test_every_way_to_distil_has_its_term_title_preset_and_row():
    methods = get_args(Distill.model_fields["method"].annotation)
    terms = [student_terms(Distill(method=method)) for method in methods]
    assert all(terms.count(term) == 1 for term in terms)
    assert set(methods) <= set(METHODS)
    for method in methods:
        preset = ROOT / "configs" / "methods" / f"{method}.yaml"
        assert load_config(None, presets=[preset]).distill.method == method
        assert f"\n| `{method}`" in (ROOT / "docs" / "distilling.md").read_text()


def test_every_layout_has_a_row_and_a_tiny_data_set():
    layouts = set(get_args(Dataset.model_fields["kind"].annotation)) - {"videos", "synthetic"}
    assert layouts == set(WRITERS)
    rows = (ROOT / "docs" / "data-sets.md").read_text()
    assert all(f"`{layout}`" in rows or f"`dataset.kind={layout}`" in rows for layout in layouts)

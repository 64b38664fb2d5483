"""The table "Deployed": forms that are really run, each in its own process, and which models it shows."""

from tiny_models import tiny_model

from benchmarks.deployed import paper_models
from pipeline.models import save_slot_model
from pipeline.report.costs import architecture
from pipeline.report.deployed import OWN
from pipeline.report.exports import find_deployed


def test_models_are_the_teacher_and_a_student_of_each_size(record, tmp_path):
    for name, hidden in (("teacher", (32,)), ("small", (4,)), ("large", (8,))):
        save_slot_model(tiny_model(image_size=16, hidden=hidden), tmp_path / name)
    at = {name: str(tmp_path / name) for name in ("teacher", "small", "large", "gone")}
    records = [
        record("slotmatch", model_uri=at["small"], steps=100),
        record("slotmatch", model_uri=at["large"], steps=100, score=0.1),
        record("slotmatch", model_uri=at["large"], steps=200, score=0.2),
        record("no_kd", model_uri=at["large"], steps=300, score=0.3),
        record("teacher", model_uri=at["teacher"]),
        record("slotmatch", model_uri=at["gone"]),
        record("baseline"),
    ]
    found = find_deployed(records, beta=0.2)
    assert [model.uris for model in found.models] == [
        {OWN: at[name]} for name in ("teacher", "large", "small")
    ]
    assert found.models[1].scores[OWN]["image_mbo"] == 0.2
    assert found.run_ids == {records[i].run_id for i in (0, 2, 4)}
    assert found.form_ids == frozenset()
    assert "the rules of slotcontrast" in found.notes[0]
    assert find_deployed([], beta=0.2).models == ()


def test_the_benchmark_is_of_the_papers_sizes():
    names = {title: list(map(architecture, pair)) for title, pair in paper_models().items()}
    assert names == {
        "MOVi-E": ["ViT-B/14, 336², N = 15", "ViT-S/14, 336², N = 15"],
        "YTVIS-2021": ["ViT-B/14, 518², N = 7", "ViT-S/14, 518², N = 7"],
    }

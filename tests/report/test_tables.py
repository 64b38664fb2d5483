"""What stands in the cells: means, dashes, marks, and what must not be averaged."""

from dataclasses import replace

import pytest

from pipeline.config import resolve_config
from pipeline.report.tables import left_out, score_tables


def find(tables, name="Table 1", part="YTVIS-2021"):
    return next(t for t in tables if t.name == name and t.part == part)


def texts(table, label):
    """The cells after the label of the (first) row with that label."""
    return next([c.text for c in row.cells[1:]] for row in table.rows if row.cells[0].text == label)


def tables_of(*records, beta=0.2):
    """The latest record first."""
    return score_tables(resolve_config({}, [f"distill.beta={beta}"]), records)


def test_without_records_every_table_is_there_with_the_papers_numbers():
    tables = tables_of()
    names = [f"{t.name} {t.part}".strip() for t in tables]
    assert names == [
        *("Table 1 MOVi-E", "Table 1 YTVIS-2021", "Table 1 DAVIS 2017", "Table 3", "Table 4 YTVIS-2021"),
        *("Table 5 MOVi-E", "Table 6", "Table 7", "Table 10 YTVIS-2021"),
    ]
    assert texts(tables[0], "SlotMatch (ours)") == ["–", "84.1", "–", "33.6", "–", "81.8", "–", "30.5"]
    for table in tables:
        ours = [i for i, c in enumerate(table.columns) if c.title == "ours"]
        assert {row.cells[i].text for row in table.rows for i in ours} == {"–"}
        assert all(len(row.cells) == len(table.columns) for row in table.rows)


def test_one_run_is_a_number_and_three_seeds_are_a_mean_with_the_sample_std(record):
    scores = {42: 0.372, 101: 0.374, 2048: 0.379}
    records = [record("slotmatch", seed=s, score=v) for s, v in scores.items()] + [record("no_kd", score=0.4)]
    table = find(tables_of(*records))
    assert texts(table, "SlotMatch (ours)")[:2] == ["37.5 ± 0.36 (n=3)", "45.8"]
    assert texts(table, "Student (no KD)")[:2] == ["40.0", "44.5"]
    assert any("sample standard deviation" in note for note in table.notes)
    assert any("slotcontrast (the rules of slotcontrast); 60 videos; clips c0ffee" in n for n in table.notes)


def test_scores_that_say_nothing_are_said_to_below(record):
    evaluated = record("slotmatch")
    rules = evaluated.protocol.model_copy(update={"warnings": ("FG-ARI says nothing here.",)})
    table = find(tables_of(replace(evaluated, protocol=rules)))
    assert any(note.endswith("clips c0ffee. FG-ARI says nothing here.") for note in table.notes)


def test_another_protocol_is_marked_and_never_averaged(record):
    shown = [record("no_kd", score=0.3), record("teacher"), record("slotmatch", seed=2, score=0.6)]
    others = [record(m, score=s, protocol="paper") for m, s in (("slotmatch", 0.9), ("feature_kd", 0.6))]
    records = [others[0], *shown, others[1]]
    table = find(tables_of(*records))
    assert texts(table, "SlotMatch (ours)")[0] == "60.0"  # under the protocol of most rows
    assert texts(table, "Feature KD")[0] == "60.0 ¹"
    assert any(note.startswith("¹") and "protocol paper" in note for note in table.notes)
    assert any("not shown: 1 evaluation (SlotMatch (ours))" in note for note in table.notes)
    best = [row.cells[0].text for row in table.rows if row.cells[1].best]
    assert best == ["SlotMatch (ours)"]  # what is marked does not compete


def test_equal_rules_on_other_clips_are_another_protocol(record):
    runs = (("slotmatch", 1, 0.4, "one"), ("slotmatch", 2, 0.6, "other"), ("no_kd", 1, 0.5, "one"))
    records = [record(method, seed=s, score=score, clips=clips) for method, s, score, clips in runs]
    table = find(tables_of(*records))
    assert texts(table, "SlotMatch (ours)")[0] == "40.0"
    table = find(tables_of(*records[1:]))
    assert texts(table, "Student (no KD)")[0] == "50.0 ¹"


def test_runs_of_other_length_or_the_same_seed_are_counted_and_not_averaged(record):
    runs = ((0.1, 10), (0.6, 1000), (0.2, 1000))
    records = [record("slotmatch", score=score, steps=steps) for score, steps in runs]
    table = find(tables_of(*records))
    assert texts(table, "SlotMatch (ours)")[0] == "60.0"
    assert any("2 other evaluations" in note and "1,000 steps" in note for note in table.notes)


def test_runs_whose_settings_differ_in_more_than_the_seed_are_not_averaged(record):
    runs = ((1, 0.5, "one rate"), (2, 0.6, "one rate"), (3, 0.9, "another rate"))
    records = [record("slotmatch", seed=seed, score=score, settings=s) for seed, score, s in runs]
    table = find(tables_of(*records))
    assert texts(table, "SlotMatch (ours)")[0] == "55.0 ± 7.07 (n=2)"


def test_a_score_that_is_not_a_number_is_a_dash(record):
    table = find(tables_of(record("no_kd", scores={"video_mbo": float("nan")})))
    assert texts(table, "Student (no KD)")[-2:] == ["–", "32.1"]


def test_baselines_are_rows_at_the_bottom_named_as_recorded(record):
    records = [record("no_kd", score=0.5), record("baseline", name="2x3 grid", score=0.7)]
    table = find(tables_of(*records))
    last = table.rows[-1]
    assert (last.cells[0].text, last.kind, last.cells[1].text) == ("2x3 grid", "baseline", "70.0")
    assert last.cells[1].best  # a model that loses to it should be seen to


def test_table_4_has_a_row_a_weight_and_table_1_the_configs(record):
    records = [record("slotmatch", beta=b, score=s) for b, s in ((0.1, 0.1), (0.2, 0.2), (0.7, 0.7))]
    tables = tables_of(*records, beta=0.1)
    assert texts(find(tables), "SlotMatch (ours)")[0] == "10.0"
    rows = [[c.text for c in row.cells[1:4]] for row in find(tables, "Table 4").rows[2:]]
    assert rows[0] == ["0.1", "10.0", "44.5"]
    assert [row[0] for row in rows] == ["0.1", "0.2", "0.3", "0.5", "0.7", "0.8"]
    assert rows[4] == ["0.7", "70.0", "–"]


def test_another_data_set_gets_the_parts_that_its_runs_can_fill(record):
    here = {"dataset": "demo videos"}
    tables = tables_of(record("slotmatch", **here), record("slotmatch", beta=0.5, seed=7, **here))
    parts = [t.name for t in tables if t.part == "demo videos"]
    assert parts == ["Table 1", "Table 4", "Table 10"]
    table = find(tables, part="demo videos")
    assert [c.title for c in table.columns] == ["method", "ours", "ours", "ours", "ours"]
    assert texts(table, "SlotMatch (ours)") == ["50.0"] * 4


def test_rivals_stand_beside_the_papers_numbers_and_with_the_other_models_of_their_data_set(record):
    def rival(system, score, **values):
        title = {"solv": "SOLV", "diod": "DIOD (uses motion)", "steve": ""}[system]
        values = {"method": "teacher", "teacher": title, "system": system, "score": score, **values}
        return record(values.pop("method"), **values)

    demo = {"dataset": "demo videos"}
    records = [
        *(rival("solv", score, seed=seed, **demo) for seed, score in enumerate((0.3, 0.4, 0.5))),
        rival("diod", 0.8, **demo),
        record("teacher", score=0.6, **demo),
        record("slotmatch", score=0.1, teacher="SOLV", **demo),
        rival("diod", 0.7, dataset="MOVi-E"),
        rival("steve", 0.2, method="other", trained_on="", dataset="MOVi-E"),  # a public file
    ]
    tables = tables_of(*records)
    here = find(tables, part="demo videos")
    labels = [row.cells[0].text for row in here.rows]
    assert labels[:4] == ["SOLV", "SlotContrast (teacher)", "DIOD (uses motion)", "Student (no KD)"]
    assert texts(here, "SOLV")[0] == "40.0 ± 10.00 (n=3)"
    assert texts(here, "DIOD (uses motion)")[0] == "80.0"
    assert texts(here, "SlotContrast (teacher)")[0] == "60.0"
    assert texts(here, "SlotMatch (ours)")[0] == "–", "its teacher is another"
    taught = find(tables, part="demo videos, teacher SOLV")
    assert texts(taught, "SlotMatch (ours)")[0] == "10.0"
    assert texts(taught, "SOLV (teacher)")[0] == "40.0 ± 10.00 (n=3)"
    movi = find(tables, part="MOVi-E")
    assert texts(movi, "DIOD (uses motion)")[:4] == ["70.0", "82.2", "70.0", "–"]
    assert texts(movi, "STEVE")[:2] == ["20.0", "54.1"]
    assert texts(movi, "SOLV")[:2] == ["–", "80.8"]
    assert texts(movi, "SlotContrast (teacher)")[0] == "–"
    parts = [t.part for t in tables if t.name == "Table 1"]
    assert len(parts) == len(set(parts)) == 5, "the paper's three, and of the demo's videos by teacher"
    assert left_out(records, tables) == []


@pytest.mark.parametrize("dataset", ["MOVi-E", "demo videos"])
def test_a_savi_that_is_told_boxes_has_a_row_of_its_own(record, dataset):
    """The paper's number is not beside it."""
    records = [
        record("teacher", teacher=title, system=system, score=score, dataset=dataset)
        for title, system, score in (("SAVi", "savi", 0.2), ("SAVi (conditional, boxes)", "savi_boxes", 0.9))
    ]
    tables = tables_of(*records)
    table = find(tables, part=dataset)
    told = texts(table, "SAVi (conditional, boxes)")
    if dataset == "MOVi-E":
        assert texts(table, "SAVi")[:2] == ["20.0", "39.2"]
        assert told[:2] == ["90.0", "–"]
    else:
        assert (texts(table, "SAVi")[0], told[0]) == ("20.0", "90.0")
    assert left_out(records, tables) == []


def test_zero_shot_and_other_teachers_have_their_own_tables(record):
    records = [
        record("slotmatch", dataset="OVIS", trained_on="YTVIS-2021", score=0.11),
        record("slotmatch", dataset="DAVIS 2017", teacher="VideoSAUR", score=0.22),
        record("teacher", dataset="COCO", teacher="DINOSAURv2", score=0.33),
        record("slotmatch_hungarian", dataset="MOVi-E", score=0.44),
    ]
    tables = tables_of(*records)
    assert texts(find(tables, "Table 3", ""), "SlotMatch")[0] == "11.0"
    second = [row.cells[1].text for row in find(tables, "Table 6", "").rows]
    assert second == ["–", "–", "22.0", "–", "–", "–"]
    assert texts(find(tables, "Table 7", ""), "DINOSAURv2 (teacher)") == ["33.0", "44.7", "33.0", "29.3"]
    assert texts(find(tables, "Table 5", "MOVi-E"), "SlotMatch (w/ matching)")[0] == "44.0"
    assert texts(find(tables, part="DAVIS 2017"), "SlotMatch (ours)")[0] == "–"
    assert left_out(records, tables) == []


def test_table_10_has_a_row_a_seed(record):
    records = [record("slotmatch", seed=s, score=v) for s, v in ((42, 0.3), (7, 0.4))]
    table = find(tables_of(*records), "Table 10")
    assert [[c.text for c in row.cells[:4]] for row in table.rows] == [
        ["Run 1", "42", "30.0", "37.2"],
        ["Run 2", "101", "–", "37.4"],
        ["Run 3", "2048", "–", "37.3"],
        ["Run 4", "7", "40.0", "–"],
        ["Mean", "–", "35.0", "37.3"],
        ["Std.", "–", "±7.07", "±0.06"],
    ]


@pytest.mark.parametrize("method", ["slotmatch", "something else"])
def test_what_fits_no_table_is_listed(record, method):
    odd = record(method, dataset="COCO", teacher="DINOSAURv2", beta=0.9, name="odd one")
    lines = left_out([odd], tables_of(odd))
    assert len(lines) == 1
    assert "COCO" in lines[0]
    assert "odd one" in lines[0]

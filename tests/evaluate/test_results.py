"""What `evaluate` gives back: to the terminal and as JSON."""

from pipeline.artifacts.manifests import Rules
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.scoring import SCORES, score_table
from pipeline.evaluate.table import Cell, Column, Row, Table, plain_text

NAN = float("nan")


def scores(*values, slots):
    return dict(zip(SCORES, values, strict=True)) | {"slots_in_use": slots}


def test_what_evaluate_prints():
    rows = [
        ("grid", scores(0.0, 0.1234, -0.0001, 1.0, slots=1.0)),
        ("colour k-means", scores(NAN, 0.9999, 0.05, 0.3, slots=4.25)),
    ]
    assert plain_text(score_table(rows)).splitlines() == [
        "                image FG-ARI     image mBO  video FG-ARI     video mBO  slots in use",
        "grid                     0.0          12.3           0.0         100.0           1.0",
        "colour k-means           nan         100.0           5.0          30.0           4.2",
    ]


def test_what_says_nothing_is_said_below():
    rows = [("grid", scores(0.1, 0.1, 0.1, 0.1, slots=4.0))]
    *_, last = plain_text(score_table(rows, ("FG-ARI says nothing here.",))).splitlines()
    assert last == "FG-ARI says nothing here."


def test_a_heading_above_and_notes_below():
    columns = (Column("method", numeric=False), Column("ours", "image mBO"))
    table = Table("Table 1", "Scores", "clay", columns, (Row((Cell("a"), Cell("1.0"))),), ("A note.",))
    assert plain_text(table).splitlines() == [
        "Table 1. Scores (clay)",
        "method  image mBO",
        "a             1.0",
        "A note.",
    ]


def test_the_summary_of_an_evaluation_is_plain_data():
    rules = Rules(name="paper", in_words="clips of 4 frames", fingerprint="f00", clip_frames=4, videos=60)
    found = scores(0.1, 0.2, 0.3, 0.4, slots=5.0)
    summary = Evaluation("evaluations/e", found, rules, videos=59).summary()
    assert list(summary) == ["uri", "scores", "protocol", "videos", "warnings"]
    assert (summary["uri"], summary["scores"], summary["videos"]) == ("evaluations/e", found, 59)
    assert list(summary["protocol"])[:2] == ["name", "in_words"]
    assert {"fingerprint": "f00", "clip_frames": 4, "videos": 60}.items() <= summary["protocol"].items()

"""The report from runs in a real MLflow database, and its command line."""

import json
from pathlib import Path

import pytest
from places import ROOT

from jobs._main import run as run_job
from jobs.report import JOB
from pipeline import tracking
from pipeline.artifacts.manifests import Rules
from pipeline.config import load_config
from pipeline.evaluate.records import Evaluation, find_records, record_evaluations
from pipeline.evaluate.scoring import SCORES
from pipeline.report import stage
from pipeline.report.render import Picture


def log_evaluation(config, name, score, **tags):
    """An MLflow run as `evaluate` writes it."""
    rules = Rules(name="slotcontrast", fingerprint="f00", in_words="whole videos")
    scores = dict.fromkeys((*SCORES, "slots_in_use"), score)
    evaluation = Evaluation(f"evaluations/{name}", scores, rules, videos=60)
    record_evaluations(config, "root/clips/c0ffee", {name: tags}, {name: evaluation})


@pytest.fixture
def pictures(monkeypatch):
    """Stands in for the pictures, which have tests of their own; collects what they are given."""
    given = []

    def draw_pictures(config, records, latencies):
        given.append((len(records), latencies))
        return [Picture(b"a picture", "figure1.png", "Figure 1", "speed")]

    monkeypatch.setattr(stage, "draw_pictures", draw_pictures)
    return given


def test_a_report_from_recorded_runs(tmp_path, pictures, counted_once, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/demo.yaml", [f"storage.root={tmp_path}", "teacher.checkpoint=demo/teacher"])
    trained = {"trained_on": "demo videos", "teacher": "SlotContrast", "steps": "2000"}
    log_evaluation(config, "2x3 grid", 0.123, method="baseline")
    for seed, score in ((1, 0.5), (2, 0.6)):
        tags = {"method": "slotmatch", "beta": "0.2", "seed": str(seed), **trained}
        log_evaluation(config, f"SlotMatch {seed}", score, **tags)
    found = {record.name: record for record in find_records(config)}
    assert (found["SlotMatch 2"].seed, found["SlotMatch 2"].protocol.in_words) == (2, "whole videos")
    summary = stage.report(config, latency_runs=0)

    assert summary["uri"] == str(tmp_path / "report" / "report.html")
    assert (summary["records"], summary["pictures"]) == (3, 1)
    assert pictures == [(3, {})]  # nothing was measured
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| SlotMatch (ours) | **55.0 ± 7.07 (n=2)** |" in text
    assert "| 2x3 grid | 12.3 |" in text
    assert "](figure1.png)" in text
    assert (tmp_path / "report" / "figure1.png").read_bytes() == b"a picture"
    assert text.count("\n## Table") == 8
    assert "data:image/png;base64" in (tmp_path / "report" / "report.html").read_text()

    client = tracking.connect(config)
    runs = client.search_runs([tracking.experiment_id(config)], "tags.role = 'report'")
    assert [run.info.run_name for run in runs] == ["report"]
    logged = {file.path for file in client.list_artifacts(runs[0].info.run_id)}
    assert logged == {"report.md", "report.html", "figure1.png"}


@pytest.fixture
def job(monkeypatch, capsys):
    """The command line, in this process: another would import torch and MLflow again."""

    def run(*arguments):
        monkeypatch.chdir(ROOT)
        code = run_job(JOB, arguments)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_job_on_an_empty_root_says_what_makes_records(tmp_path, counted_once, job):
    code, summary = job(f"storage.root={tmp_path / 'empty'}", "--latency-runs", "0")
    assert (code, summary["status"], summary["records"]) == (0, "ok", 0)
    text = Path(summary["markdown"]).read_text()
    assert "`python -m jobs.evaluate CONFIG`" in text
    assert "| SlotMatch (ours) | – | 84.1 |" in text
    assert Path(summary["uri"]).read_text().endswith("</html>\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/demo.yaml", "more"], "'more'"),
        (["--latency-runs", "-1"], "--latency-runs"),
        (["distill.bta=1"], "distill.beta"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, job):
    code, summary = job(*arguments)
    assert code == 2
    assert message in summary["error"]

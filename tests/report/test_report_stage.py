"""The report from runs in a real MLflow database, and its command line."""

import json
import os
from pathlib import Path

import pytest
from places import ROOT
from tiny_models import tiny_model

from jobs._main import run as run_job
from jobs.report import JOB
from pipeline import tracking
from pipeline.artifacts.manifests import Rules
from pipeline.config import Config, load_config
from pipeline.evaluate.records import Evaluation, find_records, record_evaluations
from pipeline.evaluate.scoring import SCORES
from pipeline.models import save_slot_model
from pipeline.registry.export import export
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
    exported = tmp_path / "exported"
    for seed, score in ((1, 0.5), (2, 0.6)):
        folder, model = tmp_path / f"student {seed}", tiny_model(seed=seed).eval()
        save_slot_model(model, folder)
        if seed == 1:
            export(Config(), model, "student", str(exported))
        tags = {"method": "slotmatch", "beta": "0.2", "seed": str(seed), "model_uri": str(folder), **trained}
        log_evaluation(config, f"SlotMatch {seed}", score, **tags)
    for file, score in (("model.onnx", 0.499), ("model_int8.onnx", 0.321)):
        log_evaluation(config, file, score, method="other", model_uri=str(exported / file))
    found = {record.name: record for record in find_records(config)}
    assert (found["SlotMatch 2"].seed, found["SlotMatch 2"].protocol.in_words) == (2, "whole videos")
    summary = stage.report(config, latency_runs=0)

    assert summary["uri"] == str(tmp_path / "report" / "report.html")
    assert (summary["records"], summary["pictures"]) == (5, 1)
    assert pictures == [(3, {})]  # nothing was measured, and exported forms are no models beside theirs
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| SlotMatch (ours) | **55.0 ± 7.07 (n=2)** |" in text
    assert "| 2x3 grid | 12.3 |" in text
    assert "](figure1.png)" in text
    assert (tmp_path / "report" / "figure1.png").read_bytes() == b"a picture"
    assert text.count("\n## Table") == 8
    assert "Evaluations that are in no table" not in text
    lines = [line for line in text.split("\n## Deployed.")[1].splitlines() if line.startswith("|")]
    rows = {row[2]: row for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}
    # Of the student that was exported, not of the latest. Of fp16 there is a file, but no scores.
    files = {"ONNX fp32": "model.onnx", "ONNX fp16": "model_fp16.onnx", "ONNX int8": "model_int8.onnx"}
    paths = {form: exported / file for form, file in files.items()}
    paths |= {"PyTorch, safetensors": tmp_path / "student 1" / "model.safetensors"}
    paths |= {"PyTorch, .pt2": exported / "model.pt2"}
    assert {form: float(row[3]) for form, row in rows.items()} == {
        form: pytest.approx(os.path.getsize(path) / 1e6, rel=0.01) for form, path in paths.items()
    }
    assert {form: set(row[7:]) for form, row in rows.items()} == {
        "PyTorch, safetensors": {"50.0"},
        "PyTorch, .pt2": {"–"},
        "ONNX fp32": {"49.9"},
        "ONNX fp16": {"–"},
        "ONNX int8": {"32.1"},
    }
    assert {cell for row in rows.values() for cell in row[4:7]} == {"–"}  # nothing was measured
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

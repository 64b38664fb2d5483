"""`python -m benchmarks` at tiny sizes: that it runs and says what it should, not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scores, step
from benchmarks.__main__ import main

ROOT = Path(__file__).parent.parent


def test_quick_run_prints_every_row(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--json", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    comparisons = json.loads(results.read_text())["comparisons"]
    assert [len(comparison["rows"]) for comparison in comparisons] == [4, 3, 2, 3]
    for comparison in comparisons:
        assert comparison["rows"][0]["speed_up"] == 1
        for row in comparison["rows"]:
            assert f"| {row['name']} " in run.stdout
    assert "loss and gradient norm agree" in run.stdout
    assert "scores agree to" in run.stdout
    assert "2× the frames" in run.stdout
    assert "starting Ray" in run.stdout


def test_different_scores_are_an_error(monkeypatch):
    monkeypatch.setitem(scores.WAYS, "wrong", lambda true_masks, slots: [0.0] * 4)
    with pytest.raises(scores.ScoreMismatch):
        scores.score_comparison(1, frames=2, side=16)


def test_different_losses_are_an_error(monkeypatch, capsys):
    for precision in list(step.TOLERANCE):
        monkeypatch.setitem(step.TOLERANCE, precision, -1.0)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick"])
    assert main() == 1
    assert "results differ" in capsys.readouterr().err

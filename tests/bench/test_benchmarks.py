"""`python -m benchmarks` at tiny sizes: that it runs and says what it should, not how fast anything is."""

import json
import math
import sys

import pytest
from places import python

from benchmarks import scale, scores, step
from benchmarks.__main__ import main
from pipeline.distill.precision import has_bf16


@pytest.mark.slow
@pytest.mark.timeout(900)  # starts Ray three times
def test_quick_run_prints_every_row(tmp_path):
    results = tmp_path / "results.json"
    printed, _ = python("-m", "benchmarks", "--quick", "--repeats", "1", "--json", results, timeout=900)

    comparisons = json.loads(results.read_text())["comparisons"]
    steps = 10 if has_bf16() else 5  # four ways and their products, in each precision
    assert [len(comparison["rows"]) for comparison in comparisons] == [steps, 3, 2, 3, 3, 2, 2, 2]
    for comparison in comparisons:
        assert comparison["rows"][0]["speed_up"] == 1
        for row in comparison["rows"]:
            assert f"| {row['name']} " in printed
    assert "loss and gradient norm agree" in printed
    assert "times the time of its products" in printed
    assert "scores agree to" in printed
    assert "2× the frames" in printed
    assert "starting Ray" in printed
    assert printed.count("of one from a batch in memory") == 2
    (point,) = json.loads(results.read_text())["scale"]
    assert point["videos"] == 20
    assert point["shard"]["seconds"] > 0
    assert "| `cache`, bytes a clip |" in printed
    assert "an index of 1,000 videos" in printed


def test_ratios_are_to_the_first_number_of_videos():
    worker, nan = (4.0, 5.0, 5.5), math.nan
    small, large, larger = (
        scale.Point(videos, scale.StageCost(*shard), scale.StageCost(*cache), worker)
        for videos, shard, cache in (
            (10, (2.0, nan, 100.0, 200), (3.0, 0.5, 200.0, 400)),
            (100, (4.7, 0.01, 110.0, 1800), (9.3, 1.0, 200.0, 4000)),
            (1000, (31.7, 0.02, 110.0, 18000), (72.3, 1.0, 200.0, 40000)),
        )
    )
    lines = scale.scale_table([small, large, larger])
    assert lines[0] == "|  | 10 videos, 20 clips | 100 videos, 200 clips | 1,000 videos, 2,000 clips |"
    assert "| `shard`, whole call, s | 2.0 | 4.7 | 31.7 |" in lines
    assert "| `shard`, ms a clip, first file to last | – | 10.00 | 20.00 (2.00×) |" in lines
    assert "| `shard`, ms a further clip, whole calls | – | 15.00 | 15.00 (1.00×) |" in lines
    assert "| `shard`, bytes a clip | 10 | 9 (0.90×) | 9 (0.90×) |" in lines
    assert "| training worker, MiB for the data of 1,000 steps | 5.0 | 5.0 | 5.0 |" in lines
    assert "| `shard`, driver's peak, MiB | 100 | 110 (1.10×) | 110 (1.10×) |" in lines


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

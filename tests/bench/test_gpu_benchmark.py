"""`python -m benchmarks.gpu` at tiny sizes and without a GPU: that its parts run, and what it says."""

import json

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_what_can_be_done(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit):
        gpu.main(["4", "--json", str(tmp_path / "gpu.json")])
    assert "sees no CUDA device here; on a machine without one --tiny checks" in capsys.readouterr().err


def test_a_part_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["11", "--tiny"])
    assert "there is no part 11; parts: 1 versions and flags; 2 " in capsys.readouterr().err


def test_parts_are_run_one_by_one_and_shown_together(tmp_path, capsys, monkeypatch):
    def broken(scale, scratch):
        raise ValueError("no such kernel\nat all")

    file = tmp_path / "gpu.json"
    monkeypatch.setitem(gpu.PARTS, 5, ("ways to distil", broken))
    assert gpu.main(["10", "--tiny", "--json", str(file)]) == 0
    assert gpu.main(["5", "--tiny", "--json", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "| failed: ValueError: no such kernel | | | no |" in shown
    assert "| backend | gloo |" in shown.partition("failed")[2], "the part that was run before"
    results = json.loads(file.read_text())
    assert list(results) == ["10", "5"]
    assert results["10"]["tiny"]
    assert all(finding["holds"] is not False for finding in results["10"]["findings"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_run(tmp_path):
    file = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert list(results) == [str(number) for number in gpu.PARTS]
    assert all(result["findings"] for result in results.values())
    for exact in ("2", "8"):
        assert all(finding["holds"] for finding in results[exact]["findings"])

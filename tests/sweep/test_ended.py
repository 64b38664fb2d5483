"""Which trials of a sweep are not run again: those that ended for good, and whose student is there."""

import pytest
from students import make_finished_run

from pipeline import storage
from pipeline.config import resolve_config
from pipeline.sweep.ended import Ended, find_ended, write_ended
from pipeline.sweep.settings import Setting, Trial


@pytest.fixture
def trial(tmp_path):
    config = resolve_config({"storage": {"root": str(tmp_path)}})
    run = make_finished_run(config, str(tmp_path / "students" / "abc"))
    storage.write_json(f"{run}/history.json", [{"step": 1, "total": 0.5}])
    return Trial(Setting("beta = 0.1", {"distill.beta": 0.1}), 0, config, run)


@pytest.fixture
def sweep(tmp_path):
    return str(tmp_path / "sweeps" / "xyz")


def test_a_student_of_whatever_job_has_ended(trial, sweep):
    assert find_ended(sweep, [trial])[trial.key].status == "finished"
    assert storage.exists(f"{sweep}/trials/{trial.key}.json")


@pytest.mark.parametrize("gone", ["model/model.safetensors", "history.json", "manifest.json", "."])
def test_a_student_of_which_files_are_gone_is_trained_again(gone, trial, sweep):
    find_ended(sweep, [trial])
    storage.delete(f"{trial.run_uri}/{gone}")
    assert find_ended(sweep, [trial]) == {}


def test_of_failures_the_final_ones_are_not_tried_again(trial, sweep):
    storage.delete(trial.run_uri)
    for final in (True, False):
        write_ended(sweep, trial, Ended("failed", trial.title, trial.run_uri, error="x", final=final))
        assert set(find_ended(sweep, [trial])) == ({trial.key} if final else set())

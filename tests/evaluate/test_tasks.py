"""How an evaluation is cut into tasks."""

import numpy as np
import pytest
from clip_sets import random_clips
from tiny_models import tiny_model

from pipeline.clips.library import artifacts_of
from pipeline.config import resolve_config
from pipeline.evaluate import stage
from pipeline.evaluate.stage import ScoreTask, score_baseline, score_subjects
from pipeline.evaluate.subjects import Subject, baseline_subjects
from pipeline.models import save_slot_model


def test_trivial_baselines_run_without_what_a_model_needs(tmp_path, monkeypatch):
    """A class runs in actors that hold a GPU, or `ray.teacher_cpus`, each; a function on one CPU (see `map_tasks`)."""
    asked = []

    def in_this_process(config, task, rows, *, arguments):
        for row in rows:
            asked.append((task, row["subject"], row["shard"]))
            yield task(*arguments)(row) if isinstance(task, type) else task(row, *arguments)

    monkeypatch.setattr(stage, "map_tasks", in_this_process)
    monkeypatch.setattr(stage, "record_evaluations", lambda *_: None)
    config = resolve_config({"storage": {"root": str(tmp_path / "root")}})
    clips = random_clips(tmp_path / "clips", {"a": 5, "b": 5, "c": 5})
    save_slot_model(tiny_model(4, 16), tmp_path / "model")
    subjects = {**baseline_subjects(4), "mine": Subject(str(tmp_path / "model"))}
    results = score_subjects(artifacts_of(config, clips.uri), clips, subjects)

    tasks = {index: {task for task, i, _ in asked if i == index} for index in range(4)}
    assert tasks == {**{index: {score_baseline} for index in range(3)}, 3: {ScoreTask}}
    assert len(asked) == len(set(asked)) == 4 * len(clips.shards)
    assert all(result.videos == 3 for result in results.values())
    one_slot, grid = (results[name].scores for name in ("one slot", "grid"))
    assert (one_slot["slots_in_use"], grid["slots_in_use"]) == (1, 4)
    assert one_slot["video_fg_ari"] == pytest.approx(0)
    assert np.isfinite(results["mine"].scores["video_mbo"])

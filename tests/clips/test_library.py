"""Which videos a job works on: those that were there when it began, looked up once."""

import numpy as np
import pytest
from clip_sets import make_clip_set, random_video

from pipeline import storage
from pipeline.clips import library, stage
from pipeline.clips.library import ClipLibrary, artifacts_of
from pipeline.clips.table import ClipSet
from pipeline.config import resolve_config


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """A config of folders of videos to which one comes whenever they have been listed; nothing is decoded on Ray."""
    folder = tmp_path / "videos"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        (folder / split / "0.mp4").write_bytes(b"no video")
    listed = []

    def list_then_grow(config, split):
        found = real(config, split)
        listed.append(split)
        (folder / split / f"{len(listed)}.mp4").write_bytes(b"no video either")
        return found

    def in_this_process(config, task, rows, *, arguments=()):
        return [task(row, *arguments) for row in rows]

    real = library._list
    monkeypatch.setattr(library, "_list", list_then_grow)
    monkeypatch.setattr(stage, "map_tasks", in_this_process)
    monkeypatch.setattr(stage._Sharding, "_check_bad", lambda work, bad: None)
    config = resolve_config(
        {
            "dataset": {"path": str(folder), "split": "train"},
            "evaluate": {"split": "val"},
            "storage": {"root": str(tmp_path / "runs")},
        }
    )
    return config, listed


def test_a_video_that_comes_while_a_job_runs_is_the_next_ones(growing):
    config, listed = growing
    summary = stage.shard(config)
    assert listed == ["train", "val"]
    for made in (summary, summary["evaluation"]):
        clips = ClipSet(made["uri"])
        assert len(clips.manifest.bad) == 1
        assert storage.name(clips.uri) == clips.fingerprint
    assert artifacts_of(config).clips.uri != summary["uri"], "the next job's clips are of two videos"


def test_the_stages_of_one_job_are_of_the_same_videos(growing):
    config, listed = growing
    known = ClipLibrary()
    summary = stage.shard(config, known)
    artifacts = artifacts_of(config, library=known)
    assert artifacts.clips.uri == summary["uri"]
    assert artifacts.evaluation_clips.uri == summary["evaluation"]["uri"]
    assert listed == ["train", "val"]


def test_the_index_of_a_clip_set_is_read_once_for_all_that_is_scored_on_it(tmp_path, monkeypatch):
    frames, masks = random_video(np.random.default_rng(0))
    clips = make_clip_set(tmp_path / "clips", {"a": (frames, masks), "b": (frames, None)})
    read = []
    real = ClipSet.videos.fget
    monkeypatch.setattr(ClipSet, "videos", property(lambda clips: read.append(clips.uri) or real(clips)))
    artifacts = artifacts_of(resolve_config({"storage": {"root": str(tmp_path)}}))
    first = artifacts.rules_on(clips.uri)
    assert artifacts.rules_on(clips.uri) == first
    assert first.videos == 1
    assert read == [clips.uri]

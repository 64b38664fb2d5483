"""Which clips a step uses: the same on every worker and after every restart."""

import numpy as np
import pytest
import torch
from layout_sets import clip_set, write_folders
from tiny_models import tiny_model
from training_runs import make_config, make_targets

from pipeline import storage
from pipeline.clips.sources.videos import list_videos
from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.clips.views import apply_view
from pipeline.config import Targets
from pipeline.distill.data import Loader, RawBatch, Sampler
from pipeline.models import save_slot_model
from pipeline.targets.table import TargetSet


def entry(index, clips=5, full_clips=4):
    return VideoEntry(f"v{index}", "shard-00000.parquet", 5 * index, clips, full_clips, 18, 12, 16, False)


def take(sampler, samples):
    """The first samples, over as many batches as they need."""
    taken = []
    for step in range(-(-samples // sampler.batch_size)):
        taken += sampler.batch(step)
    return taken[:samples]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_every_epoch_visits_each_video_once(batch_size):
    sampler = Sampler([entry(i) for i in range(7)], seed=0, batch_size=batch_size, views=1)
    assert {len(sampler.batch(step)) for step in range(20)} == {batch_size}
    visited = [s.video.video_id for s in take(sampler, 35)]
    epochs = [visited[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == [f"v{i}" for i in range(7)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1, "every epoch has the same order"


def test_clips_and_views_vary_over_the_epochs_and_are_all_used():
    sampler = Sampler([entry(0)], seed=0, batch_size=1, views=3)
    seen = [(s.clip_index, s.view) for s in take(sampler, 400)]
    assert set(seen) == {(clip, view) for clip in range(4) for view in range(3)}, "a tail, or not all of them"
    counts = np.unique([clip for clip, _ in seen], return_counts=True)[1]
    assert counts.min() > 60
    assert take(sampler, 1)[0].row == take(sampler, 1)[0].clip_index


def test_fresh_views_are_new_in_every_epoch():
    sampler = Sampler([entry(i) for i in range(3)], seed=0, batch_size=3, views=None)
    for epoch in range(20):
        assert [s.view for s in sampler.batch(epoch)] == [epoch] * 3


def test_steps_do_not_depend_on_what_was_asked_before():
    """A resumed run asks for step 37 first; another worker asks in another order."""
    videos = [entry(i) for i in range(5)]
    settings = {"seed": 3, "batch_size": 4, "views": 2}
    straight = Sampler(videos, **settings)
    expected = [straight.batch(step) for step in range(60)]
    assert Sampler(videos, **settings).batch(37) == expected[37]
    backwards = Sampler(videos, **settings)
    assert [backwards.batch(step) for step in reversed(range(60))] == expected[::-1]
    other = Sampler(videos, **{**settings, "seed": 4})
    assert [other.batch(step) for step in range(60)] != expected


def test_videos_without_a_full_clip_are_skipped():
    videos = [entry(0), entry(1, clips=1, full_clips=0), entry(2)]
    visited = {s.video.video_id for s in take(Sampler(videos, seed=0, batch_size=2, views=1), 20)}
    assert visited == {"v0", "v2"}
    message = r"no video is long enough for one full clip: lower clips\.clip_frames"
    with pytest.raises(ValueError, match=message):
        Sampler([videos[1]], seed=0, batch_size=2, views=1)
    with pytest.raises(ValueError, match="no video is long enough"):
        Sampler([], seed=0, batch_size=2, views=1)


# --- the loader, on a real clip set ----------------------------------------------------------------------


@pytest.fixture
def clips_uri(tmp_path):
    write_folders(tmp_path / "videos", {"a": 9, "b": 4, "c": 12})
    return clip_set(list_videos(str(tmp_path / "videos"), "masks"), tmp_path)[0].uri


RECIPE = Targets(views=3, crop="random", min_scale=0.5)


def load(uri, batch_size=4, videos=None, **settings):
    sampler = Sampler(videos or ClipSet(uri).videos, seed=0, batch_size=batch_size, views=3)
    with Loader(uri, None, sampler, recipe=RECIPE, dataset_seed=5, pixels=True, **settings) as loader:
        return [batch for batch, _ in loader]


def test_loader_gives_the_pixels_of_the_samples_views(clips_uri):
    clips = ClipSet(clips_uri)
    batches = load(clips_uri, stop=5)
    assert len(batches) == 5
    for batch in batches:
        assert len(batch.pixels) == len(batch.views) == len(batch.samples) == 4
        for sample, view, pixels in zip(batch.samples, batch.views, batch.pixels, strict=True):
            clip = clips.read_clip(sample.video.shard, sample.row)
            assert (clip.video_id, clip.clip_index) == (sample.video.video_id, sample.clip_index)
            assert clip.full
            np.testing.assert_array_equal(pixels, apply_view(clip.frames, view))


def test_workers_share_a_batch_and_each_runs_every_step(clips_uri):
    whole = load(clips_uri, stop=6)
    shares = [load(clips_uri, stop=6, rank=rank, world_size=2) for rank in range(2)]
    for step in range(6):
        parts = [shares[rank][step].samples for rank in range(2)]
        assert [len(part) for part in parts] == [2, 2]
        order = {(s.video.video_id, s.clip_index, s.view) for part in parts for s in part}
        assert order == {(s.video.video_id, s.clip_index, s.view) for s in whole[step].samples}


def test_a_resumed_loader_goes_on_where_it_was(clips_uri):
    whole, resumed = load(clips_uri, stop=8), load(clips_uri, start=5, stop=8)
    assert [batch.samples for batch in resumed] == [batch.samples for batch in whole[5:]]
    for one, other in zip(resumed, whole[5:], strict=True):
        assert one.views == other.views
        for pixels, expected in zip(one.pixels, other.pixels, strict=True):
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_reading_ahead_keeps_the_order(clips_uri, threads):
    sampler = Sampler(ClipSet(clips_uri).videos, seed=0, batch_size=2, views=3)
    batches = load(clips_uri, batch_size=2, stop=20, threads=threads)
    assert [batch.samples for batch in batches] == [sampler.batch(step) for step in range(20)]


def test_a_damaged_shard_stops_the_loader_and_is_named(clips_uri):
    path, videos = storage.join(clips_uri, "data", "shard-00000.parquet"), ClipSet(clips_uri).videos
    storage.write_bytes(path, storage.read_bytes(path)[:500])
    with pytest.raises(ValueError, match=r"shard-00000\.parquet: the shard is damaged"):
        load(clips_uri, stop=3, videos=videos)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cached_features_are_sent_as_they_are_stored_and_widened_there(
    clips_uri, tmp_path, monkeypatch, dtype
):
    save_slot_model(tiny_model(), tmp_path / "teacher")
    config = make_config(tmp_path, "targets.student_features=true", f"targets.feature_dtype={dtype}")
    targets_uri = make_targets(config, clips_uri, str(tmp_path / "teacher"), str(tmp_path / "targets"))
    sent, real = [], RawBatch.to
    monkeypatch.setattr(RawBatch, "to", lambda batch, device: sent.append(batch) or real(batch, device))
    sampler = Sampler(ClipSet(clips_uri).videos, seed=0, batch_size=3, views=2)
    options = {"recipe": config.targets, "dataset_seed": 5, "pixels": False, "teacher_features": True}
    with Loader(clips_uri, targets_uri, sampler, stop=2, threads=1, **options) as loader:
        batches = [batch for batch, _ in loader]
    stored = TargetSet(targets_uri)
    for step, batch in enumerate(batches):
        rows = [
            stored.read(s.video.shard, s.row, s.view, features=True, teacher_features=True)[2]
            for s in batch.samples
        ]
        assert {row.features.dtype.name for row in rows} == {dtype}
        for name in ("features", "teacher_features", "target_slots"):
            expected = np.stack([getattr(row, name.removeprefix("target_")) for row in rows])
            there = getattr(batch, name)
            assert there.dtype == torch.float32
            np.testing.assert_array_equal(there, expected.astype(np.float32))
            assert torch.from_numpy(expected).dtype == getattr(sent[step], name).dtype

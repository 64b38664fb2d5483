"""Training from the cache is training with the teacher: the losses agree step by step."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import stages, storage
from pipeline.clips.table import ClipSet
from pipeline.distill.train import distill, train_teacher
from pipeline.targets import TargetMismatch, TargetSet, cache

VIEWS = ("targets.views=3", "targets.crop=random", "targets.min_scale=0.6")
STEPS = ("distill.steps=20", "distill.log_every=1", "distill.checkpoint_every=20")


@pytest.fixture(scope="module")
def prepared(shared_tiny, local_ray):
    """Clips, a trained teacher and its targets, for views with crops and flips."""
    config = shared_tiny(*VIEWS, *STEPS)
    clips = stages.shard_stage(config)["uri"]
    train_teacher(config, clips)
    return config, clips, cache(config, clips)


def losses(config, clips):
    return storage.read_json(distill(config, clips)["history"])


def test_cached_and_live_teacher_give_the_same_curve(prepared, shared_tiny):
    config, clips, summary = prepared
    targets = TargetSet(summary["uri"])
    views = [
        targets.read(video.shard, video.first_row + c, k)[2].view
        for video in ClipSet(clips).videos
        for c in range(video.full_clips)
        for k in range(3)
    ]
    assert any(v.flip for v in views)
    assert any((v.height, v.width) != (48, 48) for v in views)
    cached = losses(config, clips)
    live = losses(shared_tiny(*VIEWS, *STEPS, "distill.live_teacher=true"), clips)
    assert len(cached) == len(live) == 20
    for a, b in zip(cached, live, strict=True):
        for name in ("total", "reconstruction", "contrast", "kd"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), (a["step"], name)
    assert cached[-1]["total"] < cached[0]["total"]


def test_cached_student_features_give_the_same_curve(prepared, shared_tiny):
    config, clips, _ = prepared
    with_features = shared_tiny(*VIEWS, *STEPS, "targets.student_features=true")
    assert TargetSet(cache(with_features, clips)["uri"]).has_features
    plain, cached = losses(config, clips), losses(with_features, clips)
    for a, b in zip(plain, cached, strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-5), a["step"]


def test_targets_are_row_for_row_and_tails_are_skipped(prepared):
    _, clips, summary = prepared
    clip_set, targets = ClipSet(clips), TargetSet(summary["uri"])
    assert summary["rows"] == 3 * clip_set.manifest["clips"]
    for shard in clip_set.shards:
        table = (
            targets.reader.file(shard).read(columns=["video_id", "clip_index", "view", "full"]).to_pylist()
        )
        expected = [
            {"video_id": c.video_id, "clip_index": c.clip_index, "view": k, "full": c.full}
            for c in clip_set.iter_shard(shard)
            for k in range(3)
        ]
        assert table == expected
    assert any(video.clips > video.full_clips for video in clip_set.videos)  # 9 frames in clips of 4


def test_second_cache_run_reuses_and_changes_get_a_new_folder(prepared, shared_tiny):
    config, clips, first = prepared
    again = cache(config, clips)
    assert again["uri"] == first["uri"]
    assert again["computed_shards"] == 0
    teacher = f"teacher.checkpoint={TargetSet(first['uri']).manifest['teacher_uri']}"
    assert cache(shared_tiny(*VIEWS, *STEPS, teacher), clips)["uri"] == first["uri"]
    other_flips = cache(shared_tiny(*VIEWS, *STEPS, teacher, "targets.flip=0.1"), clips)
    other_rollout = cache(shared_tiny(*VIEWS, *STEPS, teacher, "targets.rollout=cyclic"), clips)
    assert len({first["uri"], other_flips["uri"], other_rollout["uri"]}) == 3


def test_verify_finds_a_changed_value(prepared, shared_tiny):
    _, clips, summary = prepared
    config = shared_tiny(*VIEWS, *STEPS, "targets.verify=1.0")
    assert cache(config, clips)["verified_rows"] > 0
    shard = ClipSet(clips).shards[1]
    path = f"{summary['uri']}/data/{shard}"
    table = pq.read_table(path)
    slots = table.column("slots").combine_chunks()
    values = slots.flatten().to_numpy().copy()
    values[: slots.type.list_size] += 0.5
    changed = type(slots).from_arrays(values.astype(np.float32), slots.type.list_size)
    index = table.schema.get_field_index("slots")
    pq.write_table(table.set_column(index, table.schema.field("slots"), changed), path)
    with pytest.raises(TargetMismatch, match=shard):
        cache(config, clips)

"""Training from the cache is training with the teacher: the losses agree step by step."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import GOLDEN_TEACHER

from pipeline import storage
from pipeline.artifacts.manifests import RunManifest
from pipeline.clips.library import artifacts_of
from pipeline.clips.stage import shard
from pipeline.clips.table import ClipSet
from pipeline.config import with_overrides
from pipeline.distill.stage import distill, train_teacher
from pipeline.targets.stage import cache
from pipeline.targets.table import TargetMismatch, TargetSet

VIEWS = ("targets.views=3", "targets.crop=random", "targets.min_scale=0.6")
STEPS = ("distill.steps=20", "distill.log_every=1", "distill.checkpoint_every=20")


@pytest.fixture(scope="module")
def prepared(shared_tiny, local_ray):
    """Clips, a trained teacher and its targets, for views with crops and flips."""
    config = shared_tiny(*VIEWS, *STEPS)
    clips = shard(config)["uri"]
    train_teacher(config)
    return config, clips, cache(config)


def losses(config, clips):
    return storage.read_json(distill(config)["history"])


def test_cached_and_live_teacher_give_the_same_curve(prepared, shared_tiny):
    config, clips, summary = prepared
    targets = TargetSet(summary["uri"])
    rows = [(v.shard, v.first_row + c) for v in ClipSet(clips).videos for c in range(v.full_clips)]
    views = [targets.read(*row, k)[2].view for row in rows for k in range(3)]
    assert any(v.flip for v in views)
    assert any((v.height, v.width) != (48, 48) for v in views)
    cached = losses(config, clips)
    live = losses(shared_tiny(*VIEWS, *STEPS, "distill.live_teacher=true"), clips)
    assert len(cached) == len(live) == 20
    for a, b in zip(cached, live, strict=True):
        for name in ("total", "reconstruction", "contrast", "slot_kd"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), (a["step"], name)
    assert cached[-1]["total"] < cached[0]["total"]


def test_cached_student_features_give_the_same_curve(prepared, shared_tiny):
    config, clips, _ = prepared
    with_features = shared_tiny(*VIEWS, *STEPS, "targets.student_features=true")
    assert TargetSet(cache(with_features)["uri"]).has_features
    plain, cached = losses(config, clips), losses(with_features, clips)
    for a, b in zip(plain, cached, strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-5), a["step"]


def test_stored_features_are_made_once_for_teacher_and_student(tiny, local_ray):
    """By whichever stage wants them first; what was lost is made again. The teacher's curve is the live ViT's."""
    vit = "student.backbone={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"
    fp32 = ("teacher.train.precision=fp32", "distill.steps=2", "distill.warmup_steps=1")
    config = tiny(*VIEWS, *fp32, vit, "student.image_size=48", "student.cached_features=true")
    shard(config)
    live = storage.read_json(train_teacher(config)["history"])
    config = with_overrides(config, {"teacher.cached_features": True})
    stored = storage.read_json(train_teacher(config)["history"])
    assert [row["total"] for row in stored] == pytest.approx([row["total"] for row in live], rel=1e-5)

    store = artifacts_of(config).features(config.teacher).uri
    files = sorted(Path(store, "data").iterdir())
    made = [file.stat().st_mtime_ns for file in files]
    content = files[1].read_bytes()
    files[1].unlink()
    assert cache(config)["features"] == store
    assert files[1].read_bytes() == content
    kept = [file.stat().st_mtime_ns for file in files]
    assert [a == b for a, b in zip(made, kept, strict=True)] == [i != 1 for i in range(len(files))]
    assert RunManifest.read(distill(config)["uri"]).features_uri == store


def test_targets_are_row_for_row_and_tails_are_skipped(prepared):
    _, clips, summary = prepared
    clip_set, targets = ClipSet(clips), TargetSet(summary["uri"])
    assert summary["rows"] == 3 * clip_set.manifest.clips
    for name in clip_set.shards:
        table = targets.reader.file(name).read(columns=["video_id", "clip_index", "view", "full"])
        rows = [(c.video_id, c.clip_index, k, c.full) for c in clip_set.iter_shard(name) for k in range(3)]
        assert [tuple(row.values()) for row in table.to_pylist()] == rows
    assert any(video.clips > video.full_clips for video in clip_set.videos)  # 9 frames in clips of 4


def test_a_second_run_finds_the_targets_also_by_the_teachers_place(prepared, shared_tiny):
    config, _, first = prepared
    again = cache(config)
    assert again["uri"] == first["uri"]
    assert again["computed_shards"] == 0
    teacher = f"teacher.checkpoint={TargetSet(first['uri']).manifest.teacher_uri}"
    assert cache(shared_tiny(*VIEWS, *STEPS, teacher))["uri"] == first["uri"]


def test_verify_finds_changed_slots_and_features(tiny, local_ray):
    config = tiny(*VIEWS, "targets.verify=1.0", "targets.student_features=true")
    clips = shard(config)["uri"]
    train_teacher(config)
    summary = cache(config)
    assert summary["verified_rows"] == 3 * sum(v.full_clips for v in ClipSet(clips).videos)
    path = f"{summary['uri']}/data/{ClipSet(clips).shards[1]}"
    table = pq.read_table(path)
    slots = table.column("slots").combine_chunks()
    values = slots.flatten().to_numpy().copy()
    values[: slots.type.list_size] = np.nan
    _replace(path, table, "slots", type(slots).from_arrays(values, slots.type.list_size))
    with pytest.raises(TargetMismatch, match="shard-00001"):
        cache(config)
    features = table.column("features").to_pylist()
    features[0] = (np.frombuffer(features[0], np.float32) + 0.5).tobytes()
    _replace(path, table, "features", pa.array(features, table.schema.field("features").type))
    with pytest.raises(TargetMismatch, match="shard-00001"):
        cache(config)


def _replace(path, table, name, values):
    index = table.schema.get_field_index(name)
    pq.write_table(table.set_column(index, table.schema.field(name), values), path)


def test_a_student_without_kd_is_the_same_before_and_after_caching(shared_tiny, local_ray):
    config = shared_tiny("distill.method=no_kd", "targets.student_features=true", "dataset.seed=9")
    shard(config)
    before = artifacts_of(config).student.uri
    train_teacher(config)
    cache(config)
    assert artifacts_of(config).student.uri == before


def test_this_process_writes_what_those_of_ray_write(tiny, local_ray):
    """On `local_ray` the tiny config has room for one process, which then is this one; here it has room for two."""
    config = tiny(*VIEWS, *GOLDEN_TEACHER, "targets.student_features=true")
    shard(config)
    here = cache(config)
    written = {path.name: path.read_bytes() for path in Path(here["uri"], "data").iterdir()}
    storage.delete(here["uri"])
    others = cache(tiny(*VIEWS, *GOLDEN_TEACHER, "targets.student_features=true", "ray.teacher_cpus=0.8"))
    assert others["uri"] == here["uri"]
    assert {path.name: path.read_bytes() for path in Path(here["uri"], "data").iterdir()} == written

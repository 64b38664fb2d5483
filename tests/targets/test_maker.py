"""Targets of a shard: what is written, how often the models run for it, and what goes wrong on the way."""

import errno
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clip_sets import random_clips
from tiny_models import tiny_model
from training_runs import make_config, make_targets

from pipeline import storage
from pipeline.clips.table import SHARD_FOLDER
from pipeline.clips.views import apply_view, make_view
from pipeline.models import save_slot_model
from pipeline.targets.maker import TargetMaker, teacher_outputs
from pipeline.targets.table import TargetSet

SHARD = "shard-00000.parquet"
FOUR_VIEWS = ("targets.views=4", "targets.crop=center", "targets.student_features=true")


@pytest.fixture
def clips(tmp_path):
    return random_clips(tmp_path / "clips", {f"v{i}": 9 for i in range(3)})  # each with a shorter tail


def make_maker(tmp_path, clips, *overrides, kind="learned", model=None):
    kinds = (f"teacher.initial_slots={kind}", f"student.initial_slots={kind}")
    config = make_config(tmp_path / "root", *kinds, *overrides)
    save_slot_model(model or tiny_model(4, 16, initializer=kind), tmp_path / "teacher")
    return TargetMaker(config, clips.uri, str(tmp_path / "teacher"))


def count_images(model):
    """The number of images of each pass of a model's ViT, in a list that grows."""
    passes = []
    model.encoder.backbone.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    return passes


def one_by_one(maker, clip):
    """Of each view alone: its pixels, the teacher's slots and features, and the student's features."""
    settings = maker.config.targets, maker.config.dataset.seed, clip.video_id, clip.clip_index
    for k in range(maker.config.targets.views):
        view = make_view(*settings, k, *clip.frames.shape[1:3])
        pixels = apply_view(clip.frames, view)
        with torch.no_grad():
            teacher, student = maker.teacher, maker.student
            initial = teacher.initial_slots(1, [view.noise_seed])
            output = teacher(teacher.prepare([pixels]), initial_slots=initial)
            own = student.backbone_features(student.prepare([pixels]))
        yield pixels, output.slots[0].numpy(), output.backbone_features[0].numpy(), own[0].numpy()


@pytest.mark.parametrize("kind", ["learned", "random"])
def test_views_with_equal_pixels_are_computed_once(tmp_path, clips, kind):
    maker = make_maker(tmp_path, clips, *FOUR_VIEWS, kind=kind)
    rows = list(clips.iter_shard(SHARD))
    expected = {row: list(one_by_one(maker, clip)) for row, clip in enumerate(rows) if clip.full}
    different = sum(len({pixels.tobytes() for pixels, *_ in views}) for views in expected.values())
    assert len(expected) < different < 4 * len(expected)

    of_teacher, of_student = count_images(maker.teacher), count_images(maker.student)
    uri = make_targets(maker.config, clips.uri, str(tmp_path / "teacher"), str(tmp_path / "targets"))
    maker.write_shard(SHARD, str(tmp_path / "again"))
    assert sum(of_teacher) == sum(of_student) == 4 * different, "clips of 4 frames"
    assert storage.read_range(f"{tmp_path}/again/{SHARD}", 0, 1 << 30) == storage.read_range(
        f"{uri}/{SHARD_FOLDER}/{SHARD}", 0, 1 << 30
    )

    targets = TargetSet(uri)
    for row, views in expected.items():
        for k, (_, *values) in enumerate(views):
            name, index, target = targets.read(SHARD, row, k, features=True, teacher_features=True)
            assert (name, index) == (rows[row].video_id, rows[row].clip_index)
            cached = (target.slots, target.teacher_features, target.features)
            for value, other in zip(values, cached, strict=True):
                np.testing.assert_allclose(other, value, atol=1e-5)
    assert targets.reader.file(SHARD).metadata.num_rows == 4 * len(rows)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_verify_computes_the_writers_batches(tmp_path, clips, size):
    maker = make_maker(tmp_path, clips, "targets.views=2", f"targets.batch_size={size}")
    uri = make_targets(maker.config, clips.uri, str(tmp_path / "teacher"), str(tmp_path / "targets"))
    passes = count_images(maker.teacher)
    maker.write_shard(SHARD, str(tmp_path / "again"))
    written, passes[:] = list(passes), []
    report = maker.verify_shard(SHARD, uri, 1.0)
    assert passes == written
    assert report["checked"] == 2 * 4
    assert report["worst"] == 0, "the same batches on one machine"
    passes[:] = []
    assert maker.verify_shard(SHARD, uri, 0.0)["checked"] == len(passes) == 0


def test_a_damaged_shard_of_clips_is_named(tmp_path, clips):
    maker = make_maker(tmp_path, clips)
    path = tmp_path / "clips" / SHARD_FOLDER / SHARD
    content = bytearray(path.read_bytes())
    start = len(content) // 2  # its second row group, once the first is being computed
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{SHARD}: row group \d is damaged"):
        maker.write_shard(SHARD, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_gives_nan_ends_it_and_names_the_clips(tmp_path, clips):
    maker = make_maker(tmp_path, clips, "targets.batch_size=2")
    with torch.no_grad():
        maker.teacher.processor.corrector.to_q.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite for one of: v0 clip 0"):
        maker.write_shard(SHARD, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_the_same_error_as_without_threads(tmp_path, clips, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left") as caught:
        make_maker(tmp_path, clips).write_shard(SHARD, str(tmp_path / "out"))
    assert type(caught.value) is OSError
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()


def test_a_teacher_never_computes_in_tf32(monkeypatch):
    """Cached or live, whatever was allowed before, which it leaves as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    seen = []
    teacher = tiny_model()
    teacher.encoder.backbone.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    )
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    view = make_view(make_config("x").targets, 0, "v", 0, 0, 32, 32)
    try:
        torch.set_float32_matmul_precision("high")
        with torch.no_grad():
            teacher_outputs(teacher, [frames], [view], "forward")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(False, False)]
    assert torch.backends.cudnn.allow_tf32

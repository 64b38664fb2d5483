"""SAVi as published: slots from boxes of the first frame's objects, optical flow as what is reconstructed."""

from itertools import islice

import numpy as np
import pytest
import torch
from clip_sets import make_clip_set, random_video
from distill.test_systems import config_of, run_of

from pipeline import line
from pipeline.clips.library import artifacts_of
from pipeline.clips.table import ClipSet
from pipeline.clips.views import View, central_square
from pipeline.config import ConfigError, Evaluate, with_overrides
from pipeline.config.protocols import Protocol
from pipeline.distill.system_objective import SystemBatch
from pipeline.distill.trainer import Trainer
from pipeline.distill.validation import Validation
from pipeline.evaluate import stage
from pipeline.evaluate.scoring import boxes_of_samples, model_predictor
from pipeline.evaluate.subjects import Subject, of_its_system, teacher_subject
from pipeline.models import load_slot_model, save_slot_model
from pipeline.models.build import load_teacher
from pipeline.models.build_teachers import build_teacher
from pipeline.models.rivals.savi_losses import flow_as_rgb, picture_loss
from pipeline.report.efficiency import count_stream

BOXES = "teacher.savi.conditioning=boxes"
FLOW = (
    "teacher.savi.target=flow",
    "clips.flow=dataset",
    "dataset.kind=movi",
    "dataset.path=D",
    "clips.motion=none",
)
SIZE = 24, 32
VIDEOS = 4


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(0)
    return {f"v{i}": random_video(rng, 12) for i in range(VIDEOS)}


@pytest.fixture(scope="module")
def flow():
    rng = np.random.default_rng(1)
    return {f"v{i}": rng.normal(0, 3, (12, *SIZE, 2)).astype(np.float16) for i in range(VIDEOS)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory, videos, flow):
    return make_clip_set(tmp_path_factory.mktemp("clips"), videos, clip_frames=6, flow=flow).uri


def expected_boxes(masks, view, count):
    """By going through the pixels; of the first frame with an object."""
    for objects in masks:
        boxes = []
        for number in sorted(objects):
            rows, columns = np.nonzero(objects[number])
            seen = (columns >= view.left) & (columns < view.left + view.width)
            rows, columns = rows[seen] - view.top, columns[seen] - view.left
            if len(rows):
                low, high = columns.min(), columns.max() + 1
                if view.flip:
                    low, high = view.width - high, view.width - low
                place = (rows.min() / view.height, low / view.width)
                boxes.append([*place, (rows.max() + 1) / view.height, high / view.width])
        if boxes:
            return np.array([*boxes, *[[0] * 4] * count][:count], np.float32)
    return np.zeros((count, 4), np.float32)


@pytest.mark.parametrize(("flip", "count"), [(False, 3), (True, 3), (False, 1)])
def test_boxes_are_those_of_the_masks_as_they_are_shown(clips, videos, flip, count):
    found, view = ClipSet(clips), View(0, 5, 24, 24, flip, 0)
    for video in found.videos:
        for clip, first in ((0, 0), (0, 2), (1, 0)):  # frame 2 shows no object
            boxes = found.read_boxes(video.shard, video.first_row + clip, view, count, first)
            masks = videos[video.video_id][1][6 * clip + first : 6 * (clip + 1)]
            np.testing.assert_allclose(boxes, expected_boxes(masks, view, count), atol=1e-6)


def test_flow_is_shown_as_pixels_are(clips, flow, tmp_path):
    """A flipped view shows the other direction from left to right; a smaller input smaller steps."""
    run = run_of("savi", tmp_path, clips, BOXES, *FLOW, "targets.views=8")
    trainer = Trainer(run)
    flipped = set()
    for step in range(4):
        with trainer.loader() as loader:
            raw = loader.read(loader.sampler.batch(step))
        batch = trainer.batch(raw)
        assert raw.boxes.shape == (len(raw.samples), 3, 4)
        for sample, view, found in zip(raw.samples, raw.views, batch.flow, strict=True):
            whole = flow[sample.video.video_id][6 * sample.clip_index :][:6].astype(np.float32)
            part = whole[:, view.top : view.top + view.height, view.left : view.left + view.width]
            if view.flip:
                part = part[:, :, ::-1] * [1, -1]
            np.testing.assert_allclose(found, part)
            flipped.add(view.flip)
    assert flipped == {False, True}
    constant = torch.tensor([3.0, -6.0]).expand(6, 24, 48, 2)
    resized = trainer.objective.flow([constant])
    assert resized.shape == (1, 6, 2, 16, 16)
    torch.testing.assert_close(resized[0, 0, :, 5, 5], torch.tensor([3 * 16 / 24, -6 * 16 / 48]))


@pytest.mark.parametrize("target", ["rgb", "flow"])
def test_it_learns_and_does_not_teach(clips, tmp_path, target):
    settings = (
        "teacher.train.steps=30",
        "teacher.train.learning_rate=0.004",
        *(FLOW if target == "flow" else ()),
    )
    run = run_of("savi", tmp_path, clips, BOXES, *settings)
    trainer = Trainer(run)
    history = trainer.train().history
    losses = [row["total"] for row in history]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])
    for place in ("model", "teacher.ckpt"):
        model = load_slot_model(f"{run.uri}/{place}")
        assert model.config == trainer.model.config
        assert (model.config.initializer, model.config.target) == ("boxes", target)
    with pytest.raises(
        ConfigError, match=r"is a SAVi, .*start from boxes.*nearest valid: .*conditioning=none"
    ):
        load_teacher(run.config, f"{run.uri}/model")


def test_its_loss_is_that_of_the_flow_as_a_picture(clips, tmp_path):
    trainer = Trainer(run_of("savi", tmp_path, clips, BOXES, *FLOW))
    model, generator = trainer.model, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8, generator=generator)
    flow, boxes = torch.randn(6, 16, 16, 2, generator=generator), torch.rand(1, 3, 4, generator=generator)
    losses = trainer.objective(SystemBatch([pixels], 0, 0, None, [flow], boxes))
    video = (pixels / 255).permute(0, 3, 1, 2)[None]
    target = flow_as_rgb(flow.permute(0, 3, 1, 2)[None])
    expected = picture_loss(model(video, boxes=boxes).reconstruction, target)
    torch.testing.assert_close(losses["total"], expected)


@pytest.mark.parametrize("clip_frames", [0, 4])
def test_what_is_scored_starts_from_boxes_of_its_first_frame(clips, videos, tmp_path, clip_frames):
    model, found = build_teacher(config_of("savi", tmp_path, BOXES)).eval(), ClipSet(clips)
    protocol = Protocol("own", clip_frames=clip_frames, crop="central")
    video = found.videos[1]
    frames, masks = videos[video.video_id]
    view, length = central_square(*SIZE), clip_frames or 12
    predict = model_predictor(
        model, video.video_id, protocol, boxes_of_samples(model, found, video, protocol)
    )
    for start in range(0, 12, length):
        seen = frames[start : start + length, :, view.left : view.left + view.width]
        labels = np.concatenate(list(predict(iter([seen]), (24, 24))))
        # A sample that begins within a stored clip has no more frames of that one to look for objects in.
        end = 6 * (start // 6 + 1)
        boxes = torch.from_numpy(expected_boxes(masks[start:end], view, 3))
        ((_, _, probabilities),) = model.stream([seen], boxes=boxes)
        np.testing.assert_array_equal(labels, model.label_maps(probabilities, (24, 24)).numpy())
    assert list(
        islice(boxes_of_samples(build_teacher(config_of("savi", tmp_path)), found, video, protocol), 1)
    ) == [{}]
    evaluate = Evaluate(validation_videos=2, split="val")
    assert Validation(clips, evaluate).scores(model, 0, 1)["validation_video_mbo"] > 0


@pytest.mark.parametrize(
    ("override", "title", "system"),
    [
        (BOXES, "SAVi (conditional, boxes)", "savi_boxes"),
        ("teacher.savi.conditioning=none", "SAVi", "savi"),
    ],
)
def test_its_records_say_what_it_is_told(tmp_path, override, title, system):
    """By what the config says of one that is to be trained, by what a model is of one that is there."""
    config = config_of("savi", tmp_path, override, "teacher.name=SAVi")
    model = build_teacher(config).config
    for subject in (
        teacher_subject(config, "model"),
        teacher_subject(with_overrides(config, {"teacher.savi.conditioning": "none"}), "model", model),
    ):
        assert (subject.tags["teacher"], subject.tags["system"]) == (title, system)
    assert of_its_system(Subject(model_uri="savi.flax"), model).tags == {"system": system}


def test_its_products_are_counted(tmp_path):
    """Those of a SAVi with learned slots, and of the MLP that makes slots of boxes."""
    frames = np.zeros((2, *SIZE, 3), np.uint8)
    boxes, learned = (build_teacher(config_of("savi", tmp_path, *said)) for said in ([BOXES], []))
    mlp = boxes.config.initializer_hidden * (4 + boxes.config.slot_size) * boxes.config.num_slots
    assert count_stream(boxes, frames).layers == count_stream(learned, frames).layers + mlp


def test_the_whole_line_does_not_begin_with_it(tmp_path):
    with pytest.raises(ConfigError, match=r"^teacher.savi.conditioning: boxes, .*nearest valid: none"):
        line.run(config_of("savi", tmp_path, BOXES))


def test_what_lacks(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^teacher.initial_slots: random, but slots start from boxes .*nearest valid: learned",
    ):
        config_of("savi", tmp_path, BOXES, "teacher.initial_slots=random")
    with pytest.raises(
        ConfigError, match=r"^clips.flow: none, but teacher.savi.target=flow .* nearest valid: dataset"
    ):
        config_of("savi", tmp_path, "teacher.savi.target=flow")
    with pytest.raises(
        ConfigError, match=r"^clips.flow: dataset is .* dataset.kind=davis lacks; nearest valid: none"
    ):
        config_of(
            "savi",
            tmp_path,
            "clips.flow=dataset",
            "clips.motion=none",
            "dataset.kind=davis",
            "dataset.path=D",
        )
    rng = np.random.default_rng(0)
    bare = make_clip_set(tmp_path / "clips", {"v": (random_video(rng, 6)[0], None)}, clip_frames=6).uri
    with pytest.raises(
        ValueError, match=r"v has no masks, of which boxes .*nearest valid: .*conditioning=none"
    ):
        Trainer(run_of("savi", tmp_path, bare, BOXES)).train()
    with pytest.raises(ValueError, match=r"no optical flow; make some that do: clips.flow=dataset"):
        Trainer(run_of("savi", tmp_path, bare, *FLOW)).train()


def test_its_scores_are_marked(clips, tmp_path, monkeypatch, capsys):
    save_slot_model(build_teacher(config_of("savi", tmp_path, BOXES)), tmp_path / "savi")
    config = config_of("savi", tmp_path, f"evaluate.model={tmp_path / 'savi'}", "evaluate.baselines=false")
    artifacts, recorded = artifacts_of(config, clips), {}
    artifacts.evaluation_clips = artifacts.clips
    monkeypatch.setattr(stage, "artifacts_of", lambda _: artifacts)
    monkeypatch.setattr(stage, "map_tasks", in_this_process)
    monkeypatch.setattr(stage, "record_evaluations", lambda *given: recorded.update(given[2]))
    summary = stage.evaluate(config)
    assert {name: tags["system"] for name, tags in recorded.items()} == {
        "savi (conditional, boxes)": "savi_boxes"
    }
    assert "savi (conditional, boxes)" in capsys.readouterr().out
    assert summary["videos"] == VIDEOS


def in_this_process(config, task, rows, *, arguments):
    return (task(*arguments)(row) for row in rows)

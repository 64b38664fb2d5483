"""Features on one scale: measured where a run begins, part of its model from then on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from training_runs import make_clips, make_config, make_targets, student_run

from pipeline.clips.table import ClipSet
from pipeline.clips.views import apply_view, make_view
from pipeline.config import ConfigError, resolve_config
from pipeline.distill.checkpoint import latest_checkpoint
from pipeline.distill.feature_scale import spread_samples, unit_variance_scale
from pipeline.distill.run import Run
from pipeline.distill.step import Batch, Objective, Terms
from pipeline.distill.trainer import Trainer
from pipeline.models import load_slot_model, save_slot_model
from pipeline.models.streaming import StreamingStep
from pipeline.targets.table import TargetSet

AUTO = "student.feature_scale=auto"
SHORT = ("distill.steps=4", "distill.precision=fp32", "teacher.train.steps=4", "teacher.train.precision=fp32")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Clips, and a teacher whose own scale was measured."""
    root = tmp_path_factory.mktemp("scales")
    clips = make_clips(root / "clips")
    config = make_config(root, *SHORT, "teacher.feature_scale=auto")
    Trainer(Run.teacher(config, f"{root}/teacher", clips)).train()
    return root


def train(root, name, *overrides, targets=None, teacher=False):
    """The trainer of a student's run, at its end."""
    config = make_config(root, *SHORT, *overrides)
    taught = {"teacher_uri": f"{root}/teacher/model"} if teacher or targets else {}
    run = student_run(config, f"{root}/{name}", f"{root}/clips", targets_uri=targets, **taught)
    trainer = Trainer(run)
    trainer.train()
    return trainer


def curve(trainer):
    return torch.tensor([[row["total"], row["reconstruction"]] for row in trainer.history])


def central_features(model, config, clips):
    """Of every clip's central square, which are fewer than a sample would be."""
    for video in clips.videos:
        for index in range(video.full_clips):
            frames = clips.read_clip(video.shard, video.first_row + index).frames
            key = (video.video_id, index, 0, video.height, video.width)
            pixels = apply_view(frames, make_view(config.targets, config.dataset.seed, *key))
            yield model.backbone_features(model.prepare([pixels]))


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_scaled_features_have_unit_variance_and_the_number_is_the_models(root, kind):
    if kind == "student":
        train(root, "student", AUTO, "distill.method=no_kd")
    model = load_slot_model(f"{root}/{kind}/model")
    config = json.loads(Path(f"{root}/{kind}/model/config.json").read_text())
    assert config["feature_scale"] == model.config.feature_scale != 1
    features = torch.cat(list(central_features(model, make_config(root), ClipSet(f"{root}/clips"))))
    assert float(model.scaled(features).std()) == pytest.approx(1, abs=1e-3)
    assert abs(float(features.std()) - 1) > 0.01
    if kind == "teacher":
        assert load_slot_model(f"{root}/teacher/teacher.ckpt").config == model.config


def test_one_store_of_features_serves_every_scale_with_the_live_curve(root):
    """The cache holds what the backbone gives, whatever the scale."""
    features = ("targets.student_features=true", "targets.crop=center")
    stores = {}
    for scale in ("auto", "3"):
        config = make_config(root, *SHORT, *features, f"student.feature_scale={scale}")
        stores[scale] = make_targets(config, f"{root}/clips", f"{root}/teacher/model", f"{root}/store{scale}")
    video = ClipSet(f"{root}/clips").videos[1]
    rows = [
        TargetSet(uri).read(video.shard, video.first_row, 1, features=True)[2].features
        for uri in stores.values()
    ]
    assert (rows[0] == rows[1]).all()
    live = train(root, "live", AUTO, "targets.crop=center", "distill.live_teacher=true", teacher=True)
    cached = train(root, "cached", AUTO, *features, targets=stores["3"])
    assert cached.model.config.feature_scale == live.model.config.feature_scale
    torch.testing.assert_close(curve(cached), curve(live), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_keeps_its_constant(root, monkeypatch):
    unbroken = train(root, "unbroken", AUTO, "distill.method=no_kd")
    settings = (AUTO, "distill.method=no_kd", "distill.checkpoint_every=2")
    run = student_run(make_config(root, *SHORT, *settings), f"{root}/broken", f"{root}/clips")
    first = Trainer(run)
    monkeypatch.setattr(first, "save", lambda save=first.save: (save(), stop()))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert latest_checkpoint(run.uri).endswith("step_00000002")
    monkeypatch.setattr(
        "pipeline.distill.feature_scale.unit_variance_scale", lambda features: pytest.fail("measured again")
    )
    second = Trainer(run)
    second.train()
    assert second.model.config == unbroken.model.config
    assert torch.equal(curve(second), curve(unbroken))


def stop():
    raise KeyboardInterrupt


def test_a_number_is_the_constant_and_one_changes_nothing(root):
    plain = train(root, "plain", "distill.method=no_kd")
    one = train(root, "one", "student.feature_scale=1", "distill.method=no_kd")
    five = train(root, "five", "student.feature_scale=5", "distill.method=no_kd")
    assert torch.equal(curve(plain), curve(one))
    assert load_slot_model(f"{root}/five/model").config.feature_scale == 5
    assert five.history[0]["reconstruction"] > 5 * plain.history[0]["reconstruction"]
    assert "feature_scale" not in json.loads(Path(f"{root}/plain/model/config.json").read_text())


def test_the_sample_is_spread_over_all_clips(root):
    videos = [replace(video, full_clips=20) for video in ClipSet(f"{root}/clips").videos]
    samples = spread_samples(videos)
    assert len(samples) == 32
    assert {s.video.video_id for s in samples} == {v.video_id for v in videos}
    assert len({(s.video.video_id, s.clip_index) for s in samples}) == 32
    assert {s.view for s in samples} == {0}


# --- where the scale is in the model ----------------------------------------------------------------------------------


def scaled_pair(**design):
    """A model of a scale, and the same weights without one."""
    one = tiny_model(**design).eval()
    four = tiny_model(feature_scale=4.0, **design).eval()
    four.load_state_dict(one.state_dict())
    return one, four


@torch.no_grad()
def test_projection_and_target_are_scaled_and_features_are_not(tmp_path):
    one, four = scaled_pair()
    video = torch.rand(1, 3, 3, 32, 32)
    features = one.backbone_features(video)
    assert torch.equal(four.backbone_features(video), features)
    output, expected = four(video), one(backbone_features=4 * features)
    assert torch.equal(output.backbone_features, 4 * features)
    torch.testing.assert_close(output.slots, expected.slots)
    torch.testing.assert_close(output.masks, expected.masks)
    torch.testing.assert_close(four(backbone_features=features).slots, output.slots)
    save_slot_model(four, tmp_path)
    assert load_slot_model(tmp_path).config == four.config
    # What is exported steps alike.
    pixels = torch.rand(1, 32, 32, 3) * 255
    state, first = one.initial_slots(1), torch.tensor([True])
    slots, *_ = StreamingStep(four)(pixels, state, first)
    streamed = four.roll_out(four.backbone_features(prepared(four, pixels)))[0][:, 0]
    torch.testing.assert_close(slots, streamed)


def prepared(model, pixels):
    mean, std = (torch.tensor(values) for values in (model.config.mean, model.config.std))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)[None]


def test_feature_kd_draws_to_the_teachers_features_on_the_teachers_scale():
    one, four = scaled_pair()
    features = torch.randn(1, 2, 16, 16)
    losses = []
    for teacher, given in ((one, 4 * features), (four, features)):
        torch.manual_seed(1)
        objective = Objective(tiny_model(seed=3), Terms(feature_kd=1), teacher=teacher)
        batch = Batch(torch.ones(1, 2, 3, 32, 32), teacher_features=given)
        losses.append(objective(batch)["feature_kd"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("value", ["0", "-1", "automatic", "true"])
def test_scales_that_can_not_be(value):
    with pytest.raises(ConfigError, match=r"student\.feature_scale"):
        resolve_config({}, [f"student.feature_scale={value}"])


def test_features_that_never_vary_have_no_scale():
    with pytest.raises(ValueError, match="backbone_weights"):
        unit_variance_scale([torch.full((2, 3, 4), 0.1), torch.full((1, 3, 4), 0.1)])
    with pytest.raises(ValueError, match="same number"):
        unit_variance_scale([torch.zeros(2, 3)])
    assert unit_variance_scale([torch.tensor([1.0, 3.0])]) == 1.0

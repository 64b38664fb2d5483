"""What a run measures when it begins: features on one scale, a start that fits them; then part of its model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_design, tiny_model, tiny_vit
from training_runs import make_clips, make_config, make_targets, student_run

from pipeline.clips.table import ClipSet
from pipeline.clips.views import apply_view, make_view
from pipeline.config import ConfigError, resolve_config
from pipeline.distill.checkpoint import latest_checkpoint
from pipeline.distill.run import Run
from pipeline.distill.start import spread_samples, unit_variance_scale
from pipeline.distill.step import Batch, Objective, Terms
from pipeline.distill.trainer import Trainer
from pipeline.models import SlotModel, load_slot_model, save_slot_model
from pipeline.models.initialisation import PLACES, fit_start, start_as_soft_kmeans, start_as_teacher
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
        "pipeline.distill.start.unit_variance_scale", lambda features: pytest.fail("measured again")
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


# --- a start that fits the features --------------------------------------------------------------------


def two_kinds(frames=40, seed=0):
    """Features `(frames, 16, 16)` of 4 x 4 patches, whose left and right part are of two kinds, and what tells their
    place in them; which patch is of which kind; x of each patch."""
    rng = torch.Generator().manual_seed(1)
    kinds, place = 3 * torch.randn(2, 16, generator=rng), torch.randn(2, 16, generator=rng)
    rng.manual_seed(seed)
    y, x = (p.flatten() for p in torch.meshgrid(*(torch.linspace(-1, 1, 4),) * 2, indexing="ij"))
    labels = (x > torch.rand(frames, 1, generator=rng) - 0.5).long()
    features = kinds[labels] + torch.stack([x, y], 1) @ place
    return features + 0.1 * torch.randn(features.shape, generator=rng), labels, x


@pytest.fixture(scope="module")
def fitted():
    model = SlotModel(replace(tiny_design(2, 12), feature_scale=0.5))
    start_as_soft_kmeans(model)
    fit_start(model, two_kinds()[0], seed=0)
    return model.eval()


@torch.no_grad()
def test_a_fitted_projection_is_the_principal_components_and_tells_the_place(fitted):
    features, _, x = two_kinds()
    projected = fitted.project(features).flatten(0, 1)
    normalised = torch.nn.functional.layer_norm(0.5 * features, (16,)).flatten(0, 1).double().numpy()
    centred = normalised - normalised.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    components = centred @ axes[:7].T / np.sqrt((values[:7] ** 2).mean() / len(centred))
    alike = (projected[:, :7].numpy() * components).sum(0) / (components**2).sum(0)
    assert np.abs(alike) == pytest.approx(np.ones(7), abs=1e-3)
    assert np.corrcoef(projected[:, 7], x.repeat(len(features)))[0, 1] > 0.8
    assert projected[:, 7:].std(0).tolist() == pytest.approx([1.5] * 5, rel=0.01)


@torch.no_grad()
def test_slot_attention_tells_kinds_apart_before_any_training(fitted):
    """In frames that the start has not seen; place is handed on and not compared."""
    features, labels, _ = two_kinds(frames=4, seed=5)
    found = fitted.roll_out(features[:, None])[1][:, 0].argmax(1)
    agreement = float((found == labels).float().mean())
    assert max(agreement, 1 - agreement) > 0.95
    corrector = fitted.processor.corrector
    assert not corrector.to_q.weight[:, -PLACES:].any()
    assert not corrector.to_k.weight[:, -PLACES:].any()


def test_a_teacher_begins_fitted_and_goes_on_from_its_checkpoint(root, monkeypatch):
    config = make_config(root, *SHORT, "teacher.initialisation=fitted", "teacher.train.checkpoint_every=2")
    clips = f"{root}/clips"
    unbroken = Trainer(Run.teacher(config, f"{root}/fitted", clips))
    unbroken.train()
    broken = Trainer(Run.teacher(config, f"{root}/fitted broken", clips))
    monkeypatch.setattr(broken, "save", lambda save=broken.save: (save(), stop()))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    monkeypatch.setattr(
        "pipeline.distill.start.fit_start", lambda *args, **kwargs: pytest.fail("fitted again")
    )
    second = Trainer(Run.teacher(config, f"{root}/fitted broken", clips))
    second.train()
    assert torch.equal(curve(second), curve(unbroken))


@torch.no_grad()
def test_slots_of_more_numbers_than_features_have_leave_some_unused():
    model = SlotModel(tiny_design(2, 24))
    start_as_soft_kmeans(model)
    features, *_ = two_kinds()
    fit_start(model, features, seed=0)
    projected = model.project(features).flatten(0, 1)
    assert not projected[:, 16:-PLACES].any()
    assert (projected.std(0)[-PLACES:] > 1).all()


def test_a_fitted_student_keeps_the_slots_that_it_has_from_its_teacher(root):
    """And fits those that it has not, as it would alone."""
    started = {}
    for copied in ("true", "false"):
        settings = (f"distill.initial_slots_from_teacher={copied}", "distill.method=no_kd", "distill.steps=1")
        config = make_config(
            root, *SHORT, "student.initialisation=fitted", "distill.warmup_steps=1", *settings
        )
        run = student_run(
            config, f"{root}/fitted {copied}", f"{root}/clips", teacher_uri=f"{root}/teacher/model"
        )
        trainer = Trainer(run)
        trainer.train()  # a step of a learning rate of 0
        started[copied] = trainer.model
    teacher = load_slot_model(f"{root}/teacher/model")
    assert torch.equal(started["true"].initializer.slots, teacher.initializer.slots)
    assert not torch.equal(started["false"].initializer.slots, teacher.initializer.slots)
    projections = [model.encoder.output_transform.state_dict() for model in started.values()]
    assert all(torch.equal(projections[0][key], projections[1][key]) for key in projections[0])


def test_a_fitted_student_of_other_features_does_not_take_its_teachers_slots(root):
    settings = (
        "distill.initial_slots_from_teacher=true",
        "distill.method=no_kd",
        "student.backbone_blocks=1",
    )
    config = make_config(root, *SHORT, "student.initialisation=fitted", *settings)
    run = student_run(config, f"{root}/other", f"{root}/clips", teacher_uri=f"{root}/teacher/model")
    with pytest.raises(ConfigError, match=r"student\.initialisation: fitted.*nearest valid: soft_kmeans"):
        Trainer(run)


def test_drawn_slots_have_no_fitted_start():
    with pytest.raises(ValueError, match="learned"):
        fit_start(tiny_model(3, 12, initializer="random"), torch.randn(2, 4, 16), seed=0)
    with pytest.raises(ValueError, match="slot_size"):
        fit_start(tiny_model(3, 4), torch.randn(2, 4, 16), seed=0)


# --- a student's start that is its teacher's ------------------------------------------------------------


@torch.no_grad()
def test_a_student_with_its_teachers_start_groups_as_it_does_in_other_features(fitted):
    """The student's backbone turns, scales and shifts what the teacher's gives, and shows it by a finer grid."""
    features = two_kinds()[0]
    turn = torch.linalg.qr(torch.randn(24, 16, generator=torch.Generator().manual_seed(2)))[0].T

    def others(of_teacher):
        same = torch.nn.functional.layer_norm(of_teacher, (16,)) @ turn
        return 30 * same + torch.linspace(-1, 1, 24)

    for repeat in (1, 2):  # patches of the student a patch of the teacher, each way
        student = SlotModel(tiny_design(2, 12, vit=tiny_vit(24), image_size=32 * repeat)).eval()
        start_as_soft_kmeans(student)

        def finer(frames, repeat=repeat):
            maps = others(frames).unflatten(1, (4, 4))
            return maps.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2).flatten(1, 2)

        start_as_teacher(student, finer(features), fitted, fitted.project(features))
        unseen = two_kinds(frames=4, seed=5)[0]
        slots, attention = student.roll_out(finer(unseen)[:, None])
        expected, taught = fitted.roll_out(unseen[:, None])
        assert float(torch.cosine_similarity(slots, expected, dim=-1).mean()) > 0.98
        if repeat == 1:
            assert float((attention.argmax(2) == taught.argmax(2)).float().mean()) > 0.98


@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_students_run_starts_where_its_teacher_is(root, cached):
    """Of the same backbone, so that it can have the teacher's slots; without distillation too."""
    alone = (
        "distill.initial_slots_from_teacher=true",
        "distill.method=no_kd",
        "distill.steps=1",
        "distill.warmup_steps=1",  # a step of a learning rate of 0
        "distill.seed=7",  # not the teacher's
    )
    settings = (*alone, "student.initialisation=teacher", "student.feature_scale=auto")
    settings += (f"targets.student_features={cached}",)
    config = make_config(root, *SHORT, *settings)
    teacher = load_slot_model(f"{root}/teacher/model").eval()
    targets = None
    if cached == "true":
        targets = make_targets(config, f"{root}/clips", f"{root}/teacher/model", f"{root}/taught")
    student = train(root, f"taught {cached}", *settings, targets=targets, teacher=True).model.eval()
    other = train(root, f"not taught {cached}", *alone, "student.initialisation=soft_kmeans", teacher=True)
    assert slots_alike(root, student, teacher) > 0.9
    assert slots_alike(root, other.model.eval(), teacher) < 0.5


@torch.no_grad()
def slots_alike(root, *models):
    """The mean cosine similarity of two models' slots, slot n to slot n, of all clips."""
    config, clips = make_config(root), ClipSet(f"{root}/clips")
    slots = [
        torch.cat([model.roll_out(features)[0] for features in central_features(model, config, clips)])
        for model in models
    ]
    return float(torch.cosine_similarity(*slots, dim=-1).mean())


def test_a_start_that_no_teacher_gives_is_refused(root):
    """By what only its file says."""
    given = f"teacher.checkpoint={root}/teacher/model"
    for overrides, message in (
        (["student.slot_size=24", "distill.slot_map=true"], "of the student's slot_size"),
        (["student.corrector_mlp=false"], r"student\.corrector_mlp: False.*nearest valid: True"),
        (["student.predictor=false", "distill.alpha=0"], r"student\.predictor: False.*nearest valid: True"),
    ):
        config = make_config(root, *SHORT, "student.initialisation=teacher", given, *overrides)
        run = student_run(config, f"{root}/refused", f"{root}/clips", teacher_uri=f"{root}/teacher/model")
        with pytest.raises(ConfigError, match=message):
            Trainer(run)


def test_a_student_that_began_as_its_teacher_goes_on_from_its_checkpoint(root, monkeypatch):
    settings = ("student.initialisation=teacher", "distill.live_teacher=true", "distill.checkpoint_every=2")
    unbroken = train(root, "taught unbroken", *settings, teacher=True)
    config = make_config(root, *SHORT, *settings)
    run = student_run(config, f"{root}/taught broken", f"{root}/clips", teacher_uri=f"{root}/teacher/model")
    broken = Trainer(run)
    monkeypatch.setattr(broken, "save", lambda save=broken.save: (save(), stop()))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    monkeypatch.setattr("pipeline.distill.start.start_as_teacher", lambda *args: pytest.fail("started again"))
    second = Trainer(run)
    second.train()
    assert torch.equal(curve(second), curve(unbroken))


def test_the_decoder_has_a_learning_rate_of_its_own(root):
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    settings = ("distill.learning_rate=1e-3", "distill.decoder_learning_rate=1e-2", "distill.warmup_steps=0")
    config = make_config(root, *SHORT, *settings, "distill.method=no_kd", "distill.steps=1")
    trainer = Trainer(student_run(config, f"{root}/own rate", f"{root}/clips"))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {
        name: (value.detach() - before[name]).abs().max().item()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    of_decoder = [step for name, step in moved.items() if name.startswith("decoder.")]
    others = [step for name, step in moved.items() if not name.startswith("decoder.")]
    assert of_decoder == pytest.approx([1e-2] * len(of_decoder), rel=0.01)
    assert max(others) == pytest.approx(1e-3, rel=0.01)

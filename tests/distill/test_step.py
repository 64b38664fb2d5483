"""The training step, called as a GPU box without Ray would."""

import json

import pytest
import torch
from places import GOLDEN
from tiny_models import tiny_model, tiny_vit

from pipeline.distill.step import Batch, Objective, Terms, learning_rate_factor, training_step

RECORDED = json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture
def model():
    return tiny_model(vit=tiny_vit(32, depth=2), hidden=(16, 16)).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, 4, 3, 32, 32, generator=generator)
    return Batch(video=video, target_slots=torch.randn(2, 4, 3, 8, generator=generator))


def make_objective(model, alpha=1.0, beta=0.2):
    objective = Objective(model, Terms(alpha=alpha, slot_kd=beta))
    return objective, torch.optim.Adam(model.trainable_parameters(), lr=1.0)


def step(objective, optimizer, batch, learning_rate=1e-3, **options):
    return training_step(
        objective, optimizer, batch, learning_rate=learning_rate, gradient_clip=0.05, **options
    )


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("schedule", "total"), [("schedule_100k", 100_000), ("schedule_300k", 300_000)])
def test_schedule_is_the_references(schedule, total):
    for number, factor in RECORDED[schedule].items():
        value = learning_rate_factor(int(number), warmup_steps=2500, total_steps=total)
        assert value == pytest.approx(factor, rel=1e-6), number


def test_schedule_without_warm_up():
    assert learning_rate_factor(0, warmup_steps=0, total_steps=100) == 1
    assert learning_rate_factor(100, warmup_steps=0, total_steps=100) == 0.5
    assert learning_rate_factor(10, warmup_steps=10, total_steps=10) == 1


def test_terms_without_weight_are_left_out(model, batch):
    """A teacher, and a student without distillation, need no targets."""
    losses = make_objective(model, beta=0)[0](Batch(video=batch.video))
    assert set(losses) == {"total", "reconstruction", "contrast"}
    single_frame = Batch(video=batch.video[:, :1])
    losses = make_objective(model, alpha=0, beta=0)[0](single_frame)
    assert losses["total"] == losses["reconstruction"]


def test_step_from_cached_features_equals_step_from_video(model, batch):
    features = model.backbone_features(batch.video)
    cached = Batch(backbone_features=features, target_slots=batch.target_slots)
    objective, _ = make_objective(model)
    assert objective(cached) == objective(batch)


def test_step_changes_what_trains_and_nothing_else(model, batch):
    objective, optimizer = make_objective(model)
    before = weights(model)
    values = step(objective, optimizer, batch)
    assert set(values) == {"total", "reconstruction", "contrast", "slot_kd", "gradient_norm"}
    assert all(type(value) is float for value in values.values())
    for name, value in model.state_dict().items():
        unchanged = torch.equal(value, before[name])
        assert unchanged == name.startswith("encoder.backbone."), name
    assert all(p.grad is None for p in model.encoder.backbone.parameters())


def test_learning_rate_zero_changes_nothing(model, batch):
    """The first step of a warm-up."""
    objective, optimizer = make_objective(model)
    before = weights(model)
    step(objective, optimizer, batch, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradient_norm_is_that_before_clipping(model, batch):
    objective, optimizer = make_objective(model)
    objective(batch)["total"].backward()
    norm = torch.stack([p.grad.norm() for p in model.trainable_parameters()]).norm().item()
    values = step(objective, optimizer, batch)
    assert values["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    clipped = torch.stack([p.grad.norm() for p in model.trainable_parameters()]).norm().item()
    assert clipped == pytest.approx(min(norm, 0.05), rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_weights(model, batch, bad):
    objective, optimizer = make_objective(model)
    step(objective, optimizer, batch)
    before = weights(model)
    broken = Batch(video=batch.video.clone(), target_slots=batch.target_slots)
    broken.video[0, 0, 0, 0, 0] = bad
    values = step(objective, optimizer, broken)
    assert not torch.isfinite(torch.tensor(values["gradient_norm"]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = step(objective, optimizer, batch)
    assert torch.isfinite(torch.tensor(list(after.values()))).all()


def test_half_precision_is_close_and_losses_stay_float32(model, batch):
    objective, optimizer = make_objective(model)
    full, half = (step(objective, optimizer, batch, 0.0, autocast=dtype) for dtype in (None, torch.bfloat16))
    assert half["total"] == pytest.approx(full["total"], rel=0.05)
    assert half["total"] != full["total"]

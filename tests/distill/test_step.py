"""The training step, called as a GPU box without Ray would."""

import copy
import json
import math

import pytest
import torch
from places import GOLDEN
from tiny_models import tiny_model, tiny_vit

from pipeline.distill.objective import learning_rate_factor
from pipeline.distill.step import (
    Batch,
    GradientWatch,
    Objective,
    Terms,
    read_values,
    training_step,
)

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
    return read_values(
        training_step(objective, optimizer, batch, learning_rate=learning_rate, gradient_clip=0.05, **options)
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
@pytest.mark.parametrize("fused", [None, True])  # True: as on a GPU
def test_a_gradient_that_is_not_finite_changes_nothing(model, batch, bad, fused):
    """Nor does any later one of the same run, whoever looks how late."""
    objective, _ = make_objective(model)
    optimizer = torch.optim.Adam(model.trainable_parameters(), fused=fused)
    watch = GradientWatch(torch.device("cpu"), step=7)
    for _ in range(2):
        step(objective, optimizer, batch, watch=watch)
    before, moments = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    broken = Batch(video=batch.video.clone(), target_slots=batch.target_slots)
    broken.video[0, 0, 0, 0, 0] = bad
    values = step(objective, optimizer, broken, watch=watch)
    assert not math.isfinite(values["gradient_norm"])
    after = step(objective, optimizer, batch, watch=watch)
    assert all(map(math.isfinite, after.values()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(optimizer.state_dict()["state"], moments, rtol=0, atol=0)
    assert (bool(watch.failed), int(watch.finite_steps)) == (True, 9)
    step(objective, optimizer, batch)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_decides_on_the_device_updates_alike(model, batch):
    """The fused kernel that GPUs use, here on the CPU."""
    curves = []
    for fused in (None, True):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.Adam(copied.trainable_parameters(), fused=fused)
        objective = Objective(copied, Terms(slot_kd=0.2))
        curves.append([step(objective, optimizer, batch)["total"] for _ in range(10)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < 0.99 * curves[0][0]


def test_half_precision_is_close_and_losses_stay_float32(model, batch):
    objective, optimizer = make_objective(model)
    full, half = (step(objective, optimizer, batch, 0.0, autocast=dtype) for dtype in (None, torch.bfloat16))
    assert half["total"] == pytest.approx(full["total"], rel=0.05)
    assert half["total"] != full["total"]


def test_slots_are_carried_in_float32_whatever_the_products_are(model, batch):
    exact = model(batch.video).slots
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.encoder.output_transform(model.backbone_features(batch.video))
        rounded = model(batch.video).slots
    assert (features.dtype, rounded.dtype) == (torch.bfloat16, torch.float32)
    carried, _ = model._roll(features.float(), model.initial_slots(2), "forward")
    assert torch.equal(rounded, torch.stack(carried, 1))
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)

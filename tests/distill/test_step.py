"""The training step, called as a GPU box without Ray would."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.distill.step import Batch, Objective, Terms, learning_rate_factor, training_step
from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss, slot_kd_loss
from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = SlotModelConfig(BackboneConfig(None, 32, VIT), 3, 8, decoder_hidden_sizes=(16, 16))
    return SlotModel(config).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, 4, 3, 32, 32, generator=generator)
    return Batch(video=video, target_slots=torch.randn(2, 4, 3, 8, generator=generator))


def make_objective(model, alpha=1.0, beta=0.2, temperature=0.1):
    objective = Objective(model, Terms(alpha=alpha, slot_kd=beta, temperature=temperature))
    return objective, torch.optim.Adam(model.trainable_parameters(), lr=1.0)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("schedule", "total"), [("schedule_100k", 100_000), ("schedule_300k", 300_000)])
def test_schedule_is_the_references(schedule, total):
    for step, factor in GOLDEN[schedule].items():
        value = learning_rate_factor(int(step), warmup_steps=2500, total_steps=total)
        assert value == pytest.approx(factor, rel=1e-6), step


def test_schedule_without_warm_up():
    assert learning_rate_factor(0, warmup_steps=0, total_steps=100) == 1
    assert learning_rate_factor(100, warmup_steps=0, total_steps=100) == 0.5
    assert learning_rate_factor(10, warmup_steps=10, total_steps=10) == 1


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 0.2, 0.1), (0.5, 2.0, 0.3)])
def test_total_is_the_weighted_sum(model, batch, alpha, beta, temperature):
    losses = make_objective(model, alpha, beta, temperature)[0](batch)
    with torch.no_grad():
        output = model(batch.video)
    reconstruction = feature_reconstruction_loss(output.reconstruction, output.backbone_features)
    contrast = slot_contrastive_loss(output.slots, temperature)
    kd = slot_kd_loss(output.slots, batch.target_slots)
    expected = {
        "reconstruction": reconstruction,
        "contrast": contrast,
        "slot_kd": kd,
        "total": reconstruction + alpha * contrast + beta * kd,
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_terms_without_weight_are_left_out(model, batch):
    """A teacher, and a student without distillation, need no targets."""
    losses = make_objective(model, beta=0)[0](Batch(video=batch.video))
    assert set(losses) == {"total", "reconstruction", "contrast"}
    single_frame = Batch(video=batch.video[:, :1])
    losses = make_objective(model, alpha=0, beta=0)[0](single_frame)
    assert losses["total"] == losses["reconstruction"]


def test_distillation_without_targets_is_an_error(model, batch):
    with pytest.raises(ValueError, match="distillation needs the teacher's slots"):
        make_objective(model)[0](Batch(video=batch.video))


def test_step_from_cached_features_equals_step_from_video(model, batch):
    features = model.backbone_features(batch.video)
    cached = Batch(backbone_features=features, target_slots=batch.target_slots)
    objective, _ = make_objective(model)
    assert objective(cached)["total"].item() == pytest.approx(objective(batch)["total"].item(), rel=1e-6)


def test_step_changes_what_trains_and_nothing_else(model, batch):
    objective, optimizer = make_objective(model)
    before = weights(model)
    values = training_step(objective, optimizer, batch, learning_rate=1e-3, gradient_clip=0.05)
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
    training_step(objective, optimizer, batch, learning_rate=0.0, gradient_clip=0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradient_norm_is_that_before_clipping(model, batch):
    objective, optimizer = make_objective(model)
    objective(batch)["total"].backward()
    norm = torch.stack([p.grad.norm() for p in model.trainable_parameters()]).norm().item()
    values = training_step(objective, optimizer, batch, learning_rate=1e-3, gradient_clip=0.05)
    assert values["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    clipped = torch.stack([p.grad.norm() for p in model.trainable_parameters()]).norm().item()
    assert clipped == pytest.approx(min(norm, 0.05), rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_weights(model, batch, bad):
    objective, optimizer = make_objective(model)
    training_step(objective, optimizer, batch, learning_rate=1e-3, gradient_clip=0.05)
    before = weights(model)
    broken = Batch(video=batch.video.clone(), target_slots=batch.target_slots)
    broken.video[0, 0, 0, 0, 0] = bad
    values = training_step(objective, optimizer, broken, learning_rate=1e-3, gradient_clip=0.05)
    assert not torch.isfinite(torch.tensor(values["gradient_norm"]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = training_step(objective, optimizer, batch, learning_rate=1e-3, gradient_clip=0.05)
    assert torch.isfinite(torch.tensor(list(after.values()))).all()


def test_training_learns(model, batch):
    objective, optimizer = make_objective(model)
    curve = [
        training_step(objective, optimizer, batch, learning_rate=3e-3, gradient_clip=1.0) for _ in range(60)
    ]
    for name, share in (("total", 0.8), ("reconstruction", 0.95), ("slot_kd", 0.8)):
        assert curve[-1][name] < share * curve[0][name], name


def test_the_same_seed_gives_the_same_curve(batch):
    def curve():
        torch.manual_seed(0)
        model = SlotModel(SlotModelConfig(BackboneConfig(None, 32, VIT), 3, 8, decoder_hidden_sizes=(16,)))
        objective, optimizer = make_objective(model)
        return [
            training_step(objective, optimizer, batch, learning_rate=1e-3, gradient_clip=0.05)["total"]
            for _ in range(5)
        ]

    assert curve() == curve()


def test_half_precision_is_close_and_losses_stay_float32(model, batch):
    objective, optimizer = make_objective(model)
    full = training_step(objective, optimizer, batch, learning_rate=0.0, gradient_clip=0.05)
    half = training_step(
        objective, optimizer, batch, learning_rate=0.0, gradient_clip=0.05, autocast=torch.bfloat16
    )
    assert half["total"] == pytest.approx(full["total"], rel=0.05)
    assert half["total"] != full["total"]

"""The losses against loops that follow the formulas word for word."""

import math

import pytest
import torch

from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss, slot_kd_loss


def random_slots(seed, B=2, T=4, N=3, d=8):
    return torch.randn(B, T, N, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_slot_kd_loss_is_eq_2():
    student, teacher = random_slots(0), random_slots(1)
    B, T, N, _ = student.shape
    terms = [
        1 - cosine(student[b, t, n], teacher[b, t, n]) for b in range(B) for t in range(T) for n in range(N)
    ]
    assert slot_kd_loss(student, teacher).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_slot_kd_loss_looks_at_directions_slot_by_slot():
    slots = random_slots(0)
    assert slot_kd_loss(3 * slots, slots).item() == pytest.approx(0, abs=1e-12)
    assert slot_kd_loss(-slots, slots).item() == pytest.approx(2)
    assert slot_kd_loss(slots.roll(1, dims=2), slots) > 0.1


def test_slot_kd_loss_leaves_the_teacher_alone():
    student, teacher = random_slots(0).requires_grad_(), random_slots(1).requires_grad_()
    slot_kd_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_slot_kd_loss_wants_equal_shapes():
    """Broadcasting would average over pairs that nobody meant."""
    slots = random_slots(0)
    for other in (slots[:, :, :1], slots[:1], slots[..., :1], slots[:, 0]):
        with pytest.raises(ValueError, match=r"student slots .* teacher slots .* differ"):
            slot_kd_loss(slots, other)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_slot_contrastive_loss(temperature):
    """Cross-entropy of slot j at t+1 against every slot of the batch at t, the same one being right."""
    slots = random_slots(0)
    B, T, N, _ = slots.shape
    terms = []
    for t in range(T - 1):
        earlier = [slots[b, t, n] for b in range(B) for n in range(N)]
        later = [slots[b, t + 1, n] for b in range(B) for n in range(N)]
        for j, slot in enumerate(later):
            similarities = [cosine(other, slot) / temperature for other in earlier]
            terms.append(math.log(sum(map(math.exp, similarities))) - similarities[j])
    expected = sum(terms) / len(terms)
    assert slot_contrastive_loss(slots, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_slot_contrastive_loss_prefers_slots_that_stay():
    steady = random_slots(0)[:, :1].expand(-1, 4, -1, -1)
    swapped = torch.stack([steady[:, t].roll(t, dims=1) for t in range(4)], dim=1)
    assert slot_contrastive_loss(steady) < 0.1 < 1 < slot_contrastive_loss(swapped)


def test_slot_contrastive_loss_pools_the_batch():
    """Slots of other videos are negatives: two equal videos can't be told apart."""
    one = random_slots(0, B=1)[:, :1].expand(-1, 2, -1, -1)
    two = one.expand(2, -1, -1, -1)
    difference = slot_contrastive_loss(two) - slot_contrastive_loss(one)
    assert difference.item() == pytest.approx(math.log(2))


def test_slot_contrastive_loss_needs_two_frames():
    with pytest.raises(ValueError, match="T = 1"):
        slot_contrastive_loss(random_slots(0, T=1))


def test_feature_reconstruction_loss():
    reconstruction, features = random_slots(0).requires_grad_(), random_slots(1).requires_grad_()
    loss = feature_reconstruction_loss(reconstruction, features)
    assert loss.item() == pytest.approx(((reconstruction - features) ** 2).mean().item())
    loss.backward()
    assert features.grad is None
    assert reconstruction.grad.abs().sum() > 0

"""What Table 1 compares with, and VideoSAUR's loss, against loops that follow the definitions."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.losses import (
    feature_kd_loss,
    hungarian_slot_kd_loss,
    match_slots,
    reconstruction_kd_loss,
    slot_kd_loss,
    slot_mse_loss,
    temporal_similarity_loss,
)


def random_tensor(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_only_the_first_learns(loss, learns, fixed):
    loss.backward()
    assert fixed.grad is None
    assert learns.grad.abs().sum() > 0


# --- VideoSAUR's temporal similarity -----------------------------------------------------------


def expected_temporal_similarity(logits, features, temperature, threshold):
    """Written for numpy and one patch at a time."""
    logits, features = logits.numpy(), features.numpy()
    B, T, P, _ = features.shape
    terms = []
    for b in range(B):
        for t in range(T - 1):
            for p in range(P):
                here, weights = features[b, t, p], []
                for q in range(P):
                    there = features[b, t + 1, q]
                    cosine = here @ there / np.linalg.norm(here) / np.linalg.norm(there)
                    weights.append(math.exp(cosine / temperature) if cosine >= threshold else 0.0)
                if sum(weights) == 0:
                    weights = [1.0] * P
                target = np.array(weights) / sum(weights)
                log_probability = logits[b, t, p] - math.log(np.exp(logits[b, t, p]).sum())
                terms.append(-(target * log_probability).sum())
    return float(np.mean(terms))


@pytest.mark.parametrize(("temperature", "threshold"), [(0.075, 0.0), (0.25, 0.0), (0.15, 0.4), (1.0, -1.1)])
def test_temporal_similarity_loss(temperature, threshold):
    logits, features = random_tensor(0, 2, 3, 4, 4), random_tensor(1, 2, 3, 4, 5)
    expected = expected_temporal_similarity(logits, features, temperature, threshold)
    loss = temporal_similarity_loss(logits, features, temperature=temperature, threshold=threshold)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_temporal_similarity_of_a_patch_that_resembles_none_is_uniform():
    """All of the next frame points the other way: as in the public implementation, and not nan."""
    features = random_tensor(0, 1, 1, 1, 5) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    features = features.expand(-1, -1, 4, -1)
    logits = random_tensor(1, 1, 2, 4, 4).requires_grad_()
    loss = temporal_similarity_loss(logits, features, temperature=0.1, threshold=0.0)
    assert loss.item() == pytest.approx(-logits[:, :1].log_softmax(-1).mean().item())
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_temporal_similarity_loss_looks_at_the_next_frame():
    """Least for logits that are the similarities themselves; the last frame's logits are not asked."""
    features = random_tensor(0, 2, 3, 4, 5)
    unit = features / features.norm(dim=-1, keepdim=True)
    logits = (unit @ unit.roll(-1, dims=1).transpose(2, 3)) / 0.1
    options = {"temperature": 0.1, "threshold": -1.1}
    best = temporal_similarity_loss(logits, features, **options)
    entropy = torch.distributions.Categorical(logits=logits[:, :-1]).entropy().mean()
    assert best.item() == pytest.approx(entropy.item())
    for other in (logits.transpose(2, 3), logits.roll(1, dims=1), torch.zeros_like(logits)):
        assert temporal_similarity_loss(other, features, **options) > best
    logits[:, -1] = math.nan
    assert temporal_similarity_loss(logits, features, **options) == best


def test_temporal_similarity_loss_leaves_the_features_alone():
    logits, features = (random_tensor(s, 1, 2, 4, 4).requires_grad_() for s in (0, 1))
    loss = temporal_similarity_loss(logits, features, temperature=0.1, threshold=0.0)
    assert_only_the_first_learns(loss, logits, features)


def test_temporal_similarity_loss_errors():
    features = random_tensor(0, 2, 3, 4, 5)
    for shape in [(2, 3, 4, 5), (2, 3, 5, 4), (2, 2, 4, 4), (3, 4, 4)]:
        with pytest.raises(ValueError, match=r"similarity logits have shape .* need \(2, 3, 4, 4\)"):
            temporal_similarity_loss(random_tensor(1, *shape), features, temperature=0.1, threshold=0.0)
    with pytest.raises(ValueError, match="T = 1"):
        temporal_similarity_loss(
            random_tensor(1, 2, 1, 4, 4), features[:, :1], temperature=0.1, threshold=0.0
        )


# --- slots -----------------------------------------------------------------------------------------


def test_slot_mse_loss():
    student, teacher = (random_tensor(s, 2, 4, 3, 8).requires_grad_() for s in (0, 1))
    loss = slot_mse_loss(student, teacher)
    expected = np.mean((student.detach().numpy() - teacher.detach().numpy()) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert_only_the_first_learns(loss, student, teacher)


@pytest.mark.parametrize(
    "loss",
    [slot_mse_loss, lambda *slots: hungarian_slot_kd_loss(*slots, per="frame")],
    ids=["mse", "hungarian"],
)
def test_slot_losses_want_equal_shapes(loss):
    slots = random_tensor(0, 2, 4, 3, 8)
    for other in (slots[:, :, :1], slots[:1], slots[..., :1], slots[:, 0]):
        with pytest.raises(ValueError, match=r"student slots .* teacher slots .* differ"):
            loss(slots, other)


def shuffled(slots, per, seed=5):
    """Slots in another order, and the place where each came from `(B, T, N)`."""
    B, T, N, _ = slots.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(N, generator=generator) for _ in range(B * T)]).view(B, T, N)
    if per == "clip":
        order = order[:, :1].expand(-1, T, -1)
    return torch.stack([torch.stack([slots[b, t][order[b, t]] for t in range(T)]) for b in range(B)]), order


@pytest.mark.parametrize("per", ["clip", "frame"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_match_slots_finds_the_order(per, dtype):
    teacher = random_tensor(0, 3, 4, 6, 16)
    student, order = shuffled(teacher, per)
    student = (2.5 * student + 0.01 * random_tensor(1, *student.shape)).to(dtype).requires_grad_()
    match = match_slots(student, teacher.to(dtype), per=per)
    assert (match.dtype, match.requires_grad) == (torch.int64, False)
    assert torch.equal(match, order)


def test_match_slots_per_clip_keeps_the_first_frame():
    """Slots that swap in the middle of the clip are not followed; "frame" follows them."""
    teacher = random_tensor(0, 1, 3, 4, 16)
    student = teacher.clone()
    student[:, 1:] = student[:, 1:].flip(2)
    identity = torch.arange(4)
    assert match_slots(student, teacher, per="clip").eq(identity).all()
    frames = match_slots(student, teacher, per="frame")[0]
    assert frames.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0], [3, 2, 1, 0]]


def test_match_slots_is_the_best_of_all_permutations():
    """One to one and best in total, not each slot its nearest."""
    import itertools

    student, teacher = random_tensor(0, 2, 2, 4, 3), random_tensor(1, 2, 2, 4, 3)
    similarity = torch.cosine_similarity(student.unsqueeze(3), teacher.unsqueeze(2), dim=-1)
    match = match_slots(student, teacher, per="frame")
    for b, t in itertools.product(range(2), range(2)):
        best = max(
            itertools.permutations(range(4)),
            key=lambda p: sum(similarity[b, t, n, p[n]].item() for n in range(4)),
        )
        assert match[b, t].tolist() == list(best)


@pytest.mark.parametrize("per", ["clip", "frame"])
def test_hungarian_slot_kd_loss(per):
    teacher = random_tensor(0, 2, 4, 5, 8)
    student, order = shuffled(teacher, per)
    assert hungarian_slot_kd_loss(student, teacher, per=per).item() == pytest.approx(0, abs=1e-12)
    assert slot_kd_loss(student, teacher) > 0.1
    student = (student + 0.1 * random_tensor(1, *student.shape)).requires_grad_()
    teacher.requires_grad_()
    loss = hungarian_slot_kd_loss(student, teacher, per=per)
    terms = [
        1 - torch.cosine_similarity(student[b, t, n], teacher[b, t, order[b, t, n]], dim=0).item()
        for b in range(2)
        for t in range(4)
        for n in range(5)
    ]
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-9)
    assert_only_the_first_learns(loss, student, teacher)


def test_match_slots_lets_nan_through_to_the_loss():
    """A diverged student is the training step's to handle, so the matching must not raise."""
    student, teacher = random_tensor(0, 2, 4, 3, 8), random_tensor(1, 2, 4, 3, 8)
    student[0, 0, 1] = math.nan
    student[1, 0, 1] = math.inf
    assert match_slots(student, teacher, per="frame").sort(dim=-1).values.eq(torch.arange(3)).all()
    assert hungarian_slot_kd_loss(student, teacher, per="clip").isnan()


def test_match_slots_names_the_choices():
    slots = random_tensor(0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="'clip' or per 'frame', not 'video'"):
        match_slots(slots, slots, per="video")


def test_losses_import_neither_scipy_nor_ray():
    """A GPU box that distils by Eq. 2 needs neither."""
    check = "import sys, pipeline.losses, pipeline.distill.bound; print(sorted({'scipy', 'ray'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


# --- features and reconstructions ----------------------------------------------------------------


def test_feature_kd_loss_of_equal_grids():
    """Nothing is resized, so the grid need not be square."""
    student, teacher = (random_tensor(s, 2, 3, 6, 5).requires_grad_() for s in (0, 1))
    loss = feature_kd_loss(student, teacher)
    expected = np.mean((student.detach().numpy() - teacher.detach().numpy()) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert_only_the_first_learns(loss, student, teacher)


def bilinear(grid, side):
    """Half-pixel bilinear interpolation of `(h, h, F)` to `(side, side, F)`, one position at a time."""
    h = len(grid)
    result = np.empty((side, side, grid.shape[-1]))
    for i in range(side):
        for j in range(side):
            y, x = (np.clip((k + 0.5) * h / side - 0.5, 0, h - 1) for k in (i, j))
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, h - 1)
            top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
            bottom = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
            result[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return result


@pytest.mark.parametrize(("student_side", "teacher_side"), [(3, 5), (4, 3)])
def test_feature_kd_loss_resizes_the_students_grid(student_side, teacher_side):
    student = random_tensor(0, 2, 3, student_side**2, 4).requires_grad_()
    teacher = random_tensor(1, 2, 3, teacher_side**2, 4).requires_grad_()
    terms = []
    for b in range(2):
        for t in range(3):
            grid = student.detach()[b, t].numpy().reshape(student_side, student_side, 4)
            target = teacher.detach()[b, t].numpy().reshape(teacher_side, teacher_side, 4)
            terms.append(((bilinear(grid, teacher_side) - target) ** 2).mean())
    loss = feature_kd_loss(student, teacher)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-9)
    assert_only_the_first_learns(loss, student, teacher)


def test_feature_kd_loss_errors():
    teacher = random_tensor(0, 2, 3, 9, 4)
    for shape in [(1, 3, 9, 4), (2, 1, 9, 4), (2, 3, 9, 1)]:
        with pytest.raises(ValueError, match="differ in more than the number of patches"):
            feature_kd_loss(random_tensor(1, *shape), teacher)
    for student, other in [(random_tensor(1, 2, 3, 6, 4), teacher), (teacher, random_tensor(1, 2, 3, 6, 4))]:
        with pytest.raises(ValueError, match="only square grids"):
            feature_kd_loss(student, other)


def test_reconstruction_kd_loss():
    student, teacher = (random_tensor(s, 2, 3, 4, 5).requires_grad_() for s in (0, 1))
    loss = reconstruction_kd_loss(student, teacher)
    expected = np.mean((student.detach().numpy() - teacher.detach().numpy()) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert_only_the_first_learns(loss, student, teacher)
    for other in (teacher[:, :, :1], teacher[..., :1], teacher[:1]):
        with pytest.raises(ValueError, match=r"student reconstruction .* teacher reconstruction .* differ"):
            reconstruction_kd_loss(student, other)

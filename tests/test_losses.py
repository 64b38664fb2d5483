"""The losses against loops that follow their definitions word for word."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from places import python

from pipeline.losses import (
    feature_kd_loss,
    feature_reconstruction_loss,
    hungarian_slot_kd_loss,
    match_slots,
    reconstruction_kd_loss,
    slot_contrastive_loss,
    slot_kd_loss,
    slot_mse_loss,
    temporal_similarity_loss,
)


def random_tensor(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


# Of all that compare a student with what it learns from, and two tensors for them.
def similarity_loss(logits, features):
    return temporal_similarity_loss(logits, features, temperature=0.1, threshold=0.0)


SLOTS, PATCHES = (2, 4, 3, 8), (2, 3, 9, 4)
PAIRS = {
    "slot_kd": (slot_kd_loss, SLOTS, SLOTS),
    "slot_mse": (slot_mse_loss, SLOTS, SLOTS),
    "hungarian, clip": (lambda *slots: hungarian_slot_kd_loss(*slots, per="clip"), SLOTS, SLOTS),
    "hungarian, frame": (lambda *slots: hungarian_slot_kd_loss(*slots, per="frame"), SLOTS, SLOTS),
    "feature_reconstruction": (feature_reconstruction_loss, PATCHES, PATCHES),
    "feature_kd": (feature_kd_loss, PATCHES, PATCHES),
    "feature_kd, other grids": (partial(feature_kd_loss, grids=((3, 3), (2, 8))), PATCHES, (2, 3, 16, 4)),
    "reconstruction_kd": (reconstruction_kd_loss, PATCHES, PATCHES),
    "temporal similarity": (similarity_loss, (1, 2, 4, 4), (1, 2, 4, 5)),
}
MEAN_SQUARES = ("slot_mse", "feature_reconstruction", "feature_kd", "reconstruction_kd")


@pytest.mark.parametrize("name", PAIRS)
def test_only_the_first_learns(name):
    loss, *shapes = PAIRS[name]
    learns, fixed = (random_tensor(seed, *shape).requires_grad_() for seed, shape in enumerate(shapes))
    loss(learns, fixed).backward()
    assert fixed.grad is None
    assert learns.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MEAN_SQUARES)
@pytest.mark.parametrize("patches", [9, 6])
def test_mean_squares(name, patches):
    """Where nothing is resized, a grid need not be square."""
    one, other = (random_tensor(seed, 2, 3, patches, 5) for seed in (0, 1))
    assert PAIRS[name][0](one, other).item() == pytest.approx(((one - other) ** 2).mean().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["slot_kd", "slot_mse", "hungarian, frame", "reconstruction_kd"])
def test_shapes_must_be_equal(name):
    """Broadcasting would average over pairs that nobody meant."""
    what = "reconstruction" if name == "reconstruction_kd" else "slots"
    one = random_tensor(0, *SLOTS)
    for other in (one[:, :, :1], one[:1], one[..., :1], one[:, 0]):
        with pytest.raises(ValueError, match=rf"student {what} .* teacher {what} .* differ"):
            PAIRS[name][0](one, other)


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


def test_temporal_similarity_loss_errors():
    features = random_tensor(0, 2, 3, 4, 5)
    for shape in [(2, 3, 4, 5), (2, 3, 5, 4), (2, 2, 4, 4), (3, 4, 4)]:
        with pytest.raises(ValueError, match=r"similarity logits have shape .* need \(2, 3, 4, 4\)"):
            temporal_similarity_loss(random_tensor(1, *shape), features, temperature=0.1, threshold=0.0)
    with pytest.raises(ValueError, match="T = 1"):
        similarity_loss(random_tensor(1, 2, 1, 4, 4), features[:, :1])


# --- slots -----------------------------------------------------------------------------------------


def test_slot_kd_loss_is_eq_2():
    student, teacher = random_tensor(0, *SLOTS), random_tensor(1, *SLOTS)
    B, T, N, _ = student.shape
    terms = [
        1 - cosine(student[b, t, n], teacher[b, t, n]) for b in range(B) for t in range(T) for n in range(N)
    ]
    assert slot_kd_loss(student, teacher).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_slot_kd_loss_looks_at_directions_slot_by_slot():
    slots = random_tensor(0, *SLOTS)
    assert slot_kd_loss(3 * slots, slots).item() == pytest.approx(0, abs=1e-12)
    assert slot_kd_loss(-slots, slots).item() == pytest.approx(2)
    assert slot_kd_loss(slots.roll(1, dims=2), slots) > 0.1


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_slot_contrastive_loss(temperature):
    """Cross-entropy of slot j at t+1 against every slot of the batch at t, the same one being right."""
    slots = random_tensor(0, *SLOTS)
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
    steady = random_tensor(0, *SLOTS)[:, :1].expand(-1, 4, -1, -1)
    swapped = torch.stack([steady[:, t].roll(t, dims=1) for t in range(4)], dim=1)
    assert slot_contrastive_loss(steady) < 0.1 < 1 < slot_contrastive_loss(swapped)


def test_slot_contrastive_loss_pools_the_batch():
    """Slots of other videos are negatives: two equal videos can't be told apart."""
    one = random_tensor(0, 1, 4, 3, 8)[:, :1].expand(-1, 2, -1, -1)
    two = one.expand(2, -1, -1, -1)
    difference = slot_contrastive_loss(two) - slot_contrastive_loss(one)
    assert difference.item() == pytest.approx(math.log(2))


def test_slot_contrastive_loss_needs_two_frames():
    with pytest.raises(ValueError, match="T = 1"):
        slot_contrastive_loss(random_tensor(0, 2, 1, 3, 8))


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
    student = student + 0.1 * random_tensor(1, *student.shape)
    loss = hungarian_slot_kd_loss(student, teacher, per=per)
    places = itertools.product(range(2), range(4), range(5))
    terms = [1 - cosine(student[b, t, n], teacher[b, t, order[b, t, n]]) for b, t, n in places]
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-9)


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
    assert python("-c", check)[0].strip() == "[]"


# --- features and reconstructions ----------------------------------------------------------------


def bilinear(grid, size):
    """Half-pixel bilinear interpolation of `(h, w, F)` to `(*size, F)`, one position at a time."""
    sides = grid.shape[:2]
    result = np.empty((*size, grid.shape[-1]))
    for i, j in np.ndindex(*size):
        y, x = (
            np.clip((k + 0.5) * old / new - 0.5, 0, old - 1)
            for k, old, new in zip((i, j), sides, size, strict=True)
        )
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, sides[0] - 1), min(x0 + 1, sides[1] - 1)
        top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
        bottom = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
        result[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return result


@pytest.mark.parametrize("grids", [((3, 3), (5, 5)), ((4, 4), (3, 3)), ((2, 6), (4, 3))])
def test_feature_kd_loss_resizes_the_students_grid(grids):
    student, teacher = (random_tensor(i, 2, 3, h * w, 4) for i, (h, w) in enumerate(grids))
    terms = []
    for b in range(2):
        for t in range(3):
            grid, target = (
                x[b, t].numpy().reshape(*g, 4) for x, g in zip((student, teacher), grids, strict=True)
            )
            terms.append(((bilinear(grid, grids[1]) - target) ** 2).mean())
    loss = feature_kd_loss(student, teacher, grids=grids)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-9)


def test_feature_kd_loss_errors():
    teacher = random_tensor(0, 2, 3, 9, 4)
    for shape in [(1, 3, 9, 4), (2, 1, 9, 4), (2, 3, 9, 1)]:
        with pytest.raises(ValueError, match="differ in more than the number of patches"):
            feature_kd_loss(random_tensor(1, *shape), teacher)
    for grids in (None, ((2, 3), (3, 2)), ((3, 3), (3, 3))):
        with pytest.raises(ValueError, match="need the grids of their patches"):
            feature_kd_loss(random_tensor(1, 2, 3, 6, 4), teacher, grids=grids)

"""Theorem 1: its two sides against direct computation, on maps whose Lipschitz constant is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.distill.bound import reconstruction_bound
from pipeline.losses import reconstruction_kd_loss
from pipeline.models.decoders import MLPDecoder, SlotMixerDecoder

N, D, P, FEATURES = 3, 8, 9, 6


class LinearDecoder(nn.Module):
    """f(S) = W vec(S) for the slots of a frame jointly, with given singular values."""

    def __init__(self, singular_values=(5.0, 3.0, 2.0, 1.0), extra=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        left, right = (
            torch.linalg.qr(torch.randn(size, len(singular_values), generator=generator))[0]
            for size in (P * FEATURES, N * D)
        )
        self.weight = nn.Parameter(left @ torch.tensor(singular_values).diag() @ right.T)
        self.extra = extra  # behind the features: another output, which is none of the theorem's

    def forward(self, slots_MND):
        features = F.linear(slots_MND.flatten(1), self.weight).view(-1, P, FEATURES)
        similarity = self.extra * slots_MND.square().sum((1, 2)).view(-1, 1, 1).expand(-1, P, P)
        return torch.cat([features, similarity], dim=-1), slots_MND.sum()


def random_slots(seed, B=2, T=3, scale=1.0):
    return scale * torch.randn(B, T, N, D, generator=torch.Generator().manual_seed(seed))


def with_norm(slots, norm):
    return norm * F.normalize(slots, dim=-1)


def real_decoder(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "slot_mixer":
        decoder = SlotMixerDecoder(P, D, FEATURES + P, (32, 32), num_blocks=2)
    else:
        decoder = MLPDecoder(P, D, FEATURES, (32, 32))
        decoder.fast = kind == "mlp_fast"
    return decoder


DECODERS = ["mlp_fast", "mlp_plain", "slot_mixer"]


@pytest.mark.parametrize("iterations", [8, 30])
def test_linear_map_has_its_largest_singular_value(iterations):
    teacher, student = random_slots(0), random_slots(1)
    decoder = LinearDecoder()
    settings = {"iterations": iterations, "frames": 1, "points": 1}
    result = reconstruction_bound(decoder, teacher, student, feature_size=FEATURES, **settings)
    assert result.lipschitz == pytest.approx(5, rel=1e-3)
    assert result.bound_any_norm >= result.measured


def test_linear_map_bound_is_reached_along_its_largest_direction():
    """The inequality without the equal-norm assumption can't be tightened."""
    decoder = LinearDecoder()
    direction = torch.linalg.svd(decoder.weight.detach())[2][0].view(1, 1, N, D)
    teacher = random_slots(0)
    result = reconstruction_bound(decoder, teacher, teacher + 0.3 * direction, feature_size=FEATURES)
    assert result.ratio_any_norm == pytest.approx(1, rel=1e-3)
    assert result.measured == pytest.approx((5 * 0.3) ** 2, rel=1e-3)


def test_both_sides_are_those_of_the_theorem():
    decoder, teacher, student = LinearDecoder(), random_slots(0), random_slots(1, scale=2.0)
    result = reconstruction_bound(decoder, teacher, student, feature_size=FEATURES)
    weight = decoder.weight.detach().numpy()
    measured, cosines, equal, whole = [], [], [], []
    for b in range(2):
        for t in range(3):
            one, other = teacher[b, t].numpy(), student[b, t].numpy()
            measured.append(np.sum((weight @ (one - other).ravel()) ** 2))
            norms = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
            c = 1 - (one * other).sum(1) / norms[0] / norms[1]
            cosines.extend(c)
            equal.append(np.sum(2 * norms[0] * norms[1] * c))
            whole.append(np.sum(2 * norms[0] * norms[1] * c + (norms[0] - norms[1]) ** 2))
    constant = result.lipschitz**2
    assert result.measured == pytest.approx(np.mean(measured), rel=1e-4)
    assert result.measured_mse == pytest.approx(np.mean(measured) / (P * FEATURES), rel=1e-4)
    assert result.cosine_distance == pytest.approx(np.mean(cosines), rel=1e-4)
    assert result.teacher_norm == pytest.approx(teacher.norm(dim=-1).mean().item())
    assert result.student_norm == pytest.approx(student.norm(dim=-1).mean().item())
    assert result.bound == pytest.approx(constant * np.mean(equal), rel=1e-4)
    assert result.bound_any_norm == pytest.approx(constant * np.mean(whole), rel=1e-4)
    assert result.ratio == pytest.approx(result.bound / result.measured)
    assert result.ratio_any_norm == pytest.approx(result.bound_any_norm / result.measured)


def test_mse_is_what_reconstruction_kd_trains():
    decoder, teacher, student = real_decoder("mlp_fast"), random_slots(0, B=5), random_slots(1, B=5)
    decoded = (decoder(slots.flatten(0, 1))[0].unflatten(0, (5, 3)) for slots in (student, teacher))
    measured = reconstruction_bound(decoder, teacher, student).measured_mse
    assert measured == pytest.approx(reconstruction_kd_loss(*decoded).item(), rel=1e-5)


def test_only_features_count():
    """Similarity logits behind the features change nothing; without `feature_size` all channels count."""
    teacher, student = random_slots(0), random_slots(1)
    without, with_logits = (
        reconstruction_bound(LinearDecoder(extra=extra), teacher, student, feature_size=FEATURES)
        for extra in (0.0, 10.0)
    )
    assert without == with_logits
    everything = reconstruction_bound(LinearDecoder(extra=10.0), teacher, student)
    assert everything.measured > 2 * without.measured


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("distance", [0.01, 0.3, 3.0])
def test_real_decoders_keep_the_bound(kind, distance):
    """With slots of one norm both bounds are the same, and the measured distance stays below."""
    teacher = with_norm(random_slots(0), 2.0)
    student = with_norm(teacher + distance * random_slots(1), 2.0)
    result = reconstruction_bound(real_decoder(kind), teacher, student, feature_size=FEATURES)
    assert 0 < result.measured <= result.bound
    assert result.bound == pytest.approx(result.bound_any_norm, rel=1e-4)
    assert result.ratio >= 1
    r, c = result.teacher_norm, result.cosine_distance
    assert result.bound == pytest.approx(2 * result.lipschitz**2 * r**2 * N * c, rel=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_jacobian_norm_is_that_of_the_whole_jacobian(kind):
    """The exact one, at the ends and the middle of the only segment; the last channels are none of it."""
    decoder = real_decoder(kind)
    teacher, student = random_slots(0, B=1, T=1), random_slots(1, B=1, T=1)
    exact = 0.0
    for weight in (0.0, 0.5, 1.0):
        point = torch.lerp(teacher, student, weight)[0]
        jacobian = torch.autograd.functional.jacobian(lambda s: decoder(s)[0][..., :FEATURES], point)
        exact = max(exact, torch.linalg.matrix_norm(jacobian.reshape(P * FEATURES, N * D), 2).item())
    few, many = (
        reconstruction_bound(decoder, teacher, student, feature_size=FEATURES, iterations=n).lipschitz
        for n in (8, 200)
    )
    assert many == pytest.approx(exact, rel=1e-3)
    assert 0.9 * exact < few <= exact * (1 + 1e-4)


def test_the_fast_decoder_gives_the_plain_ones_numbers():
    teacher, student = random_slots(0), random_slots(1)
    decoders = [real_decoder(kind) for kind in ("mlp_fast", "mlp_plain")]
    fast, plain = (reconstruction_bound(decoder, teacher, student) for decoder in decoders)
    assert vars(fast) == pytest.approx(vars(plain), rel=1e-4)


def test_equal_directions_with_other_norms_break_the_equal_norm_bound():
    """Eq. 2 ignores norms: c = 0 bounds nothing if they differ, which the other bound shows."""
    teacher = random_slots(0)
    result = reconstruction_bound(real_decoder("mlp_fast"), teacher, 2 * teacher)
    assert result.cosine_distance == pytest.approx(0, abs=1e-6)
    assert result.bound < 1e-6 * result.bound_any_norm
    assert result.bound < result.measured <= result.bound_any_norm


@pytest.mark.parametrize("kind", DECODERS)
def test_identical_slots(kind):
    """Nothing to bound: both sides are 0, and a ratio of them is undefined."""
    teacher = random_slots(0)
    result = reconstruction_bound(real_decoder(kind), teacher, teacher.clone())
    assert (result.measured, result.measured_mse, result.bound, result.bound_any_norm) == (0, 0, 0, 0)
    assert result.cosine_distance == pytest.approx(0, abs=1e-12)
    assert result.lipschitz > 0
    assert math.isnan(result.ratio)
    assert math.isnan(result.ratio_any_norm)


def test_a_decoder_that_ignores_its_slots():
    constant = LinearDecoder(singular_values=(0.0, 0.0))
    result = reconstruction_bound(constant, random_slots(0), random_slots(1), feature_size=FEATURES)
    assert (result.lipschitz, result.measured, result.bound) == (0, 0, 0)


@pytest.mark.parametrize("kind", DECODERS)
def test_callers_surroundings(kind):
    """The same numbers twice, without gradients, in inference mode and under autocast; nothing is left behind."""
    decoder, teacher, student = real_decoder(kind), random_slots(0), random_slots(1)
    state = torch.get_rng_state()
    plain = reconstruction_bound(decoder, teacher, student)
    assert reconstruction_bound(decoder, teacher, student) == plain
    assert reconstruction_bound(decoder, teacher, student.clone().requires_grad_()) == plain
    with torch.no_grad():
        assert reconstruction_bound(decoder, teacher, student) == plain
    with torch.inference_mode():
        assert reconstruction_bound(decoder, teacher * 1, student * 1) == plain
    with torch.autocast("cpu", torch.bfloat16):
        assert reconstruction_bound(decoder, teacher, student) == plain
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in decoder.parameters())


def test_the_frames_furthest_apart_are_looked_at():
    """One frame with other slots is enough: the rest of the batch has no part in the constant."""
    decoder, teacher = real_decoder("mlp_fast"), random_slots(0)
    student = teacher.clone()
    student[1, 2] = random_slots(1)[1, 2]
    whole = reconstruction_bound(decoder, teacher, student, frames=1)
    alone = reconstruction_bound(decoder, teacher[1:, 2:], student[1:, 2:])
    assert whole.lipschitz == pytest.approx(alone.lipschitz, rel=1e-5)
    assert whole.measured == pytest.approx(alone.measured / 6, rel=1e-5)
    assert whole.ratio == pytest.approx(alone.ratio, rel=1e-4)


def test_errors():
    decoder, slots = LinearDecoder(), random_slots(0)
    with pytest.raises(ValueError, match=r"student slots .* teacher slots .* differ"):
        reconstruction_bound(decoder, slots, slots[:, :1])
    with pytest.raises(ValueError, match="at least 1, not 0, 3 and 8"):
        reconstruction_bound(decoder, slots, slots, frames=0)
    for size in (0, FEATURES + P + 1):
        with pytest.raises(ValueError, match=f"feature_size {size} is not of the decoder's 15 channels"):
            reconstruction_bound(decoder, slots, slots, feature_size=size)

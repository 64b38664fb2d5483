"""Every kind of model runs, draws its slots and trains."""

import numpy as np
import pytest
import torch
from kinds import KINDS, VIT, build, each_kind, run, video

from pipeline.distill.step import Batch, Objective, Terms, training_step
from pipeline.models import start_as_soft_kmeans


def frames(T=7):
    return np.random.default_rng(0).integers(0, 256, (T, 40, 40, 3), np.uint8)


@each_kind
def test_shapes(kind):
    output = run(build(kind), T=3)
    outputs = KINDS[kind].get("decoder_outputs", ("features",))
    assert output.slots.shape == (2, 3, 3, 8)
    for shares in (output.masks, output.attention):
        torch.testing.assert_close(shares.sum(2), torch.ones(2, 3, 16))
    assert output.attention.shape == output.masks.shape == (2, 3, 3, 16)
    assert output.backbone_features.shape == (2, 3, 16, 32)
    given = {"features": output.reconstruction, "similarity": output.similarity}
    for name, size in (("features", 32), ("similarity", 16)):
        assert (given[name] is None) == (name not in outputs)
        assert given[name] is None or given[name].shape == (2, 3, 16, size)


@each_kind
@pytest.mark.parametrize("rollout", ["forward", "cyclic"])
@pytest.mark.parametrize("cut", [[7], [1] * 7, [3, 4], [1, 6]])
@torch.no_grad()
def test_streaming_in_any_chunks_equals_the_whole(kind, rollout, cut):
    model = build(kind)
    whole = model(model.prepare([frames()]), initial_slots=model.initial_slots(1, [9]), rollout=rollout)
    chunks = iter(np.split(frames(), np.cumsum(cut)[:-1]))
    parts = list(model.stream(chunks, noise_seed=9, rollout=rollout))
    assert [len(part[1]) for part in parts] == cut
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), frames())
    slots, masks = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    torch.testing.assert_close(slots, whole.slots[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(masks, whole.masks[0], rtol=0, atol=1e-5)
    labels = model.label_maps(masks, (40, 40))
    assert (labels.shape, labels.dtype) == ((7, 40, 40), torch.uint8)


@pytest.mark.parametrize("kind", ["videosaur", "dinosaur"])
@pytest.mark.parametrize("rollout", ["forward", "cyclic"])
def test_what_streaming_holds(kind, rollout):
    """Only a roll-out that really goes back waits for the end of the video."""
    asked = []

    def camera():
        for index in range(3):
            asked.append(index)
            yield frames(2)

    next(build(kind).stream(camera(), rollout=rollout))
    goes_back = kind == "videosaur" and rollout == "cyclic"
    assert asked == ([0, 1, 2] if goes_back else [0])


@torch.no_grad()
def test_image_models_see_each_frame_on_its_own():
    model = build("dinosaur")
    start, output = model.initial_slots(2, [5, 6]), run(model)
    shuffled = model(video()[:, [2, 0, 3, 1]], initial_slots=start)
    torch.testing.assert_close(shuffled.slots, output.slots[:, [2, 0, 3, 1]], rtol=0, atol=1e-6)
    for t in range(4):
        alone = model(video()[:, t : t + 1], initial_slots=start)
        torch.testing.assert_close(alone.masks[:, 0], output.masks[:, t], rtol=0, atol=1e-6)
    assert torch.equal(run(model, rollout="cyclic").slots, output.slots)
    features = model.encoder.output_transform(output.backbone_features)
    thrice, _ = model.processor.corrector(start, features[:, 2], 3)
    torch.testing.assert_close(output.slots[:, 2], thrice, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_mixer_gives_every_slot_the_same_treatment():
    """Permuted slots permute the masks, and change nothing of what is rendered."""
    decoder = build("videosaur").decoder
    slots = torch.randn(5, 3, 8)
    (outputs, masks), (same, permuted) = decoder(slots), decoder(slots[:, [2, 0, 1]])
    torch.testing.assert_close(same, outputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(permuted, masks[:, [2, 0, 1]], rtol=0, atol=1e-6)
    assert (masks[0] - masks[1]).abs().max() > 1e-3


# --- drawn slots ------------------------------------------------------------------------------------


@torch.no_grad()
def test_teacher_and_student_draw_the_same_noise():
    """Of as many slots of the same size: whatever else differs, wherever it runs, in batches of any size."""
    teacher = build("videosaur")
    student = build("dinosaur", seed=1, image_size=48, vit={**VIT, "patch_size": 16})
    seeds = [7, 2**62, 8]

    def noise(model, seeds):
        return (
            model.initial_slots(len(seeds), seeds) - model.initializer.mean
        ) / model.initializer.log_std.exp()

    torch.testing.assert_close(noise(teacher, seeds), noise(student, seeds), rtol=0, atol=1e-5)
    torch.testing.assert_close(noise(student, seeds[1:]), noise(teacher, seeds)[1:], rtol=0, atol=1e-5)
    student.initializer.load_state_dict(teacher.initializer.state_dict())
    assert torch.equal(teacher.initial_slots(3, seeds), student.initial_slots(3, seeds))
    many = teacher.initial_slots(400, list(range(400)))
    torch.testing.assert_close(many.mean((0, 1)), teacher.initializer.mean[0, 0], rtol=0, atol=0.1)
    expected = teacher.initializer.log_std.exp()[0, 0]
    torch.testing.assert_close(many.std((0, 1)), expected, rtol=0.1, atol=0)


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "T", "alpha"),
    [("videosaur", 4, 1.0), ("videosaur", 1, 0.0), ("dinosaur", 4, 0.0), ("dinosaur", 1, 0.0)],
)
def test_every_kind_that_reconstructs_can_train(kind, T, alpha):
    model = build(kind).train()
    objective = Objective(model, Terms(alpha=alpha, slot_kd=0.2))
    optimizer = torch.optim.Adam(model.trainable_parameters())
    target = torch.randn(2, T, 3, 8, generator=torch.Generator().manual_seed(2))
    curve = []
    for _ in range(40):
        batch = Batch(video(T), target_slots=target, initial_slots=model.initial_slots(2, [5, 6]))
        curve.append(
            training_step(objective, optimizer, batch, learning_rate=3e-3, gradient_clip=1.0)["total"]
        )
    assert curve[-1] < 0.9 * curve[0]
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all(name.startswith("processor.predictor.") for name in unused)
    assert not unused or T == 1


def test_what_can_not_train_says_so():
    with pytest.raises(ValueError, match="reconstructs no features"):
        Objective(build("videosaur_movi"), Terms(alpha=0, slot_kd=0.2))
    with pytest.raises(ValueError, match=r"alpha = 0\.5 contrasts neighbouring frames.*use alpha = 0"):
        Objective(build("dinosaur"), Terms(alpha=0.5, slot_kd=0.2))


@each_kind
def test_soft_kmeans_start(kind):
    model = build(kind)
    start_as_soft_kmeans(model)
    assert torch.isfinite(run(model).masks).all()

"""DIOD: the numbers of the public implementation (tests/golden/README.md), its files, streams and errors."""

import json

import golden_numbers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_numbers import numbers
from places import GOLDEN

from pipeline.models import load_slot_model, save_public_checkpoint, save_slot_model
from pipeline.models.rivals.diod import DIOD, DIODConfig
from pipeline.models.rivals.diod_losses import confident, diod_losses, follow, mask_loss, objects_of
from pipeline.models.rivals.pseudo_labels import pseudo_labels
from pipeline.models.rivals.schedules import diod_learning_rate

FILE, TEACHER = GOLDEN / "rivals" / "diod_tiny.ckpt", GOLDEN / "rivals" / "diod_tiny_teacher.ckpt"


@pytest.fixture(scope="module")
def golden():
    return numbers("rivals/diod_tiny")


@pytest.fixture
def model():
    return load_slot_model(FILE)


def close(value, expected, name=""):
    golden_numbers.close(value.reshape(expected.shape), expected, name)


def close_losses(model, losses, golden, kind):
    for name, value in losses.items():
        assert value.item() == pytest.approx(golden[f"{kind}_loss_{name}"].item(), rel=1e-5), name
    model.zero_grad()
    losses["total"].backward()
    norm = torch.stack([p.grad.norm() for p in model.trainable_parameters()]).norm().item()
    assert norm == pytest.approx(golden[f"{kind}_grad_norm"].item(), rel=1e-4)


def renumbered(labels, expected):
    """Whether maps `(T, h, w)` have the same segments in each frame, 0 being 0."""
    for one, other in zip(labels, expected, strict=True):
        pairs = {(int(a), int(b)) for a, b in zip(one.flatten(), other.flatten(), strict=True)}
        numbers = len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        if not numbers or any((a == 0) != (b == 0) for a, b in pairs):
            return False
    return True


# --- the public implementation's numbers ---------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_pass(golden, model, training):
    """Batch norm has the batch's statistics in eval mode too, but there it keeps the running ones as they are."""
    before = model.encoder_cnn.resnet.bn1.running_mean.clone()
    output = model.train(training)(golden["video"])
    for name in ("features", "slots", "masks", "foreground", "decoder_input", "reconstruction"):
        close(getattr(output, name), golden[name], name)
    assert torch.equal(output.attention, output.masks)
    after = golden["bn1_running_mean_after"] if training else before
    torch.testing.assert_close(model.encoder_cnn.resnet.bn1.running_mean, after, atol=1e-6, rtol=0)


@torch.no_grad()
def test_running_statistics_are_an_option(golden):
    model = load_slot_model(FILE, batch_statistics=False)
    close(model(golden["video"]).masks, golden["masks_eval_mode"])
    assert (golden["masks"] - golden["masks_eval_mode"]).abs().max() > 0.01
    alone = model(golden["video"][:1, :2])
    close(alone.masks, golden["masks_eval_mode"][:1, :2])


def test_burn_in(golden, model):
    losses = diod_losses(model.train(), golden["video"], golden["motion_labels"])
    assert list(losses) == ["reconstruction", "mask", "nll", "l1", "total"]
    close_losses(model, losses, golden, "burnin")


def test_a_step_of_distillation(golden, model):
    teacher = load_slot_model(TEACHER).train()
    close(teacher(golden["video"]).masks * 0.999 + 1e-8, golden["teacher_masks"])
    teacher.load_state_dict(load_slot_model(TEACHER).state_dict())
    losses = diod_losses(model.train(), golden["video"], golden["motion_labels"], teacher=teacher)
    assert list(losses) == ["reconstruction", "mask", "teacher", "nll", "l1", "total"]
    close_losses(model, losses, golden, "distill")

    optimizer = torch.optim.Adam(model.trainable_parameters(), 5e-4 / 3000)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    follow(teacher, model)
    for value, name in (
        (model.fc1.weight, "student_fc1_after"),
        (teacher.fc1.weight, "teacher_fc1_after"),
        (teacher.slot_attention.slots, "teacher_slots_after"),
    ):
        torch.testing.assert_close(value.detach(), golden[name], atol=1e-6, rtol=0)


def test_what_the_teacher_is_sure_of(golden):
    masks = (golden["teacher_masks"] - 1e-8) / 0.999
    objects = objects_of(golden["motion_labels"], (8, 12))
    _, passed = confident(objects, 1 - masks[:, :, -1].flatten(2), golden["confidence_threshold"].item())
    close((objects * passed.unsqueeze(-1)).amax(2), golden["filtered_foreground"])
    assert 0 < passed.sum() < (objects.sum(-1) > 0).sum()
    for clip in range(2):
        assert renumbered(pseudo_labels(masks)[clip], golden["teacher_labels"][clip])


def test_pseudo_labels(golden):
    assert renumbered(pseudo_labels(golden["pseudo_teacher_masks"])[0], golden["pseudo_labels"][0])


def test_schedule(golden):
    rates = [5e-4 * diod_learning_rate(step) for step in golden["schedule_steps"].tolist()]
    np.testing.assert_allclose(rates, golden["schedule_lr"], rtol=1e-8)


def test_its_size_as_published():
    with torch.device("meta"):
        model = DIOD(DIODConfig())
    assert model.input_size == (480, 968)
    assert model.num_parameters() / 1e6 == pytest.approx(16.6, abs=0.05)


# --- labels and losses ---------------------------------------------------------------------------------


def masks_of(labels, slots, sure=0.98):
    """Masks `(1, 1, N, h, w)` of which the slots of a map `(h, w)` are sure."""
    masks = F.one_hot(torch.tensor(labels), slots).movedim(-1, 0).float()
    return (masks * sure + (1 - masks) * (1 - sure) / (slots - 1))[None, None]


def test_parts_of_a_slot_become_objects_and_the_lowest_label_none():
    labels = np.full((12, 12), 3)  # the background
    labels[:4, :3] = 1
    labels[8:, :3] = 1  # another object of 12 positions
    labels[8:, 9:] = 2
    labels[0:2, 8:] = 2  # too small for one: 8 positions
    found = pseudo_labels(masks_of(labels, 4))[0, 0].numpy()
    assert set(np.unique(found)) == {0, 1, 2, 3}
    assert 0 < found[0, 0] != found[8, 0] > 0
    assert not found[4:8].any()


def test_unsure_parts_are_none():
    labels = np.full((12, 12), 3)
    labels[:4, :3] = 1
    labels[8:, :3] = 1
    masks = masks_of(labels, 4)
    masks[0, 0, 3, 8:, :3] = 0.3  # of the mask: slot 1 is still ahead
    found = pseudo_labels(masks)[0, 0]
    assert found[0, 0] == 1
    assert not found[8:, :3].any()


def test_the_loss_of_a_frame_by_hand():
    """Two objects of 4 and 2 of 8 positions, matched with slots 1 and 0; slot 2 is the background."""
    masks = torch.tensor([[0.1] * 4 + [0.6] * 4, [0.7] * 4 + [0.2] * 4, [0.2] * 8])
    objects = torch.zeros(1, 1, 2, 8)
    objects[0, 0, 0, :4] = 1
    objects[0, 0, 1, 4:6] = 1
    p = 0.999 * masks.double().numpy() + 1e-8
    first = -(1.5 * np.log(p[1, :4]).sum() + np.log(1 - p[1, 4:]).sum()) / 8
    second = -(1.75 * np.log(p[0, 4:6]).sum() + np.log(1 - np.r_[p[0, :4], p[0, 6:]]).sum()) / 8
    assert mask_loss(masks[None, None], objects).item() == pytest.approx((first + second) / 2, rel=1e-5)
    sure = torch.tensor([0.95] * 4 + [0.8] * 4)[None, None]  # of the first object alone
    first = -(1.95 * np.log(p[1, :4]).sum() + np.log(1 - p[1, 4:]).sum()) / 8
    assert mask_loss(masks[None, None], objects, sure).item() == pytest.approx(first, rel=1e-5)


def test_more_objects_than_slots(golden, model):
    motion = torch.arange(32 * 48).view(32, 48).expand(2, 5, -1, -1) // 100
    losses = diod_losses(model, golden["video"], motion)
    assert losses["total"].isfinite()


def test_no_motion_segments(golden, model):
    with pytest.raises(
        ValueError, match=r"motion segments: there are none, but DIOD learns from which pixels"
    ):
        diod_losses(model, golden["video"], None)
    with pytest.raises(
        ValueError, match=r"motion segments have shape \(2, 4, 32, 48\), but .* = \(2, 5, 32,"
    ):
        diod_losses(model, golden["video"], golden["motion_labels"][:, :4])


def test_clips_in_which_nothing_moves(golden, model):
    losses = diod_losses(model, golden["video"], torch.zeros(2, 5, 32, 48, dtype=torch.long))
    assert losses["mask"] == losses["nll"] == 0
    losses["total"].backward()


def test_a_new_model_learns():
    """A bright square on grey, which moves; every trained tensor gets a gradient, and the loss falls."""
    torch.manual_seed(0)
    model = DIOD(DIODConfig((4, 6), 3, 8, (4, 4, 8, 8), (1, 1, 1, 1)))
    assert json.loads(json.dumps(model.config.to_dict()))["system"] == "diod"
    motion = torch.zeros(1, 3, 16, 24, dtype=torch.long)
    for t in range(3):
        motion[0, t, 4:12, 4 * t : 4 * t + 8] = t + 1  # numbers need not agree between frames
    video = (motion > 0).float().unsqueeze(2).expand(-1, -1, 3, -1, -1) + 0.1 * torch.randn(1, 3, 3, 16, 24)
    optimizer = torch.optim.Adam(model.trainable_parameters(), 4e-3)
    curve = []
    for _ in range(40):
        losses = diod_losses(model, video, motion)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        curve.append(losses["total"].item())
    assert curve[-1] < 0.5 * curve[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())


# --- streams, frames -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[13], [1] * 13, [5, 5, 3], [2, 7, 4]])
def test_a_stream_is_cut_into_clips_wherever_its_chunks_end(golden, model, lengths, monkeypatch):
    monkeypatch.setattr(model, "prepare", torch.stack)
    video = torch.cat([golden["video"].flatten(0, 1), golden["video"][0, :3]])
    streamed = list(model.stream(video.split(lengths)))
    assert [len(frames) for frames, _, _ in streamed] == lengths
    masks, slots = (torch.cat([part[i] for part in streamed]) for i in (2, 1))
    close(masks, alone(model, video, "masks"), "masks")
    close(slots, alone(model, video, "slots"), "slots")


def alone(model, video, name):
    """Each clip of five frames by itself."""
    return torch.cat([getattr(model(clip[None]), name)[0] for clip in video.split(5)])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[10], [3, 4, 3]])
def test_a_stream_that_carries_its_state_on(golden, lengths, monkeypatch):
    model = load_slot_model(FILE, batch_statistics=False, carried=True)
    monkeypatch.setattr(model, "prepare", torch.stack)
    video = golden["video"].flatten(0, 1)
    whole = model(video[None])
    streamed = list(model.stream(video.split(lengths)))
    close(torch.cat([masks for _, _, masks in streamed]), whole.masks[0])
    close(torch.cat([slots for _, slots, _ in streamed]), whole.slots[0])
    assert (whole.masks[0, 5:] - model(video[None, 5:]).masks[0]).abs().max() > 1e-3


def test_frames_become_bgr(model):
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    frames[..., 0] = 255  # red
    assert model.prepare([frames])[0, 0, :, 0, 0].tolist() == [-1, -1, 1]
    assert model.prepare([frames[:, :20]]).shape == (1, 2, 3, 32, 48)


def test_label_maps_are_taken_by_nearest(golden, model):
    labels = model.label_maps(golden["masks"][0].flatten(2), (32, 48))
    expected = golden["masks"][0].argmax(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(labels.long(), expected)


# --- files ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", ["folder", "file.ckpt"])
def test_a_model_survives_being_saved(golden, layout, tmp_path):
    model = load_slot_model(FILE, batch_statistics=False, carried=True)
    model.encoder_cnn.resnet.bn1.num_batches_tracked.fill_(10**6)
    if layout == "folder":
        save_slot_model(model, tmp_path / layout)
        save_slot_model(model, tmp_path / "half", dtype=torch.float16)
        load_slot_model(tmp_path / "half")
    else:
        save_public_checkpoint(model, tmp_path / layout)
    loaded = load_slot_model(tmp_path / layout)
    assert loaded.config == model.config
    assert not loaded.training
    for (name, one), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(model(golden["video"]).masks, loaded(golden["video"]).masks)


def test_the_public_layout_is_the_authors_own(model, tmp_path):
    save_public_checkpoint(model, tmp_path / "a.ckpt")
    original, again = (
        torch.load(path, weights_only=True)["model_state_dict"] for path in (FILE, tmp_path / "a.ckpt")
    )
    assert original.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in original.items())


def test_all_sizes_are_read_off_the_shapes(tmp_path):
    config = DIODConfig((3, 5), 4, 130, (4, 6, 6, 8), (1, 2, 1, 3), memory_layers=1)
    model = DIOD(config)
    state = {"module." + key: value for key, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "a.ckpt")
    loaded = load_slot_model(tmp_path / "a.ckpt")
    assert loaded.config == config
    assert torch.equal(loaded.LN.weight, model.LN.weight)


def changed(tmp_path, **tensors):
    """The public file with other tensors; None takes one out."""
    state = torch.load(FILE, weights_only=True)["model_state_dict"]
    state |= {"module." + key: value for key, value in tensors.items()}
    torch.save({"model_state_dict": {k: v for k, v in state.items() if v is not None}}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_what_the_slots_were_drawn_from_is_not_needed(model, tmp_path):
    drawn = {f"slot_attention.slots_{name}": torch.ones(1, 1, 8) for name in ("mu", "sigma")}
    loaded = load_slot_model(changed(tmp_path, **drawn))
    assert loaded.config == model.config


def test_a_grid_that_does_not_fit_the_weights(golden, model, tmp_path):
    with pytest.raises(ValueError, match=r"its grid is 8 x 10, but the weights `LN` are of 96 positions"):
        load_slot_model(changed(tmp_path, **{"encoder_cnn.encoder_pos.grid": torch.ones(1, 8, 10, 4)}))
    with pytest.raises(ValueError, match=r"weights are of a grid of 8 x 12; expected \(B, T, 3, 32, 48\)"):
        model(golden["video"][..., :40])


def test_fewer_than_two_slots(tmp_path):
    with pytest.raises(
        ValueError, match="num_slots: 1, but DIOD's last slot is the background; nearest valid: 2"
    ):
        load_slot_model(changed(tmp_path, **{"slot_attention.slots": torch.ones(1, 1, 8)}))
    with pytest.raises(ValueError, match="clip_frames: 0, but a clip has frames; nearest valid: 1"):
        DIODConfig(clip_frames=0)


def test_the_variant_that_is_not_read(tmp_path):
    path = changed(tmp_path, **{"encoder_cnn.dinov2_backbone.cls_token": torch.ones(1, 1, 8)})
    with pytest.raises(ValueError, match="DIOD with a DINOv2 backbone, which is not read here"):
        load_slot_model(path)


def test_what_does_not_fit_is_named(tmp_path):
    tensors = {"decoder.conv2.weight": torch.ones(3, 3), "extra": torch.ones(1), "fc1.bias": None}
    with pytest.raises(ValueError, match="the weights don't fit the model") as error:
        load_slot_model(changed(tmp_path, **tensors))
    for problem in (
        "missing fc1.bias",
        "unexpected extra",
        "decoder.conv2.weight is (3, 3), expected (8, 8, 5, 5)",
    ):
        assert problem in str(error.value)

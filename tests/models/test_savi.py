"""SAVi: the numbers of the authors' JAX implementation (tests/golden/README.md), its files, streams and errors."""

import colorsys
import json
import math
import sys

import msgpack
import numpy as np
import pytest
import torch
from golden_numbers import close, numbers
from places import GOLDEN

from pipeline.models import HintError, load_slot_model, save_public_checkpoint, save_slot_model
from pipeline.models.rivals.savi import SAVi, SAViConfig
from pipeline.models.rivals.savi_losses import flow_as_rgb, picture_loss
from pipeline.models.rivals.schedules import savi_learning_rate

HINTS = {
    "conditional": {"image_size": 32, "num_slots": 5},
    "learned": {"image_size": 32, "num_iterations": 2},
    "gaussian": {"image_size": 32, "num_slots": 5},
    "resnet": {"num_slots": 5},
}
FILES = {name: GOLDEN / "rivals" / f"savi_{name}_tiny.flax" for name in HINTS}
each_kind = pytest.mark.parametrize("kind", HINTS)


def load(kind, **hints):
    return load_slot_model(FILES[kind], **{**HINTS[kind], **hints})


def start(golden, kind):
    """What the first slots are made of."""
    return {
        "conditional": {"boxes": golden.get("boxes")},
        "learned": {},
        "gaussian": {"initial_slots": golden["initial_slots"]},
        "resnet": {"boxes": golden.get("boxes")},
    }[kind]


# --- the public implementation's numbers ---------------------------------------------------------------


@each_kind
def test_a_training_step(kind):
    """Slots, masks, loss, gradient, and how far the first step of clipped Adam goes."""
    golden, model = numbers(f"rivals/savi_{kind}_tiny"), load(kind)
    output = model(golden["video"], **start(golden, kind))
    for name in {"features", "attention", "slots", "slots_predicted", "reconstruction"} & golden.keys():
        close(getattr(output, name), golden[name], name)
    close(output.masks.unflatten(-1, (32, 32)), golden["masks"], "masks")
    if kind != "gaussian":
        made_of = {"boxes": golden["boxes"][:, 0]} if model.config.conditional else {}
        close(model.initial_slots(2, **made_of), golden["initial_slots"], "initial slots")
    target = flow_as_rgb(golden["flow_pixels"]) if model.config.target == "flow" else golden["video"]
    loss = picture_loss(output.reconstruction, target)
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    loss.backward()
    parameters = model.trainable_parameters()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
    assert norm.item() == pytest.approx(golden["grad_norm"].item(), rel=1e-4)
    before = [parameter.detach().clone() for parameter in parameters]
    torch.optim.Adam(parameters, 2e-4).step()
    moved = [(now.detach() - then).norm() for now, then in zip(parameters, before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(golden["step_norm"].item(), rel=1e-4)


@torch.no_grad()
@each_kind
def test_labels(kind):
    golden, model = numbers(f"rivals/savi_{kind}_tiny"), load(kind)
    masks = model(golden["video"], **start(golden, kind)).masks
    for clip, expected in zip(masks, golden["hard_masks"], strict=True):
        labels = model.label_maps(clip, (32, 32))
        assert (labels != expected).float().mean() < 1e-3
        larger = model.label_maps(clip, (64, 64))  # as the authors', who score at the size of the input
        assert torch.equal(larger[:, ::2, ::2], labels)
        assert torch.equal(larger[:, 1::2, 1::2], labels)


def test_losses_by_name():
    golden, model = numbers("rivals/savi_conditional_tiny"), load("conditional")
    losses = model.losses(golden["video"], flow=golden["flow_pixels"], boxes=golden["boxes"])
    assert {name: loss.item() for name, loss in losses.items()} == {
        "reconstruction": pytest.approx(golden["loss"].item(), rel=1e-5)
    }
    losses = load("learned").losses(numbers("rivals/savi_learned_tiny")["video"])
    assert losses["reconstruction"].item() == pytest.approx(
        numbers("rivals/savi_learned_tiny")["loss"].item(), rel=1e-5
    )


# --- flow, schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conditional", "resnet"])
def test_flow_as_the_authors_draw_it(kind):
    golden = numbers(f"rivals/savi_{kind}_tiny")
    assert torch.equal(flow_as_rgb(golden["flow_pixels"]), golden["target"])


def test_flow_as_colours():
    """Of 30 x 40 pixels, whose diagonal is 50: a pixel's way is full saturation, and half of it half."""
    flow = torch.zeros(2, 30, 40)
    ways = [(1, 0), (0, 1), (-1, 0), (0, -1), (0.5, 0), (0.3, -0.4), (7, 7), (0, 0)]
    flow[:, 0, : len(ways)] = torch.tensor(ways, dtype=torch.float).T
    for column, (x, y) in enumerate(ways):
        hue = (math.atan2(y, x) / math.pi + 1) / 2
        expected = colorsys.hsv_to_rgb(hue, min(math.hypot(x, y), 1), 1)
        assert flow_as_rgb(flow)[:, 0, column].tolist() == pytest.approx(expected, abs=1 / 255)


def test_learning_rate():
    shares = [savi_learning_rate(step, 100_000) for step in (0, 1_250, 2_500, 51_250, 100_000, 100_001)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert savi_learning_rate(25, 1000, warmup=25) == 1


# --- streams ---------------------------------------------------------------------------------------------


def frames(length=5, size=(40, 30)):
    return np.random.default_rng(0).integers(0, 256, (length, *size, 3), dtype=np.uint8)


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("lengths", [[1] * 5, [2, 3]])
def test_a_stream_does_not_depend_on_its_chunks(kind, lengths):
    golden, model = numbers(f"rivals/savi_{kind}_tiny"), load(kind)
    boxes = {"boxes": golden["boxes"][0, 0]} if model.config.conditional else {}
    whole = frames()
    chunks = np.split(whole, np.cumsum(lengths)[:-1])
    streamed = list(model.stream(chunks, noise_seed=3, **boxes))
    assert [len(own) for own, _, _ in streamed] == lengths
    given = {key: value[None] for key, value in boxes.items()}
    output = model(model.prepare([whole]), noise_seeds=[3], **given)
    close(torch.cat([slots for _, slots, _ in streamed]), output.slots[0], "slots")
    masks = torch.cat([masks for _, _, masks in streamed])
    close(masks, output.masks[0], "masks")
    assert model.label_maps(masks, (40, 30)).shape == (5, 40, 30)


def test_frames_are_in_0_to_1():
    prepared = load("learned").prepare([np.full((2, 32, 32, 3), 51, np.uint8)])
    assert prepared.shape == (1, 2, 3, 32, 32)
    assert prepared.unique().tolist() == pytest.approx([0.2])


# --- files -----------------------------------------------------------------------------------------------


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("layout", ["folder", "file.flax", "file.ckpt"])
def test_a_model_survives_being_saved(kind, layout, tmp_path):
    golden, model = numbers(f"rivals/savi_{kind}_tiny"), load(kind)
    (save_slot_model if layout == "folder" else save_public_checkpoint)(model, tmp_path / layout)
    loaded = load_slot_model(tmp_path / layout)
    assert loaded.config == model.config
    assert not loaded.training
    one, other = (m(golden["video"], **start(golden, kind)) for m in (model, loaded))
    for name in ("slots", "attention", "masks", "reconstruction"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def raw(path):
    return msgpack.unpackb(path.read_bytes(), raw=False)


@each_kind
def test_the_public_layout_is_the_authors_own(kind, tmp_path):
    """All that their files have is there, to the last bit, and nothing beside it but an entry among the variables."""
    save_public_checkpoint(load(kind), tmp_path / "a.flax", step=7)
    original, again = raw(FILES[kind]), raw(tmp_path / "a.flax")
    assert original.keys() == again.keys()
    assert again["step"] == 7
    assert original["optimizer"]["target"] == again["optimizer"]["target"]
    assert original["optimizer"]["state"]["step"].code == again["optimizer"]["state"]["step"].code

    def shapes(tree):
        if isinstance(tree, dict):
            return {key: shapes(value) for key, value in tree.items()}
        return msgpack.unpackb(tree.data, raw=False)[:2]

    assert shapes(original["optimizer"]["state"]) == shapes(again["optimizer"]["state"])
    assert shapes(original["rng"]) == shapes(again["rng"])
    assert json.loads(again["variables"]["slotmatch_config"])["system"] == "savi"


def changed(kind, tmp_path, change):
    """A public file with something else in it."""
    content = raw(FILES[kind])
    change(content["optimizer"]["target"])
    (tmp_path / "a.flax").write_bytes(msgpack.packb(content))
    return tmp_path / "a.flax"


def array(values):
    return msgpack.ExtType(1, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))


def test_what_does_not_fit_is_named(tmp_path):
    def change(target):
        del target["SlotAttention_0"]["GRU_0"]["GRUCell_0"]["hz"]
        target["TransformerBlock_0"]["extra"] = array(np.ones(3, np.float32))
        target["FrameEncoder_0"]["CNN_0"]["conv_1"]["kernel"] = array(np.ones((3, 3, 8, 8), np.float32))

    with pytest.raises(ValueError, match="the weights don't fit the model") as error:
        load_slot_model(changed("learned", tmp_path, change), image_size=32)
    assert "missing corrector.gru.hz.weight" in str(error.value)
    assert "unexpected TransformerBlock_0/extra" in str(error.value)
    assert "encoder.cnn.conv_1.weight is (8, 8, 3, 3), expected (8, 8, 5, 5)" in str(error.value)


@pytest.mark.parametrize("content", [b"\x84abc", b"", msgpack.packb({"a": 1}), msgpack.packb([1])])
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "a.flax").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.flax"):
        load_slot_model(tmp_path / "a.flax")


def test_msgpack_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ModuleNotFoundError, match="is a Flax file, for which the package msgpack is needed"):
        load("learned")


# --- hints and errors ------------------------------------------------------------------------------------


def test_what_a_file_does_not_tell():
    with pytest.raises(
        HintError, match=r"^image_size: must be given, .* of 16 pixels \(as SAVi-S\) or of 32"
    ):
        load_slot_model(FILES["learned"])
    with pytest.raises(HintError, match=r"^num_slots: must be given, as .*gaussian"):
        load_slot_model(FILES["gaussian"], image_size=32)
    with pytest.raises(
        HintError, match=r"^image_size: 40 is no multiple of the grid of 16 x 16 .* valid: 32"
    ):
        load("learned", image_size=40)
    with pytest.raises(HintError, match=r"^image_size: 64, but the grid of .* is that of 32 pixels"):
        load("resnet", image_size=64)
    with pytest.raises(ValueError, match=r"image_size: 64, but a decoder of 4 layers .* nearest valid: 32"):
        load("learned", image_size=64)
    assert load_slot_model(FILES["conditional"], image_size=32).config.num_slots == 24


@pytest.mark.parametrize(("channels", "stride"), [(32, 1), (64, 2)])
def test_the_published_sizes_tell_the_strides(channels, stride, tmp_path):
    torch.manual_seed(0)
    config = SAViConfig(16 * stride, 3, 8, encoder_channels=(channels,) * 2, stride=stride, decoder_grid=4)
    save_public_checkpoint(SAVi(config), tmp_path / "a.flax")
    content = raw(tmp_path / "a.flax")
    content["variables"] = {}  # as others have written it
    (tmp_path / "a.flax").write_bytes(msgpack.packb(content))
    assert load_slot_model(tmp_path / "a.flax").config == config


def test_boxes_must_be_given_where_slots_are_made_of_them():
    golden, model = numbers("rivals/savi_conditional_tiny"), load("conditional")
    for attempt in (
        lambda: model(golden["video"]),
        lambda: next(model.stream([frames()])),
        lambda: model.losses(golden["video"], flow=golden["flow_pixels"]),
    ):
        with pytest.raises(ValueError, match=r"^boxes: missing, but this SAVi is conditional on boxes"):
            attempt()
    with pytest.raises(ValueError, match=r"^flow: missing, but this SAVi reconstructs it"):
        model.losses(golden["video"], boxes=golden["boxes"])
    with pytest.raises(ValueError, match="draws its first slots: pass noise_seeds or initial_slots"):
        load("gaussian")(golden["video"])


def test_other_errors_name_the_way_out():
    model = load("learned")
    with pytest.raises(ValueError, match=r"num_slots: 1, but masks need slots .* nearest valid: 2"):
        SAViConfig(num_slots=1)
    with pytest.raises(ValueError, match=r"slot_size: 18 is no multiple .* 4 heads; nearest valid: 20"):
        SAViConfig(slot_size=18)
    with pytest.raises(ValueError, match="initializer: 'boxs'; nearest valid: boxes, centres"):
        SAViConfig(initializer="boxs")
    with pytest.raises(ValueError, match=r"video has shape .*, expected \(B, T, \(3, 32, 32\)\)"):
        model(torch.zeros(1, 1, 3, 16, 16))
    with pytest.raises(ValueError, match="masks: 'attention', which SAVi has not; nearest valid: 'decoder'"):
        next(model.stream([frames()], masks="attention"))
    with pytest.raises(ValueError, match="rollout: 'cyclic', which SAVi has not"):
        next(model.stream([frames()], rollout="cyclic"))


# --- new models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"initializer": "centres", "target": "flow"},
        {"initializer": "drawn", "mlp_size": 8},
        {"encoder_blocks": (1, 2), "encoder_channels": (32, 32)},
    ],
)
def test_a_new_model_learns(settings):
    torch.manual_seed(0)
    values = {"encoder_channels": (8, 8), "decoder_channels": (8, 8), "decoder_grid": 4, **settings}
    model = SAVi(SAViConfig(16, 3, 8, **values))
    given = {
        "flow": torch.randn(2, 2, 2, 16, 16),
        "boxes": torch.rand(2, 2, 2),
        "noise_seeds": [1, 2],
    }
    video = torch.rand(2, 2, 3, 16, 16)
    optimizer = torch.optim.Adam(model.trainable_parameters(), 4e-3)
    losses = []
    for _ in range(30):
        loss = sum(model.losses(video, **given).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

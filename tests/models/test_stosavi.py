"""SlotFormer's SAVi: the numbers of the public implementation (tests/golden/README.md), its files and streams."""

import numpy as np
import pytest
import torch
from golden_numbers import close, numbers
from places import GOLDEN

from pipeline.models import HintError, load_slot_model, save_public_checkpoint, save_slot_model
from pipeline.models.rivals.stosavi import StoSAVi, StoSAViConfig

HINTS = {"rnn": {}, "mlp": {"stochastic": True}}
FILES = {name: GOLDEN / "rivals" / f"stosavi_{name}_tiny.pth" for name in HINTS}
each_kind = pytest.mark.parametrize("kind", HINTS)


def load(kind, **hints):
    return load_slot_model(FILES[kind], **HINTS[kind], **hints)


# --- the public implementation's numbers ---------------------------------------------------------------


@each_kind
def test_a_training_step(kind):
    golden, model = numbers(f"rivals/stosavi_{kind}_tiny"), load(kind)
    output = model(golden["video"], noise=golden.get("noise"))
    for name in ("slots", "slots_predicted", "kernel_distribution", "reconstruction"):
        close(getattr(output, name), golden[name], name)
    close(output.masks.unflatten(-1, (64, 64)), golden["masks"], "masks")
    labels = torch.stack([model.label_maps(masks, (64, 64)) for masks in output.masks.detach()])
    assert (labels != golden["hard_masks"]).float().mean() < 1e-3
    losses = model.losses(golden["video"], noise=golden.get("noise"))
    assert losses["reconstruction"].item() == pytest.approx(golden["loss_reconstruction"].item(), rel=1e-5)
    assert sum(losses.values()).item() == pytest.approx(golden["loss_total"].item(), rel=1e-5)
    if model.config.stochastic:
        assert losses["noise_prior"].item() == pytest.approx(1e-4 * golden["loss_kld"].item(), rel=1e-5)
    sum(losses.values()).backward()
    norms = [p.grad.norm() for p in model.trainable_parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(golden["grad_norm"].item(), rel=1e-4)


# --- streams ---------------------------------------------------------------------------------------------


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("lengths", [[1] * 5, [2, 3]])
def test_a_stream_does_not_depend_on_its_chunks(kind, lengths):
    """Nor do the LSTM's state and the noise."""
    model = load(kind)
    whole = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), dtype=np.uint8)
    streamed = list(model.stream(np.split(whole, np.cumsum(lengths)[:-1]), noise_seed=3))
    assert [len(own) for own, _, _ in streamed] == lengths
    output = model(model.prepare([whole]), noise_seeds=[3])
    close(torch.cat([slots for _, slots, _ in streamed]), output.slots[0], "slots")
    close(torch.cat([masks for _, _, masks in streamed]), output.masks[0], "masks")


def test_frames_are_in_minus_1_to_1():
    prepared = load("rnn").prepare([np.full((2, 64, 64, 3), 51, np.uint8)])
    assert prepared.unique().tolist() == pytest.approx([-0.6])


# --- files -----------------------------------------------------------------------------------------------


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("layout", ["folder", "file.pth"])
def test_a_model_survives_being_saved(kind, layout, tmp_path):
    golden, model = numbers(f"rivals/stosavi_{kind}_tiny"), load(kind)
    (save_slot_model if layout == "folder" else save_public_checkpoint)(model, tmp_path / layout)
    loaded = load_slot_model(tmp_path / layout)
    assert loaded.config == model.config
    one, other = (m(golden["video"], noise=golden.get("noise")) for m in (model, loaded))
    for name in ("slots", "attention", "masks", "reconstruction"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@each_kind
def test_the_public_layout_is_the_authors_own(kind, tmp_path):
    save_public_checkpoint(load(kind), tmp_path / "a.pth")
    original, again = (
        torch.load(p, weights_only=True)["state_dict"] for p in (FILES[kind], tmp_path / "a.pth")
    )
    assert original.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in original.items())


def test_a_bare_state_dict_and_what_does_not_fit(tmp_path):
    state = torch.load(FILES["rnn"], weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "a.pth")
    assert load_slot_model(tmp_path / "a.pth").config == load("rnn").config
    del state["slot_attention.gru.bias_hh"]
    torch.save({**state, "extra": torch.ones(1), "decoder.4.bias": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="the weights don't fit the model") as error:
        load_slot_model(tmp_path / "a.pth")
    assert "missing slot_attention.gru.bias_hh" in str(error.value)
    assert "unexpected extra" in str(error.value)
    assert "decoder.4.bias is (3,), expected (4,)" in str(error.value)


@pytest.mark.parametrize(
    "settings", [{"kernel": None, "rnn": False}, {"stride": 2, "image_size": 32}, {"predictor_layers": 1}]
)
def test_other_sizes_are_read_off_the_shapes(settings, tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_slots": 3, "slot_size": 8, "mlp_size": 12, "predictor_hidden": 20}
    sizes |= {"encoder_channels": (4, 6), "decoder_channels": (5, 4, 4), "decoder_grid": 4}
    model = StoSAVi(StoSAViConfig(**{**sizes, **settings}))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    assert load_slot_model(tmp_path / "a.pth", image_size=model.config.image_size).config == model.config


# --- errors, new models ----------------------------------------------------------------------------------


def test_errors_name_the_way_out():
    model = load("mlp")
    video = numbers("rivals/stosavi_mlp_tiny")["video"]
    with pytest.raises(ValueError, match="is stochastic: pass noise_seeds or noise"):
        model(video)
    with pytest.raises(
        ValueError, match="noise: given, but this model is not stochastic; the hint stochastic"
    ):
        load("rnn")(video, noise=torch.zeros(2, 3, 4, 16))
    with pytest.raises(
        HintError, match=r"^image_size: 100 is no multiple of the grid of 64 x 64 .* valid: 128"
    ):
        load("rnn", image_size=100)
    with pytest.raises(ValueError, match="num_slots: 1, but masks need slots"):
        StoSAViConfig(num_slots=1)
    with pytest.raises(ValueError, match="kernel: 'conv'; nearest valid: linear, mlp, None"):
        StoSAViConfig(kernel="conv")
    with pytest.raises(ValueError, match="stochastic: the noise is the kernel layer's"):
        StoSAViConfig(kernel=None, stochastic=True)


def test_a_new_model_learns():
    torch.manual_seed(0)
    model = StoSAVi(
        StoSAViConfig(
            16,
            3,
            8,
            encoder_channels=(8, 8),
            mlp_size=16,
            stochastic=True,
            predictor_hidden=16,
            decoder_grid=4,
            decoder_channels=(8, 8),
        )
    )
    video = (torch.rand(2, 2, 3, 1, 1) * 2 - 1).expand(-1, -1, -1, 16, 16)
    optimizer = torch.optim.Adam(model.trainable_parameters(), 4e-3)
    losses = []
    for step in range(30):
        loss = sum(model.losses(video, noise_seeds=[step, step + 1]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("prior_slot_layer.")

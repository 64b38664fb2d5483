"""STEVE: the numbers of the public implementation (tests/golden/README.md), its files, streams and errors."""

import json
import math

import numpy as np
import pytest
import torch
from golden_numbers import close, numbers
from places import GOLDEN

from pipeline.models import HintError, load_slot_model, save_public_checkpoint, save_slot_model
from pipeline.models.rivals import steve_training
from pipeline.models.rivals.schedules import steve_learning_rate, steve_temperature
from pipeline.models.rivals.steve import STEVE, STEVEConfig, TokenDraws

FILE = GOLDEN / "rivals" / "steve_tiny.pt"
TINY = STEVEConfig(
    num_slots=3,
    slot_size=8,
    image_size=16,
    stride=1,
    width=12,
    cnn_width=6,
    mlp_size=10,
    vocabulary=7,
    predictor_heads=2,
    decoder_blocks=2,
    decoder_heads=3,
)


@pytest.fixture(scope="module")
def golden():
    return numbers("rivals/steve_tiny")


@pytest.fixture(scope="module")
def model():
    return load_slot_model(FILE, num_slots=5)


@pytest.fixture
def new():
    torch.manual_seed(0)
    return STEVE(TINY).eval()


def as_drawn(golden, model):
    return model(
        golden["video"],
        initial_slots=model.slots_from(golden["slot_noise"]),
        draws=TokenDraws(golden["exponential_soft"], golden["exponential_hard"]),
        temperature=golden["tau"].item(),
    )


# --- the public implementation's numbers ---------------------------------------------------------------


@torch.no_grad()
def test_a_forward_pass(golden, model):
    output = as_drawn(golden, model)
    for name in ("features", "slots", "attention", "slots_predicted", "dvae_logits"):
        close(getattr(output, name), golden[name], name)
    assert torch.equal(output.tokens, golden["tokens"])
    close(output.reconstruction, golden["logits"], "logits")
    close(output.dvae_reconstruction.clamp(0, 1), golden["dvae_reconstruction"], "picture")
    assert torch.equal(output.masks, output.attention)


def test_losses_and_gradients(golden, model):
    """The gradient's largest entry too, by which it is clipped."""
    model.zero_grad()
    losses = steve_training.losses(as_drawn(golden, model), golden["video"])
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden[f"loss_{name}"].item(), rel=1e-5)
    total = sum(losses.values())
    assert total.item() == pytest.approx(golden["loss_total"].item(), rel=1e-5)
    total.backward()
    parameters = model.trainable_parameters()
    largest = torch.nn.utils.get_total_norm([p.grad for p in parameters], math.inf)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert norm.item() == pytest.approx(golden["grad_norm"].item(), rel=1e-4)
    assert largest.item() == pytest.approx(golden["grad_norm_inf"].item(), rel=1e-4)


def test_generation(golden, model):
    close(model.generate(golden["slots"]), golden["generated"])


@torch.no_grad()
def test_label_maps(golden, model):
    for attention, expected in zip(golden["attention"], golden["hard_masks"], strict=True):
        labels = model.label_maps(attention, (32, 32))
        assert labels.dtype == torch.uint8
        assert (labels != expected).float().mean() < 1e-3


def test_schedules(golden):
    steps = golden["schedule_steps"].tolist()
    np.testing.assert_allclose([steve_temperature(s) for s in steps], golden["schedule_tau"], rtol=1e-8)
    factors = [steve_learning_rate(s) for s in steps]
    np.testing.assert_allclose(factors, golden["schedule_lr_factor"], rtol=1e-8)
    rates = steve_training.rates(15_000)
    assert rates["dvae"] == 3e-4
    assert rates["steve_encoder"] == pytest.approx(1e-4 * factors[2])
    assert rates["steve_decoder"] == pytest.approx(3e-4 * factors[2])


# --- streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5], [1] * 5, [2, 3]])
def test_a_stream_does_not_depend_on_its_chunks(new, lengths):
    video = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    streamed = list(new.stream(np.split(video, np.cumsum(lengths)[:-1]), noise_seed=3))
    assert [len(frames) for frames, _, _ in streamed] == lengths
    with torch.no_grad():
        prepared = new.prepare([video])
        whole = new(prepared, noise_seeds=[3])
    assert 0 <= prepared.min() < 0.1
    assert 0.9 < prepared.max() <= 1
    close(torch.cat([slots for _, slots, _ in streamed]), whole.slots[0])
    close(torch.cat([masks for _, _, masks in streamed]), whole.masks[0])
    other = next(iter(new.stream([video], noise_seed=4)))[1]
    assert (other - whole.slots[0]).abs().max() > 1e-3


def test_only_forward(new):
    with pytest.raises(ValueError, match="rollout: 'cyclic', but STEVE never goes back"):
        next(new.stream([], rollout="cyclic"))


# --- files -----------------------------------------------------------------------------------------------


def outputs(model, seed=0):
    video = torch.rand((1, 2, 3, *model.input_size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(video, noise_seeds=[seed])


@pytest.mark.parametrize("save", [save_slot_model, save_public_checkpoint])
def test_a_model_survives_being_saved(new, save, tmp_path):
    save(new, tmp_path / "a.ckpt")
    loaded = load_slot_model(tmp_path / "a.ckpt")
    assert loaded.config == new.config
    assert not loaded.training
    one, other = outputs(new), outputs(loaded)
    for name in ("slots", "attention", "reconstruction", "dvae_reconstruction"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_public_layout_is_the_authors_own(model, tmp_path):
    save_public_checkpoint(model, tmp_path / "a.pt.tar", step=7)
    original, again = (torch.load(path, weights_only=True) for path in (FILE, tmp_path / "a.pt.tar"))
    assert original.keys() == again["model"].keys()
    assert all(torch.equal(value, again["model"][key]) for key, value in original.items())
    assert all(original[key].dtype == again["model"][key].dtype for key in original)
    assert {"epoch", "best_val_loss", "best_epoch"} < again.keys()


def test_sizes_are_those_of_the_file(new, tmp_path):
    """Of the bare tensors, and with the counters of a training that goes on; stride 1 comes with small pictures."""
    save_public_checkpoint(new, tmp_path / "ours.ckpt")
    content = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    torch.save(content["model"], tmp_path / "best_model.pt")
    torch.save({"epoch": 3, "model": content["model"], "optimizer": {}}, tmp_path / "checkpoint.pt.tar")
    for name in ("best_model.pt", "checkpoint.pt.tar"):
        loaded = load_slot_model(tmp_path / name, num_slots=3, num_heads=3, predictor_heads=2)
        assert loaded.config == new.config
        assert torch.equal(outputs(loaded).reconstruction, outputs(new).reconstruction)
    once = load_slot_model(tmp_path / name, num_slots=4, num_heads=3, predictor_heads=2, num_iterations=1)
    assert (once.config.num_slots, once.config.num_iterations) == (4, 1)


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({}, r"num_slots: must be given, as .*steve_tiny\.pt draws its initial slots"),
        ({"num_slots": 1}, "num_slots: 1, but masks need slots to choose from; nearest valid: 2"),
        ({"num_heads": 3}, "num_heads: 3 does not divide the width 32 of"),
        ({"predictor_heads": 5}, "predictor_heads: 5 does not divide the width 24 of"),
        ({"num_iterations": 0}, "num_iterations: 0; nearest valid: 1"),
    ],
)
def test_hints_that_cannot_be(hints, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        load_slot_model(FILE, **({"num_slots": 5} if hints else {}) | hints)
    assert isinstance(error.value, HintError) == ("nearest" not in message)


def changed(tmp_path, **tensors):
    torch.save({**torch.load(FILE, weights_only=True), **tensors}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_what_does_not_fit_is_named(tmp_path):
    path = changed(tmp_path, **{"steve_encoder.mlp.0.weight": torch.ones(3, 3), "extra": torch.ones(1)})
    with pytest.raises(ValueError, match="the weights don't fit the model") as error:
        load_slot_model(path, num_slots=5)
    assert "unexpected extra" in str(error.value)
    assert "steve_encoder.mlp.0.weight is (3, 3), expected (32, 32)" in str(error.value)


def test_a_grid_that_does_not_fit_the_weights(tmp_path):
    path = changed(tmp_path, **{"steve_encoder.pos.pe": torch.ones(1, 4, 12, 12)})
    with pytest.raises(ValueError, match="64 tokens are of 32 x 32 pixels, which a grid of 12 x 12 "):
        load_slot_model(path, num_slots=5)


def test_a_video_of_another_size(new):
    with pytest.raises(
        ValueError, match=r"video has shape \(1, 2, 3, 16, 20\), expected \(B, T, \(3, 16, 16\)\)"
    ):
        new(torch.zeros(1, 2, 3, 16, 20), noise_seeds=[0])
    with pytest.raises(ValueError, match="pass initial_slots, or 1 noise_seeds, one a clip, not None"):
        new(torch.zeros(1, 2, 3, 16, 16))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 30}, "image_size: 30 is no multiple of STEVE's 4 .*; nearest valid: 32"),
        (
            {"slot_size": 10},
            "slot_size: 10 is no multiple of STEVE's 4 heads of its predictor; nearest valid: 12",
        ),
        ({"width": 30}, "width: 30 is no multiple of STEVE's 4 heads of its decoder; nearest valid: 32"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        STEVEConfig(**sizes)


# --- training --------------------------------------------------------------------------------------------


def test_movi_e_has_the_published_number_of_parameters():
    """Of which those published are counted with the causal masks of 8 blocks."""
    with torch.device("meta"):
        model = STEVE(STEVEConfig())
    assert model.num_parameters() + 8 * 1024**2 == pytest.approx(17.1e6, rel=5e-3)


@torch.no_grad()
def test_a_new_model_starts_as_published(new):
    hidden = new.steve_encoder.savi.gru.weight_hh
    torch.testing.assert_close(hidden.T @ hidden, torch.eye(8), atol=1e-5, rtol=0)
    block = new.steve_decoder.tf.blocks[1]
    bound = math.sqrt(6 / (12 + 12))  # Xavier
    assert 0.8 * bound < block.self_attn.proj_q.weight.abs().max() <= bound
    for layer, size in ((block.self_attn.proj_o, bound), (block.ffn[2], math.sqrt(6 / (48 + 12)))):
        assert 0.8 * size < layer.weight.abs().max() * math.sqrt(6) <= 1.0001 * size  # 3 times 2 blocks
    assert 0.8 < block.ffn[0].weight.abs().max() / math.sqrt(6 / 12) <= 1  # Kaiming
    assert not block.ffn[0].bias.any()


def test_a_new_model_learns():
    """A bright square on one of two grounds; both losses fall, and every trained tensor gets a gradient."""
    torch.manual_seed(0)
    model = STEVE(TINY).train()
    assert json.loads(json.dumps(model.config.to_dict()))["system"] == "steve"
    video = torch.tensor([0.1, 0.4])[:, None, None, None, None].repeat(1, 2, 3, 16, 16)
    video[:, :, :, 4:12, 4:12] = 0.9
    groups = [
        {"params": list(getattr(model, name).parameters()), "name": name} for name in steve_training.RATES
    ]
    optimizer = torch.optim.Adam(groups)
    seen = []
    for step in range(60):
        losses = steve_training.training_losses(
            model, video, step, noise_seeds=[step, 100 + step], seed=step, temperature_steps=30
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.trainable_parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), steve_training.CLIP_LARGEST, math.inf)
        assert (
            max(p.grad.abs().max() for p in model.trainable_parameters())
            <= 1.001 * steve_training.CLIP_LARGEST
        )
        for group in optimizer.param_groups:
            group["lr"] = 10 * steve_training.rates(step, warmup=10, half_life=1000)[group["name"]]
        optimizer.step()
        seen.append({name: loss.item() for name, loss in losses.items()})
    first, last = ({k: sum(s[k] for s in part) / 5 for k in seen[0]} for part in (seen[:5], seen[-5:]))
    assert last["dvae"] < 0.5 * first["dvae"]
    assert last["cross_entropy"] < 0.8 * first["cross_entropy"]


def test_draws_are_a_seeds(new):
    one, again, other = (
        steve_training.training_losses(new, torch.full((1, 1, 3, 16, 16), 0.5), 0, noise_seeds=[0], seed=seed)
        for seed in (1, 1, 2)
    )
    assert one["dvae"].item() == again["dvae"].item() != other["dvae"].item()
    draws = steve_training.draw_tokens(new, 200, seed=5)
    for part in draws:
        assert part.shape == (200, 7, 4, 4)
        assert part.mean().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(draws.soft, draws.hard)

"""Backbones by name and from files, model folders, what a model takes and gives, the fast decoder."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import decoded, tiny_model, tiny_vit

from pipeline.models import (
    Backbone,
    BackboneConfig,
    SlotModel,
    SlotModelConfig,
    load_backbone_weights,
    load_slot_model,
    save_public_checkpoint,
    save_slot_model,
    tiled_decoder,
)
from pipeline.models.decoders import MLPDecoder, untiled

VIT = tiny_vit(32, depth=2)


def tiny_backbone(image_size=32, **changes):
    return Backbone(BackboneConfig(None, image_size, {**VIT, **changes}))


def make(**design):
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.3, 0.4)}
    return tiny_model(vit=VIT, hidden=(16, 16), **colours, **design).eval()


def random_video(B=2, T=4, size=32):
    return torch.randn(B, T, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- backbones --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_size", "grid", "width"),
    [
        ("test_vit", 48, 3, 64),
        ("vit_tiny_patch16_224", 32, 2, 192),
        ("vit_tiny_patch16_224.augreg_in21k", 32, 2, 192),  # with a tag of weights
        ("deit_tiny_distilled_patch16_224", 64, 4, 192),  # two prefix tokens
        ("vit_small_patch14_reg4_dinov2", 56, 4, 384),  # register tokens
    ],
)
def test_any_vit_by_its_timm_name(name, image_size, grid, width):
    backbone = Backbone(BackboneConfig(name, image_size))
    features = backbone(torch.randn(2, 3, image_size, image_size))
    assert features.shape == (2, grid**2, width)
    assert (backbone.grid, backbone.num_patches, backbone.feature_size) == ((grid, grid), grid**2, width)


def test_image_size_that_the_patch_size_does_not_divide():
    message = "image size 50 is not a multiple of the patch size 16 of test_vit; nearest: 48 or 64"
    with pytest.raises(ValueError, match=message):
        Backbone(BackboneConfig("test_vit", 50))


@pytest.mark.parametrize(("image_size", "grid"), [(224, 16), (336, 24), (518, 37)])
def test_grid_of_a_patch_14_vit(image_size, grid):
    """Interpolated position embeddings have been off by one at some sizes (timm#2111)."""
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig("vit_small_patch14_dinov2", image_size))
        features = backbone(torch.randn(1, 3, image_size, image_size))
    assert features.shape == (1, grid**2, 384)


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_base_patch14_dinov2", 91.02), ("vit_small_patch14_dinov2", 25.17)]
)
def test_parameter_counts_are_the_papers(name, millions):
    """Table 2, YTVIS: 518 pixels, 7 slots of size 64."""
    with torch.device("meta"):
        model = SlotModel(SlotModelConfig(BackboneConfig(name, 518), num_slots=7, slot_size=64))
    assert round(model.num_parameters() / 1e6, 2) == millions


def test_the_backbone_stays_frozen_and_in_eval_mode():
    model = tiny_model(vit={**VIT, "proj_drop_rate": 0.5}).train()
    assert model.training
    assert not any(module.training for module in model.encoder.backbone.modules())
    video = random_video()
    torch.testing.assert_close(model.backbone_features(video), model.backbone_features(video))
    output = model(video)
    (output.slots.sum() + output.reconstruction.sum()).backward()
    assert all(p.grad is None for p in model.encoder.backbone.parameters())
    assert all(p.grad is not None for p in model.trainable_parameters())
    frozen = sum(p.numel() for p in model.encoder.backbone.parameters())
    assert sum(p.numel() for p in model.trainable_parameters()) == model.num_parameters() - frozen


@pytest.fixture(params=["safetensors", "pt", "nested.pt"])
def weights_file(request, tmp_path):
    """A backbone, and a file of its weights as others publish them: with a final norm and a head."""
    backbone = tiny_backbone()
    path = tmp_path / f"vit.{request.param}"
    extra = {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32), "head.weight": torch.ones(5, 32)}
    state = {**backbone.model.state_dict(), **extra}
    if request.param == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if request.param == "nested.pt" else state, path)
    return backbone, path


def test_backbone_weights_from_a_file(weights_file):
    donor, path = weights_file
    backbone = tiny_backbone()
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(backbone(images), donor(images))
    load_backbone_weights(backbone, path)
    torch.testing.assert_close(backbone(images), donor(images))
    assert not any(p.requires_grad for p in backbone.parameters())


def test_position_embeddings_of_another_size_are_resampled(weights_file):
    donor, path = weights_file
    with torch.no_grad():  # a position embedding that says where it is: row, column
        ramp = torch.linspace(-1, 1, 4)
        donor.model.pos_embed[0, 1:, 0] = ramp.repeat_interleave(4)
        donor.model.pos_embed[0, 1:, 1] = ramp.repeat(4)
    torch.save(donor.model.state_dict(), path.with_suffix(".pt"))
    backbone = tiny_backbone(64)
    load_backbone_weights(backbone, path.with_suffix(".pt"))
    assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, 64, 32)
    resampled = backbone.model.pos_embed[0, 1:].reshape(8, 8, 32)
    assert (resampled[1:, :, 0] > resampled[:-1, :, 0]).all()
    assert (resampled[:, 1:, 1] > resampled[:, :-1, 1]).all()
    torch.testing.assert_close(resampled[..., 0], resampled[..., 1].T)
    torch.testing.assert_close(backbone.model.pos_embed[0, 0], donor.model.pos_embed[0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 48}, r"patch_embed\.proj\.weight is \(32, 3, 8, 8\), expected \(48, 3, 8, 8\)"),
        ({"depth": 3}, r"missing blocks\.2\.norm1\.weight"),
        ({"depth": 1}, r"unexpected blocks\.1\.norm1\.weight"),
    ],
)
def test_backbone_weights_that_do_not_fit(weights_file, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load_backbone_weights(tiny_backbone(**changes), weights_file[1])
    assert str(weights_file[1]) in str(error.value)


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.pt"])
def test_backbone_weights_that_are_no_weights(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_backbone_weights(tiny_backbone(), tmp_path / name)
    (tmp_path / name).write_text("no weights")
    with pytest.raises(ValueError, match=f"{name}: can't be read"):
        load_backbone_weights(tiny_backbone(), tmp_path / name)


# --- checkpoints --------------------------------------------------------------------------------------


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    model = make()
    save_slot_model(model, tmp_path / "full")
    save_slot_model(model, tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_slot_model(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(random_video()).slots, model(random_video()).slots, rtol=0, atol=0.02)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_slot_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is not a model folder: it has no config\.json"):
        load_slot_model(tmp_path)


@pytest.mark.parametrize("content", ["{half", "[]", '{"num_slots": 3}', "extra key"])
def test_broken_config_of_a_model_folder(tmp_path, content):
    save_slot_model(make(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "x": 1}) if content == "extra key" else content
    )
    with pytest.raises(ValueError, match=r"config\.json: not the config of a slot model"):
        load_slot_model(tmp_path)


# --- the model ------------------------------------------------------------------------------------------


def test_wrong_input_is_an_error():
    model = make()
    for video in (random_video(size=40), random_video()[0], random_video().permute(0, 2, 1, 3, 4)):
        with pytest.raises(ValueError, match="expected"):
            model(video)
    with pytest.raises(ValueError, match="not both"):
        model()
    with pytest.raises(ValueError, match="not both"):
        model(random_video(), backbone_features=torch.zeros(1))
    with pytest.raises(ValueError, match="'forward' or 'cyclic', not 'backward'"):
        model(random_video(), rollout="backward")


def test_given_initial_slots_are_where_frame_0_starts():
    model = make()
    with torch.no_grad():
        own = model.initializer.slots.expand(2, -1, -1)
        default, given = model(random_video()), model(random_video(), initial_slots=own)
        torch.testing.assert_close(given.slots, default.slots)
        permuted = model(random_video(), initial_slots=own[:, [2, 0, 1]])
    torch.testing.assert_close(permuted.slots, default.slots[:, :, [2, 0, 1]], rtol=0, atol=1e-5)


def test_prepare_resizes_and_normalises():
    model = make()  # mean 0.5, std (0.2, 0.3, 0.4)
    small = np.full((2, 20, 20, 3), 255, np.uint8)
    exact = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    video = model.prepare([small, exact])
    assert video.shape == (2, 2, 3, 32, 32)
    torch.testing.assert_close(video[0, 0, :, 5, 5], torch.tensor([0.5 / 0.2, 0.5 / 0.3, 0.5 / 0.4]))
    expected = (exact[1, 3, 4] / 255 - 0.5) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(video[1, 1, :, 3, 4], expected, rtol=1e-5)


def test_label_maps():
    masks = torch.zeros(2, 3, 16)
    masks[0, 1], masks[1, 0, :8], masks[1, 2, 8:] = 1, 1, 1  # frame 1: slot 0 above, slot 2 below
    labels = make().label_maps(masks, (40, 60))
    assert (labels.shape, labels.dtype) == ((2, 40, 60), torch.uint8)
    assert (labels[0] == 1).all()
    assert (labels[1, :20] == 0).all()
    assert (labels[1, 20:] == 2).all()


@pytest.mark.parametrize("tile_bytes", [1, 1000, 5000, 1 << 20])  # a slot, some slots, a frame, all at a time
@pytest.mark.parametrize("hidden_sizes", [(32, 32, 32), (16, 24), (16,)])
def test_the_fast_decoder_equals_the_plain_one(hidden_sizes, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiled_decoder, "TILE_BYTES", tile_bytes)
    torch.manual_seed(0)
    decoder = MLPDecoder(num_patches=9, slot_size=8, feature_size=12, hidden_sizes=hidden_sizes).double()
    slots = torch.randn(4, 5, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 9, 12, dtype=torch.float64)
    tiled = decoded(decoder, slots, target)
    with torch.no_grad():
        without_gradients = decoder(slots)
    with untiled(decoder):
        fast = decoded(decoder, slots, target)
    decoder.fast = False
    plain = decoded(decoder, slots, target)
    for others in (tiled, without_gradients, fast):
        for one, other in zip(plain, others, strict=False):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_tiled_decoder_under_autocast():
    """Products in bfloat16, as without tiles; results and gradients as near to float32 as those are."""
    torch.manual_seed(0)
    decoder = MLPDecoder(num_patches=9, slot_size=8, feature_size=12, hidden_sizes=(32, 32, 32))
    slots, target = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 9, 12)
    exact = decoded(decoder, slots, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiled = decoded(decoder, slots, target)
        with untiled(decoder):
            fast = decoded(decoder, slots, target)
    for one, two, three in zip(exact, tiled, fast, strict=True):
        assert (one - two).norm() <= 1.5 * (one - three).norm() + 1e-3 * one.norm()
    assert tiled[0].dtype == fast[0].dtype == torch.bfloat16


def test_the_tiled_decoder_keeps_no_hidden_layer_where_no_gradient_is_asked_for():
    """Of many frames it takes hardly more memory than of one tile's."""
    decoder = MLPDecoder(num_patches=64, slot_size=8, feature_size=8, hidden_sizes=(256, 256, 256))
    slots = torch.randn(64, 5, 8)
    whole = 64 * 5 * 64 * 256 * 4  # bytes of one hidden layer
    for block, kept in ((torch.no_grad, False), (torch.inference_mode, False), (torch.enable_grad, True)):
        with block(), torch.profiler.profile(profile_memory=True) as profile:
            decoder(slots)
        largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty")
        assert (largest >= whole) is kept


def products(decoder, slots):
    """Of matrices, in one pass forward and backward."""
    with torch.profiler.profile() as profile:
        decoder(slots)[0].square().sum().backward()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())


def test_the_tiled_decoder_trains_slots_through_frozen_weights():
    """As reconstruction KD does; of the middle layer it computes no gradient that nobody asks for."""
    decoder = MLPDecoder(num_patches=9, slot_size=8, feature_size=12, hidden_sizes=(32, 32))
    slots = torch.randn(4, 5, 8, requires_grad=True)
    trained = products(decoder, slots)
    slots.grad = None
    decoder.requires_grad_(False)
    assert products(decoder, slots) <= trained - 2  # the middle layer's and the last one's
    gradient, slots.grad = slots.grad, None
    with untiled(decoder):
        decoder(slots)[0].square().sum().backward()
    torch.testing.assert_close(gradient, slots.grad, rtol=1e-4, atol=1e-5)


def test_random_initial_slots_need_a_seed():
    model = make(initializer="random")
    with pytest.raises(ValueError, match="pass noise or initial_slots"):
        model(random_video())
    with torch.no_grad():
        assert model(random_video(), initial_slots=model.initial_slots(2, [1, 2])).slots.shape == (2, 4, 3, 8)


# --- weights that are not finite --------------------------------------------------------------------


def damaged(state, *keys, value=float("nan")):
    """The tensors with one number of each of `keys` changed."""
    state = {k: v.clone() for k, v in state.items()}
    for key in keys:
        state[key].view(-1)[-1] = value
    return state


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.fault(
    "NaN or infinity in a checkpoint", "all that load a model", "refused, with the tensors' names"
)
def test_a_checkpoint_that_is_not_finite_is_refused_by_name(tmp_path, value):
    path = tmp_path / "teacher.ckpt"
    save_public_checkpoint(make(), path)
    content = torch.load(path, weights_only=True)
    keys = [k for k in content["state_dict"] if k.endswith(("to_q.weight", "pos_embed"))]
    torch.save({**content, "state_dict": damaged(content["state_dict"], *keys, value=value)}, path)
    with pytest.raises(ValueError, match=r"teacher\.ckpt: 2 of \d+ tensors are not finite") as caught:
        load_slot_model(path)
    assert "processor.corrector.to_q.weight" in str(caught.value)
    assert "encoder.backbone.model.pos_embed" in str(caught.value)


def test_a_model_folder_that_is_not_finite_is_refused(tmp_path):
    save_slot_model(make(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    every = [k for k, v in state.items() if v.is_floating_point()]
    save_file(damaged(state, *every), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{len(every)} of \d+ tensors .* and {len(every) - 5} more\)"):
        load_slot_model(tmp_path)


def test_a_backbone_that_is_not_finite_is_refused_for_what_is_used(tmp_path):
    """A head's weights are not loaded, so that they may be anything."""
    donor = tiny_backbone()
    state = {**donor.model.state_dict(), "head.weight": torch.full((2, 32), float("nan"))}
    save_file(state, tmp_path / "good.safetensors")
    load_backbone_weights(tiny_backbone(), tmp_path / "good.safetensors")
    save_file(damaged(state, "blocks.1.attn.qkv.weight"), tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors: 1 of \d+ .*\(blocks\.1\.attn\.qkv\.weight\)"):
        load_backbone_weights(tiny_backbone(), tmp_path / "bad.safetensors")


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    model = make()
    bias = model.get_parameter("processor.corrector.to_q.weight")
    bias.data[0, 0] = 1e6  # beyond float16
    save_slot_model(model, tmp_path / "single")
    with pytest.raises(ValueError, match=r"saved as float16: 1 of .*\(processor\.corrector\.to_q\.weight\)"):
        save_slot_model(model, tmp_path / "half", dtype=torch.float16)
    bias.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="to_q"):
        save_slot_model(model, tmp_path / "folder")
    with pytest.raises(ValueError, match="to_q"):
        save_public_checkpoint(model, tmp_path / "file.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["single"]

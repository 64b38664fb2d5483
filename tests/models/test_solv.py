"""SOLV: the numbers of the public implementation (tests/golden/README.md), its files, streams and errors."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_numbers import close, numbers
from places import GOLDEN

from pipeline.losses import feature_reconstruction_loss
from pipeline.models import HintError, load_slot_model, save_public_checkpoint, save_slot_model
from pipeline.models.backbone import BackboneConfig
from pipeline.models.rivals.merging import Tracks, clusters, merged
from pipeline.models.rivals.schedules import drawn_tokens, merge_probability, solv_learning_rate
from pipeline.models.rivals.solv import SOLV, SOLVConfig
from pipeline.models.rivals.solv_files import dinov2_positions

FILE, VIT = GOLDEN / "rivals" / "solv_tiny.pt", GOLDEN / "rivals" / "solv_tiny_vit.pt"
HINTS = {"num_heads": 3, "backbone_weights": VIT}  # what its file does not tell


@pytest.fixture(scope="module")
def golden():
    return numbers("rivals/solv_tiny")


@pytest.fixture(scope="module")
def model():
    return load_slot_model(FILE, **HINTS)


def same_partition(one, other):
    """Equal up to the numbers that the parts have."""
    pairs = {(int(a), int(b)) for a, b in zip(one.flatten(), other.flatten(), strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def same_parts(parts, expected):
    """Rows `(S, ...)` of two frames are the same but for their order; which row of `parts` each expected one is."""
    distances = (parts[None] - expected[:, None]).flatten(2).abs().amax(-1)
    assert distances.amin(1).max() < 1e-4
    order = distances.argmin(1)
    assert sorted(order.tolist()) == list(range(len(order)))
    return order


# --- the public implementation's numbers ---------------------------------------------------------------


@torch.no_grad()
def test_a_training_step(golden, model):
    """Frame 0 of item 1 is missing; the decoder's places are those of other frames' tokens, as published."""
    output = model.middle_frame(golden["frames"], golden["frame_mask"], golden["token_indices"])
    close(output.slots_spatial, golden["slots_spatial"], "spatial")
    close(output.backbone_features[:, 0], golden["features_target"], "target")
    close(output.attention_middle[:, 0], golden["attention_middle"], "attention")
    close(output.slots_temporal[:, 0], golden["slots_temporal"], "temporal")
    assert output.slot_nums[:, 0].tolist() == golden["slot_nums"].tolist()
    close(output.reconstruction[:, 0], golden["reconstruction"], "reconstruction")
    for item, number in enumerate(golden["slot_nums"]):
        order = same_parts(output.slots[item, 0, :number], golden["slots"][item, :number])
        close(output.masks[item, 0][order], golden["masks"][item, :number], "masks")
        close(output.attention[item, 0][order], golden["attention_merged"][item, :number], "merged attention")
        assert not output.slots[item, 0, number:].any()
        assert not output.masks[item, 0, number:].any()


@torch.no_grad()
def test_without_merging(golden, model):
    output = model.middle_frame(
        golden["frames"], golden["frame_mask"], golden["token_indices"], merge_B=torch.zeros(2, dtype=bool)
    )
    close(output.masks[:, 0], golden["masks_unmerged"])
    close(output.reconstruction[:, 0], golden["reconstruction_unmerged"])
    assert torch.equal(output.slots, output.slots_temporal)
    assert output.slot_nums.tolist() == [[6], [6]]


def test_loss_and_gradient(golden, model):
    model.zero_grad()
    output = model.middle_frame(golden["frames"], golden["frame_mask"], golden["token_indices"])
    loss = feature_reconstruction_loss(output.reconstruction, output.backbone_features)
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    loss.backward()
    norms = [p.grad.norm() for p in model.trainable_parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(golden["grad_norm"].item(), rel=1e-4)
    assert not any(p.requires_grad for p in model.backbone.parameters())


@torch.no_grad()
def test_a_whole_video(golden, model):
    output = model(golden["video"][None])
    close(output.backbone_features[0], golden["video_features"], "features")
    assert output.slot_nums[0].tolist() == golden["video_slot_nums"].tolist()
    labels = model.label_maps(output.masks[0], (48, 72))
    for t, number in enumerate(golden["video_slot_nums"]):
        order = same_parts(output.slots[0, t, :number], golden["video_slots"][t, :number])
        close(output.masks[0, t][order], golden["video_masks"][t, :number], f"masks {t}")
        renamed = torch.empty(6, dtype=torch.uint8)
        renamed[order] = torch.arange(number, dtype=torch.uint8)
        assert (renamed[labels[t].long()] != golden["video_labels"][t]).float().mean() < 1e-3


def test_merging(golden):
    """Of one frame each two clusters, or one, came out: there it leaves all slots."""
    found = torch.stack([clusters(slots, 0.12) for slots in golden["merge_slots"]])
    numbers = found.amax(1) + 1
    assert numbers.tolist() == golden["merge_slot_nums"].tolist()
    slots, attention = merged(golden["merge_slots"], golden["merge_attention"], found)
    for frame, number in enumerate(numbers):
        if number < 6:
            assert same_partition(found[frame], golden["merge_labels"][frame])
        order = same_parts(slots[frame, :number], golden["merge_slots_out"][frame, :number])
        close(attention[frame][order], golden["merge_attention_out"][frame, :number])
        assert not slots[frame, number:].any()
        assert not attention[frame, number:].any()


def test_linking(golden):
    tracks, lengths = Tracks(), golden["link_slot_nums"].tolist()
    linked = golden["link_labels"].clone()
    for t, slots in enumerate(golden["link_slots"].split(lengths)):
        linked[t] = torch.from_numpy(tracks.follow(slots))[golden["link_labels"][t].long()]
    assert torch.equal(linked, golden["link_labels_linked"])


def test_schedules(golden):
    factors = [solv_learning_rate(step, 10_000) for step in golden["schedule_steps"].tolist()]
    np.testing.assert_allclose(factors, golden["schedule_lr_factor"], rtol=1e-8)
    merging = [merge_probability(epoch, 10) for epoch in range(10)]
    np.testing.assert_allclose(merging, np.log(np.arange(1, 11)) / np.log(10))
    assert (merging[0], merging[-1], merge_probability(0, 1)) == (0, 1, 1)


def test_drawn_tokens():
    tokens = drawn_tokens(50, 24, seed=3)
    assert tokens.shape == (50, 12)
    assert (tokens.diff(dim=1) > 0).all()  # sorted, none twice
    assert torch.equal(tokens, drawn_tokens(50, 24, seed=3))
    assert torch.bincount(tokens.flatten(), minlength=24).min() > 5


# --- streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[6], [1] * 6, [2, 1, 3], [5, 1]])
def test_a_stream_is_linked_and_does_not_depend_on_its_chunks(golden, model, lengths, monkeypatch):
    monkeypatch.setattr(model, "prepare", torch.stack)
    chunks = golden["video"].split(lengths)
    streamed = list(model.stream(chunks))
    assert [len(frames) for frames, _, _ in streamed] == lengths
    labels = torch.cat([model.label_maps(masks, (48, 72)) for _, _, masks in streamed])
    # The first frame's slots are in another order than scikit-learn's.
    expected = golden["video_labels_linked"]
    names = {int(n): int(expected[labels == n].mode().values) for n in labels.unique()}
    assert len(set(names.values())) == len(names)
    renamed = torch.tensor([names.get(number, 255) for number in range(6)], dtype=torch.uint8)
    assert (renamed[labels.long()] != expected).float().mean() < 1e-3


def test_a_stream_is_half_a_window_behind(golden, model, monkeypatch):
    monkeypatch.setattr(model, "prepare", torch.stack)
    asked = []

    def frames():
        for t, frame in enumerate(golden["video"].split(1)):
            asked.append(t)
            yield frame

    stream = model.stream(frames())
    for behind in (2, 3, 4, 5, 5, 5):
        next(stream)
        assert asked[-1] == behind


def test_tracks_that_slots_share():
    """A frame of three slots after one of two: the third has the track of the most similar one, for good."""
    x, y, between = torch.tensor([1.0, 0]), torch.tensor([0, 1.0]), torch.tensor([0.9, 0.5])
    tracks = Tracks()
    assert tracks.follow(torch.stack([x, y])).tolist() == [0, 1]
    assert tracks.follow(torch.stack([between, y, x])).tolist() == [0, 1, 0]
    assert tracks.follow(torch.stack([y, between])).tolist() == [1, 0]


# --- files -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", ["folder", "file.pt"])
def test_a_model_survives_being_saved(golden, model, layout, tmp_path):
    (save_slot_model if layout == "folder" else save_public_checkpoint)(model, tmp_path / layout)
    loaded = load_slot_model(tmp_path / layout)
    assert loaded.config == model.config
    assert not loaded.training
    one, other = (m(golden["video"][None]) for m in (model, loaded))
    for name in ("slots", "attention", "masks", "reconstruction"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_public_layout_is_the_authors_own(model, tmp_path):
    save_public_checkpoint(model, tmp_path / "a.pt")
    with torch.serialization.safe_globals([Namespace]):
        original, again = (torch.load(path, weights_only=True) for path in (FILE, tmp_path / "a.pt"))
    assert original["model"].keys() == again["model"].keys()
    assert all(torch.equal(value, again["model"][key]) for key, value in original["model"].items())
    known = vars(again["args"])
    assert {key: vars(original["args"])[key] for key in known} == known


def changed(tmp_path, model=None, **args):
    """The public file with other tensors or settings."""
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(FILE, weights_only=True)
    content["model"].update(model or {})
    for key, value in args.items():
        setattr(content["args"], key, value)
    torch.save(content, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_a_grid_is_read_off_the_places_where_nothing_says_it(tmp_path):
    path = changed(tmp_path)
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(path, weights_only=True)
    torch.save({"model": content["model"]}, path)
    assert load_slot_model(path, **HINTS).grid == (4, 6)


def test_a_grid_that_does_not_fit_the_weights(tmp_path):
    with pytest.raises(ValueError, match=r"70 x 84 .* grid of 5 x 6, but the weights are of 24 patches"):
        load_slot_model(changed(tmp_path, resize_to=[70, 84]), **HINTS)


def test_fewer_than_two_slots(tmp_path):
    one = {f"module.s_bind.{key}": torch.ones(1, 1, *rest) for key, *rest in (("slots", 16), ("S_s", 1, 2))}
    with pytest.raises(ValueError, match="num_slots: 1, but SOLV needs slots to merge; nearest valid: 2"):
        load_slot_model(changed(tmp_path, one), **HINTS)


def test_slots_that_the_heads_do_not_divide():
    backbone = BackboneConfig(None, 16, {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2})
    with pytest.raises(ValueError, match="slot_size: 12 is no multiple of SOLV's 8 heads; nearest valid: 16"):
        SOLVConfig(backbone, slot_size=12)


def test_the_vit_must_be_given(tmp_path):
    with pytest.raises(HintError, match=r"^backbone_weights: must be given, as .*solv_tiny\.pt lacks"):
        load_slot_model(FILE, num_heads=3)
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: no ViT in timm's names \(its first keys: conv\.weight\)"):
        load_slot_model(FILE, num_heads=3, backbone_weights=tmp_path / "a.pt")


def test_what_does_not_fit_is_named(tmp_path):
    path = changed(tmp_path, {"module.dec.layer3.weight": torch.ones(3, 3), "module.extra": torch.ones(1)})
    with pytest.raises(ValueError, match="the weights don't fit the model") as error:
        load_slot_model(path, **HINTS)
    assert "unexpected extra" in str(error.value)
    assert "dec.layer3.weight is (3, 3), expected (32, 32)" in str(error.value)


@torch.no_grad()
def test_a_window_longer_than_a_video(golden, model):
    message = r"a video of 4 frames is shorter than the window of 5"
    with pytest.raises(ValueError, match=message):
        model(golden["video"][None, :4])
    with pytest.raises(ValueError, match=message):
        list(model.stream([np.zeros((3, 28, 42, 3), np.uint8), np.zeros((1, 28, 42, 3), np.uint8)]))
    assert list(model.stream([])) == []


def test_masks_that_it_has_not(model):
    with pytest.raises(ValueError, match="masks: 'attention', but SOLV's masks are its decoder's"):
        next(model.stream([], masks="attention"))


# --- frames, positions -----------------------------------------------------------------------------------


def test_frames_of_any_size_become_its_rectangle(model):
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    prepared = model.prepare([frames, frames[:, :30]])
    assert prepared.shape == (2, 2, 3, 56, 84)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    expected = F.interpolate(pixels, (56, 84), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.mean, model.config.std))
    torch.testing.assert_close(prepared[0], (expected - mean) / std, atol=1e-5, rtol=1e-5)


def cubic(old, new):
    """A matrix `(new, old)`: cubic convolution (a = -0.75) at a tenth of a patch too large a scale, edges repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x, a = abs(place - j), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            weight = near if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix


def test_positions_are_resampled_with_the_historical_offset():
    table = np.random.default_rng(0).normal(size=(37, 37, 2))
    rows, columns = cubic(37, 24), cubic(37, 36)
    expected = np.einsum("yi,xj,ijf->yxf", rows, columns, table)
    positions = torch.cat([torch.full((1, 1, 2), 9.0), torch.from_numpy(table).float().view(1, -1, 2)], 1)
    resampled = dinov2_positions(positions, (24, 36), 1)
    assert resampled[0, 0].tolist() == [9, 9]
    np.testing.assert_allclose(resampled[0, 1:].view(24, 36, 2), expected, atol=1e-4)
    assert torch.equal(dinov2_positions(resampled, (24, 36), 1), resampled)


def test_a_vit_of_another_size_is_resampled(tmp_path):
    vit = torch.load(VIT, weights_only=True)
    torch.manual_seed(0)
    vit["pos_embed"] = torch.randn(1, 50, 48)
    vit["norm.weight"] = torch.ones(48)
    torch.save(vit, tmp_path / "vit.pt")
    loaded = load_slot_model(FILE, num_heads=3, backbone_weights=tmp_path / "vit.pt")
    torch.testing.assert_close(loaded.backbone.model.pos_embed, dinov2_positions(vit["pos_embed"], (4, 6), 1))


@torch.no_grad()
def test_all_tokens_are_no_tokens_dropped(golden, model):
    images = golden["frames"][0]
    everything = torch.arange(24).expand(5, -1)
    torch.testing.assert_close(model.backbone.features_of_tokens(images, everything), model.backbone(images))
    kept = model.backbone.features_of_tokens(golden["frames"].flatten(0, 1), golden["token_indices"])
    close(kept, golden["features_dropped"])


def test_a_new_model_learns():
    """Two videos of one scene each; the loss falls, and every trained tensor gets a gradient."""
    torch.manual_seed(0)
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = SOLV(SOLVConfig(BackboneConfig(None, 16, vit, image_width=24), 3, 8, decoder_size=16))
    assert json.loads(json.dumps(model.config.to_dict()))["system"] == "solv"
    frames, present = torch.randn(2, 1, 3, 16, 24).expand(2, 5, 3, 16, 24), torch.ones(2, 5)
    tokens = drawn_tokens(10, 6, seed=0)
    optimizer = torch.optim.Adam(model.trainable_parameters(), 4e-3)
    losses = []
    for _ in range(30):
        output = model.middle_frame(frames, present, tokens, as_published=False)
        loss = feature_reconstruction_loss(output.reconstruction, output.backbone_features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())

"""The numbers that the public implementations produced, reproduced (tests/golden/README.md)."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_numbers import numbers
from places import GOLDEN

from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss
from pipeline.metrics import fg_ari, mean_best_overlap
from pipeline.models import load_slot_model

OUTPUTS = ("slots", "attention", "masks", "reconstruction", "backbone_features")
HEADS = 3  # of the tiny ViT: the one thing that a checkpoint's shapes don't tell


@pytest.fixture(scope="module")
def golden():
    return numbers("slotcontrast_tiny")


@pytest.fixture(scope="module")
def model():
    return load_slot_model(GOLDEN / "slotcontrast_tiny.ckpt", num_heads=HEADS)


@pytest.mark.parametrize("fast_decoder", [True, False])
def test_slotcontrast_forward(golden, model, fast_decoder):
    model.decoder.fast = fast_decoder
    with torch.no_grad():
        output = model(golden["video"])
        predicted = model.processor.predictor(output.slots.flatten(0, 1)).view_as(output.slots)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(output, name), golden[name], atol=1e-4, rtol=0, msg=name)
    torch.testing.assert_close(predicted, golden["slots_predicted"], atol=1e-4, rtol=0)
    labels = model.label_maps(output.masks.flatten(0, 1), (56, 56)).view(2, 6, 56, 56)
    assert (labels != golden["hard_masks"]).float().mean() < 1e-3


def test_slotcontrast_cyclic_rollout(golden, model):
    with torch.no_grad():
        output = model(golden["video"], rollout="cyclic")
    torch.testing.assert_close(output.slots, golden["slots_cyclic"], atol=1e-4, rtol=0)


def test_slotcontrast_losses_and_gradient(golden, model):
    model.zero_grad()
    output = model(golden["video"])
    reconstruction = feature_reconstruction_loss(output.reconstruction, output.backbone_features)
    contrast = slot_contrastive_loss(output.slots)
    total = reconstruction + contrast
    for value, name in ((reconstruction, "loss_featrec"), (contrast, "loss_ss"), (total, "loss_total")):
        assert value.item() == pytest.approx(golden[name].item(), rel=1e-5), name
    total.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(golden["grad_norm"].item(), rel=1e-4)


@torch.no_grad()
def test_videosaur():
    """Drawn slots (given), no MLP in slot attention, the slot mixer with F + P outputs."""
    golden = numbers("videosaur_tiny")
    model = load_slot_model(GOLDEN / "videosaur_tiny.ckpt", num_heads=HEADS, num_slots=4)
    keys = []  # of the last block's attention: what temporal similarity is about
    model.encoder.backbone.model.blocks[-1].attn.qkv.register_forward_hook(
        lambda *args: keys.append(args[-1][:, 1:].chunk(3, -1)[1].unflatten(0, (2, 4)))
    )
    output = model(golden["video"], initial_slots=golden["initial_slots"])
    computed = {name: getattr(output, name) for name in OUTPUTS}
    computed["features"] = model.encoder.output_transform(output.backbone_features)
    computed["decoder_output"] = torch.cat([output.reconstruction, output.similarity], -1)
    for name, value in computed.items():
        torch.testing.assert_close(value, golden[name], atol=1e-4, rtol=0, msg=name)
    labels = model.label_maps(output.masks.flatten(0, 1), (56, 56)).view(2, 4, 56, 56)
    assert (labels != golden["hard_masks"]).float().mean() < 1e-3
    reconstruction = feature_reconstruction_loss(output.reconstruction, output.backbone_features)
    assert reconstruction.item() == pytest.approx(golden["loss_featrec"].item(), rel=1e-5)
    # Where each patch goes in the next frame, at the temperature of the public YTVIS config (DINOv2).
    unit = F.normalize(keys[0], dim=-1)
    similarity = unit[:, :-1] @ unit[:, 1:].transpose(-1, -2)
    target = (similarity.masked_fill(similarity < 0, -torch.inf) / 0.15).softmax(-1)
    loss = -(target * output.similarity[:, :-1].log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(golden["loss_timesim"].item(), abs=1e-4)


@pytest.mark.parametrize("case", list(json.loads((GOLDEN / "metrics.json").read_text()))[:6])
def test_metrics(case):
    expected = json.loads((GOLDEN / "metrics.json").read_text())[case]
    arrays = np.load(GOLDEN / "metrics.npz")
    shape = arrays[f"{case}_true_shape"]
    bits = np.unpackbits(arrays[f"{case}_true"])[: shape.prod()]
    true_masks = torch.from_numpy(bits.reshape(shape).astype(bool))
    predicted = torch.from_numpy(arrays[f"{case}_pred"])
    flags = {k: expected[k] for k in ("ignore_background", "ignore_overlaps")}
    for level in ("image", "video"):
        values = expected["values"]
        ari = fg_ari(true_masks, predicted, level=level, **flags)
        mbo = mean_best_overlap(true_masks, predicted, level=level, **flags)
        assert ari == pytest.approx(values[f"{level}_ari"], abs=1e-6)
        assert mbo == pytest.approx(values[f"{level}_mbo"], abs=1e-6)

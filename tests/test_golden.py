"""The numbers that the public implementations produced, reproduced (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.losses import feature_reconstruction_loss, slot_contrastive_loss
from pipeline.metrics import fg_ari, mean_best_overlap
from pipeline.models import load_slot_model

GOLDEN = Path(__file__).parent / "golden"
HEADS = 3  # of the tiny ViT: the one thing that a checkpoint's shapes don't tell


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(GOLDEN / "slotcontrast_tiny.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def model():
    return load_slot_model(GOLDEN / "slotcontrast_tiny.ckpt", num_heads=HEADS)


@pytest.mark.parametrize("fast_decoder", [True, False])
def test_slotcontrast_forward(golden, model, fast_decoder):
    model.decoder.fast = fast_decoder
    with torch.no_grad():
        output = model(golden["video"])
    for name in ("slots", "attention", "masks", "reconstruction", "backbone_features"):
        torch.testing.assert_close(getattr(output, name), golden[name], atol=1e-4, rtol=0, msg=name)
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

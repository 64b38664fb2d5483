"""A tiny model of every kind of public checkpoint."""

import pytest
import torch
from tiny_models import tiny_model, tiny_vit

VIT = tiny_vit(32, depth=2)
DRAWN = {"initializer": "random"}
MIXER = {"decoder": "slot_mixer", "decoder_blocks": 2, "corrector_mlp": False}
KINDS = {
    "slotcontrast": {},
    "videosaur": {**DRAWN, **MIXER, "decoder_outputs": ("features", "similarity")},
    "videosaur_movi": {**DRAWN, **MIXER, "decoder_outputs": ("similarity",)},
    "dinosaur": {**DRAWN, "predictor": False},
}


def build(kind, seed=0, **changes):
    model = tiny_model(seed=seed, hidden=(16, 24), **{"vit": VIT, **KINDS[kind], **changes}).eval()
    with torch.no_grad():  # values that no initialisation has, so that a tensor in the wrong place shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def video(T=4, size=32):
    return torch.randn(2, T, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model, T=4, rollout="forward"):
    return model(video(T, model.image_size), initial_slots=model.initial_slots(2, [5, 6]), rollout=rollout)


each_kind = pytest.mark.parametrize("kind", KINDS)

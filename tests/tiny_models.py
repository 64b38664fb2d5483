"""Slot models small enough to be built in every test."""

import torch

from pipeline.models import BackboneConfig, SlotModel, SlotModelConfig


def tiny_vit(width=16, depth=1):
    return {"patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2}


def tiny_design(num_slots=3, slot_size=8, *, backbone=None, vit=None, image_size=32, hidden=(8,), **design):
    """Its config; of a ViT of width 16 on 4 x 4 patches where nothing else is said."""
    backbone = backbone or BackboneConfig(None, image_size, vit or tiny_vit())
    return SlotModelConfig(backbone, num_slots, slot_size, decoder_hidden_sizes=hidden, **design)


def tiny_model(num_slots=3, slot_size=8, *, seed=0, **design):
    torch.manual_seed(seed)
    return SlotModel(tiny_design(num_slots, slot_size, **design))


def tiny_section(width=16, image_size=16, hidden=(8,), **settings):
    """Of a config, for such a model."""
    vit = {"backbone": tiny_vit(width), "backbone_weights": "random"}
    return {**vit, "image_size": image_size, "decoder_hidden_sizes": list(hidden), **settings}


def decoded(decoder, slots, target):
    """Both outputs of a decoder and all gradients, also of a loss on the masks."""
    reconstruction, masks = decoder(slots)
    loss = (reconstruction - target).square().mean() + masks[:, 0].square().mean()
    return reconstruction, masks, *torch.autograd.grad(loss, [slots, *decoder.parameters()])

"""Slim models: the trained part alone gives the whole model's outputs, beside the weights that it was trained with."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_design, tiny_model, tiny_vit

from pipeline.artifacts.subjects import model_identity
from pipeline.models import (
    Backbone,
    BackboneConfig,
    BackboneError,
    BackboneSource,
    CheckpointHints,
    SlotModel,
    load_slot_model,
    save_slot_model,
)
from pipeline.models.build import load_model

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
VIT = tiny_vit(width=32, depth=3)


@pytest.fixture
def weights(tmp_path):
    """A file as timm's are."""
    torch.manual_seed(3)
    return vit_file(tmp_path / "vit.safetensors")


def vit_file(path, image_size=32):
    save_file(Backbone(BackboneConfig(None, image_size, VIT)).model.state_dict(), path)
    return path


def student(weights, **design):
    model = tiny_model(vit=VIT, **design)
    model.encoder.backbone.model.load_state_dict(load_file(weights))
    return model.eval()


def outputs(model):
    return [tensor for _, *tensors in model.stream([FRAMES]) for tensor in tensors]


def check_same(model, expected):
    for found, wanted in zip(outputs(model), outputs(expected), strict=True):
        assert torch.equal(found, wanted)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }


def test_a_slim_model_is_smaller_and_gives_the_same_to_the_last_bit(tmp_path, weights):
    model = student(weights)
    save_slot_model(model, tmp_path / "whole")
    store = tmp_path / "root" / "backbones"
    for number in (1, 2):  # of two students the backbone is kept once
        save_slot_model(model, tmp_path / f"slim{number}", slim=BackboneSource(str(weights), str(store)))
    whole, slim = (os.path.getsize(tmp_path / name / "model.safetensors") for name in ("whole", "slim1"))
    assert slim < whole / 3
    assert len(list(store.rglob("*.safetensors"))) == 1
    check_same(load_slot_model(tmp_path / "slim1"), load_slot_model(tmp_path / "whole"))
    check_same(load_slot_model(tmp_path / "slim2"), model)


def test_the_weights_are_found_wherever_they_are(tmp_path, weights):
    """In the store that is named, in one above the model, beside it, where they came from, and where the user says."""
    model = student(weights)
    store = tmp_path / "root" / "backbones"
    made = tmp_path / "root" / "students" / "s" / "model"
    save_slot_model(model, made, slim=BackboneSource(str(weights), str(store)))
    weights.rename(tmp_path / "elsewhere.safetensors")
    pulled = shutil.copytree(made, tmp_path / "pulled")
    check_same(load_slot_model(pulled), model)

    (tmp_path / "root").rename(tmp_path / "moved")
    check_same(load_slot_model(tmp_path / "moved/students/s/model"), model)
    with pytest.raises(BackboneError):
        load_slot_model(pulled)
    check_same(load_slot_model(pulled, backbone_weights=tmp_path / "elsewhere.safetensors"), model)
    shutil.copy(tmp_path / "elsewhere.safetensors", pulled / "backbone.safetensors")
    check_same(load_slot_model(pulled), model)
    (pulled / "backbone.safetensors").unlink()
    (tmp_path / "elsewhere.safetensors").rename(weights)
    check_same(load_model(str(pulled), CheckpointHints()), model)


def test_other_weights_are_refused_and_missing_ones_named(tmp_path, weights):
    model = student(weights)
    store = tmp_path / "backbones"
    save_slot_model(model, tmp_path / "a" / "slim", slim=BackboneSource(str(weights), str(store)))
    expected = json.loads((tmp_path / "a/slim/config.json").read_text())["frozen_backbone"]["sha256"]
    (place,) = store.rglob("*.safetensors")
    place.unlink()
    vit_file(weights)  # others under the same name
    with pytest.raises(BackboneError) as caught:
        load_slot_model(tmp_path / "a" / "slim")
    text = str(caught.value)
    assert f"have sha256 {expected}" in text
    assert f"{weights} (other weights, sha256 " in text
    assert str(place) in text
    assert "load_slot_model(PATH, backbone_weights=FILE)" in text
    with pytest.raises(BackboneError, match="other weights, sha256"):
        load_slot_model(tmp_path / "a" / "slim", backbone_weights=weights)
    weights.unlink()
    with pytest.raises(BackboneError, match=rf"Looked at: .*{weights.name} \(no checkpoint file at"):
        load_slot_model(tmp_path / "a" / "slim")
    # Another ViT's weights don't fit it, which is said as well.
    save_file(Backbone(BackboneConfig(None, 32, tiny_vit())).model.state_dict(), weights)
    with pytest.raises(BackboneError, match="don't fit the model"):
        load_slot_model(tmp_path / "a" / "slim", backbone_weights=weights)


def test_students_of_other_sizes_share_the_store(tmp_path, weights):
    """Embeddings of positions are resampled to the input, so they stay with each model."""
    store = tmp_path / "backbones"
    for size in (32, 48):
        other = SlotModel(tiny_design(vit=VIT, image_size=size)).eval()
        state = other.state_dict()
        frozen = load_file(weights)
        state |= {f"encoder.backbone.model.{k}": v for k, v in frozen.items() if k != "pos_embed"}
        other.load_state_dict(state)
        save_slot_model(other, tmp_path / f"of{size}", slim=BackboneSource("timm", str(store)))
        check_same(load_slot_model(tmp_path / f"of{size}"), other)
    assert len(list(store.rglob("*.safetensors"))) == 1


def test_a_random_backbone_is_drawn_again(tmp_path):
    from pipeline.config import resolve_config
    from pipeline.models.build import build_student

    vit = {"backbone": VIT, "backbone_weights": "random", "image_size": 32, "decoder_hidden_sizes": [8]}
    model = build_student(resolve_config({"student": vit}), teacher=None, seed=5).eval()
    save_slot_model(model, tmp_path / "slim", slim=BackboneSource("random"))
    check_same(load_slot_model(tmp_path / "slim"), model)


def test_a_convolutional_backbone_too(tmp_path):
    backbone = BackboneConfig("test_convnext", 64, stride=16)
    torch.manual_seed(1)
    model = SlotModel(tiny_design(backbone=backbone)).eval()
    save_slot_model(model, tmp_path / "m" / "slim", slim=BackboneSource("timm", str(tmp_path / "backbones")))
    check_same(load_slot_model(tmp_path / "m" / "slim"), model)


def test_where_the_backbone_lies_decides_nothing(tmp_path, weights):
    model, hints = student(weights), CheckpointHints()
    known = []
    for name in ("here", "there"):
        save_slot_model(model, tmp_path / name / "m", slim=BackboneSource(str(weights), str(tmp_path / name)))
        known.append(model_identity(str(tmp_path / name / "m"), hints))
    assert known[0] == known[1]
    vit_file(weights)
    save_slot_model(student(weights), tmp_path / "m", slim=BackboneSource(str(weights)))
    assert model_identity(str(tmp_path / "m"), hints) != known[0]

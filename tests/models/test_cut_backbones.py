"""A ViT cut short: its features are its k-th block's output, whatever its weights come from."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_section, tiny_vit

from pipeline.config import ConfigError, resolve_config
from pipeline.models import (
    Backbone,
    BackboneConfig,
    SlotModel,
    load_backbone_weights,
    load_slot_model,
    save_slot_model,
)
from pipeline.models import backbone as backbones
from pipeline.models._timm import import_timm
from pipeline.models.build import build_student, model_config
from pipeline.models.build_teachers import build_teacher
from pipeline.report.costs import architecture
from pipeline.report.efficiency import count_cost

timm = import_timm()

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
# Of each family a name and a size: with LayerScale, with registers, and one that is no `VisionTransformer`.
VITS = {
    "dinov2": ("vit_small_patch14_dinov2", 28),
    "registers": ("vit_small_patch14_reg4_dinov2", 28),
    "dinov3": ("vit_small_patch16_dinov3", 32),
}


def whole_and_cut(kind, blocks):
    """timm's whole model of shaken random weights, and the backbone without them."""
    name, size = VITS[kind]
    torch.manual_seed(0)
    whole = timm.create_model(name, img_size=size, **SMALL).eval()
    with torch.no_grad():
        for tensor in whole.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return whole, Backbone(BackboneConfig(name, size, SMALL, blocks=blocks))


@torch.no_grad()
def output_of_block(whole, number, images):
    """The patch tokens that the block gives, counted from 1."""
    seen = []
    hook = whole.blocks[number - 1].register_forward_hook(lambda _, __, output: seen.append(output))
    whole.forward_features(images)
    hook.remove()
    return seen[0][:, whole.num_prefix_tokens :]


@pytest.mark.parametrize("blocks", [1, 3, 4, None])
@pytest.mark.parametrize("kind", VITS)
def test_features_are_the_named_blocks_output(kind, blocks, tmp_path):
    """Of a file of the whole model, and of one of what is left of it."""
    whole, backbone = whole_and_cut(kind, blocks)
    images = torch.rand(2, 3, *2 * [VITS[kind][1]])
    expected = output_of_block(whole, blocks or 4, images)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    load_backbone_weights(backbone, tmp_path / "whole.safetensors")
    torch.testing.assert_close(backbone(images), expected)
    left = {key for key in whole.state_dict() if key.startswith("blocks.")}
    own = {key for key in backbone.model.state_dict() if key.startswith("blocks.")}
    assert own == {key for key in left if int(key.split(".")[1]) < (blocks or 4)}
    assert [key for key in own if "ls1" in key or "gamma_1" in key], "LayerScale"
    save_file(backbone.model.state_dict(), tmp_path / "left.safetensors")
    again = Backbone(backbone.config)
    load_backbone_weights(again, tmp_path / "left.safetensors")
    torch.testing.assert_close(again(images), expected)


def test_attention_keys_are_the_last_blocks_that_is_left():
    _, backbone = whole_and_cut("dinov2", 2)
    images, seen = torch.rand(1, 3, 28, 28), []
    block = backbone.model.blocks[1]
    block.norm1.register_forward_hook(lambda _, __, output: seen.append(output))
    _, keys = backbone.features_and_keys(images)
    expected = torch.nn.functional.linear(seen[0], block.attn.qkv.weight, block.attn.qkv.bias)[:, 1:, 32:64]
    torch.testing.assert_close(keys, expected)


def test_weights_from_the_hub(monkeypatch):
    whole, backbone = whole_and_cut("dinov2", 2)
    monkeypatch.setattr(backbones, "_pretrained", lambda config: whole.state_dict())
    load_backbone_weights(backbone, "timm")
    images = torch.rand(1, 3, 28, 28)
    torch.testing.assert_close(backbone(images), output_of_block(whole, 2, images))


@pytest.mark.parametrize("kind", VITS)
def test_files_that_lack_what_is_wanted_or_hold_what_no_such_model_has(kind, tmp_path):
    whole, backbone = whole_and_cut(kind, 2)
    state = whole.state_dict()
    del state["blocks.1.norm1.weight"]
    state["blocks.4.norm1.weight"] = torch.ones(32)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="don't fit") as error:
        load_backbone_weights(backbone, tmp_path / "other.safetensors")
    assert "missing blocks.1.norm1.weight; unexpected blocks.4.norm1.weight" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone_blocks": 7, "backbone": "test_vit"}, "backbone_blocks 7: test_vit has 6; valid: 1 to 6"),
        ({"backbone_blocks": 3, "backbone": tiny_vit(depth=2)}, "3: the ViT has 2; valid: 1 to 2"),
        ({"backbone_blocks": 2, "backbone": "test_convnext"}, "2: 'test_convnext' is no ViT.*leave it out"),
    ],
)
def test_blocks_that_are_not_there(settings, message):
    section = tiny_section(image_size=32, **settings)
    config = resolve_config({"student": section, "teacher": section})
    with pytest.raises(ConfigError, match=message):
        build_student(config, teacher=None, seed=0)
    with pytest.raises(ConfigError, match=message):
        build_teacher(config)


def test_no_block_is_no_backbone():
    with pytest.raises(ConfigError, match=r"student\.backbone_blocks: 0 must be at least 1"):
        resolve_config({"student": {"backbone_blocks": 0}})


def test_parameters_products_and_names_are_those_of_what_is_left(tmp_path):
    section = tiny_section(backbone=tiny_vit(depth=3))
    sections = [resolve_config({"student": {**section, "backbone_blocks": k}}).student for k in (None, 1, 2)]
    whole, one, two = (model_config(s, num_slots=3, slot_size=8) for s in sections)
    costs = [count_cost(design) for design in (whole, one, two)]
    steps = [costs[0].parameters - costs[2].parameters, costs[2].parameters - costs[1].parameters]
    block = Backbone(whole.backbone).model.blocks[0]
    assert steps == [sum(p.numel() for p in block.parameters())] * 2
    products = [cost.macs_products for cost in costs]
    assert products[0] - products[2] == pytest.approx(products[2] - products[1])
    assert products[1] < products[2]
    named = BackboneConfig("vit_small_patch14_dinov2", 224, blocks=8)
    assert architecture(model_config(sections[0], num_slots=3, slot_size=8)).startswith("ViT(width 16")
    assert "ViT(width 16, depth 3, patch 8) up to block 2, 16²" in architecture(two)
    assert named.label == "vit_small_patch14_dinov2 up to block 8"


def test_models_of_cut_backbones_are_saved_and_loaded(tmp_path):
    section = tiny_section(image_size=32, backbone="test_vit", backbone_blocks=2)
    config = resolve_config({"student": section})
    model = build_student(config, teacher=None, seed=0).eval()
    save_slot_model(model, tmp_path)
    loaded = load_slot_model(tmp_path)
    video = torch.rand(1, 2, 3, 32, 32)
    assert loaded.config == model.config
    assert loaded.config.backbone.blocks == 2
    torch.testing.assert_close(loaded(video).slots, model(video).slots)
    whole = SlotModel(
        model_config(
            resolve_config({"student": {**section, "backbone_blocks": None}}).student,
            num_slots=model.config.num_slots,
            slot_size=model.config.slot_size,
        )
    )
    assert "blocks" not in whole.config.to_dict()["backbone"], "so that files stay as they were"


def test_random_weights_are_those_of_the_whole_models_first_blocks():
    """So that a student cut short sees what the whole one sees on the way."""
    section = tiny_section(image_size=32, backbone="test_vit")
    whole, cut = (
        build_student(resolve_config({"student": {**section, "backbone_blocks": k}}), teacher=None, seed=0)
        for k in (None, 2)
    )
    state = whole.encoder.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in cut.encoder.backbone.state_dict().items())

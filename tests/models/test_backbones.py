"""Backbones of any shape: their features against timm's own read-outs, their weights' files, what is refused."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from places import CONFIGS, ROOT
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import nn

from pipeline.config import ConfigError, load_config, resolve_config
from pipeline.distill.step import Batch, Objective, Terms
from pipeline.models import Backbone, BackboneConfig, SlotModel, SlotModelConfig, load_backbone_weights
from pipeline.models._timm import import_timm
from pipeline.models.build import build_student, model_config
from pipeline.models.initialisation import start_as_soft_kmeans
from pipeline.report.efficiency import count_macs

timm = import_timm()

DINOV3 = {"depth": 2, "embed_dim": 64, "num_heads": 2}
# A small one of each family: name, image size, arguments, stride, features.
MAPS = {
    "convnext": ("test_convnext", 64, {}, None, (2, 2, 64)),
    "convnext, stride 8": ("test_convnext", 64, {}, 8, (8, 8, 32)),
    "convnext rounds down": ("test_convnext", 72, {}, 16, (4, 4, 48)),
    "mobilenetv4": ("mobilenetv4_conv_small", 64, {}, None, (2, 2, 960)),
    "mobilenetv4 rounds up": ("mobilenetv4_conv_small", 72, {}, 16, (5, 5, 96)),
    "hybrid mobilenetv4": ("mobilenetv4_hybrid_medium", 64, {}, 16, (4, 4, 160)),
    "fastvit": ("fastvit_t8", 64, {}, None, (2, 2, 384)),
    "efficientvit": ("efficientvit_b0", 64, {}, 16, (4, 4, 64)),
    "resnet": ("test_resnet", 64, {}, 16, (4, 4, 192)),
}
each_map = pytest.mark.parametrize("kind", MAPS)


def build(kind, **changes):
    name, size, arguments, stride, _ = MAPS[kind]
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(name, size, arguments, stride, **changes))
    shake(backbone)
    return backbone


def dinov3(**changes):
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig("vit_small_patch16_dinov3", 64, {**DINOV3, **changes}))
    shake(backbone)
    return backbone


@torch.no_grad()
def shake(module):
    """Values that no initialisation has, so that a tensor in the wrong place shows; statistics too."""
    for tensor in (*module.parameters(), *(b for name, b in module.named_buffers() if "running" in name)):
        tensor.add_(0.05 * torch.rand_like(tensor))


def images(size, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- features -----------------------------------------------------------------------------------------


@each_map
@torch.no_grad()
def test_a_map_is_what_features_only_gives(kind):
    name, size, arguments, _, (rows, columns, width) = MAPS[kind]
    backbone = build(kind)
    assert (backbone.grid, backbone.num_patches, backbone.feature_size) == (
        (rows, columns),
        rows * columns,
        width,
    )
    features = backbone(images(size))
    whole = timm.create_model(name, features_only=True, **arguments).eval()
    # `features_only` joins some names with underscores.
    own = {key.replace(".", "_"): value for key, value in backbone.model.state_dict().items()}
    for key, tensor in whole.state_dict().items():
        tensor.copy_(own.get(key.replace(".", "_"), tensor))
    maps = [m for m in whole(images(size)) if m.shape[1:] == (width, rows, columns)]
    expected = maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_dinov3_gives_the_patch_tokens_before_the_final_norm():
    backbone = dinov3()
    whole = timm.create_model("vit_small_patch16_dinov3", img_size=64, num_classes=0, **DINOV3).eval()
    assert not whole.load_state_dict(backbone.model.state_dict(), strict=False).unexpected_keys
    nn.init.normal_(whole.norm.weight)
    before = []
    whole.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    whole.forward_features(images(64))
    assert backbone.model.num_prefix_tokens == 5  # a class token and four registers
    assert (backbone.grid, backbone.feature_size) == ((4, 4), 64)
    torch.testing.assert_close(backbone(images(64)), before[0][:, 5:])


def test_dinov3_has_attention_keys():
    backbone = dinov3()
    features, keys = backbone.features_and_keys(images(64))
    assert keys.shape == features.shape == (2, 16, 64)
    block, seen = backbone.model.blocks[-1], []
    block.norm1.register_forward_hook(lambda _, __, output: seen.append(output))
    backbone(images(64))
    weight = block.attn.qkv.weight[64:128]
    torch.testing.assert_close(keys, (seen[0] @ weight.T)[:, 5:])


def test_models_without_attention_keys_say_so():
    for backbone in (build("convnext"), dinov3(qkv_fused=False)):
        with pytest.raises(ValueError, match=r"shows no attention keys.*use a plain ViT"):
            backbone.features_and_keys(images(64))


@torch.no_grad()
def test_a_grid_of_ones_own():
    own, asked = build("convnext, stride 8"), build("convnext, stride 8", grid=(5, 11))
    maps = own(images(64)).transpose(1, 2).unflatten(2, (8, 8))
    expected = F.interpolate(maps, (5, 11), mode="bilinear").flatten(2).transpose(1, 2)
    assert (asked.grid, asked.num_patches) == ((5, 11), 55)
    torch.testing.assert_close(asked(images(64)), expected)
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = Backbone(BackboneConfig(None, 32, vit, grid=(2, 6)))
    features, keys = backbone.features_and_keys(images(32))
    assert features.shape == keys.shape == (2, 12, 16)


def test_registers_are_no_patches():
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig("vit_small_patch14_reg4_dinov2", 56))
    assert (backbone.model.num_prefix_tokens, backbone.grid) == (5, (4, 4))
    assert backbone.trained_colours == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_statistics_of_batches_stay_as_they_are():
    model = SlotModel(
        SlotModelConfig(BackboneConfig("test_efficientnet", 64), 3, 8, decoder_hidden_sizes=(8,))
    )
    norms = [m for m in model.encoder.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = copy.deepcopy(model.encoder.backbone.state_dict())
    model.train()
    output = model(images(64, 4)[None])
    (output.slots.sum() + output.reconstruction.sum()).backward()
    assert norms
    assert not any(norm.training for norm in norms)
    for key, tensor in model.encoder.backbone.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(p.grad is None for p in model.encoder.backbone.parameters())


# --- weights --------------------------------------------------------------------------------------------


def published(kind):
    """A whole model, as its weights are published, with the backbone that has them."""
    name, _, arguments, *_ = MAPS.get(kind, ("vit_small_patch16_dinov3", 64, DINOV3, None, None))
    whole = timm.create_model(name, **arguments)
    shake(whole)
    return whole


@pytest.mark.parametrize(
    "kind", ["dinov3", "convnext, stride 8", "mobilenetv4 rounds up", "fastvit", "efficientvit"]
)
@torch.no_grad()
def test_weights_from_a_file(kind, tmp_path):
    """Of the whole model, with its head, and of the backbone alone."""
    backbone = dinov3() if kind == "dinov3" else build(kind)
    size, whole = backbone.config.image_size, published(kind)
    path = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), path)
    before = backbone(images(size))
    load_backbone_weights(backbone, path)
    loaded = backbone(images(size))
    assert not torch.allclose(loaded, before)
    for key, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key]), key
    torch.save(backbone.model.state_dict(), path.with_suffix(".pth"))
    shake(backbone)
    load_backbone_weights(backbone, path.with_suffix(".pth"))
    assert torch.equal(backbone(images(size)), loaded)


@pytest.mark.parametrize("kind", ["dinov3", "convnext", "mobilenetv4", "fastvit"])
def test_keys_that_do_not_fit_are_named(kind, tmp_path):
    backbone = dinov3() if kind == "dinov3" else build(kind)
    state = backbone.model.state_dict()
    first, *_, last = state
    del state[last]
    state[first] = torch.zeros(3)
    torch.save({**state, "other.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="don't fit") as error:
        load_backbone_weights(backbone, tmp_path / "weights.pth")
    for text in (f"missing {last}", "unexpected other.weight", f"{first} is (3,), expected"):
        assert text in str(error.value)


def test_weights_that_are_not_finite(tmp_path):
    backbone = build("convnext")
    state = backbone.model.state_dict()
    state["stem.0.bias"] = torch.full_like(state["stem.0.bias"], torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"not finite \(stem\.0\.bias\)"):
        load_backbone_weights(backbone, tmp_path / "nan.safetensors")


def test_position_biases_of_another_size_are_resampled(tmp_path):
    """EfficientViT (MSRA) has some in each window; timm knows how."""
    torch.save(timm.create_model("efficientvit_m0", img_size=224).state_dict(), tmp_path / "weights.pth")
    backbone = Backbone(BackboneConfig("efficientvit_m0", 64))
    load_backbone_weights(backbone, tmp_path / "weights.pth")
    assert backbone.grid == (2, 2)


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "vit_smal_patch14_dinov2"},
            "no model 'vit_smal_patch14_dinov2'; similar: vit_small_patch14_dinov2",
        ),
        ({"name": "mobilenetv4_conv_smal"}, "similar: mobilenetv4_conv_small"),
        ({"name": "test_convnext", "stride": 12}, "stride 12: 'test_convnext' gives .* are 8, 16, 32"),
        ({"name": "test_vit", "stride": 8}, "stride 8: test_vit is a ViT, whose stride is its patch size 16"),
        ({"name": "vit_small_patch16_dinov3", "image_size": 40}, "multiple of the patch size 16.*32 or 48"),
        ({"name": "convmixer_768_32"}, r"'convmixer_768_32' gives no grid of features .*\(it has 7\)"),
        ({"name": "test_convnext", "image_size": 4}, "'test_convnext' can't take images of 4 pixels"),
    ],
)
def test_backbones_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        Backbone(BackboneConfig(**{"image_size": 64, **config}))


# --- students of a config -------------------------------------------------------------------------------------

PRESETS = sorted((CONFIGS / "students").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_have_the_colours_and_the_parameters_that_are_said(preset):
    config = load_config(CONFIGS / "movi_e.yaml", presets=[preset])
    design = model_config(config.student, **config.teacher.sizes)
    with torch.device("meta"):
        model = SlotModel(design)
    assert (design.mean, design.std) == model.encoder.backbone.trained_colours
    gmac = count_macs(design, 60).products / 60 / 1e9
    row = f"| {model.num_parameters() / 1e6:.2f} | {gmac:.1f} |"
    (line,) = [
        r for r in (ROOT / "docs" / "distilling.md").read_text().splitlines() if f"| `{preset.stem}`" in r
    ]
    assert row in line, row
    # And over a config whose student has a ViT of its own.
    assert load_config(CONFIGS / "demo.yaml", presets=[preset]).student.backbone == config.student.backbone


def test_pretrained_weights_see_the_colours_that_they_know(tmp_path, capsys):
    expected = r"test_convnext was trained with .*: mean=\[0\.5, 0\.5, 0\.5\] std=\[0\.5, 0\.5, 0\.5\]"
    student = {"backbone": "test_convnext", "image_size": 64, "decoder_hidden_sizes": [8]}
    with pytest.raises(ConfigError, match=expected):
        build_student(resolve_config({"student": student}), teacher=None, seed=0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_convnext").state_dict(), path)
    for colour, warned in ([0.5] * 3, False), ([0.4] * 3, True):
        values = {**student, "backbone_weights": str(path), "mean": colour, "std": [0.5] * 3}
        assert (
            build_student(resolve_config({"student": values}), teacher=None, seed=0).config.mean[0]
            == colour[0]
        )
        assert bool(re.search(expected, capsys.readouterr().err)) == warned


def test_a_convolutional_student_of_another_grid_learns_from_a_vits_features():
    torch.manual_seed(0)
    design = BackboneConfig("test_convnext", 64, stride=8, grid=(3, 5))
    student = SlotModel(SlotModelConfig(design, 3, 8, decoder_hidden_sizes=(8,)))
    start_as_soft_kmeans(student)
    teacher = tiny_model().eval()
    features = teacher.backbone_features(torch.rand(2, 2, 3, 32, 32))
    slots = teacher.roll_out(features)[0].detach()
    batch = Batch(torch.rand(2, 2, 3, 64, 64), target_slots=slots, teacher_features=features)
    losses = Objective(student, Terms(slot_kd=1, feature_kd=1), teacher=teacher)(batch)
    losses["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.trainable_parameters())
    own = student(batch.video)
    assert own.masks.shape == (2, 2, 3, 15)
    labels = student.label_maps(own.masks[0], (30, 50))
    upscaled = F.interpolate(own.masks[0].unflatten(-1, (3, 5)), (30, 50), mode="bilinear")
    assert torch.equal(labels.long(), upscaled.argmax(1))
    save_and_load = SlotModelConfig.from_dict(json.loads(json.dumps(student.config.to_dict())))
    assert save_and_load == student.config


def test_a_plain_vits_config_has_no_new_keys():
    """So that files stay as they were, and what hashes them."""
    assert set(tiny_model().config.to_dict()["backbone"]) == {"name", "image_size", "arguments"}

"""Every kind of public checkpoint: read, told apart, written again, and refused where it is bad."""

import argparse
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from kinds import KINDS, VIT, build, each_kind, run, video
from places import GOLDEN, ROOT
from safetensors.torch import load_file, save_file

from pipeline.models import CheckpointHints, load_slot_model, save_public_checkpoint, save_slot_model


def assert_same_function(one, other):
    expected, output = run(one), run(other)
    for name in ("slots", "attention", "masks", "reconstruction", "similarity"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=0, atol=0, msg=name)


def public_file(model, path, change=None):
    """As others have written it: without our config. `change` may change the tensors."""
    save_public_checkpoint(model, path)
    state = torch.load(path, weights_only=True)["state_dict"]
    if change:
        change(state)
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.0.0"}, path)
    return path


# --- reading and writing ----------------------------------------------------------------------------


@each_kind
def test_kinds_are_told_apart_by_their_keys(kind, tmp_path):
    """Which may lack `.module`."""
    model = build(kind)
    public_file(model, tmp_path / "a.ckpt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "b.ckpt")
    for path in ("a.ckpt", "b.ckpt"):
        loaded = load_slot_model(tmp_path / path, num_heads=2, num_slots=3)
        backbone = loaded.config.backbone
        assert replace(loaded.config, backbone=model.config.backbone) == model.config
        assert (backbone.image_size, loaded.grid) == (32, (4, 4))
        assert_same_function(model, loaded)


@each_kind
def test_our_own_formats(kind, tmp_path):
    model = build(kind)
    save_slot_model(model, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path / "folder")) == ["config.json", "model.safetensors"]
    save_public_checkpoint(model, tmp_path / "file.ckpt", step=7)
    assert torch.load(tmp_path / "file.ckpt", weights_only=True)["global_step"] == 7
    for path in ("folder", "file.ckpt"):
        loaded = load_slot_model(tmp_path / path)
        assert not loaded.training
        assert loaded.config == model.config
        assert_same_function(model, loaded)


@pytest.mark.parametrize("name", [*KINDS, "slotcontrast_tiny", "videosaur_tiny"])
def test_a_public_file_survives_our_own_formats(name, tmp_path):
    """Those of others, and the two that the public implementations wrote."""
    original, hints = GOLDEN / f"{name}.ckpt", {"num_heads": 3, "num_slots": 4}
    if name in KINDS:
        original, hints = public_file(build(name), tmp_path / "a.ckpt"), {"num_heads": 2, "num_slots": 3}
    model = load_slot_model(original, **hints)
    save_slot_model(model, tmp_path / "folder")
    save_public_checkpoint(model, tmp_path / "again.ckpt")
    for path in ("folder", "again.ckpt"):
        assert_same_function(model, load_slot_model(tmp_path / path))
    one, other = (torch.load(p, weights_only=True)["state_dict"] for p in (original, tmp_path / "again.ckpt"))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}


def test_layouts(tmp_path):
    keys = {k: set(torch.load(public_file(build(k), tmp_path / k))["state_dict"]) for k in KINDS}
    assert {
        "initializer.slots",
        "encoder.module.backbone.model.patch_embed.proj.weight",
        "encoder.module.output_transform.layers.3.bias",
        "processor.module.corrector.gru.weight_ih",
        "processor.module.corrector.mlp.layers.1.weight",
        "processor.module.predictor.blocks.0.self_attn.qkv.weight",
        "decoder.module.pos_emb",
        "decoder.module.mlp.layers.4.weight",
    } <= keys["slotcontrast"]
    assert not any(key.startswith("encoder.module.backbone.model.norm.") for key in keys["slotcontrast"])
    assert not any(".module." in key or "predictor" in key for key in keys["dinosaur"])
    assert {
        "initializer.log_std",
        "decoder.module.allocator.blocks.1.self_attn.qkv.weight",
        "decoder.module.norm_memory.bias",
        "decoder.module.renderer.layers.2.weight",
        "decoder.module.output_transform.bias",
        "processor.module.predictor.blocks.0.norm2.weight",
    } <= keys["videosaur"]
    assert not any("corrector.mlp" in key for key in keys["videosaur"])


def test_drawn_slots_need_their_number(tmp_path):
    """It is in no tensor, and any number works."""
    path = public_file(build("videosaur"), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"num_slots: must be given, as .*a\.ckpt draws its initial slots"):
        load_slot_model(path, num_heads=2)
    assert run(load_slot_model(path, num_heads=2, num_slots=5)).slots.shape == (2, 4, 5, 8)


def test_learned_slots_are_counted(tmp_path):
    path = public_file(build("slotcontrast"), tmp_path / "a.ckpt")
    assert load_slot_model(path, num_heads=2, num_slots=15).config.num_slots == 3


def test_normalisation_of_a_public_file_can_be_said(tmp_path):
    """VideoSAUR's MOVi files have been run on pixels in [-1, 1]."""
    path = public_file(build("videosaur_movi"), tmp_path / "a.ckpt")
    half = (0.5, 0.5, 0.5)
    model = load_slot_model(path, num_heads=2, num_slots=3, mean=half, std=half)
    white = np.full((1, 32, 32, 3), 255, np.uint8)
    torch.testing.assert_close(model.prepare([white]), torch.ones(1, 1, 3, 32, 32))


def test_hints_survive_json():
    half = (0.5, 0.5, 0.5)
    for hints in (CheckpointHints(), CheckpointHints(2, 3, half, (0.1, 0.2, 1 / 3))):
        again = CheckpointHints.from_dict(json.loads(json.dumps(hints.to_dict())))
        assert again == hints
        assert hash(again) == hash(hints)
    assert CheckpointHints.from_dict({"num_slots": 7}) == CheckpointHints(num_slots=7)
    with pytest.raises(TypeError, match="heads"):
        CheckpointHints.from_dict({"heads": 7})


def test_srl_training_heads_are_named_in_one_line(tmp_path, capsys):
    model = build("slotcontrast")
    path = public_file(
        model,
        tmp_path / "srl.ckpt",
        lambda s: s.update({f"projector{i}.{k}.weight": torch.ones(2) for i in ("", "2") for k in (0, 2)}),
    )
    loaded = load_slot_model(path, num_heads=2)
    assert_same_function(model, loaded)
    assert capsys.readouterr().err == (
        f"{path}: ignored 4 tensors of heads that only training uses (projector, projector2)\n"
    )


@pytest.mark.parametrize("kind", ["slotcontrast", "dinosaur"])
@pytest.mark.parametrize(
    "extra", [{}, {"no_embed_class": True}, {"reg_tokens": 4, "no_embed_class": True}, {"reg_tokens": 4}]
)
def test_position_embeddings_of_the_vits_own_size(kind, extra, tmp_path, capsys):
    """SlotContrast's MOVi files and DINOSAUR's: a ViT of 518 pixels, run at 336 and 224."""
    from timm.models.vision_transformer import VisionTransformer

    model = build(kind, vit={**VIT, **extra})
    vit = VisionTransformer(
        **VIT, **extra, img_size=72, num_classes=0, global_pool="", dynamic_img_size=True
    ).eval()
    vit.norm = torch.nn.Identity()
    states = vit.state_dict()

    def native(state):
        prefix = next(k for k in state if k.endswith("patch_embed.proj.weight")).removesuffix(
            "patch_embed.proj.weight"
        )
        assert state[prefix + "pos_embed"].shape != states["pos_embed"].shape
        state.update({prefix + k: v for k, v in states.items()})

    path = public_file(model, tmp_path / "a.ckpt", native)
    loaded = load_slot_model(path, num_heads=2, num_slots=3)
    assert loaded.image_size == 32
    assert capsys.readouterr().err == f"{path}: position embeddings resampled from 9 x 9 to 4 x 4 patches\n"
    with torch.no_grad():
        expected = vit.forward_features(video().flatten(0, 1))[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(loaded.backbone_features(video()).flatten(0, 1), expected)


def test_configs_from_before_there_were_other_kinds():
    config = json.loads((ROOT / "demo" / "teacher" / "config.json").read_text())
    assert not {"predictor", "decoder", "decoder_outputs"} & set(config)
    model = load_slot_model(ROOT / "demo" / "teacher")
    assert (model.config.predictor, model.config.decoder) == (True, "mlp")
    assert model.config.decoder_outputs == ("features",)


# --- what is refused --------------------------------------------------------------------------------


def without(*keys):
    return lambda state: [state.pop(key) for key in keys]


@each_kind
@pytest.mark.parametrize("layout", ["folder", "public"])
def test_all_that_does_not_fit_is_in_one_error(kind, layout, tmp_path):
    mixer = kind.startswith("videosaur")
    module = "" if kind == "dinosaur" or layout == "folder" else "module."
    weight = f"decoder.{module}" + ("output_transform.weight" if mixer else "mlp.layers.4.weight")

    def damage(state):
        for key in ("pos_emb", "renderer.layers.0.weight" if mixer else "mlp.layers.0.weight"):
            del state[f"decoder.{module}{key}"]
        del state[f"processor.{module}corrector.gru.bias_hh"]
        del state[f"encoder.{module}backbone.model.blocks.0.attn.qkv.weight"]
        state["extra.weight"] = torch.ones(1)
        state[f"processor.{module}corrector.norm_slots.weight"] = torch.ones(9)
        state[weight] = torch.ones(7, 24)

    path = tmp_path / "a.ckpt"
    if layout == "public":
        public_file(build(kind), path, damage)
    else:
        save_slot_model(build(kind), path)
        damage(state := load_file(path / "model.safetensors"))
        save_file(state, path / "model.safetensors")
    with pytest.raises(ValueError, match="the weights don't fit the model") as error:
        load_slot_model(path, num_heads=2, num_slots=3)
    message = str(error.value)
    assert message.startswith(str(path))
    for part in (
        "missing decoder.pos_emb",
        f"missing decoder.{'renderer' if mixer else 'mlp'}.layers.0.weight",
        "missing processor.corrector.gru.bias_hh",
        "missing encoder.backbone.model.blocks.0.attn.qkv.weight",
        "unexpected extra.weight",
        "processor.corrector.norm_slots.weight is (9,), expected (8,)",
        weight.replace("module.", "") + " is (7, 24), expected",
    ):
        assert part in message


@each_kind
def test_every_single_missing_tensor_is_named(kind, tmp_path):
    model = build(kind, vit={**VIT, "init_values": 1.0})
    for key in model.state_dict():
        state = {k: v for k, v in model.state_dict().items() if k != key}
        torch.save({"state_dict": state}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"missing|not a slot model") as error:
            load_slot_model(tmp_path / "a.ckpt", num_heads=2, num_slots=3)
        assert key in str(error.value), str(error.value)


def test_a_video_model_without_its_predictor_is_damaged(tmp_path):
    """And no image model: those have no `.module` either."""
    keys = [k for k in build("slotcontrast").state_dict() if "predictor" in k]
    public = [k.replace("processor.", "processor.module.") for k in keys]
    path = public_file(build("slotcontrast"), tmp_path / "a.ckpt", without(*public))
    with pytest.raises(ValueError, match="the weights don't fit the model") as error:
        load_slot_model(path, num_heads=2)
    assert all(f"missing {key}" in str(error.value) for key in keys)


def test_tensors_of_something_else(tmp_path):
    torch.save({"conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)}, tmp_path / "resnet.pth")
    message = (
        r"resnet\.pth: not a slot model, it has no `initializer\.slots`.*first keys: conv1\.weight, fc\.bias"
    )
    with pytest.raises(ValueError, match=message):
        load_slot_model(tmp_path / "resnet.pth")


class Malicious:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "old torch", "pickle 2", "pickle 5"])
def test_a_pickle_with_code_in_it_is_refused(writer, tmp_path):
    content = {"state_dict": {"initializer.slots": torch.ones(1), "x": Malicious(tmp_path / "pwned")}}
    path = tmp_path / "a.ckpt"
    if writer.endswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(writer[-1])))
    message = r"a\.ckpt: refused, it is a pickle that holds more than tensors"
    with pytest.raises(ValueError, match=message) as error:
        load_slot_model(path)
    named = {"pickle 2": "torch.storage._load_from_bytes", "pickle 5": "a plain pickle"}
    assert f"({named.get(writer, 'posix.mkdir')})" in str(error.value)
    assert "Re-running" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_objects_besides_tensors_are_refused_by_name(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"refused, .* more than tensors \(argparse\.Namespace\)"):
        load_slot_model(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "content",
    [b"", b"I am no checkpoint\n" * 9, b"<!DOCTYPE html><html>", bytes(999), b"version https://git-lfs"],
)
@pytest.mark.parametrize(
    ("name", "reason"),
    [("a.ckpt", "can't be read as a PyTorch file: cut off, damaged or"), ("a.safetensors", "can't be read")],
)
def test_what_is_no_checkpoint(name, reason, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: {reason}") as error:
        load_slot_model(tmp_path / name)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("layout", ["zipped", "not zipped", "folder"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share, layout, tmp_path):
    path = file = tmp_path / "a.ckpt"
    if layout == "folder":
        save_slot_model(build("videosaur"), path)
        file = path / "model.safetensors"
    else:
        state = build("videosaur").state_dict()
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=layout == "zipped")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"a\.ckpt.*: (can't be read|refused)"):
        load_slot_model(path, num_heads=2, num_slots=3)


def test_wrong_heads(tmp_path):
    path = public_file(build("videosaur"), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="num_heads: 5 does not divide the width 32"):
        load_slot_model(path, num_heads=5, num_slots=3)
    with pytest.raises(ValueError, match="num_heads: must be given"):
        load_slot_model(path, num_slots=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "conv"}, "decoder must be 'mlp' or 'slot_mixer', not 'conv'"),
        ({"decoder_outputs": ("similarity", "features")}, r"decoder_outputs must be of .* in this order"),
        ({"decoder": "mlp", "decoder_outputs": ("similarity",)}, r"an MLP decoder has the outputs"),
        ({"initializer": "fixed"}, "initializer must be one of"),
    ],
)
def test_configs_that_no_model_has(changes, message):
    with pytest.raises(ValueError, match=message):
        build("videosaur", **changes)

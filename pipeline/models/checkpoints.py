"""Reading and writing slot models: public SlotContrast files, and our own folders.

A model folder holds `model.safetensors` and `config.json`. Tensor names are those of the public
layout in both formats, where a video model has `.module` in some of them and an image model has not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.backbone import BackboneConfig, check_state_dict, read_checkpoint_file
from pipeline.models.slot_model import SlotModel, SlotModelConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_BACKBONE = "encoder.backbone.model."
_TRAINING_HEADS = ("projector.", "projector2.")
_EMBEDDED_CONFIG = "slotmatch_config"  # an extra entry of the `.ckpt` files that we write


def load_slot_model(path: str | Path, *, num_heads: int | None = None) -> SlotModel:
    """Builds a model from a checkpoint and loads its weights; in eval mode, on the CPU.

    Args:
        path: a folder written by `save_slot_model`, or a public checkpoint file (`.ckpt`, `.pt`,
            `.safetensors`) in the SlotContrast layout.
        num_heads: attention heads of the ViT, the one thing that a public file's shapes don't tell.
            By default width / 64, as in every public ViT.
            Ignored where the file or folder has a config of ours.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not a checkpoint, or keys that are missing, unexpected or of another shape.
    """
    path = Path(path)
    if path.is_dir():
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} is not a model folder: it has no {name}")
        config = _parse_config((path / CONFIG_FILE).read_text(), source=str(path / CONFIG_FILE))
        state = read_checkpoint_file(path / WEIGHTS_FILE)
    else:
        content = read_checkpoint_file(path)
        state = content.get("state_dict", content)
        if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
            raise ValueError(f"{path}: has no `state_dict` of tensors")
        if _EMBEDDED_CONFIG in content:
            config = _parse_config(content[_EMBEDDED_CONFIG], source=str(path))
        else:
            config = infer_config(_plain_names(state), source=str(path), num_heads=num_heads)
    # SRL's extra training heads; inference has no use for them.
    state = {k: v.float() for k, v in _plain_names(state).items() if not k.startswith(_TRAINING_HEADS)}
    model = SlotModel(config)
    check_state_dict(model, state, str(path))
    model.load_state_dict(state)
    return model.eval()


def _parse_config(text: str, *, source: str) -> SlotModelConfig:
    try:
        return SlotModelConfig.from_dict(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: not the config of a slot model ({type(error).__name__}: {error})"
        ) from error


def save_slot_model(model: SlotModel, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes `model.safetensors` (weights stored as `dtype`) and `config.json` into `folder`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def save_public_checkpoint(model: SlotModel, path: str | Path, *, step: int = 0) -> None:
    """Writes one `.ckpt` file in the public layout, which `load_slot_model` reads as well.

    Our config travels along as a JSON string; other readers ignore it.
    """
    state = {_public_name(k): v.detach().cpu() for k, v in model.state_dict().items()}
    content = {"state_dict": state, "epoch": 0, "global_step": step}
    torch.save({**content, _EMBEDDED_CONFIG: json.dumps(model.config.to_dict())}, path)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^(encoder|processor|decoder)\.module\.", r"\1.", k): v for k, v in state.items()}


def _public_name(key: str) -> str:
    return re.sub(r"^(encoder|processor|decoder)\.", r"\1.module.", key)


def infer_config(state: Mapping[str, Tensor], *, source: str, num_heads: int | None) -> SlotModelConfig:
    """The architecture that tensors of the public layout belong to, from their names and shapes.

    Raises:
        ValueError: a tensor that the architecture must have is missing.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(
                f"{source}: not a SlotContrast checkpoint, it has no `{key}` "
                f"(its first keys: {', '.join(list(state)[:5]) or 'none'})"
            )
        return state[key].shape

    learned = "initializer.slots" in state
    slot_size = shape("initializer.slots" if learned else "initializer.mean")[-1]
    if not learned:
        raise ValueError(f"{source}: models with random initial slots are not supported yet")
    if "decoder.allocator.blocks.0.norm1.weight" in state:
        raise ValueError(f"{source}: models with VideoSAUR's slot-mixer decoder are not supported yet")
    hidden = []
    index = 0
    while f"decoder.mlp.layers.{index + 2}.weight" in state:
        hidden.append(shape(f"decoder.mlp.layers.{index}.weight")[0])
        index += 2
    return SlotModelConfig(
        backbone=_infer_backbone(state, shape, num_heads),
        num_slots=shape("initializer.slots")[1],
        slot_size=slot_size,
        corrector_mlp="processor.corrector.mlp.layers.0.weight" in state,
        decoder_hidden_sizes=tuple(hidden),
    )


def _infer_backbone(state: Mapping[str, Tensor], shape: Any, num_heads: int | None) -> BackboneConfig:
    width, _, patch, _ = shape(_BACKBONE + "patch_embed.proj.weight")
    if num_heads and width % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide the width {width} of the checkpoint's ViT")
    if num_heads is None and width % 64:
        raise ValueError(
            f"num_heads: must be given, as the ViT's width {width} is not a multiple of 64 and the checkpoint's "
            "shapes don't tell its heads"
        )
    depth = 1 + max(
        (int(m[1]) for k in state if (m := re.match(re.escape(_BACKBONE) + r"blocks\.(\d+)\.", k))),
        default=-1,
    )
    num_patches = shape("decoder.pos_emb")[-2]
    grid = round(num_patches**0.5)
    registers = shape(_BACKBONE + "reg_token")[1] if _BACKBONE + "reg_token" in state else 0
    class_token = _BACKBONE + "cls_token" in state
    # Models with registers add position embeddings to the patches alone.
    no_embed_class = shape(_BACKBONE + "pos_embed")[1] == num_patches
    arguments: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads or width // 64,
        "mlp_ratio": shape(_BACKBONE + "blocks.0.mlp.fc1.weight")[0] / width,
        "qkv_bias": _BACKBONE + "blocks.0.attn.qkv.bias" in state,
        "init_values": 1.0 if _BACKBONE + "blocks.0.ls1.gamma" in state else None,
        "class_token": class_token,
        "reg_tokens": registers,
        "no_embed_class": no_embed_class and class_token,
    }
    return BackboneConfig(name=None, image_size=grid * patch, arguments=arguments)

"""Reading and writing slot models: public checkpoint files, and our own folders.

A model folder holds `model.safetensors` and `config.json`. Tensor names are those of the public
layout in both formats, where a video model has `.module` in some of them and an image model has not.

Public files are told apart by their keys: SlotContrast, SRL and SlotCurri (`initializer.slots`, MLP
decoder), VideoSAUR (`initializer.mean`, no MLP in slot attention, slot mixer), DINOSAUR (no predictor);
SOLV (`s_bind.slots` under `model`), whose layout is another one.
"""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.log import log
from pipeline.models._timm import import_timm
from pipeline.models.files import check_finite, check_state_dict, read_checkpoint_file
from pipeline.models.hints import BACKBONE, CheckpointHints, HintError, Shapes, infer_vit
from pipeline.models.initialisation import WithoutDraws
from pipeline.models.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.rivals import solv_files
from pipeline.models.rivals.solv import SOLV, SOLVConfig
from pipeline.models.segmenter import VideoSegmenter
from pipeline.models.slot_model import SlotModel, SlotModelConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE)
Config = SlotModelConfig | SOLVConfig
_TRAINING_HEADS = ("projector.", "projector2.")
_EMBEDDED_CONFIG = "slotmatch_config"  # an extra entry of the `.ckpt` files that we write


def load_slot_model(
    path: str | Path,
    *,
    num_heads: int | None = None,
    num_slots: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    backbone_weights: str | Path | None = None,
) -> VideoSegmenter:
    """Builds a model from a checkpoint and loads its weights; in eval mode, on the CPU.

    The keyword arguments are what a public file does not tell, see `CheckpointHints`. They are ignored where
    the file or folder has a config of ours.

    Args:
        path: a folder written by `save_slot_model`, or a public checkpoint file (`.ckpt`, `.pt`,
            `.safetensors`) in the layout that SlotContrast, VideoSAUR and DINOSAUR share, or in SOLV's.

    Raises:
        FileNotFoundError: nothing at `path`.
        HintError: a public file needs another `num_heads`, a `num_slots` or `backbone_weights`.
        ValueError: not a checkpoint, one that holds more than tensors and plain values, or keys that are
            missing, unexpected or of another shape, all of which the message lists; or tensors that are not
            finite.
    """
    path = Path(path)
    if path.is_dir():
        for name in MODEL_FILES:
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} is not a model folder: it has no {name}")
        config = _parse_config((path / CONFIG_FILE).read_text(), source=str(path / CONFIG_FILE))
        state = _without_training_heads(read_checkpoint_file(path / WEIGHTS_FILE), str(path))
    else:
        content = _read_file(path)
        vit = None if backbone_weights is None else str(backbone_weights)
        hints = CheckpointHints(num_heads, num_slots, mean, std, vit)
        config, state = (_read_solv if solv_files.is_solv(content) else _read_slot_model)(
            content, hints, str(path)
        )
    state = {k: v.float() for k, v in _plain_names(state).items()}
    with WithoutDraws():
        model: VideoSegmenter = SOLV(config) if isinstance(config, SOLVConfig) else SlotModel(config)
    check_state_dict(model, state, str(path))
    check_finite(state, str(path))
    model.load_state_dict(state)
    return model.eval()


def _read_file(path: Path) -> dict[str, Any]:
    """Content of a public file; SOLV's may hold a plain `argparse.Namespace` beside its tensors."""
    try:
        return read_checkpoint_file(path)
    except ValueError:
        try:
            content = read_checkpoint_file(path, allowed=[Namespace])
        except ValueError:
            content = {}
        if not solv_files.is_solv(content):
            raise
        return content


def _read_slot_model(
    content: dict[str, Any], hints: CheckpointHints, source: str
) -> tuple[Config, dict[str, Tensor]]:
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{source}: has no `state_dict` of tensors")
    state = _without_training_heads(state, source)
    if _EMBEDDED_CONFIG in content:
        return _parse_config(content[_EMBEDDED_CONFIG], source=source), state
    config = infer_config(state, hints, source=source)
    return config, _with_resampled_positions(state, config, source)


def _read_solv(
    content: dict[str, Any], hints: CheckpointHints, source: str
) -> tuple[Config, dict[str, Tensor]]:
    if _EMBEDDED_CONFIG in content:
        return _parse_config(content[_EMBEDDED_CONFIG], source=source), solv_files.tensors(content)
    return solv_files.read(content, hints, source)


def _without_training_heads(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors that inference uses; SRL's files have two heads more."""
    heads = [k for k in state if k.startswith(_TRAINING_HEADS)]
    if heads:
        names = sorted({k.partition(".")[0] for k in heads})
        log(f"{source}: ignored {len(heads)} tensors of heads that only training uses ({', '.join(names)})")
    return {k: v for k, v in state.items() if not k.startswith(_TRAINING_HEADS)}


def _parse_config(text: str, *, source: str) -> Config:
    try:
        values = json.loads(text)
        kind = SOLVConfig if values.pop("system", None) == "solv" else SlotModelConfig
        return kind.from_dict(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: not the config of a slot model ({type(error).__name__}: {error})"
        ) from error


def save_slot_model(model: VideoSegmenter, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes `model.safetensors` (weights stored as `dtype`) and `config.json` into `folder`.

    Raises:
        ValueError: weights that are not finite, as `dtype` has them; then nothing is written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    check_finite(state, f"the model to be saved as {str(dtype).removeprefix('torch.')}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")


def save_public_checkpoint(model: VideoSegmenter, path: str | Path, *, step: int = 0) -> None:
    """Writes one `.ckpt` file in its system's public layout, which `load_slot_model` reads as well.

    Our config travels along as a JSON string; other readers ignore it.

    Raises:
        ValueError: weights that are not finite; then nothing is written.
    """
    check_finite(model.state_dict(), "the model to be saved")
    if isinstance(model, SOLV):
        content = solv_files.written(model)
    else:
        image_model = not model.config.predictor
        named = {k if image_model else _video_name(k): v for k, v in model.state_dict().items()}
        content = {"state_dict": {k: v.detach().cpu() for k, v in named.items()}}
    counters = {"epoch": 0, "global_step": step}
    torch.save({**content, **counters, _EMBEDDED_CONFIG: json.dumps(model.config.to_dict())}, path)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^(encoder|processor|decoder)\.module\.", r"\1.", k): v for k, v in state.items()}


def _video_name(key: str) -> str:
    return re.sub(r"^(encoder|processor|decoder)\.", r"\1.module.", key)


def infer_config(state: Mapping[str, Tensor], hints: CheckpointHints, *, source: str) -> SlotModelConfig:
    """The architecture that tensors of the public layout belong to, from their names and shapes.

    Raises:
        ValueError: nothing of a slot model there.
        HintError: what shapes don't tell was not given.
    """
    shapes = Shapes(_plain_names(state), source)
    corrector = "processor.corrector.to_q.weight"
    slot_size = shapes.size(("initializer.slots", 2), ("initializer.mean", 2), (corrector, 0))
    drawn = not shapes.has("initializer.slots") and shapes.has("initializer.")
    if drawn and hints.num_slots is None:
        raise HintError(
            f"num_slots: must be given, as {source} draws its initial slots and works with any number of them "
            "(public VideoSAUR: 11 for MOVi-C, 15 for MOVi-E, 7 for YTVIS; DINOSAUR on COCO: 7)"
        )
    positions = shapes.size(("decoder.pos_emb", -2), default=0)
    backbone, num_patches = infer_vit(shapes, hints.num_heads, patches=positions or None)
    video = shapes.has("processor.predictor.") or any(".module." in k for k in state)
    return SlotModelConfig(
        backbone=backbone,
        num_slots=(hints.num_slots or 1) if drawn else shapes.size(("initializer.slots", 1), default=1),
        slot_size=slot_size,
        initializer="random" if drawn else "learned",
        corrector_mlp=shapes.has("processor.corrector.mlp."),
        predictor=video,
        mean=tuple(hints.mean),
        std=tuple(hints.std),
        **_infer_decoder(shapes, num_patches),
    )


def _infer_decoder(shapes: Shapes, num_patches: int) -> dict[str, Any]:
    if shapes.has("decoder.mlp.") or not shapes.has("decoder.allocator."):
        return {"decoder_hidden_sizes": tuple(shapes.linear_sizes("decoder.mlp.layers.")[:-1])}
    features = shapes.size((BACKBONE + "patch_embed.proj.weight", 0), (BACKBONE + "pos_embed", 2))
    kinds = {
        features + num_patches: ("features", "similarity"),
        num_patches: ("similarity",),
        features: ("features",),
    }
    transform = "decoder.output_transform."
    size = shapes.size((transform + "weight", 0), (transform + "bias", 0), default=features + num_patches)
    return {
        "decoder": "slot_mixer",
        "decoder_hidden_sizes": tuple(shapes.linear_sizes("decoder.renderer.layers.")) or (1024,),
        "decoder_blocks": shapes.count(r"decoder\.allocator\.blocks\.(\d+)\."),
        # Any other size is named, with what was expected, when the weights are compared.
        "decoder_outputs": kinds.get(size, ("features", "similarity")),
    }


def _with_resampled_positions(
    state: Mapping[str, Tensor], config: SlotModelConfig, source: str
) -> dict[str, Tensor]:
    """The tensors with the ViT's position embeddings at the size of the decoder's grid.

    SlotContrast's MOVi models and DINOSAUR's run a ViT of 518 pixels at 336 and 224. Their files have the
    embeddings of 37 x 37 patches, which timm resamples in every pass (`dynamic_img_size`): the same
    function does it once here.
    """
    key = next((k for k in state if re.fullmatch(r"encoder\.(module\.)?backbone\.model\.pos_embed", k)), "")
    arguments = config.backbone.arguments or {}
    prefix = 0 if arguments["no_embed_class"] else arguments["class_token"] + arguments["reg_tokens"]
    stored = state[key].shape[1] - prefix if key and state[key].ndim == 3 else 0
    side, grid = math.isqrt(max(stored, 0)), config.backbone.image_size // arguments["patch_size"]
    if not side or side**2 != stored or side == grid:
        return dict(state)
    import_timm()
    from timm.layers import resample_abs_pos_embed

    log(f"{source}: position embeddings resampled from {side} x {side} to {grid} x {grid} patches")
    resampled = resample_abs_pos_embed(state[key], [grid, grid], [side, side], num_prefix_tokens=prefix)
    return {**state, key: resampled}

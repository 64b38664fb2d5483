"""The public files of slot models: SlotContrast, SRL and SlotCurri, VideoSAUR, DINOSAUR.

They share one layout and are told apart by their keys: `initializer.slots` and an MLP decoder (SlotContrast, SRL,
SlotCurri); `initializer.mean`, no MLP in slot attention, a slot mixer (VideoSAUR); no predictor (DINOSAUR). Names have
`.module` in them where the model is one of videos.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.log import log
from pipeline.models._timm import import_timm
from pipeline.models.hints import BACKBONE, CheckpointHints, HintError, Shapes, infer_vit
from pipeline.models.slot_model import SlotModel, SlotModelConfig

_TRAINING_HEADS = ("projector.", "projector2.")


def read(
    content: Mapping[str, Any], hints: CheckpointHints, source: str
) -> tuple[SlotModelConfig, dict[str, Tensor]]:
    """The config and the tensors of a file that others have written.

    Raises:
        ValueError: nothing of a slot model there.
        HintError: what shapes don't tell was not given.
    """
    named = _named(content, source)
    state = plain_names(named)
    video = any(".module." in key for key in named)
    config = infer_config(state, hints, source=source, video=video)
    return config, _with_resampled_positions(state, config, source)


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a file by our names, without the heads that only training uses.

    Raises:
        ValueError: there are none.
    """
    return plain_names(_named(content, source))


def _named(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{source}: has no `state_dict` of tensors")
    return without_training_heads(state, source)


def written(model: SlotModel) -> dict[str, Any]:
    """What a public file of a model holds."""
    image_model = not model.config.predictor
    named = {k if image_model else _video_name(k): v for k, v in model.state_dict().items()}
    return {"state_dict": {k: v.detach().cpu() for k, v in named.items()}}


def without_training_heads(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors that inference uses; SRL's files have two heads more."""
    heads = [k for k in state if k.startswith(_TRAINING_HEADS)]
    if heads:
        names = sorted({k.partition(".")[0] for k in heads})
        log(f"{source}: ignored {len(heads)} tensors of heads that only training uses ({', '.join(names)})")
    return {k: v for k, v in state.items() if not k.startswith(_TRAINING_HEADS)}


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of our modules."""
    return {re.sub(r"^(encoder|processor|decoder)\.module\.", r"\1.", k): v for k, v in state.items()}


def _video_name(key: str) -> str:
    return re.sub(r"^(encoder|processor|decoder)\.", r"\1.module.", key)


def infer_config(
    state: Mapping[str, Tensor], hints: CheckpointHints, *, source: str, video: bool
) -> SlotModelConfig:
    """The architecture that tensors of the public layout belong to, from their names and shapes.

    video: whether the file says that it is of a model of videos, even if its predictor should be missing.

    Raises:
        ValueError: nothing of a slot model there.
        HintError: what shapes don't tell was not given.
    """
    shapes = Shapes(state, source)
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
    video = video or shapes.has("processor.predictor.")
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
    key = BACKBONE + "pos_embed"
    arguments = config.backbone.arguments or {}
    prefix = 0 if arguments["no_embed_class"] else arguments["class_token"] + arguments["reg_tokens"]
    stored = state[key].shape[1] - prefix if key in state and state[key].ndim == 3 else 0
    side, grid = math.isqrt(max(stored, 0)), config.backbone.image_size // arguments["patch_size"]
    if not side or side**2 != stored or side == grid:
        return dict(state)
    import_timm()
    from timm.layers import resample_abs_pos_embed

    log(f"{source}: position embeddings resampled from {side} x {side} to {grid} x {grid} patches")
    resampled = resample_abs_pos_embed(state[key], [grid, grid], [side, side], num_prefix_tokens=prefix)
    return {**state, key: resampled}

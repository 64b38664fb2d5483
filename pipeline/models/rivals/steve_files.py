"""STEVE's public files: the bare tensors (`best_model.pt`), or `{model, epoch, ...}` (`checkpoint.pt.tar`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.models.hints import CheckpointHints, HintError, Shapes
from pipeline.models.rivals.dvae import TOKEN_SIDE
from pipeline.models.rivals.steve import STEVE, STEVEConfig

SLOTS = "steve_encoder.savi."
DECODER = "steve_decoder."
MASK = "self_attn_mask"  # True where a token may not look: the same in all blocks of all files


def is_steve(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is of STEVE."""
    return SLOTS + "slot_mu" in _state(content)


def _state(content: Mapping[str, Any]) -> Mapping[str, Any]:
    state = content.get("model", content)
    return state if isinstance(state, Mapping) else {}


def read(
    content: Mapping[str, Any], hints: CheckpointHints, source: str
) -> tuple[STEVEConfig, dict[str, Tensor]]:
    """The config and the tensors of a file that others have written.

    Raises:
        HintError: no `num_slots`, or heads that can't be.
    """
    if hints.num_slots is None:
        raise HintError(
            f"num_slots: must be given, as {source} draws its initial slots and works with any number of them "
            "(public STEVE: 15 for MOVi-E)"
        )
    state = tensors(content, source)
    shapes = Shapes(state, source)
    slot_size = shapes.size((SLOTS + "slot_mu", 2))
    width = shapes.size((DECODER + "bos", 2), (DECODER + "head.weight", 1), default=slot_size)
    heads: dict[str, Any] = {
        "predictor_heads": hints.predictor_heads or STEVEConfig.predictor_heads,
        "decoder_heads": hints.num_heads or STEVEConfig.decoder_heads,
    }
    for name, size, divisor in (
        ("predictor_heads", slot_size, heads["predictor_heads"]),
        ("num_heads", width, heads["decoder_heads"]),
    ):
        if size % divisor:
            raise HintError(f"{name}: {divisor} does not divide the width {size} of {source}'s transformer")
    vocabulary = (
        (DECODER + "head.weight", 0),
        (DECODER + "dict.dictionary.weight", 0),
        ("dvae.encoder.7.bias", 0),
    )
    return STEVEConfig(
        num_slots=hints.num_slots,
        slot_size=slot_size,
        width=width,
        cnn_width=shapes.size(("steve_encoder.cnn.0.m.weight", 0), default=STEVEConfig.cnn_width),
        mlp_size=shapes.size((SLOTS + "mlp.0.weight", 0), (SLOTS + "mlp.0.bias", 0), default=slot_size),
        vocabulary=shapes.size(*vocabulary, default=STEVEConfig.vocabulary),
        num_iterations=STEVEConfig.num_iterations if hints.num_iterations is None else hints.num_iterations,
        predictor_blocks=shapes.count(re.escape(SLOTS) + r"predictor\.blocks\.(\d+)\."),
        decoder_blocks=shapes.count(re.escape(DECODER) + r"tf\.blocks\.(\d+)\."),
        **heads,
        **_image(shapes),
    ), state


def _image(shapes: Shapes) -> dict[str, Any]:
    """Side of the input, as the tokens say, and stride, as the positions say besides.

    Raises:
        ValueError: positions that no stride gives.
    """
    tokens = shapes.size((DECODER + "pos.pe", 1), default=1025) - 1
    side = TOKEN_SIDE * math.isqrt(tokens)
    grid = shapes.size(("steve_encoder.pos.pe", 2), default=side // 2)
    if side % grid:
        raise ValueError(
            f"{shapes.source}: {tokens} tokens are of {side} x {side} pixels, which a grid of {grid} x {grid} "
            "(steve_encoder.pos.pe) doesn't fit: weights of another training"
        )
    return {"image_size": side, "stride": side // grid}


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a file by our names, without the masks, which are the same in all files."""
    return {k: v for k, v in _state(content).items() if isinstance(v, Tensor) and not k.endswith("." + MASK)}


def written(model: STEVE) -> dict[str, Any]:
    """What a public file of a model holds: its own readers' tensors and counters, but no optimiser's."""
    tokens = model.config.token_side**2
    forbidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    masks = {f"{DECODER}tf.blocks.{i}.{MASK}": forbidden for i in range(model.config.decoder_blocks)}
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return {"model": {**state, **masks}, "best_val_loss": math.inf, "best_epoch": 0}

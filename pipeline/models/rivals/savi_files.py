"""SAVi's public files: `.flax`, in which `optimizer/target` is a tree of the parameters by their JAX names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.models.hints import CheckpointHints, HintError, Shapes
from pipeline.models.rivals.savi import CUES, SAVi, SAViConfig

# Our modules, and what they are in a file; the names below them are the same.
PLACES = {
    "encoder.cnn.": "FrameEncoder_0/CNN_0/",
    "encoder.resnet.": "FrameEncoder_0/ResNet_0/",
    "encoder.mlp.": "FrameEncoder_0/PositionEmbedding_0/MLP_0/",
    "encoder.position.": "FrameEncoder_0/PositionEmbedding_0/",
    "initializer.mlp.": "CoordinateEncoderStateInit_0/MLP_0/",
    "initializer.": "ParamStateInit_0/",
    "corrector.norm_slots.": "SlotAttention_0/LayerNorm_0/",
    "corrector.norm_inputs.": "SlotAttention_0/LayerNorm_1/",
    "corrector.q.": "SlotAttention_0/general_dense_q_0/",
    "corrector.k.": "SlotAttention_0/general_dense_k_0/",
    "corrector.v.": "SlotAttention_0/general_dense_v_0/",
    "corrector.gru.": "SlotAttention_0/GRU_0/GRUCell_0/",
    "corrector.mlp.": "SlotAttention_0/MLP_0/",
    "predictor.attention.": "TransformerBlock_0/MultiHeadDotProductAttention_0/",
    "predictor.norm_attention.": "TransformerBlock_0/LayerNorm_0/",
    "predictor.norm_mlp.": "TransformerBlock_0/LayerNorm_1/",
    "predictor.mlp.": "TransformerBlock_0/MLP_0/",
    "decoder.cnn.": "SpatialBroadcastDecoder_0/CNN_0/",
    "decoder.position.": "SpatialBroadcastDecoder_0/PositionEmbedding_0/",
    "decoder.alpha_logits.": "SpatialBroadcastDecoder_0/alpha_logits/",
    "decoder.readout.": "SpatialBroadcastDecoder_0/Readout_0/Dense_0/Dense_0/",
}
NORM = re.compile(r"norm|bn\d?\.", re.IGNORECASE)  # their weight is a "scale" there, any other's a "kernel"
ATTENTION_OUT = "MultiHeadDotProductAttention_0/out/"
# Channels of the published CNNs, and the strides of their first layers.
PUBLISHED_STRIDES = {32: 1, 64: 2}


def is_savi(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is of SAVi."""
    optimizer = content.get("optimizer")
    target = optimizer.get("target") if isinstance(optimizer, Mapping) else None
    return isinstance(target, Mapping) and "SlotAttention_0" in target


def read(
    content: Mapping[str, Any], hints: CheckpointHints, source: str
) -> tuple[SAViConfig, dict[str, Tensor]]:
    """The config and the tensors of a file that others have written.

    Raises:
        HintError: no `image_size` or `num_slots` where nothing in the file tells them, or a size that can't be.
        ValueError: sizes that don't fit each other.
    """
    state = tensors(content, source)
    shapes = Shapes(state, source)
    # Slot attention's keys see the last layer's channels.
    last = shapes.size(("corrector.k.weight", 1), ("encoder.mlp.dense_mlp_1.bias", 0))
    encoder = _encoder(shapes, hints, last, source)
    slot_size = shapes.size(("corrector.q.weight", 0), ("corrector.gru.ir.weight", 0))
    initializer, num_slots = _initializer(shapes, hints, source)
    has_mlp = shapes.has("corrector.mlp.")
    heads = dict(_leaves(content["optimizer"]["target"])).get(
        "TransformerBlock_0/MultiHeadDotProductAttention_0/query/kernel"
    )
    layers = shapes.count(r"decoder\.cnn\.conv_(\d+)\.")
    config = SAViConfig(
        num_slots=num_slots,
        slot_size=slot_size,
        initializer=initializer,
        target="flow" if initializer in CUES else "rgb",  # as published
        **encoder,
        encoder_hidden=shapes.size(("encoder.mlp.dense_mlp_0.bias", 0), default=64),
        initializer_hidden=shapes.size(("initializer.mlp.dense_mlp_0.bias", 0), default=256),
        num_iterations=hints.num_iterations or (2 if has_mlp else 1),
        mlp_size=shapes.size(("corrector.mlp.dense_mlp_0.bias", 0), default=slot_size) if has_mlp else None,
        predictor_heads=heads.shape[1] if heads is not None and heads.ndim == 3 else 4,
        predictor_hidden=shapes.size(("predictor.mlp.dense_mlp_0.bias", 0), default=256),
        decoder_grid=shapes.size(("decoder.position.pos_embedding", 1), default=8),
        decoder_channels=tuple(
            shapes.size((f"decoder.cnn.conv_{i}.bias", 0), (f"decoder.cnn.conv_{i}.weight", 0), default=64)
            for i in range(layers)
        ),
    )
    return config, state


def _encoder(shapes: Shapes, hints: CheckpointHints, last: int, source: str) -> dict[str, Any]:
    """The config's values of the encoder, and the size of its input."""
    grid = shapes.size(("encoder.position.pos_embedding", 1))
    if shapes.has("encoder.resnet."):
        stages = shapes.count(r"encoder\.resnet\.stage(\d+)\.") - 1
        blocks = tuple(
            shapes.count(rf"encoder\.resnet\.stage{stage}\.block(\d+)\.") - 1
            for stage in range(1, stages + 1)
        )
        values = {
            "encoder_blocks": blocks,
            "encoder_channels": tuple(
                shapes.size((f"encoder.resnet.stage{stage}.block1.bn1.weight", 0), default=last)
                for stage in range(1, stages + 1)
            ),
        }
        image_size = grid * 2 ** (stages - 1)
        if hints.image_size not in (None, image_size):
            raise HintError(
                f"image_size: {hints.image_size}, but the grid of {source} is that of {image_size} pixels"
            )
        return {**values, "image_size": image_size}
    layers = shapes.count(r"encoder\.cnn\.conv_(\d+)\.")
    channels = tuple(
        shapes.size((f"encoder.cnn.conv_{i}.bias", 0), (f"encoder.cnn.conv_{i}.weight", 0), default=last)
        for i in range(layers)
    )
    if hints.image_size is None and (not channels or channels[0] not in PUBLISHED_STRIDES):
        raise HintError(
            f"image_size: must be given, as {source} tells no strides and its grid of {grid} x {grid} can be that of "
            f"{grid} pixels (as SAVi-S) or of {2 * grid} (as SAVi-M)"
        )
    image_size = hints.image_size or grid * PUBLISHED_STRIDES[channels[0]]
    if image_size % grid:
        raise HintError(
            f"image_size: {image_size} is no multiple of the grid of {grid} x {grid} that {source} has; nearest "
            f"valid: {max(round(image_size / grid), 1) * grid}"
        )
    return {"image_size": image_size, "stride": image_size // grid, "encoder_channels": channels}


def _initializer(shapes: Shapes, hints: CheckpointHints, source: str) -> tuple[str, int]:
    """What the first slots are made of, and how many there are."""
    if shapes.has("initializer.mlp."):
        numbers = shapes.size(("initializer.mlp.dense_mlp_0.weight", 1), default=CUES["boxes"])
        names = {size: name for name, size in CUES.items()}
        return names.get(numbers, "boxes"), hints.num_slots or SAViConfig.num_slots
    if shapes.has("initializer."):
        return "learned", shapes.size(("initializer.state_init", 0), default=2)
    if hints.num_slots is None:
        raise HintError(
            f"num_slots: must be given, as {source} draws its initial slots and works with any number of them"
        )
    return "drawn", hints.num_slots


# --- names and shapes, there and here ----------------------------------------------------------------------


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a file by our names; those that we have no name for keep theirs."""
    return {
        _our_name(path): _our_layout(path, value) for path, value in _leaves(content["optimizer"]["target"])
    }


def written(model: SAVi) -> dict[str, Any]:
    """What a public file of a model holds: its parameters, and the state of an optimiser that has made no step."""
    target: dict[str, Any] = {}
    states: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        *folders, leaf = _their_name(name).split("/")
        array = _their_layout(name, value.detach().cpu(), model.config.predictor_heads).contiguous()
        _folder(target, folders)[leaf] = array
        averages = {key: torch.zeros_like(array) for key in ("grad_ema", "grad_sq_ema")}
        _folder(states, folders)[leaf] = averages
    state = {"step": torch.zeros((), dtype=torch.int32), "param_states": states}
    return {"optimizer": {"target": target, "state": state}}


def _folder(tree: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        tree = tree.setdefault(name, {})
    return tree


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _our_name(path: str) -> str:
    for ours, theirs in PLACES.items():
        if path.startswith(theirs):
            name = ours + path.removeprefix(theirs).replace("/", ".")
            return re.sub(r"\.(kernel|scale)$", ".weight", name)
    return path


def _their_name(name: str) -> str:
    ours = next(place for place in PLACES if name.startswith(place))
    leaf = ".scale" if NORM.search(name) else ".kernel"
    return PLACES[ours] + re.sub(r"\.weight$", leaf, "." + name.removeprefix(ours))[1:].replace(".", "/")


def _our_layout(path: str, value: Tensor) -> Tensor:
    """Theirs are (…, in, out), and those of attention have an axis of heads beside that of `out`, or of `in`."""
    if path.endswith("/bias"):
        return value.flatten()
    if not path.endswith("/kernel"):
        return value
    if value.ndim == 3:
        value = value.flatten(0, 1) if ATTENTION_OUT in path else value.flatten(1)
    return value.permute(-1, -2, *range(value.ndim - 2)) if value.ndim > 1 else value


def _their_layout(name: str, value: Tensor, heads: int) -> Tensor:
    path = _their_name(name)
    in_heads = {"predictor.attention": heads, "corrector.q": 1, "corrector.k": 1, "corrector.v": 1}
    count = next((number for place, number in in_heads.items() if name.startswith(place + ".")), None)
    out = ATTENTION_OUT in path
    if path.endswith("/bias"):
        return (
            value.unflatten(0, (heads, -1)) if name.startswith("predictor.attention.") and not out else value
        )
    if not path.endswith("/kernel"):
        return value
    value = value.permute(*range(2, value.ndim), 1, 0)
    if count is None:
        return value
    return value.unflatten(0, (count, -1)) if out else value.unflatten(1, (count, -1))

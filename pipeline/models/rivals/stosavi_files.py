"""The public files of SlotFormer's SAVi: `{state_dict}`, or its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.models.hints import CheckpointHints, HintError, Shapes
from pipeline.models.rivals.stosavi import StoSAVi, StoSAViConfig

TRANSFORMER = "transformer_encoder.layers."


def is_stosavi(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is of SlotFormer's SAVi."""
    state = content.get("state_dict", content)
    return (
        isinstance(state, Mapping) and {"init_latents", "slot_attention.project_q.1.weight"} <= state.keys()
    )


def read(
    content: Mapping[str, Any], hints: CheckpointHints, source: str
) -> tuple[StoSAViConfig, dict[str, Tensor]]:
    """The config and the tensors of a file that others have written.

    Raises:
        HintError: an `image_size` that can't be.
        ValueError: sizes that don't fit each other.
    """
    state = tensors(content, source)
    shapes = Shapes(state, source)
    size = shapes.size(("init_latents", 2))
    grid = shapes.size(("encoder_pos_embedding.grid", 1))
    image_size = hints.image_size or grid
    if image_size % grid:
        raise HintError(
            f"image_size: {image_size} is no multiple of the grid of {grid} x {grid} that {source} has; nearest "
            f"valid: {max(round(image_size / grid), 1) * grid}"
        )
    recurrent = shapes.has("predictor.rnn.")
    base = "predictor.base_predictor." if recurrent else "predictor."
    layer = base + TRANSFORMER + "0."
    transformer = shapes.has(base + TRANSFORMER)
    hidden = layer + "linear1.bias" if transformer else "predictor.mlp.0.bias"
    kernel = "mlp" if shapes.has("kernel_dist_layer.3.") else "linear"
    config = StoSAViConfig(
        image_size=image_size,
        num_slots=shapes.size(("init_latents", 1)),
        slot_size=size,
        encoder_channels=_channels(shapes, "encoder", 0),
        stride=image_size // grid,
        num_iterations=hints.num_iterations or StoSAViConfig.num_iterations,
        mlp_size=shapes.size(("slot_attention.mlp.1.bias", 0), default=2 * size),
        kernel=kernel if shapes.has("kernel_dist_layer.") else None,
        stochastic=hints.stochastic,
        predictor="transformer" if transformer else "mlp",
        predictor_layers=shapes.count((base + TRANSFORMER).replace(".", r"\.") + r"(\d+)\."),
        predictor_heads=hints.predictor_heads or StoSAViConfig.predictor_heads,
        predictor_hidden=shapes.size((hidden, 0), default=4 * size),
        rnn=recurrent,
        decoder_grid=shapes.size(("decoder_pos_embedding.grid", 1), default=8),
        decoder_channels=_channels(shapes, "decoder", 1),
    )
    return config, state


def _channels(shapes: Shapes, part: str, axis: int) -> tuple[int, ...]:
    """Of each layer of a part's convolutions."""
    layers = shapes.count(part + r"\.(\d+)\.0\.")
    return tuple(
        shapes.size((f"{part}.{i}.0.bias", 0), (f"{part}.{i}.0.weight", axis), default=64)
        for i in range(layers)
    )


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a file, whose names are ours."""
    state = content.get("state_dict", content)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def written(model: StoSAVi) -> dict[str, Any]:
    """What a public file of a model holds."""
    return {"state_dict": {key: value.detach().cpu() for key, value in model.state_dict().items()}}

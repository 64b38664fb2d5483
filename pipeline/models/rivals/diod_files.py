"""DIOD's public files: `{model_state_dict}`, of which the shapes tell all but how batch norm is meant to run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.models.hints import CheckpointHints, Shapes
from pipeline.models.rivals.diod import DIOD, DIODConfig

STATE = "model_state_dict"
PREFIX = "module."
UNUSED = (
    "slot_attention.slots_mu",
    "slot_attention.slots_sigma",
)  # what the table of slots was once drawn from
RESNET, MEMORY = "encoder_cnn.resnet.", "encoder_cnn.convGRU.cell_list."


def is_diod(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is of DIOD."""
    state = content.get(STATE)
    return isinstance(state, Mapping) and PREFIX + "slot_attention.slots" in state


def read(
    content: Mapping[str, Any], hints: CheckpointHints, source: str
) -> tuple[DIODConfig, dict[str, Tensor]]:
    """The config and the tensors of a file that others have written.

    Raises:
        ValueError: a grid that the weights don't fit, or a file of the variant with a DINOv2 backbone.
    """
    own = tensors(content, source)
    shapes = Shapes(own, source)
    if shapes.has("encoder_cnn.dinov2_backbone."):
        raise ValueError(
            f"{source}: DIOD with a DINOv2 backbone, which is not read here; nearest valid: a file of the variant "
            "with a ResNet (keys `encoder_cnn.resnet.…`)"
        )
    positions = "encoder_cnn.encoder_pos.grid"
    grid = shapes.size((positions, 1)), shapes.size((positions, 2))
    patches = shapes.size(("LN.weight", 0), ("LN.bias", 0), default=grid[0] * grid[1])
    if patches != grid[0] * grid[1]:
        raise ValueError(
            f"{source}: its grid is {grid[0]} x {grid[1]}, but the weights `LN` are of {patches} positions: parts of "
            "two trainings at different resolutions, to one of which they are bound"
        )
    stages = shapes.count(re.escape(RESNET) + r"layer(\d+)\.") - 1
    stage = [f"layer{number}" for number in range(1, stages + 1)]
    return (
        DIODConfig(
            grid=grid,
            num_slots=shapes.size(("slot_attention.slots", 1)),
            slot_size=shapes.size(("slot_attention.slots", 2)),
            widths=tuple(shapes.size((f"{RESNET}{name}.0.conv1.weight", 0), default=1) for name in stage),
            blocks=tuple(shapes.count(re.escape(RESNET + name) + r"\.(\d+)\.") for name in stage),
            memory_layers=shapes.count(re.escape(MEMORY) + r"(\d+)\."),
            batch_statistics=hints.batch_statistics is not False,
            carried=bool(hints.carried),
        ),
        own,
    )


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a file by our names, without those that nothing looks at."""
    own = {key.removeprefix(PREFIX): value for key, value in content[STATE].items()}
    return {key: value for key, value in own.items() if key not in UNUSED}


def written(model: DIOD) -> dict[str, Any]:
    """What a public file of a model holds: what its own readers look for."""
    return {STATE: {PREFIX + key: value.detach().cpu() for key, value in model.state_dict().items()}}

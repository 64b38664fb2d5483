"""SOLV's public files: `{model, epoch, args}`, in which `args` is an `argparse.Namespace` and the ViT is missing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.files import read_state_dict
from pipeline.models.hints import CheckpointHints, HintError, Shapes, infer_vit
from pipeline.models.pixels import Grid
from pipeline.models.rivals.solv import SOLV, SOLVConfig, place_grid

PREFIX = "module."
BACKBONE = "backbone.model."
EMBEDDED_BACKBONE = "slotmatch_backbone"  # an extra entry of the files that we write: the ViT's tensors


def is_solv(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is of SOLV."""
    state = content.get("model")
    return isinstance(state, Mapping) and PREFIX + "s_bind.slots" in state


def read(
    content: Mapping[str, Any], hints: CheckpointHints, source: str
) -> tuple[SOLVConfig, dict[str, Tensor]]:
    """The config and the tensors of a file that others have written.

    Raises:
        HintError: no `backbone_weights`, or no `num_heads` where the ViT's width does not tell them.
        ValueError: a grid that the weights don't fit, or a ViT that is none.
    """
    if hints.backbone_weights is None:
        raise HintError(
            f"backbone_weights: must be given, as {source} lacks the frozen ViT that SOLV sees through: a file in "
            "timm's names (public SOLV: vit_base_patch14_dinov2)"
        )
    own = tensors(content, source)
    vit = read_state_dict(hints.backbone_weights)
    if "patch_embed.proj.weight" not in vit:
        first = ", ".join(list(vit)[:5])
        raise ValueError(f"{hints.backbone_weights}: no ViT in timm's names (its first keys: {first})")
    shapes = Shapes(own, source)
    patches, size = shapes.size(("pos_dec", 1)), shapes.size(("s_bind.slots", 2))
    backbone, _ = infer_vit(Shapes(vit, source), hints.num_heads, prefix="", patches=patches)
    assert backbone.arguments is not None
    args = content.get("args")
    grid = _grid(own, getattr(args, "resize_to", None), backbone.arguments["patch_size"], source)
    side = backbone.arguments["patch_size"]
    config = SOLVConfig(
        replace(backbone, image_size=grid[0] * side, image_width=grid[1] * side),
        num_slots=shapes.size(("s_bind.slots", 1)),
        slot_size=size,
        half_window=(shapes.size(("t_bind.pos_embed_temporal", 1), default=5) - 1) // 2,
        decoder_size=shapes.size(("dec.layer1.weight", 0), ("dec.layer1.bias", 0), default=1024),
        merge_distance=getattr(args, "slot_merge_coeff", SOLVConfig.merge_distance),
        mean=tuple(hints.mean),
        std=tuple(hints.std),
    )
    unused = ("norm.", "fc_norm.", "head.", "mask_token")
    vit = {key: value for key, value in vit.items() if not key.startswith(unused)}
    if "pos_embed" in vit:
        prefix = 0 if backbone.arguments["no_embed_class"] else 1 + backbone.arguments["reg_tokens"]
        vit["pos_embed"] = dinov2_positions(vit["pos_embed"], grid, prefix)
    return config, {**own, **{BACKBONE + key: value for key, value in vit.items()}}


def tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a file by our names; with the ViT's where we wrote it."""
    own = {key.removeprefix(PREFIX): value for key, value in content["model"].items()}
    return {**own, **{BACKBONE + k: v for k, v in content.get(EMBEDDED_BACKBONE, {}).items()}}


def written(model: SOLV) -> dict[str, Any]:
    """What a public file of a model holds: what its own readers look for, and the ViT, which these leave alone."""
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    config = model.config
    args = Namespace(
        num_slots=config.num_slots,
        slot_dim=config.slot_size,
        N=config.half_window,
        slot_merge_coeff=config.merge_distance,
        resize_to=list(model.input_size),
        patch_size=model.input_size[0] // model.grid[0],
    )
    return {
        "model": {PREFIX + k: v for k, v in state.items() if not k.startswith(BACKBONE)},
        "args": args,
        EMBEDDED_BACKBONE: {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)},
    }


def _grid(own: Mapping[str, Tensor], resize_to: Any, patch: int, source: str) -> Grid:
    """Rows and columns: as the file's settings say, else as its places lie, which were trained but move little.

    Raises:
        ValueError: the settings' are another number of patches than the weights have.
    """
    patches = own["pos_dec"].shape[1]
    fitting = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    if resize_to is not None:
        rows, columns = (int(side) // patch for side in resize_to)
        if rows * columns != patches:
            raise ValueError(
                f"{source}: frames of {resize_to[0]} x {resize_to[1]} pixels in patches of {patch} are a grid of "
                f"{rows} x {columns}, but the weights are of {patches} patches: a ViT with other patches "
                "(backbone_weights), or settings of another training"
            )
        return rows, columns
    places = own.get("s_bind.abs_grid")
    if places is None or places.numel() != 2 * patches:
        return min(fitting, key=lambda grid: abs(grid[0] - grid[1]))
    return min(fitting, key=lambda grid: float((place_grid(grid) - places).square().sum()))


def dinov2_positions(positions_1NF: Tensor, grid: Grid, prefix: int) -> Tensor:
    """A square table of position embeddings at another grid, as DINOv2's hub models have resampled it.

    Bicubic without anti-aliasing, and with scales that are a tenth of a patch too large (an offset against rounding
    errors, from before there was another way). timm resamples exactly and with anti-aliasing, which differs a little.
    """
    patches = positions_1NF.shape[1] - prefix
    side = round(patches**0.5)
    if patches == grid[0] * grid[1] or side**2 != patches:
        return positions_1NF
    table = positions_1NF[:, prefix:].float().transpose(1, 2).unflatten(2, (side, side))
    scales = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    resampled = F.interpolate(table, scale_factor=scales, mode="bicubic")
    return torch.cat([positions_1NF[:, :prefix], resampled.flatten(2).transpose(1, 2)], 1)

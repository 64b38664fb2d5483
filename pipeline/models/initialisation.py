"""A start for slot models that have little data and few steps; and none, for those whose weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.models.layers import TransformerBlock
from pipeline.models.pixels import Grid
from pipeline.models.slot_model import SlotModel


def sine_cosine_positions(grid: Grid, width: int, periods: Tensor) -> Tensor:
    """Fixed 2-D positions `(rows * columns, width)`: sine and cosine of x and y at `width / 4` periods."""
    places = [torch.arange(side, dtype=torch.float32) for side in grid]
    y, x = (p.flatten()[:, None] / periods for p in torch.meshgrid(*places, indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)


@torch.no_grad()
def start_as_soft_kmeans(model: SlotModel, *, sharpness: float = 4.0, position_scale: float = 2.0) -> None:
    """Slot attention that clusters its features before any training, and a decoder that sees place.

    Queries and keys share one random rotation (times `sharpness`), values pass through, the GRU mostly
    takes its input, and the residual parts start near zero: a few iterations are a few of soft k-means.
    Not from the paper, whose models train for 100,000 steps and more; within 1,000 steps on small models
    PyTorch's default start learns next to nothing.
    """
    corrector, size = model.processor.corrector, model.config.slot_size
    rotation = nn.init.orthogonal_(torch.empty(size, size))
    corrector.to_q.weight.copy_(rotation)
    corrector.to_k.weight.copy_(sharpness * rotation)
    corrector.to_v.weight.copy_(torch.eye(size))
    gru = corrector.gru  # rows: reset, update, candidate
    gru.weight_ih.mul_(0.1)
    gru.weight_hh.mul_(0.1)
    gru.weight_ih[2 * size :] = torch.eye(size)
    gru.weight_hh[2 * size :] = 0
    gru.bias_ih.zero_()
    gru.bias_hh.zero_()
    gru.bias_ih[size : 2 * size] = -1
    residual = []
    if model.processor.predictor is not None:
        block = cast(TransformerBlock, model.processor.predictor.blocks[0])
        residual += [block.self_attn.out_proj, block.linear2]
    if corrector.mlp is not None:
        residual.append(cast(nn.Linear, corrector.mlp.layers[-1]))
    for layer in residual:
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    periods = (max(model.grid) - 1) / (math.pi * 2 ** torch.linspace(-1, 2.5, size // 4))
    model.decoder.pos_emb.copy_(position_scale * sine_cosine_positions(model.grid, size, periods))


class WithoutDraws(TorchFunctionMode):
    """A block that builds modules without their random start: for those of which every parameter is loaded next.

    Drawing a ViT-B takes longer than reading it. Until they are loaded, parameters hold anything.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# timm calls the tensor's own methods, PyTorch's layers call functions, some of which are seen here themselves.
_DRAWS = (
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_),
)

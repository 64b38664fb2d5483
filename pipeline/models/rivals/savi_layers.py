"""What SAVi's JAX model is made of, and where it differs from PyTorch's habits: `SAME` padding, an epsilon of 1e-6.

Names are those of the public files. Shapes: B clips, N slots, d slot size, P positions of a grid, C channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.rivals.pixel_slots import coordinates

NORM_EPSILON = 1e-6
NORM_GROUPS = 32


def layer_norm(size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=NORM_EPSILON)


def group_norm(size: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, size, eps=NORM_EPSILON)


def two_layers(size: int, hidden: int, out: int, *, norm: bool = False) -> nn.Sequential:
    """Linear -> ReLU -> Linear, with the names of the public files."""
    layers: list[tuple[str, nn.Module]] = [("LayerNorm_0", layer_norm(size))] if norm else []
    layers += [
        ("dense_mlp_0", nn.Linear(size, hidden)),
        ("relu", nn.ReLU()),
        ("dense_mlp_1", nn.Linear(hidden, out)),
    ]
    return nn.Sequential(OrderedDict(layers))


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's `SAME`: with a stride, more at the end than at the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for side, kernel, stride in zip(
            reversed(x.shape[-2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        if padding[0] == padding[1] and padding[2] == padding[3]:
            return F.conv2d(x, self.weight, self.bias, self.stride, (padding[2], padding[0]))
        return super().forward(F.pad(x, padding))


class Upsampling(nn.Conv2d):
    """Twice the side: a convolution of the input with zeros between its pixels, whose kernel it has (unflipped)."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.transpose(0, 1).flip(2, 3)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)[..., :-1, :-1]


def convolutions(layers: Sequence[nn.Module]) -> nn.Sequential:
    """Layers with ReLU after each, the last one too."""
    named: list[tuple[str, nn.Module]] = []
    for index, layer in enumerate(layers):
        named += [(f"conv_{index}", layer), (f"relu_{index}", nn.ReLU())]
    return nn.Sequential(OrderedDict(named))


class Block(nn.Module):
    """A ResNet's basic block with group norm."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = SameConv(channels_in, channels, 3, stride, bias=False)
        self.bn1 = group_norm(channels)
        self.conv2 = SameConv(channels, channels, 3, bias=False)
        self.bn2 = group_norm(channels)
        self.changes = stride != 1 or channels_in != channels
        if self.changes:
            self.proj_conv = SameConv(channels_in, channels, 1, stride, bias=False)
            self.proj_bn = group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.proj_bn(self.proj_conv(x)) if self.changes else x))


class ResNet(nn.Module):
    """Stages of basic blocks; all but the first halve the grid. Its first norm has no ReLU behind it."""

    def __init__(self, channels: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.init_conv = SameConv(3, channels[0], 3, bias=False)
        self.init_bn = group_norm(channels[0])
        self.num_stages = len(blocks)
        before = channels[0]
        for stage, (width, number) in enumerate(zip(channels, blocks, strict=True), 1):
            named = OrderedDict[str, nn.Module]()
            for block in range(1, number + 1):
                named[f"block{block}"] = Block(before, width, 2 if stage > 1 and block == 1 else 1)
                before = width
            self.add_module(f"stage{stage}", nn.Sequential(named))

    def forward(self, x: Tensor) -> Tensor:
        x = self.init_bn(self.init_conv(x))
        for stage in range(1, self.num_stages + 1):
            x = self.get_submodule(f"stage{stage}")(x)
        return x


class Positions(nn.Module):
    """What is added at each position of a grid, `(h, w, C)`: a linear map of its (y, x) from -1 to 1."""

    pos_embedding: Tensor

    def __init__(self, side: int, size: int) -> None:
        super().__init__()
        self.register_buffer("pos_embedding", coordinates(side, -1))
        self.dense_pe_0 = nn.Linear(2, size)

    def forward(self) -> Tensor:
        return self.dense_pe_0(self.pos_embedding[0])


class GRUCell(nn.Module):
    """A GRU of linear maps by name; only the candidate has a bias on its hidden side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("ir", "iz", "in", "hr", "hz", "hn"):
            self.add_module(name, nn.Linear(size, size, bias=name not in ("hr", "hz")))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        ir, iz, candidate, hr, hz, hn = (
            layer(x if name.startswith("i") else hidden) for name, layer in self.named_children()
        )
        reset, update = (ir + hr).sigmoid(), (iz + hz).sigmoid()
        return torch.lerp((candidate + reset * hn).tanh(), hidden, update)


class Attention(nn.Module):
    """Multi-head attention among slots."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

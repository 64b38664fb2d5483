"""What slot models are made of: projection, initial slots, slot attention, transformer blocks.

Module names follow the public SlotContrast/VideoSAUR checkpoints, so that loading one is a plain
`load_state_dict`. Shapes: B clips, T frames, N slots, P patches, F feature size, d slot size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, after an optional LayerNorm, named `layers.i`.

    `final_relu` puts one behind the last layer as well.
    """

    def __init__(
        self, sizes: Sequence[int], *, norm: bool = False, residual: bool = False, final_relu: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(sizes[0])] if norm else []
        for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            layers.append(nn.Linear(fan_in, fan_out))
            if final_relu or index < len(sizes) - 2:
                layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class LearnedSlots(nn.Module):
    """Initial slots that are parameters, `(1, N, d)` (SlotContrast): slot n means slot n."""

    def __init__(self, num_slots: int, slot_size: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, num_slots, slot_size) * slot_size**-0.5)

    def forward(self, batch_size: int, noise_BND: Tensor | None = None) -> Tensor:
        return self.slots.expand(batch_size, -1, -1)


class RandomSlots(nn.Module):
    """Initial slots drawn as `mean + exp(log_std) * noise` (VideoSAUR, DINOSAUR).

    Raises:
        ValueError: called without noise. The caller owns the seed (a view's `noise_seed`), so that
            teacher and student, live or cached, start from the same draw.
    """

    def __init__(self, num_slots: int, slot_size: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.mean = nn.Parameter(torch.zeros(1, 1, slot_size))
        self.log_std = nn.Parameter(torch.full((1, 1, slot_size), math.log(slot_size**-0.5)))

    def forward(self, batch_size: int, noise_BND: Tensor | None = None) -> Tensor:
        if noise_BND is None:
            raise ValueError("this model draws its initial slots: pass noise or initial_slots")
        return self.mean + self.log_std.exp() * noise_BND


def slot_noise(num_slots: int, slot_size: int, seed: int) -> Tensor:
    """The standard normal noise `(N, d)` of a seed, the same on every machine."""
    return torch.randn((num_slots, slot_size), generator=torch.Generator().manual_seed(seed))


class SlotAttention(nn.Module):
    """Slot attention (Locatello et al. 2020) with the details that public weights depend on.

    The GRU's hidden state is the *layer-normed* slots; the residual MLP is absent in VideoSAUR.
    """

    def __init__(self, slot_size: int, *, mlp: bool = True) -> None:
        super().__init__()
        self.to_q = nn.Linear(slot_size, slot_size, bias=False)
        self.to_k = nn.Linear(slot_size, slot_size, bias=False)
        self.to_v = nn.Linear(slot_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.norm_features = nn.LayerNorm(slot_size)
        self.norm_slots = nn.LayerNorm(slot_size)
        self.mlp = MLP([slot_size, 4 * slot_size, slot_size], norm=True, residual=True) if mlp else None

    def forward(self, slots_BND: Tensor, features_BPD: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """Returns slots `(B, N, d)` and the last iteration's softmax over slots `(B, N, P)`."""
        features_BPD = self.norm_features(features_BPD)
        # Folding 1/sqrt(d) into the keys scales the small matrix once instead of the logits thrice.
        keys_BPD = self.to_k(features_BPD) * slots_BND.shape[-1] ** -0.5
        values_BPD = self.to_v(features_BPD)
        attention_BNP = slots_BND
        for _ in range(iterations):
            slots_BND = self.norm_slots(slots_BND)
            logits_BNP = self.to_q(slots_BND) @ keys_BPD.transpose(1, 2)
            attention_BNP = logits_BNP.softmax(dim=1)
            weights_BNP = attention_BNP + 1e-8
            weights_BNP = weights_BNP / weights_BNP.sum(dim=-1, keepdim=True)
            updates_BND = weights_BNP.to(values_BPD.dtype) @ values_BPD
            slots_BND = self.gru(updates_BND.flatten(0, 1), slots_BND.flatten(0, 1)).view_as(slots_BND)
            if self.mlp is not None:
                slots_BND = self.mlp(slots_BND)
        return slots_BND, attention_BNP


class Attention(nn.Module):
    """Multi-head attention whose logits are *multiplied* by sqrt(head size).

    That is a quirk of the reference implementation, kept because trained weights depend on it.
    Keys and values come from `memory_BMD` where there is one, else from the queries' own tokens.
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x_BND: Tensor, memory_BMD: Tensor | None = None) -> Tensor:
        B, N, D = x_BND.shape
        if memory_BMD is None:
            q, k, v = self.qkv(x_BND).chunk(3, -1)
        else:
            weights, biases = (p.split([D, 2 * D]) for p in (self.qkv.weight, self.qkv.bias))
            q = F.linear(x_BND, weights[0], biases[0])
            k, v = F.linear(memory_BMD, weights[1], biases[1]).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=(D // self.num_heads) ** 0.5)
        return self.out_proj(y.transpose(1, 2).reshape(B, N, D))


class TransformerBlock(nn.Module):
    """Pre-norm encoder block: attention, then a feed-forward of width 4d with ReLU, no dropout.

    A memory takes the place of the keys and values, as it is: `norm1` is for the queries alone.
    """

    def __init__(self, size: int, num_heads: int = 4) -> None:
        super().__init__()
        self.self_attn = Attention(size, num_heads)
        self.linear1 = nn.Linear(size, 4 * size)
        self.linear2 = nn.Linear(4 * size, size)
        self.norm1 = nn.LayerNorm(size)
        self.norm2 = nn.LayerNorm(size)

    def forward(self, x_BND: Tensor, memory_BMD: Tensor | None = None) -> Tensor:
        x_BND = x_BND + self.self_attn(self.norm1(x_BND), memory_BMD)
        return x_BND + self.linear2(F.relu(self.linear1(self.norm2(x_BND))))


class Transformer(nn.Module):
    """Transformer blocks, all of which read the same memory where there is one.

    One block over the slots is the predictor, whose output starts the next frame's slot attention.
    """

    def __init__(self, size: int, num_blocks: int, num_heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TransformerBlock(size, num_heads) for _ in range(num_blocks)])

    def forward(self, x_BND: Tensor, memory_BMD: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x_BND = block(x_BND, memory_BMD)
        return x_BND

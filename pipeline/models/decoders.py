"""Decoders: slots `(M, N, d)` -> outputs `(M, P, C)` and masks `(M, N, P)`, a softmax over the slots.

The C outputs of a position are the F reconstructed features; VideoSAUR's follow them with, or have in
their place, P logits of how similar the position is to each position of the next frame.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.log import log
from pipeline.models import tiled_decoder
from pipeline.models.layers import MLP, Transformer


class Decoder(nn.Module):
    """What all decoders have: a position embedding, and `fast` and `tiled`, which allow exact short cuts."""

    pos_emb: nn.Parameter
    fast = tiled = True


@contextlib.contextmanager
def untiled(decoder: nn.Module) -> Iterator[None]:
    """The decoders in a module in plain operations during the block, so that they have every kind of derivative."""
    tiled = [part for part in decoder.modules() if isinstance(part, Decoder) and part.tiled]
    for part in tiled:
        part.tiled = False
    try:
        yield
    finally:
        for part in tiled:
            part.tiled = True


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """`triton_decoder`, or None where its kernels don't run: no Triton, or no C compiler for it, or too old a GPU."""
    try:
        from pipeline.models import triton_decoder

        triton_decoder.try_out(device)
    except Exception as error:  # Triton's own have no class in common
        reason = str(error).strip().partition("\n")[0]
        log(f"decoder: in plain operations, since Triton's kernels don't run on {device}: {reason}")
        return None
    return triton_decoder


class MLPDecoder(Decoder):
    """Spatial-broadcast MLP decoder (DINOSAUR, Seitzer et al. 2023; used by SlotContrast, SlotMatch).

    Every slot is broadcast to the P positions, a learned position embedding is added, an MLP gives
    F + 1 numbers per slot and position; the last is the mask logit, softmaxed over the slots.

    `fast` uses two exact identities and computes a tenth to a fifth less: the first layer distributes
    over slot + position, and the last one commutes with the mask-weighted sum over the slots. On a CPU
    it works in tiles as well, see `tiled_decoder`, and on a GPU in kernels, see `triton_decoder`, but where
    `tiled` is off, since those have a first derivative alone. Results agree with the plain form to rounding.
    """

    def __init__(
        self, num_patches: int, slot_size: int, feature_size: int, hidden_sizes: Sequence[int] = (1024,) * 3
    ) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.randn(1, 1, num_patches, slot_size) * slot_size**-0.5)
        self.mlp = MLP([slot_size, *hidden_sizes, feature_size + 1])

    def forward(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fast:
            return self._plain(slots_MND)
        if self.tiled and slots_MND.device.type == "cpu":
            return tiled_decoder.decode(slots_MND, self.pos_emb[0, 0], self._linears)
        if self.tiled and slots_MND.device.type == "cuda" and (kernels := _kernels(slots_MND.device)):
            return kernels.decode(slots_MND, self.pos_emb[0, 0], self._linears)
        return self._fast(slots_MND)

    @property
    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.mlp.layers if isinstance(layer, nn.Linear)]

    def _plain(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        output = self.mlp(slots_MND.unsqueeze(2) + self.pos_emb)  # (M, N, P, F + 1)
        masks_MNP = output[..., -1].softmax(dim=1)
        return (output[..., :-1] * masks_MNP.unsqueeze(-1)).sum(dim=1), masks_MNP

    def _fast(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        linears = self._linears
        first, last = linears[0], linears[-1]
        # W(s + e) + b = Ws + (We + b): N + P products instead of N * P.
        hidden = F.linear(slots_MND, first.weight).unsqueeze(2) + first(self.pos_emb)  # (M, N, P, H)
        hidden = F.relu(hidden)
        for linear in linears[1:-1]:
            hidden = F.relu(linear(hidden))
        masks_MNP = (hidden @ last.weight[-1] + last.bias[-1]).softmax(dim=1)
        # The masks sum to one over the slots, so sum_n m_n (V h_n + c) = V (sum_n m_n h_n) + c.
        mixed_MPH = torch.einsum("mnp,mnph->mph", masks_MNP.to(hidden.dtype), hidden)
        return F.linear(mixed_MPH, last.weight[:-1], last.bias[:-1]), masks_MNP


class SlotMixerDecoder(Decoder):
    """Slot-mixer decoder (Sajjadi et al. 2022, in the form of VideoSAUR, Zadaianchuk et al. 2023).

    Each position looks at the slots (`allocator`), decides how to share itself among them (the masks),
    and is rendered once, from the mix of slots that this gives: N times less work than the MLP
    decoder, which renders every slot at every position.
    """

    def __init__(
        self,
        num_patches: int,
        slot_size: int,
        output_size: int,
        hidden_sizes: Sequence[int] = (1024,) * 3,
        num_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.randn(1, num_patches, slot_size) * slot_size**-0.5)
        self.allocator = Transformer(slot_size, num_blocks)
        self.to_q = nn.Linear(slot_size, slot_size, bias=False)
        self.to_k = nn.Linear(slot_size, slot_size, bias=False)
        self.norm_q = nn.LayerNorm(slot_size)
        self.norm_k = nn.LayerNorm(slot_size)
        self.norm_memory = nn.LayerNorm(slot_size)
        self.renderer = MLP([slot_size, *hidden_sizes], final_relu=True)
        self.output_transform = nn.Linear(hidden_sizes[-1], output_size)

    def forward(self, slots_MND: Tensor) -> tuple[Tensor, Tensor]:
        positions_MPD = self.pos_emb.expand(slots_MND.shape[0], -1, -1)
        queries_MPD = self.to_q(self.norm_q(self.allocator(positions_MPD, self.norm_memory(slots_MND))))
        keys_MND = self.to_k(self.norm_k(slots_MND)) * slots_MND.shape[-1] ** -0.5
        masks_MNP = (keys_MND @ queries_MPD.transpose(1, 2)).softmax(dim=1)
        # The slots are mixed as they are: only queries, keys and memory are layer-normed.
        mixed_MPD = masks_MNP.transpose(1, 2).to(slots_MND.dtype) @ slots_MND
        return self.output_transform(self.renderer(mixed_MPD + self.pos_emb)), masks_MNP

"""The MLP decoder on a CPU, forward and backward, in tiles that stay in the cache.

Written as whole tensors, every ReLU, mask and bias gradient reads and writes `(M, N, P, H)` numbers from main memory,
tens of times a step. Here each tile of a few slots is taken through all layers while it is in the cache, so that a
step takes little more than the time of its matrix products. Of the hidden layers the backward pass keeps one tensor
`(M, N, P, H)` each, but for the first, which is made again; it makes no gradient of that size.

Shapes: M frames, N slots, P positions, d slot size, H hidden units, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE_BYTES = 5 << 19  # of one hidden layer: three such tensors are in use at a time


def decode(slots_MND: Tensor, pos_emb_PD: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Reconstruction `(M, P, F)` and masks `(M, N, P)`, as `MLPDecoder` defines them.

    The products are computed in the type of autocast where that is on; masks, sums over slots and the sums of
    gradients over tiles in float32 at least.
    """
    inputs = [slots_MND, pos_emb_PD, *(p for linear in linears for p in (linear.weight, linear.bias))]
    if not torch.is_grad_enabled():  # a function of autograd sees only what the tensors themselves say
        inputs = [one.detach() for one in inputs]
    return _Decode.apply(*inputs)


class Layers:
    """The decoder's weights in the type that products are computed in, and how its first layers are taken apart."""

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.weights = [p.to(dtype) for p in parameters[0::2]]
        self.biases = [p.to(dtype) for p in parameters[1::2]]
        self.middle = list(zip(self.weights, self.biases, strict=True))[1:-1]
        self.mask_row, self.mask_bias = self.weights[-1][-1], parameters[-1][-1]
        self.features = self.weights[-1][:-1]

    @property
    def widths(self) -> list[int]:
        """Of the hidden layers but the first."""
        return [len(weight) for weight, _ in self.middle]


def _tiles(frames: int, slots: int, bytes_of_one: int) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of frames, each with the groups of slots to take at a time; `bytes_of_one` slot of one frame."""
    most = max(1, TILE_BYTES // bytes_of_one)
    together, step = max(1, most // slots), min(most, slots)
    blocks = [slice(start, min(start + step, slots)) for start in range(0, slots, step)]
    for start in range(0, frames, together):
        yield slice(start, min(start + together, frames)), blocks


def _first_hidden(from_slots: Tensor, from_positions: Tensor, frames: slice, block: slice) -> Tensor:
    """W(s + e) + b = Ws + (We + b): N + P products instead of N * P."""
    return (from_slots[frames, block].unsqueeze(2) + from_positions).relu_()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, pos_emb: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        device = slots.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else slots.dtype
        with torch.autocast(device, enabled=False):
            layers = Layers(parameters, dtype)
            slots_in, positions_in = slots.to(dtype), pos_emb.to(dtype)
            from_slots = F.linear(slots_in, layers.weights[0])  # (M, N, H)
            from_positions = F.linear(positions_in, layers.weights[0], layers.biases[0])  # (P, H)
            keep = any(ctx.needs_input_grad)
            hidden, masks, mixed = _forward(layers, from_slots, from_positions, keep)
            reconstruction = F.linear(mixed, layers.features, layers.biases[-1][:-1])
        if keep:
            ctx.layers = layers
            ctx.save_for_backward(
                slots_in, positions_in, from_slots, from_positions, masks, mixed, *parameters, *hidden
            )
        return reconstruction, masks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_reconstruction: Tensor, grad_masks: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        slots, positions, from_slots, from_positions, masks, mixed, *rest = ctx.saved_tensors
        parameters, hidden = rest[: len(ctx.layers.weights) * 2], rest[len(ctx.layers.weights) * 2 :]
        layers, exact = ctx.layers, masks.dtype
        with torch.autocast(slots.device.type, enabled=False):
            gradients = [torch.zeros_like(p, dtype=exact) for p in parameters]
            grad = grad_reconstruction.to(slots.dtype)
            grad_mixed = grad @ layers.features
            if trained := any(ctx.needs_input_grad[2:]):
                gradients[-2][:-1] = _rows(grad).t() @ _rows(mixed)
                gradients[-1][:-1] = _rows(grad).sum(0, dtype=exact)
            state = _Backward(layers, gradients, trained, from_slots, from_positions, masks, grad_mixed)
            state.run(hidden, grad_masks)
            into_slots, into_positions = (
                state.into_slots.to(slots.dtype),
                state.into_positions.to(slots.dtype),
            )
            first = _rows(into_slots).t() @ _rows(slots)
            gradients[0] += first + into_positions.t() @ positions
            gradients[1] += state.into_positions.sum(0)
            grad_slots = (into_slots @ layers.weights[0]).to(exact)
            grad_positions = (into_positions @ layers.weights[0]).to(exact)
        found = [grad_slots, grad_positions, *gradients]
        return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


def _forward(
    layers: Layers, from_slots: Tensor, from_positions: Tensor, keep: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden layers but the first `(M, N, P, H)`, none unless `keep`; masks; the last one's mix `(M, P, H)`."""
    M, N, H = from_slots.shape
    P = len(from_positions)
    exact = torch.promote_types(from_slots.dtype, torch.float32)
    masks = from_slots.new_empty(M, N, P, dtype=exact)
    mixed = from_slots.new_empty(M, P, layers.weights[-1].shape[1])
    groups = list(_tiles(M, N, P * max([H, *layers.widths]) * from_slots.element_size()))
    stored = M if keep else groups[0][0].stop
    hidden = [from_slots.new_empty(stored, N, P, width) for width in layers.widths]
    for frames, blocks in groups:
        count = frames.stop - frames.start
        here = [h[frames] if keep else h[:count] for h in hidden]
        for block in blocks:
            x = _first_hidden(from_slots, from_positions, frames, block)
            for (weight, bias), layer in zip(layers.middle, here, strict=True):
                out = layer[:, block]
                torch.addmm(bias, _rows(x), weight.t(), out=out.view(-1, len(weight))).relu_()
                x = out
            masks[frames, block] = (x @ layers.mask_row).to(exact)
        masks[frames] = (masks[frames] + layers.mask_bias).softmax(dim=1)
        # The masks sum to one over the slots, so sum_n m_n (V h_n + c) = V (sum_n m_n h_n) + c.
        total = torch.zeros_like(mixed[frames], dtype=exact)
        for n in range(N):
            one = slice(n, n + 1)
            last = here[-1][:, n] if here else _first_hidden(from_slots, from_positions, frames, one)[:, 0]
            total.addcmul_(masks[frames, n].unsqueeze(-1), last.to(exact))
        mixed[frames] = total
    return hidden if keep else [], masks, mixed


class _Backward:
    """The backward pass over the tiles, which adds to the parameters' `gradients` where those are `trained`.

    into_slots `(M, N, H)`, into_positions `(P, H)`: gradients of the two parts of the first layer.
    """

    def __init__(
        self,
        layers: Layers,
        gradients: list[Tensor],
        trained: bool,
        from_slots: Tensor,
        from_positions: Tensor,
        masks: Tensor,
        grad_mixed: Tensor,
    ) -> None:
        self.layers, self.gradients, self.trained, self.masks = layers, gradients, trained, masks
        self.from_slots, self.from_positions, self.grad_mixed = from_slots, from_positions, grad_mixed
        self.into_slots = torch.empty_like(from_slots, dtype=masks.dtype)
        self.into_positions = torch.zeros_like(from_positions, dtype=masks.dtype)

    def run(self, hidden: list[Tensor], grad_masks: Tensor) -> None:
        M, N, H = self.from_slots.shape
        P = len(self.from_positions)
        size = P * max([H, *self.layers.widths]) * self.from_slots.element_size()
        for frames, blocks in _tiles(M, N, size):
            grad_masks_here = grad_masks[frames].to(self.masks.dtype, copy=True)
            for n in range(N):
                last = self._hidden(hidden, len(hidden), frames, slice(n, n + 1))[:, 0]
                grad_masks_here[:, n] += (last * self.grad_mixed[frames]).sum(-1, dtype=self.masks.dtype)
            masks = self.masks[frames]
            grad_logits = masks * (grad_masks_here - (masks * grad_masks_here).sum(1, keepdim=True))
            self.gradients[-1][-1] += grad_logits.sum()
            for block in blocks:
                self._tile(hidden, frames, block, grad_logits[:, block].to(self.from_slots.dtype))

    def _hidden(self, hidden: list[Tensor], index: int, frames: slice, block: slice) -> Tensor:
        if index > 0:
            return hidden[index - 1][frames, block]
        return _first_hidden(self.from_slots, self.from_positions, frames, block)

    def _tile(self, hidden: list[Tensor], frames: slice, block: slice, grad_logits: Tensor) -> None:
        """One tile from the last hidden layer back to the first; `grad_logits` (f, n, P) of its masks."""
        layers, exact = self.layers, self.masks.dtype
        layer = self._hidden(hidden, len(hidden), frames, block)
        if self.trained:
            self.gradients[-2][-1] += _rows(layer).t() @ grad_logits.flatten()
        masks = self.masks[frames, block].to(grad_logits.dtype).unsqueeze(-1)
        grad = torch.addcmul(
            grad_logits.unsqueeze(-1) * layers.mask_row, masks, self.grad_mixed[frames].unsqueeze(1)
        )
        for index in range(len(hidden), 0, -1):
            below = self._hidden(hidden, index - 1, frames, block)
            rows = _rows(torch.ops.aten.threshold_backward(grad, layer, 0))
            if self.trained:
                self._add(index, rows, below)
            grad, layer = (rows @ layers.weights[index]).view_as(below), below
        grad = torch.ops.aten.threshold_backward(grad, layer, 0)
        self.into_slots[frames, block] = grad.sum(2, dtype=exact)
        self.into_positions += grad.sum((0, 1), dtype=exact)

    def _add(self, index: int, rows: Tensor, below: Tensor) -> None:
        """To a middle layer's gradients, from those of its sums and from what it read."""
        weight_gradient = self.gradients[2 * index]
        if weight_gradient.dtype == rows.dtype:
            weight_gradient.addmm_(rows.t(), _rows(below))
        else:
            weight_gradient += rows.t() @ _rows(below)
        self.gradients[2 * index + 1] += rows.sum(0, dtype=self.masks.dtype)

"""The MLP decoder on a GPU, forward and backward, in as few passes over its hidden layers as can be.

A GPU computes the hidden layers' products faster than it reads and writes them, `(M, N, P, H)` numbers each, so what
stands between the products decides. Kernels in Triton take it together:

- the first layer is the sum of what the slots give and what the positions give: one pass writes it;
- logits, softmax over the slots and mix read the last layer once, with the softmax of FlashAttention (Dao et al.
  2022) that goes on from slot to slot;
- their backward pass reads it once more, and writes the gradient before the ReLU;
- every bias's gradient is summed where the gradient is written, in place of the one of the layer above it.

Between them are torch's products, which put bias and ReLU on while they write. For the backward pass each hidden layer
is kept once, so that a training step holds at most `len(hidden_sizes) + 2` tensors of `M N P H` numbers.

Shapes: M frames, N slots, P positions, d slot size, H hidden units, F features. A row is the H numbers of one frame,
slot and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.tiled_decoder import Layers

PROGRAMS = 2048  # that share the rows where sums go over all of them; a fixed number keeps the sums' order
POSITIONS, UNITS = 32, 128  # of a tile of the first layer
SPLITS = 16  # of the frames and slots, where sums go over them


def decode(slots_MND: Tensor, pos_emb_PD: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Reconstruction `(M, P, F)` and masks `(M, N, P)`, as `MLPDecoder` defines them.

    The products are computed in the type of autocast where that is on; logits, masks, sums over slots and what a
    kernel sums of gradients in float32 at least.
    """
    inputs = [slots_MND, pos_emb_PD, *(p for linear in linears for p in (linear.weight, linear.bias))]
    if not torch.is_grad_enabled():  # a function of autograd sees only what the tensors themselves say
        inputs = [one.detach() for one in inputs]
    return _Decode.apply(*inputs)


def try_out(device: torch.device) -> None:
    """Runs the smallest kernel, and raises whatever Triton does where it can't."""
    one = torch.ones(1, 1, 1, 1, device=device)
    _relu_backward_(one, one)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, pos_emb: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        device = slots.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else slots.dtype
        keep = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            layers = Layers(parameters, dtype)
            slots_in, positions_in = slots.to(dtype), pos_emb.to(dtype)
            from_slots = F.linear(slots_in, layers.weights[0])  # (M, N, H)
            from_positions = F.linear(positions_in, layers.weights[0], layers.biases[0])  # (P, H)
            hidden = [_first_hidden(from_slots, from_positions)]
            for weight, bias in layers.middle:
                hidden.append(_linear_relu(hidden[-1], weight, bias))
                if not keep:
                    del hidden[0]
            masks, mixed = _mix(hidden[-1], layers.mask_row)
            reconstruction = F.linear(mixed, layers.features, layers.biases[-1][:-1])
        if keep:
            ctx.layers = layers
            ctx.save_for_backward(slots_in, positions_in, masks, mixed, *hidden)
        return reconstruction, masks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_reconstruction: Tensor, grad_masks: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        slots, positions, masks, mixed, *hidden = ctx.saved_tensors
        layers, needed = ctx.layers, ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [None] * len(needed)
        with torch.autocast(slots.device.type, enabled=False):
            grad = grad_reconstruction.to(slots.dtype)
            grad_hidden, of_bias, of_mask_row = _mix_backward(
                hidden[-1], masks, mixed, grad @ layers.features, grad_masks, layers.mask_row
            )
            if needed[-2]:
                of_features = _rows(grad).t() @ _rows(mixed)
                gradients[-2] = torch.cat([of_features.to(masks.dtype), of_mask_row[None]])
            if needed[-1]:  # the softmax does not see what is added to all logits
                gradients[-1] = F.pad(_rows(grad).sum(0, dtype=masks.dtype), (0, 1))
            for index in range(len(layers.middle), 0, -1):
                below = hidden[index - 1]
                if needed[2 * index]:
                    gradients[2 * index] = _rows(grad_hidden).t() @ _rows(below)
                gradients[2 * index + 1] = of_bias
                grad_hidden = (_rows(grad_hidden) @ layers.weights[index]).view_as(below)
                if index > 1:
                    of_bias = _relu_backward_(grad_hidden, below)
            into_slots, into_positions = _first_backward(grad_hidden, hidden[0])
            gradients[1] = into_positions.sum(0)
            into_slots, into_positions = into_slots.to(slots.dtype), into_positions.to(slots.dtype)
            if needed[0]:
                gradients[0] = _rows(into_slots).t() @ _rows(slots) + into_positions.t() @ positions
            found = [into_slots @ layers.weights[0], into_positions @ layers.weights[0], *gradients]
        return tuple(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=True))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not public, and without a derivative of its own: cuBLAS puts both on while it writes the product.
    return torch._addmm_activation(bias, _rows(x), weight.t()).view(*x.shape[:-1], len(weight))


# --- what launches the kernels ------------------------------------------------------------------------


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, exact: torch.dtype, **sizes: int) -> None:
    """Runs a kernel, whose sums are of the type `exact`, on the device of its first argument."""
    EXACT = tl.float64 if exact == torch.float64 else tl.float32
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, EXACT=EXACT, **sizes)


def _row_sizes(width: int) -> dict[str, int]:
    """A row's numbers as a power of two, and the warps that share them."""
    units = triton.next_power_of_2(width)
    return {"UNITS": units, "num_warps": min(max(units // 512, 1), 8)}


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _first_hidden(from_slots: Tensor, from_positions: Tensor) -> Tensor:
    """ReLU of the sum of `(M, N, H)` and `(P, H)`: W(s + e) + b = Ws + (We + b), N + P products instead of N * P."""
    (M, N, H), P = from_slots.shape, len(from_positions)
    hidden = from_slots.new_empty(M, N, P, H)
    grid = (M * N, triton.cdiv(P, POSITIONS), triton.cdiv(H, UNITS))
    sizes = {"POSITIONS": POSITIONS, "UNITS": UNITS}
    _launch(
        _first_kernel, grid, from_slots, from_positions, hidden, P, H, exact=_exact(hidden.dtype), **sizes
    )
    return hidden


def _mix(hidden: Tensor, mask_row: Tensor) -> tuple[Tensor, Tensor]:
    """Masks `(M, N, P)`, softmax over the slots of a row's product with `mask_row` `(H,)`, and the mix `(M, P, H)`.

    The logits' bias, one number for all slots, would change no mask. Those sum to one over the slots, and so
    sum_n m_n (V h_n + c) = V (sum_n m_n h_n) + c: the rest of the last layer comes after the mix.
    """
    M, N, P, H = hidden.shape
    masks = hidden.new_empty(M, N, P, dtype=_exact(hidden.dtype))
    mixed = hidden.new_empty(M, P, H)
    sizes = {"SLOTS": triton.next_power_of_2(N), **_row_sizes(H)}
    _launch(_mix_kernel, (M * P,), hidden, mask_row, masks, mixed, N, P, H, exact=masks.dtype, **sizes)
    return masks, mixed


def _mix_backward(
    hidden: Tensor, masks: Tensor, mixed: Tensor, grad_mixed: Tensor, grad_masks: Tensor, mask_row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before the last layer's ReLU `(M, N, P, H)`, its sum over all rows, and `mask_row`'s, `(H,)`."""
    M, N, P, H = hidden.shape
    grad_hidden = torch.empty_like(hidden)
    programs = min(PROGRAMS, M * P)
    sums, grad_row = masks.new_empty(2, programs, H)
    inputs = hidden, masks, mixed, grad_mixed.contiguous(), grad_masks.contiguous(), mask_row
    sizes = {"SLOTS": triton.next_power_of_2(N), **_row_sizes(H)}
    outputs = grad_hidden, sums, grad_row
    _launch(_mix_backward_kernel, (programs,), *inputs, *outputs, M * P, N, P, H, exact=masks.dtype, **sizes)
    return grad_hidden, sums.sum(0), grad_row.sum(0)


def _relu_backward_(grad: Tensor, hidden: Tensor) -> Tensor:
    """Makes `grad` `(M, N, P, H)` the gradient before the ReLU that gave `hidden`; its sum over all rows `(H,)`."""
    count, width = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    programs = min(PROGRAMS, count)
    sums = grad.new_empty(programs, width, dtype=_exact(grad.dtype))
    sizes = _row_sizes(width)
    _launch(_relu_backward_kernel, (programs,), grad, hidden, sums, count, width, exact=sums.dtype, **sizes)
    return sums.sum(0)


def _first_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients `(M, N, H)` and `(P, H)` of what the ReLU of their sum, `hidden`, was made of."""
    M, N, P, H = hidden.shape
    tiles, splits, exact = triton.cdiv(P, POSITIONS), min(SPLITS, M * N), _exact(grad.dtype)
    into_slots = grad.new_empty(M, N, tiles, H, dtype=exact)
    into_positions = grad.new_empty(splits, P, H, dtype=exact)
    grid = (tiles, triton.cdiv(H, UNITS), splits)
    sizes = {"POSITIONS": POSITIONS, "UNITS": UNITS}
    _launch(
        _first_backward_kernel,
        grid,
        *(grad, hidden, into_slots, into_positions),
        *(M * N, P, H),
        exact=exact,
        **sizes,
    )
    return into_slots.sum(2), into_positions.sum(0)


# mypy: disable-error-code="no-untyped-def"
# --- kernels: all tensors are contiguous; rows are counted in 64 bits, as there can be 2^31 numbers and more ----------


@triton.jit
def _first_kernel(
    from_slots,
    from_positions,
    hidden,
    P,
    H,
    POSITIONS: tl.constexpr,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    positions = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    units = tl.program_id(2) * UNITS + tl.arange(0, UNITS)
    inside = (positions < P)[:, None] & (units < H)[None, :]
    tile = positions[:, None] * H + units[None, :]
    of_slot = tl.load(from_slots + slot * H + units, mask=units < H, other=0).to(EXACT)
    x = tl.load(from_positions + tile, mask=inside, other=0).to(EXACT) + of_slot[None, :]
    x = tl.where(x < 0, 0, x)  # and not `maximum`, for which NaN is none
    tl.store(hidden + slot * P * H + tile, x.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _mix_kernel(
    hidden,
    mask_row,
    masks,
    mixed,
    N,
    P,
    H,
    SLOTS: tl.constexpr,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # of M * P
    first = place // P * N * P + place % P  # row of slot 0
    units = tl.arange(0, UNITS)
    slots = tl.arange(0, SLOTS)
    inside = units < H
    weights = tl.load(mask_row + units, mask=inside, other=0).to(EXACT)
    logits = tl.full((SLOTS,), -float("inf"), EXACT)
    total = tl.zeros((UNITS,), EXACT)
    top = tl.max(logits)
    for n in range(N):
        x = tl.load(hidden + (first + n * P) * H + units, mask=inside, other=0).to(EXACT)
        logit = tl.sum(x * weights)
        logits = tl.where(slots == n, logit, logits)
        higher = tl.maximum(top, logit)
        total = total * tl.exp(top - higher) + tl.exp(logit - higher) * x
        top = higher
    shares = tl.exp(logits - top)
    whole = tl.sum(shares)
    tl.store(masks + first + slots * P, shares / whole, mask=slots < N)
    tl.store(mixed + place * H + units, (total / whole).to(mixed.dtype.element_ty), mask=inside)


@triton.jit
def _mix_backward_kernel(
    hidden,
    masks,
    mixed,
    grad_mixed,
    grad_masks,
    mask_row,
    grad_hidden,
    sums,
    grad_row,
    places,
    N,
    P,
    H,
    SLOTS: tl.constexpr,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
):
    units = tl.arange(0, UNITS)
    slots = tl.arange(0, SLOTS)
    inside = units < H
    weights = tl.load(mask_row + units, mask=inside, other=0).to(EXACT)
    summed = tl.zeros((UNITS,), EXACT)
    of_row = tl.zeros((UNITS,), EXACT)
    program = tl.program_id(0).to(tl.int64)
    for place in range(program, places, tl.num_programs(0)):
        first = place // P * N * P + place % P
        of_mixed = tl.load(grad_mixed + place * H + units, mask=inside, other=0).to(EXACT)
        mean = tl.load(mixed + place * H + units, mask=inside, other=0).to(EXACT)
        shares = tl.load(masks + first + slots * P, mask=slots < N, other=0)
        of_masks = tl.load(grad_masks + first + slots * P, mask=slots < N, other=0).to(EXACT)
        # sum_n m_n dL/dm_n, which the softmax's derivative needs before the rows are read: sum_n m_n h_n is the mix.
        level = tl.sum(of_mixed * mean) + tl.sum(shares * of_masks)
        for n in range(N):
            row = (first + n * P) * H + units
            x = tl.load(hidden + row, mask=inside, other=0).to(EXACT)
            share = tl.load(masks + first + n * P)
            of_mask = tl.load(grad_masks + first + n * P).to(EXACT)
            of_logit = share * (tl.sum(x * of_mixed) + of_mask - level)
            grad = tl.where(x > 0, share * of_mixed + of_logit * weights, 0)
            tl.store(grad_hidden + row, grad.to(grad_hidden.dtype.element_ty), mask=inside)
            summed += grad
            of_row += of_logit * x
    tl.store(sums + program * H + units, summed, mask=inside)
    tl.store(grad_row + program * H + units, of_row, mask=inside)


@triton.jit
def _relu_backward_kernel(grad, hidden, sums, count, H, UNITS: tl.constexpr, EXACT: tl.constexpr):
    units = tl.arange(0, UNITS)
    inside = units < H
    summed = tl.zeros((UNITS,), EXACT)
    program = tl.program_id(0).to(tl.int64)
    for index in range(program, count, tl.num_programs(0)):
        row = index * H + units
        x = tl.load(hidden + row, mask=inside, other=0).to(EXACT)
        above = tl.where(x > 0, tl.load(grad + row, mask=inside, other=0).to(EXACT), 0)
        tl.store(grad + row, above.to(grad.dtype.element_ty), mask=inside)
        summed += above
    tl.store(sums + program * H + units, summed, mask=inside)


@triton.jit
def _first_backward_kernel(
    grad,
    hidden,
    into_slots,
    into_positions,
    count,
    P,
    H,
    POSITIONS: tl.constexpr,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
):
    block = tl.program_id(0)
    positions = block * POSITIONS + tl.arange(0, POSITIONS)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    split = tl.program_id(2).to(tl.int64)
    inside = (positions < P)[:, None] & (units < H)[None, :]
    tile = positions[:, None] * H + units[None, :]
    of_positions = tl.zeros((POSITIONS, UNITS), EXACT)
    for slot in range(split, count, tl.num_programs(2)):
        x = tl.load(hidden + slot * P * H + tile, mask=inside, other=0).to(EXACT)
        above = tl.load(grad + slot * P * H + tile, mask=inside, other=0).to(EXACT)
        above = tl.where(x > 0, above, 0)
        of_positions += above
        of_slot = into_slots + (slot * tl.num_programs(0) + block) * H + units
        tl.store(of_slot, tl.sum(above, axis=0), mask=units < H)
    tl.store(into_positions + split * P * H + tile, of_positions, mask=inside)

"""From frames to a model's square input, and from its masks back to the frames: the same for every form of a model."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, without waiting for what that is at, which a copy from unpinned memory does."""
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def square_pixels(frames: np.ndarray | Tensor, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Frames `(T, h, w, 3)` uint8 to `(T, 3, side, side)` in [0, 1]: bicubic, anti-aliased, clamped."""
    if not isinstance(frames, Tensor):
        frames = torch.from_numpy(np.ascontiguousarray(frames))
    pixels = send(frames, device).permute(0, 3, 1, 2).float().div_(255)
    if tuple(pixels.shape[-2:]) == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp_(0, 1)


def resized_grid(features_MPF: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """Features of a grid's patches at the patches of another grid, bilinearly."""
    map_MFHW = features_MPF.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(map_MFHW, other, mode="bilinear").flatten(2).transpose(1, 2)


def label_maps(masks_TNP: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Slot index of every pixel, `(T, *size)` uint8: bilinear resize of the grid, then argmax over slots."""
    # One frame at a time: N full-size masks of a whole chunk would be the peak of all memory.
    return torch.stack(
        [
            F.interpolate(frame[None], size, mode="bilinear")[0].argmax(0).to(torch.uint8)
            for frame in masks_TNP.float().unflatten(-1, grid)
        ]
    )

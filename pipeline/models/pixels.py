"""From frames to a model's input, and from its masks back to the frames: the same for every form of a model."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Grid = tuple[int, int]  # rows and columns, of patches or of pixels


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, without waiting for what that is at, which a copy from unpinned memory does."""
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def input_pixels(
    frames: np.ndarray | Tensor, size: Grid, device: torch.device | str = "cpu", mode: str = "bicubic"
) -> Tensor:
    """Frames `(T, h, w, 3)` uint8 to `(T, 3, *size)` in [0, 1]: bicubic or bilinear, anti-aliased, clamped."""
    if not isinstance(frames, Tensor):
        frames = torch.from_numpy(np.ascontiguousarray(frames))
    pixels = send(frames, device).permute(0, 3, 1, 2).float().div_(255)
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode=mode, antialias=True).clamp_(0, 1)


def resized_grid(features_MPF: Tensor, grid: Grid, other: Grid) -> Tensor:
    """Features of a grid's patches at the patches of another grid, bilinearly."""
    map_MFHW = features_MPF.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(map_MFHW, other, mode="bilinear").flatten(2).transpose(1, 2)


def label_maps(masks_TNP: Tensor, grid: Grid, size: Grid, mode: str = "bilinear") -> Tensor:
    """Slot index of every pixel, `(T, *size)` uint8: bilinear or nearest resize of the grid, then argmax over slots."""
    # One frame at a time: N full-size masks of a whole chunk would be the peak of all memory.
    return torch.stack(
        [
            F.interpolate(frame[None], size, mode=mode)[0].argmax(0).to(torch.uint8)
            for frame in masks_TNP.float().unflatten(-1, grid)
        ]
    )

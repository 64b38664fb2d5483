"""What every video segmenter offers, whatever finds its slots: frames in, slots and label maps out.

Shapes: B clips, T frames, N slots, d slot size, P positions of the grid of masks, H x W the input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.hub import OnHub
from pipeline.models.pixels import Grid, input_pixels, label_maps


class SegmenterConfig(Protocol):
    """What all configs of models have: sizes, and the normalisation of RGB values in [0, 1]."""

    @property
    def num_slots(self) -> int: ...
    @property
    def slot_size(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    def to_dict(self) -> dict[str, Any]: ...


class Segmenter(Protocol):
    """What is scored and segments: a `VideoSegmenter`, or an exported form of one."""

    @property
    def config(self) -> SegmenterConfig: ...

    def stream(
        self,
        chunks: Iterable[np.ndarray],
        *,
        noise_seed: int = 0,
        rollout: str = "forward",
        masks: str = "decoder",
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]: ...

    def label_maps(self, masks_TNP: Tensor, size: Grid) -> Tensor: ...


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A number for each channel of pictures; made once a device, as making it waits for the device."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


class VideoSegmenter(OnHub, nn.Module):
    """A trained system of any kind: what is scored, drawn, registered and cuts videos into segments.

    A system says how its authors resize frames to its input (`frame_resizing`, anti-aliased) and masks to the frames
    (`mask_resizing`).
    """

    config: Any  # as `SegmenterConfig`
    frame_resizing = "bicubic"  # or "bilinear"
    mask_resizing = "bilinear"  # or "nearest"
    teaches = False  # whether students can learn its slots
    start_boxes = (
        0  # of objects in a video's first frame, which its slots start from: `stream` takes `boxes` then
    )

    @property
    def input_size(self) -> Grid:
        """Height and width of the input, pixels."""
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        """Rows and columns of the masks; P is their product."""
        raise NotImplementedError

    def stream(
        self,
        chunks: Iterable[np.ndarray],
        *,
        noise_seed: int = 0,
        rollout: str = "forward",
        masks: str = "decoder",
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """One video of any length in chunks of uint8 frames `(t, h, w, 3)`.

        Yields `(frames, slots (t, N, d), masks (t, N, P))` for each chunk, in order and in eval mode without gradients;
        slot n is the same thing in all of them.
        """
        raise NotImplementedError

    def target_slots(self, video_BTCHW: Tensor, noise_seeds: Sequence[int]) -> Tensor:
        """Slots `(B, T, N, d)` of whole clips, normalised, that a student learns: slot n of one is one thing in them.

        Of a slot model `roll_out` gives them. noise_seeds: of each clip, where slots are drawn.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def num_parameters(self) -> int:
        """All parameters, the frozen ones included (the paper's Table 2)."""
        return sum(p.numel() for p in self.parameters())

    def prepare(self, clips: Sequence[np.ndarray | Tensor]) -> Tensor:
        """B clips of uint8 frames `(T, h, w, 3)`, sizes may differ -> normalised `(B, T, 3, H, W)`.

        Every clip is resized to the model's own input and normalised with the model's own mean and standard deviation.
        """
        size, device = self.input_size, self.device
        mean, std = (_channels(values, device) for values in (self.config.mean, self.config.std))
        videos = [(input_pixels(frames, size, device, self.frame_resizing) - mean) / std for frames in clips]
        return torch.stack(videos)

    def label_maps(self, masks_TNP: Tensor, size: Grid) -> Tensor:
        """Slot index of every pixel, `(T, *size)` uint8: the masks resized, then argmax over slots."""
        return label_maps(masks_TNP, self.grid, size, self.mask_resizing)

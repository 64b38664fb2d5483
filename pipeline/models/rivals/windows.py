"""Videos in parts of a fixed length, wherever their chunks end: windows around each frame, and clips.

Streams of windows run half a window behind their input, streams of clips up to a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Bound = tuple[np.ndarray, Tensor, Tensor]  # a chunk's frames, and its slots and attention within each of them


def check_length(frames: int, half: int) -> None:
    """Raises ValueError for a video, or a part of one, that is shorter than a window."""
    if frames < 2 * half + 1:
        raise ValueError(
            f"a video of {frames} frames is shorter than the window of {2 * half + 1} that the model looks at; give it "
            f"videos, or parts of videos (clips.clip_frames, evaluate.clip_frames), of {2 * half + 1} frames or more"
        )


def windows(slots_TSD: Tensor, half: int, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Windows `(T', W, S, d)`, and which of their frames are there, `(T', W)`.

    The first window lacks `before` frames, the last one `after`; T' = before + T + after - 2 half.
    """
    present = F.pad(torch.ones(len(slots_TSD), device=slots_TSD.device), (before, after)).bool()
    padded = F.pad(slots_TSD, (0, 0, 0, 0, before, after))
    size = 2 * half + 1
    return padded.unfold(0, size, 1).movedim(-1, 1), present.unfold(0, size, 1)


def delayed(chunks: Iterable[Bound], half: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
    """Each chunk's frames, their windows `(t, W, S, d)`, `(t, W)` as `windows` gives them, and their own attention.

    A chunk comes out once the half window behind it has gone in; nothing before its own half window is kept.

    Raises:
        ValueError: fewer frames in all than a window has.
    """
    waiting: list[np.ndarray] = []
    slots = weights = torch.empty(0)
    first = frames_seen = 0  # where the waiting frames begin in the slots that are kept

    def ready(ended: bool) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
        nonlocal slots, weights, first
        while waiting and (ended or first + len(waiting[0]) + half <= len(slots)):
            frames = waiting.pop(0)
            last = first + len(frames)
            start, stop = max(first - half, 0), min(last + half, len(slots))
            missing = (half - (first - start), half - (stop - last))
            yield frames, *windows(slots[start:stop], half, *missing), weights[first:last]
            gone = max(last - half, 0)
            slots, weights, first = slots[gone:], weights[gone:], last - gone

    for frames, new_slots, new_weights in chunks:
        waiting.append(frames)
        frames_seen += len(frames)
        slots = torch.cat([slots, new_slots]) if len(slots) else new_slots
        weights = torch.cat([weights, new_weights]) if len(weights) else new_weights
        yield from ready(False)
    if frames_seen:
        check_length(frames_seen, half)
    yield from ready(True)


def in_clips(
    chunks: Iterable[tuple[np.ndarray, Tensor]], length: int, run: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Each chunk's frames, and what `run` gives for them, which sees the video in clips of `length` frames.

    chunks: frames, and their pixels `(t, 3, H, W)`. run: slots and masks of each of a clip's frames; the video's last
    clip may be shorter.
    """
    waiting: list[np.ndarray] = []
    pixels = slots = masks = torch.empty(0)

    def segment(clip: Tensor) -> None:
        nonlocal slots, masks
        new_slots, new_masks = run(clip)
        slots = torch.cat([slots, new_slots]) if len(slots) else new_slots
        masks = torch.cat([masks, new_masks]) if len(masks) else new_masks

    def ready() -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        nonlocal slots, masks
        while waiting and len(waiting[0]) <= len(slots):
            frames = waiting.pop(0)
            yield frames, slots[: len(frames)], masks[: len(frames)]
            slots, masks = slots[len(frames) :], masks[len(frames) :]

    for frames, new_pixels in chunks:
        waiting.append(frames)
        pixels = torch.cat([pixels, new_pixels]) if len(pixels) else new_pixels
        while len(pixels) >= length:
            segment(pixels[:length])
            pixels = pixels[length:]
        yield from ready()
    if len(pixels):
        segment(pixels)
    yield from ready()

"""Readers: one module a data-set layout, each listing videos and yielding their frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class VideoRef(NamedTuple):
    """A video that has been found but not opened.

    `content` is a hash of its bytes (masks included): what the clip set's fingerprint is made of.
    """

    video_id: str
    path: str
    masks_path: str | None
    content: str
    bytes: int


class Frame(NamedTuple):
    """Pixels `(H, W, 3)` uint8, the time in seconds, and masks by object id (None: no annotation)."""

    pixels: np.ndarray
    seconds: float
    masks: dict[int, np.ndarray] | None


class BadVideo(Exception):
    """A video that can't be used; the message is the reason a user reads."""


FrameIterator = Iterator[Frame]

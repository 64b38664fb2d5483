"""What every reader gives: references to videos, and their frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FLOW_DIRECTIONS = ("forward", "backward")  # of a frame: to the next one, and to the one before


class VideoRef(NamedTuple):
    """A video that has been found but not opened.

    Attributes:
        path: its file or folder, local or `s3://`.
        content: a hash of all that decides its frames and masks, or what stands for one: what the clip
            set's fingerprint is made of.
        bytes: of its files.
        kind: the layout that it was found in, and so the reader that reads it.
        details: what that reader needs, as plain values that JSON can hold.
        problem: what is wrong with it, where listing has shown that already; then it is never read.
    """

    video_id: str
    path: str
    content: str = ""
    bytes: int = 0
    kind: str = "videos"
    details: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    problem: str = ""

    @property
    def name(self) -> str:
        """What a message calls it: files and folders of videos are known by their names."""
        return Path(self.path).name if self.kind == "videos" else self.video_id


class Frame(NamedTuple):
    """Pixels `(H, W, 3)` uint8, the time in seconds, and masks by object id (None: no annotation).

    Layouts without a clock count frames instead of seconds. `orientation` is EXIF's, which the pixels have been
    turned by. `motion`: masks of what moves (None: nobody has looked), whose numbers mean nothing in other frames.
    `flow`: optical flow that the data set has and somebody asked for, `(H, W, 2)` pixels down and to the right in
    `FLOW_DIRECTIONS`.
    """

    pixels: np.ndarray
    seconds: float
    masks: dict[int, np.ndarray] | None
    orientation: int = 1
    motion: dict[int, np.ndarray] | None = None
    flow: dict[str, np.ndarray] | None = None


class BadVideo(Exception):
    """A video that can't be used; the message is the reason a user reads."""


FrameIterator = Iterator[Frame]

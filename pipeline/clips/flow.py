"""The column of motion segments of a clip set, as `clips.motion` says: of optical flow, of masks, or of files.

Flow is a data set's own, in the direction of the next frame, or OpenCV's DIS flow (Kroeger et al. 2016), computed of
the frames as they are stored, which needs no weights. It is cut into segments as by `motion_segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.clips.motion import RUN, is_still, segmented
from pipeline.clips.sources.base import BadVideo, Frame, FrameIterator
from pipeline.config import ConfigError

Flow = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # from a frame `(H, W, 3)` uint8 to another, `(H, W, 2)` pixels


def with_column(frames: FrameIterator, motion: str) -> FrameIterator:
    """Frames with the motion segments that `clips.motion` asks for.

    Raises:
        BadVideo: masks are to be the segments, and there are none.
        ConfigError: flow is asked for, and OpenCV is not installed.
    """
    if motion == "flow":
        return with_flow_segments(flowing(frames, dis_flow()))
    if motion == "dataset":
        return with_flow_segments((frame, (frame.flow or {})["forward"]) for frame in frames)
    return _with_masks(frames) if motion == "masks" else frames


def _with_masks(frames: FrameIterator) -> FrameIterator:
    for frame in frames:
        if frame.masks is None:
            raise BadVideo("has no masks, which are to be its motion segments (clips.motion=masks)")
        yield frame._replace(motion=frame.masks)


def flow_library(motion: str) -> str | None:
    """What computes the flow that `clips.motion` asks for, with its version, on which values may depend; else None.

    Raises:
        ConfigError: flow is asked for, and OpenCV is not installed.
    """
    return f"OpenCV {_opencv().__version__}" if motion == "flow" else None


def _opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError:
        raise ConfigError(
            "clips.motion: flow is OpenCV's, which is not installed: pip install opencv-python-headless; nearest "
            "valid without it: masks, or files of your own (dataset.motion)"
        ) from None
    return cv2


def dis_flow() -> Flow:
    """OpenCV's dense inverse search; raises ConfigError where OpenCV is not installed."""
    cv2 = _opencv()
    cv2.setNumThreads(1)  # its numbers depend on how many there are
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        grey = (cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (one, other))
        return search.calc(*grey, None)

    return flow


def with_flow_segments(frames: Iterable[tuple[Frame, np.ndarray]]) -> FrameIterator:
    """Frames with the segments that `motion_segments` gives of their flow, a few at a time in memory."""
    held: list[Frame] = []  # in a run of steady frames that is too short so far
    length = 0
    for frame, flow_HW2 in frames:
        steady = is_still(flow_HW2)
        length = length + 1 if steady else 0
        moving = frame._replace(motion=_masks(segmented(flow_HW2)) if steady else {})
        if 0 < length < RUN:
            held.append(moving)
            continue
        yield from held if steady else (other._replace(motion={}) for other in held)
        held = []
        yield moving
    yield from (other._replace(motion={}) for other in held)


def flowing(frames: Iterable[Frame], flow: Flow) -> Iterator[tuple[Frame, np.ndarray]]:
    """Each frame with its flow to the next; of the last one from the frame before."""
    earlier: Frame | None = None
    frame: Frame | None = None
    for later in frames:
        if frame is not None:
            yield frame, flow(frame.pixels, later.pixels)
        earlier, frame = frame, later
    if frame is not None:
        other = frame if earlier is None else earlier
        yield frame, -flow(frame.pixels, other.pixels)


def _masks(segments_HW: np.ndarray) -> dict[int, np.ndarray]:
    return {int(number): segments_HW == number for number in np.unique(segments_HW) if number}

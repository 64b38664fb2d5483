"""Motion segments: what moves by itself in each frame, from optical flow. What DIOD learns from.

Maps of whole numbers, one a frame: 0 where nothing moves, else a segment's number, which means nothing in other frames.
Flow is in pixels to the next (or from the last) frame, at the maps' own resolution, as all limits here are.

With segmentations at hand the segments are exact (`moving_objects`); without, they are cut out of the flow alone
(`motion_segments`) where the camera hardly moves, as MR-DINOSAUR does.

Shapes: T frames of H x W pixels.
"""

from __future__ import annotations

import numpy as np

OWN_MOTION = 1.0  # pixels that an object's flow differs from the camera's, in the mean
SMALL = 50  # pixels; segments that have no more are dropped

CORNER, STEADY_CORNERS = 0.15, 3  # of a frame's sides; of its four corners
STILL = 1.7  # pixels, below which a corner's mean flow is none
RUN = 5  # frames
FOREGROUND = 2.5  # pixels of flow
EDGE = 20.0  # Sobel's gradient, which for a slope of one is 8
LEAST_CORE, LEAST_SEGMENT = 30, 100  # pixels


def moving_objects(
    segmentation_THW: np.ndarray, flow_THW2: np.ndarray, *, least: float = OWN_MOTION, small: int = SMALL
) -> np.ndarray:
    """The objects of exact segmentations (0: background) whose flow is not the camera's, `(T, H, W)` int32.

    The camera's flow is a quadratic surface through the background's, by least squares: what a plane's is, up to
    perspective. An object moves where its mean distance from that is more than `least` pixels, and it has more than
    `small`. Numbers are the segmentations' own.

    Raises:
        ValueError: flow that is not `(T, H, W, 2)` for the segmentations.
    """
    _check(flow_THW2)
    if segmentation_THW.shape != flow_THW2.shape[:3]:
        raise ValueError(
            f"segmentations have shape {segmentation_THW.shape}, but flow {flow_THW2.shape}; expected "
            f"{flow_THW2.shape[:3]}"
        )
    _, H, W, _ = flow_THW2.shape
    y, x = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij"))
    surface = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)
    moving = np.zeros(segmentation_THW.shape, np.int32)
    for t, (labels, flow) in enumerate(zip(segmentation_THW, flow_THW2, strict=True)):
        background = labels.ravel() == 0
        pixels = flow.reshape(-1, 2).astype(np.float64)
        camera = surface @ np.linalg.lstsq(surface[background], pixels[background], rcond=None)[0]
        distance = np.linalg.norm(pixels - camera, axis=1).reshape(labels.shape)
        for label in np.unique(labels[labels > 0]):
            own = labels == label
            if own.sum() > small and distance[own].mean() > least:
                moving[t][own] = label
    return moving


def motion_segments(flow_THW2: np.ndarray) -> np.ndarray:
    """Segments `(T, H, W)` int32 from flow alone, numbered from 1; none in frames that are not `steady_frames`.

    After MR-DINOSAUR: connected parts of what flows by more than 2.5 pixels, of at least 100 pixels. A part is cut
    where its flow jumps. There MR-DINOSAUR clusters flow directions and places by HDBSCAN; here each pixel goes to
    the nearest connected core without a jump, which needs no library.

    Raises:
        ValueError: flow that is not `(T, H, W, 2)`.
    """
    steady = steady_frames(flow_THW2)
    segments = np.zeros(flow_THW2.shape[:3], np.int32)
    for t in np.flatnonzero(steady):
        segments[t] = segmented(flow_THW2[t])
    return segments


def steady_frames(flow_THW2: np.ndarray) -> np.ndarray:
    """Which frames `(T,)` belong to five or more in a row in which the camera hardly moves.

    In such a frame at least three of the four corners flow by less than 1.7 pixels in the mean.

    Raises:
        ValueError: flow that is not `(T, H, W, 2)`.
    """
    from scipy import ndimage

    _check(flow_THW2)
    still = np.array([is_still(flow_HW2) for flow_HW2 in flow_THW2])
    runs, _ = ndimage.label(still)
    return still & (np.bincount(runs)[runs] >= RUN)


def is_still(flow_HW2: np.ndarray) -> bool:
    """Whether the camera hardly moves in one frame."""
    speed = np.linalg.norm(flow_HW2, axis=-1)
    high, wide = (max(round(CORNER * side), 1) for side in speed.shape)
    corners = [
        speed[y, x] for y in (slice(high), slice(-high, None)) for x in (slice(wide), slice(-wide, None))
    ]
    return sum(bool(corner.mean() < STILL) for corner in corners) >= STEADY_CORNERS


def segmented(flow_HW2: np.ndarray) -> np.ndarray:
    """The segments `(H, W)` int32 of one frame's flow, see `motion_segments`, steady or not."""
    from scipy import ndimage

    flow_HW2 = flow_HW2.astype(np.float64)
    parts, count = ndimage.label(np.linalg.norm(flow_HW2, axis=-1) > FOREGROUND)
    slopes = [ndimage.sobel(flow_HW2[..., channel], axis) for channel in (0, 1) for axis in (0, 1)]
    edges = np.linalg.norm(slopes, axis=0) > EDGE
    segments = np.zeros(parts.shape, np.int32)
    for number in range(1, count + 1):
        for segment in _cut(parts == number, edges):
            if segment.sum() >= LEAST_SEGMENT:
                segments[segment] = segments.max() + 1
    return segments


def _cut(part_HW: np.ndarray, edges_HW: np.ndarray) -> list[np.ndarray]:
    """The segments of a connected part: itself, but where an edge runs through it."""
    from scipy import ndimage

    inside = ndimage.binary_erosion(part_HW, np.ones((3, 3)), border_value=1)
    if not (inside & edges_HW).any():
        return [part_HW]
    cores, count = ndimage.label(part_HW & ~edges_HW)
    sizes = np.bincount(cores.ravel(), minlength=count + 1)
    cores[sizes[cores] < LEAST_CORE] = 0
    if not cores.any():
        return [part_HW]
    nearest = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    owners = cores[tuple(nearest)]
    return [part_HW & (owners == core) for core in np.unique(cores[cores > 0])]


def _check(flow: np.ndarray) -> None:
    if flow.ndim != 4 or flow.shape[3] != 2:
        raise ValueError(f"flow has shape {flow.shape}; expected (T, H, W, 2), pixels along x and y")

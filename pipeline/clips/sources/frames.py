"""Decoding and resizing frames and masks, and picking frames by time: what all readers share."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, Frame, FrameIterator
from pipeline.clips.sources.files import HashMemo, read_whole
from pipeline.clips.sources.pictures import (
    DECODING_ERRORS,
    VOID,
    is_exchanged,
    labels_of,
    open_picture,
    orientation_of,
    png_depth,
    rgb_of,
    turn,
)
from pipeline.clips.views import nearest_resize


class RawFrame(NamedTuple):
    """A frame in its own size, `(H, W, 3)` uint8, with `(H, W)` bool masks, and what messages call it.

    Layouts without a clock give no time; then the frame's number stands for it. `orientation` is EXIF's, which the
    pixels have been turned by. `flow`: as a `Frame` has it.
    """

    name: str
    pixels: np.ndarray
    masks: dict[int, np.ndarray] | None = None
    seconds: float | None = None
    orientation: int = 1
    flow: dict[str, np.ndarray] | None = None


def reason(error: Exception, path: object = "") -> str:
    """One line in the library's own words, without the error number and the path or file object."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].replace(f" {str(path)!r}", "").split(" <_io.")[0]


def decode_frame(content: bytes, name: str) -> RawFrame:
    """A picture as viewers show it, turned by its EXIF orientation; raises BadVideo, calling it `name`."""
    try:
        with open_picture(io.BytesIO(content)) as image:
            pixels, orientation = rgb_of(image), orientation_of(image)
    except DECODING_ERRORS as error:
        raise BadVideo(f"frame {name} can't be decoded ({reason(error)})") from error
    return RawFrame(name, turn(pixels, orientation), orientation=orientation)


def decode_labels(content: bytes, name: str) -> np.ndarray:
    """The labels (H, W) uint8 of a palette or grey picture; raises BadVideo, calling it `name`."""
    try:
        file = io.BytesIO(content)
        with open_picture(file) as image:
            return labels_of(image, png_depth(file), name)
    except DECODING_ERRORS as error:
        raise BadVideo(f"mask {name} can't be decoded ({reason(error)})") from error


def label_masks(labels: np.ndarray, one_object: bool = False) -> dict[int, np.ndarray]:
    """A mask for every label but 0 (background) and 255 (void).

    Args:
        one_object: of a video with no label but 255 (`is_one_object`), which then is object 1.
    """
    if one_object:
        labels = (labels == VOID).astype(np.uint8)
    return {int(i): labels == i for i in np.unique(labels) if i not in (0, VOID)}


def only_void(labels: np.ndarray) -> bool | None:
    """Whether labels are 0 and 255 alone; None where all are 0."""
    there = labels[labels != 0]
    return bool((there == VOID).all()) if there.size else None


def is_one_object(kinds: Iterable[bool | None]) -> bool:
    """Whether 255 is an object in a video, given `only_void` of its label images: where there is no other label.

    Most tools write the mask of a single object as 0 and 255, and void beside no object says nothing. Looks no
    further than the first image with another label, which mostly is the first.
    """
    found = False
    for kind in kinds:
        if kind is False:
            return False
        found = found or kind is True
    return found


def marked_content(content: str, masks: Iterable[Path], memo: HashMemo) -> str:
    """A video's content, another one where its local masks are one object: earlier versions took that for void."""

    def kind(path: str) -> bool | None:
        try:
            return only_void(decode_labels(Path(path).read_bytes(), ""))
        except BadVideo:
            return False  # reading it will say why

    try:
        changed = is_one_object(memo.look(path, "kind", kind) for path in masks)
    except OSError:
        changed = False
    return storage.fingerprint(["one object", content]) if changed else content


def check_mask_size(mask: str, size: Sequence[int], frame: RawFrame) -> None:
    """Raises BadVideo, naming the mask, where its (height, width) is not its frame's."""
    height, width = frame.pixels.shape[:2]
    if tuple(size) != (height, width):
        raise BadVideo(f"mask {mask} is {size[1]}x{size[0]}, its frame {frame.name} {width}x{height} pixels")


def with_labels(frame: RawFrame, content: bytes, mask: str, one_object: bool) -> RawFrame:
    """The frame with the masks of a label image of its size; raises BadVideo, calling that `mask`."""
    labels = as_shown(decode_labels(content, mask), frame.pixels.shape[:2], frame.orientation)
    check_mask_size(mask, labels.shape, frame)
    return frame._replace(masks=label_masks(labels, one_object))


def as_shown(labels: np.ndarray, size: Sequence[int], orientation: int) -> np.ndarray:
    """Labels of a turned picture that is `size` (height, width) when shown, or of that shape.

    Where their shape is that of the picture as stored, and not as shown, they are turned as the picture was. Where
    both have one shape (squares, mirrored pictures) they are taken for those of the picture as shown, which is what
    tools for annotation show.
    """
    exchanged = (size[1], size[0])
    if not is_exchanged(orientation) or labels.shape == tuple(size):
        return labels
    if labels.shape == exchanged or (not fits(labels.shape, size) and fits(labels.shape, exchanged)):
        return turn(labels, orientation)
    return labels


def fits(shape: Sequence[float], size: Sequence[float]) -> bool:
    """Whether a mask's (height, width) are a frame's, up to a factor."""
    return abs(shape[1] * size[0] / (shape[0] * size[1]) - 1) <= 0.02


def target_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    if short_side is None or short_side == min(height, width):
        return height, width
    scale = short_side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def read_images(folder: str, files: Iterable[str]) -> Iterator[RawFrame]:
    """The frames in files below a folder, local or remote, without masks; raises BadVideo, naming the frame."""
    for file in files:
        name = storage.name(file)
        yield decode_frame(read_whole(storage.join(folder, file), f"frame {name}"), name)


def fitted(frames: Iterable[RawFrame], short_side: int | None) -> FrameIterator:
    """Frames, masks and flow resized: bicubic, the nearest pixel's centre, and bilinear in pixels of the new size.

    Raises:
        BadVideo: frames of differing sizes.
    """
    first: tuple[int, int] | None = None
    for index, frame in enumerate(frames):
        height, width = frame.pixels.shape[:2]
        first = first or (height, width)
        if first != (height, width):
            raise BadVideo(
                f"its frame size changes from {first[::-1]} to {(width, height)} (width, height) at frame {frame.name}"
            )
        target = target_size(height, width, short_side)
        pixels, masks, flow = frame.pixels, frame.masks, frame.flow
        if target != first:
            image = Image.fromarray(pixels).resize((target[1], target[0]), Image.Resampling.BICUBIC)
            pixels = np.asarray(image)
            masks = None if masks is None else {i: nearest_resize(m, target) for i, m in masks.items()}
            flow = None if flow is None else {way: _resized_flow(own, target) for way, own in flow.items()}
        seconds = float(index) if frame.seconds is None else frame.seconds
        yield Frame(pixels, seconds, masks, frame.orientation, flow=flow)


def _resized_flow(flow_HW2: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    channels = [
        np.asarray(Image.fromarray(channel).resize(size[::-1], Image.Resampling.BILINEAR)) * (new / old)
        for channel, new, old in zip(np.moveaxis(flow_HW2, 2, 0), size, flow_HW2.shape, strict=False)
    ]
    return np.stack(channels, 2)


def resample(frames: FrameIterator, fps: float | None, max_seconds: float | None) -> FrameIterator:
    """At each multiple of 1 / fps seconds the frame on display, up to `max_seconds`; None: all of them."""
    start: float | None = None
    shown: Frame | None = None
    emitted = 0
    for frame in frames:
        start = frame.seconds if start is None else start
        if max_seconds is not None and frame.seconds - start >= max_seconds:
            break
        if fps is None:
            yield frame
            continue
        while shown is not None and emitted / fps < frame.seconds - start - 1e-6:
            yield shown._replace(seconds=start + emitted / fps)
            emitted += 1
        shown = frame
    if shown is not None and start is not None and emitted / fps <= shown.seconds - start + 1e-6:  # type: ignore[operator]
        yield shown._replace(seconds=start + emitted / fps)  # type: ignore[operator]

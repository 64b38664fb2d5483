"""Decoding and resizing frames and masks, and picking frames by time: what all readers share."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.clips.sources.base import BadVideo, Frame, FrameIterator
from pipeline.clips.sources.files import PICTURE_FORMATS, read_whole
from pipeline.clips.views import nearest_resize

VOID = 255
# What Pillow raises for files that are damaged in one way or another.
DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class RawFrame(NamedTuple):
    """A frame as stored, `(H, W, 3)` uint8, with `(H, W)` bool masks, and what messages call it.

    Layouts without a clock give no time; then the frame's number stands for it.
    """

    name: str
    pixels: np.ndarray
    masks: dict[int, np.ndarray] | None = None
    seconds: float | None = None


def reason(error: Exception, path: object = "") -> str:
    """One line in the library's own words, without the error number and the path or file object."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].replace(f" {str(path)!r}", "").split(" <_io.")[0]


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Pixels (H, W, 3) of a picture, grey ones repeated; raises BadVideo, calling it `name`."""
    try:
        with Image.open(io.BytesIO(content), formats=tuple(PICTURE_FORMATS)) as image:
            return np.asarray(image.convert("RGB"))
    except DECODING_ERRORS as error:
        raise BadVideo(f"frame {name} can't be decoded ({reason(error)})") from error


def decode_labels(content: bytes, name: str) -> np.ndarray:
    """The labels (H, W) uint8 of a palette or grey picture; raises BadVideo, calling it `name`."""
    try:
        with Image.open(io.BytesIO(content), formats=tuple(PICTURE_FORMATS)) as image:
            if image.mode not in ("P", "L", "1"):
                raise BadVideo(f"mask {name} is a {image.mode} image, not one of labels")
            if image.format not in ("PNG", "BMP"):
                raise BadVideo(f"mask {name} is a {image.format}, which does not keep labels; save it as PNG")
            return np.asarray(image).astype(np.uint8)
    except DECODING_ERRORS as error:
        raise BadVideo(f"mask {name} can't be decoded ({reason(error)})") from error


def label_masks(labels: np.ndarray) -> dict[int, np.ndarray]:
    """A mask for every label but 0 (background) and 255 (void)."""
    return {int(i): labels == i for i in np.unique(labels) if i not in (0, VOID)}


def check_mask_size(mask: str, size: Sequence[int], frame: RawFrame) -> None:
    """Raises BadVideo, naming the mask, where its (height, width) is not its frame's."""
    height, width = frame.pixels.shape[:2]
    if tuple(size) != (height, width):
        raise BadVideo(f"mask {mask} is {size[1]}x{size[0]}, its frame {frame.name} {width}x{height} pixels")


def with_labels(frame: RawFrame, content: bytes, mask: str) -> RawFrame:
    """The frame with the masks of a label image of its size; raises BadVideo, calling that `mask`."""
    labels = decode_labels(content, mask)
    check_mask_size(mask, labels.shape, frame)
    return frame._replace(masks=label_masks(labels))


def target_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    if short_side is None or short_side == min(height, width):
        return height, width
    scale = short_side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def read_images(folder: str, files: Iterable[str]) -> Iterator[RawFrame]:
    """The frames in files below a folder, local or remote, without masks; raises BadVideo, naming the frame."""
    for file in files:
        name = storage.name(file)
        content = read_whole(storage.join(folder, file), f"frame {name}")
        yield RawFrame(name, decode_image(content, name))


def fitted(frames: Iterable[RawFrame], short_side: int | None) -> FrameIterator:
    """Frames and masks resized: bicubic, and the nearest pixel's centre.

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
        pixels, masks = frame.pixels, frame.masks
        if target != first:
            image = Image.fromarray(pixels).resize((target[1], target[0]), Image.Resampling.BICUBIC)
            pixels = np.asarray(image)
            masks = None if masks is None else {i: nearest_resize(m, target) for i, m in masks.items()}
        yield Frame(pixels, float(index) if frame.seconds is None else frame.seconds, masks)


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

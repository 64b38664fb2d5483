"""Pictures as viewers show them, and what in a picture's file decides that.

Earlier versions showed turned and deep pictures wrongly. `frame_mark` and `label_mark` find the files that are read in
another way since, from their headers, so that only these are other contents.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import IO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from pipeline.clips.sources.base import BadVideo
from pipeline.clips.sources.files import PICTURE_FORMATS

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
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_EXIF = {b"eXIf": b"", b"zTXt": b"Raw profile type exif\0", b"tEXt": b"Raw profile type exif\0"}
_PNG_EXIF |= {b"iTXt": b"XML:com.adobe.xmp\0"}


class Orientation(NamedTuple):
    """One of the eight ways to lay a picture on its side or mirror it: transposed first, then flipped."""

    transposed: bool = False
    left_right: bool = False
    upside_down: bool = False

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels or masks (H, W, …) as they are shown, contiguous."""
        shown = pixels.swapaxes(0, 1) if self.transposed else pixels
        return np.ascontiguousarray(shown[:: -1 if self.upside_down else 1, :: -1 if self.left_right else 1])


# By EXIF's numbers.
_ORIENTATIONS = {
    1: Orientation(),
    2: Orientation(left_right=True),
    3: Orientation(left_right=True, upside_down=True),
    4: Orientation(upside_down=True),
    5: Orientation(transposed=True),
    6: Orientation(transposed=True, left_right=True),
    7: Orientation(transposed=True, left_right=True, upside_down=True),
    8: Orientation(transposed=True, upside_down=True),
}


def open_picture(file: IO[bytes]) -> Image.Image:
    return Image.open(file, formats=tuple(PICTURE_FORMATS))


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels or masks (H, W, …) as they are shown under an EXIF orientation (1: as they are)."""
    return _ORIENTATIONS[orientation].of(pixels)


def is_exchanged(orientation: int) -> bool:
    """Whether height and width change places."""
    return _ORIENTATIONS[orientation].transposed


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8); 1 where there is none, or none that can be understood."""
    return _orientation(image.getexif)


def _orientation(read: Callable[[], Image.Exif]) -> int:
    try:
        value = read().get(ExifTags.Base.Orientation, 1)
    except (*DECODING_ERRORS, TypeError, KeyError):
        return 1
    return value if isinstance(value, int) and value in _ORIENTATIONS else 1


def rgb_of(image: Image.Image) -> np.ndarray:
    """The stored pixels (H, W, 3) uint8: grey repeated, 16 bits a channel by their upper 8, alpha left out."""
    if not _is_deep_grey(image):
        return np.asarray(image.convert("RGB"))
    grey = (np.asarray(image) >> 8).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _is_deep_grey(image: Image.Image) -> bool:
    """Grey of 16 bits, which `convert` would cut off at 255; Pillow takes the upper 8 bits of deep colours itself."""
    return image.mode.startswith("I")


def labels_of(image: Image.Image, depth: int, name: str) -> np.ndarray:
    """The labels (H, W) uint8 of a palette or grey picture with `depth` bits a channel.

    Raises:
        BadVideo: it holds none, or may have changed them; the message calls it `name`.
    """
    if image.format not in ("PNG", "BMP"):
        raise BadVideo(f"mask {name} is a {image.format}, which does not keep labels; save it as PNG")
    values = np.asarray(image)
    if image.mode in ("P", "1"):
        return values.astype(np.uint8)
    if image.mode == "L":
        # Pillow stretches 2 and 4 bits to 8.
        return values // np.uint8(255 // (2**depth - 1)) if depth < 8 else values.astype(np.uint8)
    if _is_deep_grey(image):
        if values.max() > VOID:
            raise BadVideo(
                f"mask {name} has 16-bit labels up to {values.max()}, the most that is read is {VOID} (void); "
                "number the objects from 1 and save it as an 8-bit PNG"
            )
        return values.astype(np.uint8)
    raise BadVideo(
        f"mask {name} is a {image.mode} image, not one of labels; save it with its palette (mode P), or as grey labels"
    )


def png_depth(file: IO[bytes]) -> int:
    """Bits a channel; 8 for what is no PNG. Leaves the file where it was."""
    before = file.tell()
    file.seek(0)
    header = file.read(len(_PNG) + 17)  # length and name of the first chunk, width, height, depth
    file.seek(before)
    return header[-1] if header.startswith(_PNG) else 8


def frame_mark(file: IO[bytes]) -> str:
    """What of a frame's file is read otherwise than in earlier versions: "" for most. Nothing is decoded."""
    try:
        image = open_picture(file)
        if image.format != "PNG":
            orientation = orientation_of(image)
        else:
            orientation = orientation_of(image) if _has_exif(file) else 1
    except DECODING_ERRORS:
        return ""  # reading it will say why
    marks = [f"turned {orientation}"] if orientation != 1 else []
    return " ".join([*marks, "16 bits"] if _is_deep_grey(image) else marks)


def _has_exif(png: IO[bytes]) -> bool:
    """Whether a PNG may hold an orientation; behind the pixels, Pillow finds it only by decoding them."""
    before, found, position = png.tell(), False, len(_PNG)
    while not found:
        png.seek(position)
        header = png.read(8)
        if len(header) < 8:
            break
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        found = kind in _PNG_EXIF and png.read(len(_PNG_EXIF[kind])) == _PNG_EXIF[kind]
        position += length + 12
    png.seek(before)
    return found


def label_mark(file: IO[bytes]) -> str:
    """As `frame_mark`, of a label image, which is decoded where it is of an unusual kind."""
    try:
        image = open_picture(file)
        depth = png_depth(file)
        usual = image.mode in ("P", "1") or (image.mode == "L" and depth == 8)
        if not usual:
            labels_of(image, depth, "")
    except (*DECODING_ERRORS, BadVideo):
        return ""
    return "" if usual else "labels"

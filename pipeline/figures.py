"""Pictures: frames with their masks, one stable colour a slot."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_GAP = 4
_LABEL_WIDTH = 84


def slot_colours(num_slots: int) -> np.ndarray:
    """`(N, 3)` uint8, far apart: neighbours in the list differ by the golden angle in hue."""
    colours = []
    for n in range(num_slots):
        value = 0.95 if n % 2 == 0 else 0.75
        colours.append(colorsys.hsv_to_rgb((0.08 + n * 0.618034) % 1.0, 0.75, value))
    return (np.array(colours) * 255).astype(np.uint8)


def overlay(frame: np.ndarray, labels: np.ndarray, num_slots: int, *, opacity: float = 0.55) -> np.ndarray:
    """A frame `(H, W, 3)` uint8 under its slots' colours, with a line around each slot."""
    colours = slot_colours(max(num_slots, int(labels.max()) + 1))[labels]
    mixed = frame * (1 - opacity) + colours * opacity
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    mixed[edge] = 255
    return mixed.astype(np.uint8)


def overlay_strip(
    frames: np.ndarray,
    rows: Sequence[tuple[str, np.ndarray]],
    num_slots: int,
    *,
    columns: int = 6,
    size: int = 128,
) -> Image.Image:
    """Frames over one row of overlays for each `(name, labels (T, H, W))`, at a few time steps."""
    count = min(columns, len(frames))
    steps = np.linspace(0, len(frames) - 1, count).round().astype(int)
    width = max(1, round(size * frames.shape[2] / frames.shape[1]))
    sheet = Image.new(
        "RGB",
        (_LABEL_WIDTH + count * (width + _GAP) - _GAP, (len(rows) + 1) * (size + _GAP) - _GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    pictures = [("frames", [frames[t] for t in steps])]
    pictures += [(name, [overlay(frames[t], labels[t], num_slots) for t in steps]) for name, labels in rows]
    for r, (name, images) in enumerate(pictures):
        draw.text((2, r * (size + _GAP) + size // 2 - 6), name, fill="black")
        for c, image in enumerate(images):
            picture = Image.fromarray(image).resize((width, size), Image.Resampling.LANCZOS)
            sheet.paste(picture, (_LABEL_WIDTH + c * (width + _GAP), r * (size + _GAP)))
    return sheet

"""Pictures: frames with their masks, one stable colour a slot; arrays in, images out."""

from __future__ import annotations

import colorsys
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1400  # of a picture in pixels: as wide as a page of the report shows
MAX_BYTES = 490_000
_GAP = 4  # between cells
_PANEL_GAP = 20
_TEXT_SIZE = 17
_FRAMES = "Frames"


def slot_colours(num_slots: int) -> np.ndarray:
    """`(N, 3)` uint8, far apart: neighbours in the list differ by the golden angle in hue."""
    colours = []
    for n in range(num_slots):
        value = 0.95 if n % 2 == 0 else 0.75
        colours.append(colorsys.hsv_to_rgb((0.08 + n * 0.618034) % 1.0, 0.75, value))
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def overlay(
    frame: np.ndarray, labels: np.ndarray, num_slots: int, *, opacity: float = 0.55, line: int = 1
) -> np.ndarray:
    """A frame `(H, W, 3)` uint8 under its slots' colours, with a line of `line` pixels around each slot.

    Where a label is negative the frame is darker.
    """
    colours = slot_colours(max(num_slots, int(labels.max()) + 1, 1))[labels]
    mixed = frame * (1 - opacity) + np.where(labels[..., None] < 0, 0, colours) * opacity
    edge = np.zeros(labels.shape, bool)
    for step in range(1, line + 1):
        edge[:, step:] |= labels[:, step:] != labels[:, :-step]
        edge[step:] |= labels[step:] != labels[:-step]
    mixed[edge] = 255
    return mixed.astype(np.uint8)


# --- which slot has which colour ------------------------------------------------------------------


def match_labels(labels: np.ndarray, reference: np.ndarray, first_free: int | None = None) -> np.ndarray:
    """The same labels `(T, H, W)` under the reference's numbers, so that what is alike has one colour.

    The numbers are given one to one for the whole video, so that as many pixels as possible agree with the
    reference. A label that shares no pixel with its partner, or has none, gets a number of its own, from
    `first_free` on (by default the first that the reference does not use). Negative labels stay.
    """
    from scipy.optimize import linear_sum_assignment

    labels, reference = labels.astype(np.int32), reference.astype(np.int32)
    used = np.unique(labels[labels >= 0])
    count, size = int(labels.max()) + 1, int(reference.max()) + 1
    both = (labels >= 0) & (reference >= 0)
    pairs = labels[both].astype(np.int64) * size + reference[both]
    shared = np.bincount(pairs, minlength=count * size).reshape(count, size)
    numbers = np.full(count + 1, -1, np.int32)  # the last stands for all negative labels
    for label, partner in zip(*linear_sum_assignment(shared, maximize=True), strict=True):
        if shared[label, partner]:
            numbers[label] = partner
    alone = [label for label in used if numbers[label] < 0]
    numbers[alone] = (size if first_free is None else first_free) + np.arange(len(alone))
    return numbers[np.where(labels < 0, count, labels)]


def match_rows(rows: Mapping[str, np.ndarray], reference: str) -> dict[str, np.ndarray]:
    """`match_labels` of each row to the row `reference`; what has no partner shares no number with others."""
    free = int(rows[reference].max()) + 1
    matched = {}
    for name, labels in rows.items():
        matched[name] = labels if name == reference else match_labels(labels, rows[reference], free)
        free = max(free, int(matched[name].max()) + 1)
    return matched


# --- comparisons ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One video of a comparison: frames `(T, H, W, 3)` uint8 and, for each row, labels `(T, H, W)`.

    Negative labels have no colour: the background of a ground truth.
    """

    frames: np.ndarray
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    title: str = ""  # may have several lines


def comparison(
    panels: Sequence[Panel],
    *,
    reference: str | None = None,
    columns: int = 4,
    across: int = 2,
    width: int = WIDTH,
) -> Image.Image:
    """Videos side by side in the layout of the paper's Figures 3 and 4: frames over a row for each model.

    Args:
        reference: the row whose colours the others take, see `match_rows`; None: label n has colour n.
        columns: time steps, spread evenly over a video.
        across: panels side by side; more stand below.
    """
    columns = min(columns, max(len(panel.frames) for panel in panels))
    bands = [panels[start : start + across] for start in range(0, len(panels), across)]
    names = list(dict.fromkeys([_FRAMES, *(name for panel in panels for name in panel.rows)]))
    labels = {name: _wrap(name) for name in names}
    left = round(
        max(_font(_TEXT_SIZE).getlength(line) for text in labels.values() for line in text.split("\n"))
    )
    left += 3 * _GAP
    across = min(across, len(panels))
    cells = across * columns
    cell = (width - left - (across - 1) * _PANEL_GAP - (cells - across) * _GAP) // cells
    drawn = [_draw_band(band, labels, reference, columns, cell, left, width) for band in bands]
    height = sum(image.height for image in drawn) + _PANEL_GAP * (len(drawn) - 1)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for image in drawn:
        sheet.paste(image, (0, top))
        top += image.height + _PANEL_GAP
    return sheet


def _draw_band(
    panels: Sequence[Panel],
    labels: Mapping[str, str],
    reference: str | None,
    columns: int,
    cell: int,
    left: int,
    width: int,
) -> Image.Image:
    """Panels side by side, with one column of row labels."""
    line = round(1.35 * _TEXT_SIZE)
    titles = max(len(panel.title.split("\n")) if panel.title else 0 for panel in panels)
    heights = [round(cell * panel.frames.shape[1] / panel.frames.shape[2]) for panel in panels]
    row_height = max(heights)
    top = (titles + 1) * line
    names = [name for name in labels if name == _FRAMES or any(name in panel.rows for panel in panels)]
    sheet = Image.new("RGB", (width, top + len(names) * (row_height + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, name in enumerate(names):
        middle = top + r * (row_height + _GAP) + row_height / 2
        draw.multiline_text(
            (left - 2 * _GAP, middle), labels[name], "black", _font(_TEXT_SIZE), anchor="rm", align="right"
        )
    panel_width = columns * (cell + _GAP) - _GAP
    for p, (panel, height) in enumerate(zip(panels, heights, strict=True)):
        x = left + p * (panel_width + _PANEL_GAP)
        for i, text in enumerate(panel.title.split("\n")):
            fitted = _fit(text, panel_width, bold=i == 0)
            draw.text((x, (i + 0.5) * line), fitted, "black", _font(_TEXT_SIZE, i == 0), anchor="lm")
        rows = panel.rows if reference is None else match_rows(panel.rows, reference)
        for c, t in enumerate(time_steps(len(panel.frames), columns)):
            place = x + c * (cell + _GAP)
            draw.text((place + cell / 2, top - line / 2), f"t = {t}", "black", _font(_TEXT_SIZE), anchor="mm")
            for r, name in enumerate(names):
                if name == _FRAMES or name in rows:
                    image = _draw_cell(
                        panel.frames[t], rows[name][t] if name in rows else None, (cell, height)
                    )
                    sheet.paste(image, (place, top + r * (row_height + _GAP)))
    return sheet


def time_steps(frames: int, count: int) -> list[int]:
    """Up to `count` different frames of a video, the first and the last among them."""
    return [int(t) for t in np.unique(np.linspace(0, frames - 1, min(count, frames)).round())]


def _draw_cell(frame: np.ndarray, labels: np.ndarray | None, size: tuple[int, int]) -> Image.Image:
    """A frame; or its grey tones under its labels, so that a slot's colour is the same on all that it covers.

    Lines have the same width whatever the frame's size.
    """
    if labels is None:
        return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
    double = (2 * size[0], 2 * size[1])
    grey = Image.fromarray(frame).convert("L").convert("RGB")
    pixels = np.asarray(grey.resize(double, Image.Resampling.LANCZOS))
    smooth = _resize_labels(labels, double)
    return Image.fromarray(overlay(pixels, smooth, int(smooth.max()) + 1, line=3)).reduce(2)


def _resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(h, w)` at another (width, height) with smooth outlines: the label with the largest share of a pixel."""
    used = np.unique(labels)
    shares = [
        np.asarray(Image.fromarray(np.float32(labels == label)).resize(size, Image.Resampling.BILINEAR))
        for label in used
    ]
    return used.astype(np.int32)[np.argmax(shares, axis=0)]


# --- text and files -------------------------------------------------------------------------------


@functools.cache
def _font(size: int, bold: bool = False) -> Any:
    """The font of the charts, which knows Greek and minus signs."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _wrap(text: str, longest: int = 14) -> str:
    """Lines of about `longest` characters, broken at spaces, and always before a bracket."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= longest and not word.startswith("("):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _fit(text: str, width: int, bold: bool) -> str:
    """The text, cut off with an ellipsis where it is wider than that."""
    font = _font(_TEXT_SIZE, bold)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def to_png(image: Image.Image, max_bytes: int = MAX_BYTES) -> bytes:
    """A PNG file; with 256 colours where it would be too large, and then with fewer pixels."""
    content = _encode(image)
    scale = 1.0
    while len(content) > max_bytes:
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        reduced = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
        content = _encode(reduced.quantize(256, Image.Quantize.FASTOCTREE))
        scale *= 0.95 * min(1, (max_bytes / len(content)) ** 0.5)
    return content


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()

"""Views: what a model sees of a clip, as explicit numbers.

View k of a clip follows from (data-set seed, clip, k) alone, so teacher and student see the same
pixels, whenever and wherever each of them runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from pipeline.config import Targets

BLACK = 1  # of 255: rows and columns of a lower mean are black


@dataclass(frozen=True)
class View:
    """A crop box in pixels of the stored frame, a horizontal flip, a seed for drawn initial slots."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    noise_seed: int

    def to_dict(self) -> dict[str, int | bool]:
        return asdict(self)


def stable_hash(*parts: object) -> int:
    """63 bits that follow from the parts alone: the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def central_square(height: int, width: int, noise_seed: int = 0) -> View:
    """The largest square in the middle, without a flip: view 0, and what models are evaluated on."""
    short = min(height, width)
    return View((height - short) // 2, (width - short) // 2, short, short, False, noise_seed)


def without_borders(whole: View, chunks: Iterable[np.ndarray]) -> View:
    """A video without black borders: the leading and trailing rows and columns that are black in all of its frames.

    One is black where its mean is below 1 of 255, as SOLV's authors have it (Aydemir et al. 2023). Of a video that is
    all black nothing is cut off. chunks: the video's frames `(T, H, W, 3)` uint8.
    """
    lit = [np.zeros(whole.height, bool), np.zeros(whole.width, bool)]
    for frames in chunks:
        for side, axes in zip(lit, ((2, 3), (1, 3)), strict=True):
            side |= (frames.mean(axes) >= BLACK).any(0)
    (top, bottom), (left, right) = (
        (side.argmax(), len(side) - side[::-1].argmax()) if side.any() else (0, len(side)) for side in lit
    )
    return replace(whole, top=int(top), left=int(left), height=int(bottom - top), width=int(right - left))


def make_view(
    recipe: Targets, seed: int, video_id: str, clip_index: int, k: int, height: int, width: int
) -> View:
    """View k of a clip whose frames are height x width pixels.

    View 0 is the central square without a flip. The others crop a square, at a random place where
    the recipe says so, and flip with its probability.
    """
    clip_seed = stable_hash(seed, video_id, clip_index, k)
    if k == 0:
        return central_square(height, width, clip_seed)
    rng = np.random.default_rng(clip_seed)
    scale, vertical, horizontal, flip = rng.random(4)
    short = min(height, width)
    if recipe.crop == "random":
        side = max(1, round(short * (recipe.min_scale + (1 - recipe.min_scale) * scale)))
        top, left = round(vertical * (height - side)), round(horizontal * (width - side))
    else:
        side, top, left = short, (height - short) // 2, (width - short) // 2
    return View(top, left, side, side, bool(flip < recipe.flip), clip_seed)


def apply_view(frames_THWC: np.ndarray, view: View) -> np.ndarray:
    """The view's pixels, `(T, h, w, 3)` uint8; resizing is left to each model."""
    cropped = frames_THWC[:, view.top : view.top + view.height, view.left : view.left + view.width]
    if not view.flip:
        return np.ascontiguousarray(cropped)
    # A pixel as one value of 3 bytes: half the time of reversing them byte by byte.
    return np.ascontiguousarray(cropped.view("V3")[:, :, ::-1]).view(np.uint8)


def labels_in_view(labels_THW: np.ndarray, view: View) -> np.ndarray:
    """Labels where `apply_view` shows the pixels that they are of, `(T, h, w)`."""
    cropped = labels_THW[:, view.top : view.top + view.height, view.left : view.left + view.width]
    return np.ascontiguousarray(cropped[:, :, ::-1] if view.flip else cropped)


def flow_in_view(flow_THW2: np.ndarray, view: View) -> np.ndarray:
    """Flow `(T, H, W, 2)`, down and to the right, where and as `apply_view` shows it, `(T, h, w, 2)`."""
    shown = labels_in_view(flow_THW2, view)
    return shown * np.array([1, -1], shown.dtype) if view.flip else shown


def boxes_in_view(masks: dict[int, np.ndarray], view: View) -> np.ndarray:
    """Boxes `(K, 4)` float32 of the objects that a view shows, by their numbers: (y0, x0, y1, x1), all of it 0 to 1."""
    boxes = []
    for number in sorted(masks):
        seen = labels_in_view(masks[number][None], view)[0]
        rows, columns = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
        if len(rows):
            boxes.append([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
    sides = [view.height, view.width] * 2
    return (np.array(boxes, np.float32).reshape(-1, 4) / sides).astype(np.float32)


def nearest_resize(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks or labels `(…, h, w)` at another size: each pixel is the one under its centre ("nearest-exact")."""
    height, width = labels.shape[-2:]
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(int)
    return labels if size == (height, width) else labels[..., rows[:, None], columns]

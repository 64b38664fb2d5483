"""Generated videos with exact instance masks, for the demo and the tests.

Rotating, translating shapes cross one another over a panned background. Every surface of a video
is painted from the same three colours, so that colour does not tell objects apart; the texture's
pattern and the motion do.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

_SUPERSAMPLE = 2  # pictures are drawn at twice their size and averaged down
_PALETTES = (
    ("#264653", "#2a9d8f", "#e9c46a"),
    ("#1d3557", "#e63946", "#f1faee"),
    ("#3d405b", "#e07a5f", "#f4f1de"),
    ("#0b3954", "#ff6663", "#bfd7ea"),
    ("#2b2d42", "#ef8354", "#d9dcec"),
    ("#10451d", "#6ab547", "#f2e8cf"),
    ("#5f0f40", "#fb8b24", "#ffe5b4"),
    ("#22223b", "#9a6fb0", "#f2e9e4"),
    ("#003049", "#d62828", "#fcbf49"),
    ("#073b4c", "#118ab2", "#ffd166"),
)
_MASK_PALETTE = (
    (24, 24, 32), (255, 107, 107), (78, 205, 196), (255, 217, 61), (108, 142, 255), (199, 125, 255),
    (107, 203, 119), (255, 159, 67), (84, 160, 255), (243, 104, 224),
)  # fmt: skip

Coordinates = np.ndarray
Pattern = Callable[[Coordinates, Coordinates, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class SyntheticSettings:
    """What to generate. A video follows from the seed, its index and the settings of one video.

    Raises ValueError for a count below one, an odd or tiny size, or bounds in the wrong order.
    """

    videos: int
    frames: int = 24
    size: int = 96
    min_objects: int = 3
    max_objects: int = 5
    fps: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("videos", "frames", "min_objects", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size must be even and at least 16, got {self.size}")
        if not self.min_objects <= self.max_objects <= 254:
            raise ValueError(
                f"max_objects must be between min_objects ({self.min_objects}) and 254, "
                f"got {self.max_objects}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def render_video(settings: SyntheticSettings, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one video; the same seed and index always give the same pixels.

    Returns frames (T, H, W, 3) uint8 and instance labels (T, H, W) uint8: 0 is the background,
    1 the farthest object, n the nearest. Raises ValueError for a negative index.
    """
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    rng = np.random.default_rng([settings.seed, index])
    canvas = settings.size * _SUPERSAMPLE
    count = int(rng.integers(settings.min_objects, settings.max_objects + 1))
    colours = _colours(rng)
    # Neighbouring patterns of one video differ; only more objects than patterns repeat one.
    order = np.resize(rng.permutation(len(_PATTERNS)), count + 1)
    background = _background(settings, colours, _PATTERNS[order[0]], rng)
    pan = _pan(settings, rng)
    sprites = [_sprite(canvas, colours, _PATTERNS[kind], rng) for kind in order[1:]]
    paths = _paths(settings, count, rng)
    spins = rng.uniform(-6, 6, count)[:, None] * np.arange(settings.frames) + rng.uniform(0, 360, (count, 1))

    frames = np.empty((settings.frames, settings.size, settings.size, 3), np.uint8)
    labels = np.empty((settings.frames, settings.size, settings.size), np.uint8)
    for t in range(settings.frames):
        left, top = pan[t]
        picture = background.crop((left, top, left + canvas, top + canvas))
        label = Image.new("L", (canvas, canvas))
        for number, sprite in enumerate(sprites):
            turned, corner = _placed(sprite, paths[number, t], spins[number, t])
            alpha = turned.getchannel("A")
            picture.paste(turned, corner, alpha)
            label.paste(number + 1, corner, alpha.convert("1", dither=Image.Dither.NONE))
        frames[t] = np.asarray(picture.reduce(_SUPERSAMPLE))
        labels[t] = np.asarray(label)[1::_SUPERSAMPLE, 1::_SUPERSAMPLE]
    return frames, labels


def video_file(index: int) -> str:
    """The name of a generated video's file."""
    return f"video_{index:05d}.mp4"


def write_dataset(settings: SyntheticSettings, folder: str | Path, *, indices: range | None = None) -> None:
    """Write every video as ``video_00000.mp4`` and its masks under ``masks/video_00000/``, or those of `indices`.

    The videos are H.264, the masks one palette PNG a frame whose index is the label. A video
    appears only once it and its masks are complete; one that is there already is kept.
    Raises OSError where the folder cannot be written.
    """
    root = Path(folder)
    (root / "masks").mkdir(parents=True, exist_ok=True)
    for index in range(settings.videos) if indices is None else indices:
        video = root / video_file(index)
        masks = root / "masks" / video.stem
        if not (video.exists() and masks.exists()):
            frames, labels = render_video(settings, index)
            _write_masks(labels, masks)
            _write_mp4(frames, settings.fps, video)


def _write_masks(labels: np.ndarray, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    palette = [channel for colour in _MASK_PALETTE for channel in colour]
    for t, label in enumerate(labels):
        picture = Image.fromarray(label)
        picture.putpalette(palette)
        picture.save(temporary / f"{t:05d}.png")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that stopped before its video
    os.replace(temporary, folder)


# x264's lookahead gives other bytes in every run, even with one thread; without it the same frames make
# the same file, and so the same fingerprint.
_H264 = {"crf": "12", "preset": "veryfast", "x264-params": "sync-lookahead=0:rc-lookahead=0"}


def _write_mp4(frames: np.ndarray, fps: int, path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=_H264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode(None))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)


# --- colours and patterns -------------------------------------------------------------------------


def _colours(rng: np.random.Generator) -> np.ndarray:
    """Three colours (3, 3) in 0..255, a little off one of the palettes."""
    palette = _PALETTES[rng.integers(len(_PALETTES))]
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in palette])
    return np.clip(colours + rng.uniform(-12, 12, (3, 3)), 0, 255).astype(np.float32)


def _stripes(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    return np.sin(u)


def _checks(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    return 2 * np.sin(0.75 * u) * np.sin(0.75 * v)


def _dots(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    return np.cos(0.9 * u) + np.cos(0.9 * v) - 0.4


def _net(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    return 2 * np.maximum(np.cos(0.7 * u), np.cos(0.7 * v)) - 1.3


def _waves(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    return np.sin(u + 1.6 * np.sin(0.6 * v))


def _zigzag(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    return np.sin(u + 2 * np.abs((0.45 * v / np.pi) % 2 - 1) * np.pi)


def _bricks(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(0.9 * v / (2 * np.pi))
    gap = np.maximum(np.cos(0.9 * v), np.cos(0.45 * u + np.pi * row))
    return 2 * gap - 1.4


def _spots(u: Coordinates, v: Coordinates, rng: np.random.Generator) -> np.ndarray:
    """Animal spots: a random field of one wavelength."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 12))
    field = np.zeros_like(u)
    for a, p in zip(angle, phase, strict=True):
        field += np.cos(0.8 * (np.cos(a) * u + np.sin(a) * v) + p)
    return field * 0.6


_PATTERNS: tuple[Pattern, ...] = (
    _stripes, _checks, _dots, _net, _waves, _zigzag, _bricks, _spots,
)  # fmt: skip


def _texture(
    side: int, period: float, colours: np.ndarray, pattern: Pattern, rng: np.random.Generator
) -> np.ndarray:
    """A square picture (side, side, 3) of two of the colours."""
    y, x = (np.mgrid[:side, :side].astype(np.float32) - side / 2) * (2 * np.pi / period)
    angle = rng.uniform(0, 2 * np.pi)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    share = np.clip(0.5 + period / 8 * pattern(u, v, rng), 0, 1)[..., None]
    first, second = colours[rng.permutation(3)[:2]]
    return first + share * (second - first)


# --- shapes and motion ----------------------------------------------------------------------------


def _outline(angle: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The outline of a random shape as a radius of at most 1 for every angle."""
    kind = int(rng.integers(5))
    if kind == 0:  # ellipse
        flat = rng.uniform(0.6, 1)
        return flat / np.sqrt((flat * np.cos(angle)) ** 2 + np.sin(angle) ** 2)
    if kind == 1:  # regular polygon
        corners = int(rng.integers(3, 7))
        step = 2 * np.pi / corners
        return np.cos(step / 2) / np.cos(angle % step - step / 2)
    if kind == 2:  # flower
        return 0.84 + 0.16 * np.cos(int(rng.integers(4, 7)) * angle)
    if kind == 3:  # star
        return 1 - 0.45 * np.abs((angle * 5 / (2 * np.pi)) % 1 * 2 - 1)
    weights, phases = rng.uniform(0, 0.16, 3), rng.uniform(0, 2 * np.pi, 3)  # pebble
    waves = np.cos(np.multiply.outer(np.arange(2, 5), angle) + phases[:, None, None])
    radius = 1 + np.tensordot(weights, waves, axes=1)
    return radius / radius.max()


def _sprite(canvas: int, colours: np.ndarray, pattern: Pattern, rng: np.random.Generator) -> Image.Image:
    """A textured shape with a darker rim on transparent ground, as RGBA."""
    radius = canvas * rng.uniform(0.16, 0.25)
    side = 2 * int(np.ceil(radius)) + 4
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    inside = radius * _outline(np.arctan2(y, x) % (2 * np.pi), rng) - np.hypot(x, y)
    texture = _texture(side, canvas * rng.uniform(0.07, 0.11), colours, pattern, rng)
    texture *= (0.55 + 0.45 * np.clip((inside - 1) / 2, 0, 1))[..., None]
    alpha = 255 * np.clip(inside + 0.5, 0, 1)
    return Image.fromarray(np.dstack([texture, alpha]).round().astype(np.uint8))


def _placed(sprite: Image.Image, centre: np.ndarray, degrees: float) -> tuple[Image.Image, tuple[int, int]]:
    """The sprite turned about its middle, and where its corner goes on the canvas."""
    side = sprite.width
    corner = np.floor(centre - side / 2)
    rest = centre - side / 2 - corner
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    middle = side / 2 + rest
    shift_x = side / 2 - cos * middle[0] - sin * middle[1]
    shift_y = side / 2 + sin * middle[0] - cos * middle[1]
    turned = sprite.transform(
        sprite.size,
        Image.Transform.AFFINE,
        (cos, sin, shift_x, -sin, cos, shift_y),
        Image.Resampling.BILINEAR,
    )
    return turned, (int(corner[0]), int(corner[1]))


def _paths(settings: SyntheticSettings, count: int, rng: np.random.Generator) -> np.ndarray:
    """Where each object's middle is (count, T, 2) on the canvas; objects bounce off the edges."""
    canvas = settings.size * _SUPERSAMPLE
    starts = [rng.uniform(0, 1, 2)]
    for _ in range(count - 1):  # of a few candidates, the one farthest from the others
        candidates = rng.uniform(0, 1, (8, 2))
        distance = np.linalg.norm(candidates[:, None] - np.array(starts)[None], axis=-1)
        starts.append(candidates[distance.min(axis=1).argmax()])
    heading = rng.uniform(0, 2 * np.pi, count)
    speed = rng.uniform(0.012, 0.03, count)  # of the picture's side, a frame
    step = speed[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    line = np.array(starts)[:, None] + np.arange(settings.frames)[None, :, None] * step[:, None]
    bounced = 1 - np.abs(line % 2 - 1)
    return canvas * (0.12 + 0.76 * bounced)


def _background(
    settings: SyntheticSettings, colours: np.ndarray, pattern: Pattern, rng: np.random.Generator
) -> Image.Image:
    """The background at canvas scale, with room for the pan on every side."""
    canvas = settings.size * _SUPERSAMPLE
    period = canvas * rng.uniform(0.07, 0.11)
    texture = _texture(2 * canvas, period, colours, pattern, rng)
    return Image.fromarray(texture.round().astype(np.uint8))


def _pan(settings: SyntheticSettings, rng: np.random.Generator) -> np.ndarray:
    """The background's top-left corner (T, 2): a steady pan that turns back and never runs out."""
    canvas = settings.size * _SUPERSAMPLE
    heading, start = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1, 2)
    step = rng.uniform(0.006, 0.016) * np.array([np.cos(heading), np.sin(heading)])
    line = start + np.arange(settings.frames)[:, None] * step
    return np.rint(canvas * (1 - np.abs(line % 2 - 1))).astype(int)

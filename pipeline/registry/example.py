"""The input example that a registered model is stored with."""

from __future__ import annotations

import numpy as np

FRAMES, HEIGHT, WIDTH = 2, 16, 24  # MLflow stores it as text, twice: 60 kB in all


def input_example() -> np.ndarray:
    """Frames `(2, 16, 24, 3)` uint8: a bright square that moves to the right over a gradient; nobody's video."""
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 120, WIDTH, dtype=np.uint8)
    frames[..., 1] = np.linspace(0, 120, HEIGHT, dtype=np.uint8)[:, None]
    frames[..., 2] = 60
    for number, frame in enumerate(frames):
        frame[4:12, 6 + 4 * number : 14 + 4 * number] = 230
    return frames

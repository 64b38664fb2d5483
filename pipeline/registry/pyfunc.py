"""The MLflow model, as code: this file is stored beside the exported model and needs MLflow, numpy and onnxruntime.

It imports nothing of the package that it comes from, so that a registered model loads where that is not installed, or
where another module has its name. `pipeline/models/pixels.py` does in PyTorch what is done in numpy here.
"""

from __future__ import annotations

import json
import math
from typing import Any

import mlflow
import numpy as np
import onnxruntime
from mlflow.pyfunc import PythonModel

ARTIFACT = "slot_model"
ONNX_FILE = "model.onnx"
ABOUT = "slotmatch"


class SlotMatchModel(PythonModel):
    """`predict(frames (T, H, W, 3) uint8)` -> slot index of every pixel, `(T, H, W)` uint8.

    The whole frame is resized to the model's square input; slots are carried from frame to frame.
    """

    def load_context(self, context: Any) -> None:
        path = f"{context.artifacts[ARTIFACT]}/{ONNX_FILE}"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.about = json.loads(self.session.get_modelmeta().custom_metadata_map[ABOUT])

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        about, (frames, height, width, _) = self.about, model_input.shape
        labels = np.empty((frames, height, width), np.uint8)
        rows, columns = bicubic(height, about["size"]), bicubic(width, about["size"])
        grid = about["grid"] if isinstance(about["grid"], list) else [about["grid"]] * 2
        back = bilinear(grid[0], height), bilinear(grid[1], width)
        state = np.zeros((1, about["num_slots"], about["slot_size"]), np.float32)
        if about["noise"]:
            state[:] = np.reshape(about["noise"], state.shape)
        for t, frame in enumerate(model_input):
            pixels = np.clip(resized(frame.astype(np.float32).transpose(2, 0, 1), rows, columns), 0, 255)
            inputs = {"frames": pixels.transpose(1, 2, 0)[None], "state": state, "first": np.array([t == 0])}
            masks, state = self.session.run(["masks", "next_state"], inputs)
            labels[t] = resized(masks[0], *back).argmax(0)
        return labels


def resized(planes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Planes `(C, h, w)` to `(C, H, W)` by the weights `(H, h)` and `(W, w)` of the pixels of each side."""
    return rows @ (planes @ columns.T)


def bicubic(size: int, out: int) -> np.ndarray:
    """Weights `(out, size)` of an anti-aliased bicubic resize with a = -0.5, as Pillow's and PyTorch's."""
    scale = size / out
    wide = max(scale, 1.0)  # where it shrinks, each pixel looks at as many more
    weights = np.zeros((out, size))
    for i in range(out):
        centre = scale * (i + 0.5)
        first = max(int(centre - 2 * wide + 0.5), 0)
        last = min(int(centre + 2 * wide + 0.5), size)
        x = np.abs((np.arange(first, last) - centre + 0.5) / wide)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        row = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[i, first:last] = row / row.sum()
    return weights.astype(np.float32)


def bilinear(size: int, out: int) -> np.ndarray:
    """Weights `(out, size)` of a bilinear resize without anti-aliasing, pixel centres at half."""
    weights = np.zeros((out, size), np.float32)
    for i in range(out):
        place = max((i + 0.5) * size / out - 0.5, 0.0)
        first = min(math.floor(place), size - 1)
        weights[i, first] += 1 - (place - first)
        weights[i, min(first + 1, size - 1)] += place - first
    return weights


mlflow.models.set_model(SlotMatchModel())

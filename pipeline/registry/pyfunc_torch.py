"""The MLflow model of a student that can't be exported, as code: it needs the package that is stored beside it."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel

ARTIFACT = "slot_model"
CHUNK_FRAMES = 8


class SlotMatchModel(PythonModel):
    """`predict(frames (T, H, W, 3) uint8)` -> slot index of every pixel, `(T, H, W)` uint8.

    The whole frame is resized to the model's square input; slots are carried from frame to frame.
    """

    def load_context(self, context: Any) -> None:
        from pipeline.models import load_slot_model

        self.model = load_slot_model(context.artifacts[ARTIFACT])

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        chunks = (model_input[i : i + CHUNK_FRAMES] for i in range(0, len(model_input), CHUNK_FRAMES))
        labels = [
            self.model.label_maps(masks, frames.shape[1:3]).cpu().numpy()
            for frames, _, masks in self.model.stream(chunks)
        ]
        return np.concatenate(labels)


mlflow.models.set_model(SlotMatchModel())

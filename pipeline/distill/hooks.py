"""What a training run is given by whoever starts it, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from pipeline.distill.precision import Precision
from pipeline.distill.run import OnValidation

PREEMPTION_CHECK_STEPS = 5  # each check asks all workers

Draw = Callable[
    [np.ndarray, np.ndarray], Image.Image
]  # of frames (T, H, W, 3) uint8 and slot numbers (T, H, W)


@dataclass(frozen=True)
class Hooks:
    """What else happens while a run trains.

    after_checkpoint: called by every worker with the step.
    on_validation: called by every worker with the step and the scores (`validation_video_mbo`, …) of each
        validation but the one at the end, first those before the checkpoint that the run goes on from.
    preempted: whether a worker's node is about to be taken away, the same on every worker; asked every
        `PREEMPTION_CHECK_STEPS` steps. The first yes makes a checkpoint at once.
    """

    after_checkpoint: Callable[[int], None] = lambda step: None
    on_validation: OnValidation = lambda step, scores: None
    preempted: Callable[[], bool] = lambda: False


class Logger(Protocol):
    """Where metrics and pictures go, as `tracking.RunLogger`."""

    def metrics(self, values: dict[str, float], step: int) -> None: ...

    def tag(self, key: str, value: str) -> None: ...

    def file(self, path: str | Path, folder: str | None = None) -> None: ...

    def flush(self, *, last: bool = False) -> None: ...


class NoLogger:
    """Metrics are in the history alone."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        pass

    def tag(self, key: str, value: str) -> None:
        pass

    def file(self, path: str | Path, folder: str | None = None) -> None:
        pass

    def flush(self, *, last: bool = False) -> None:
        pass


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "non-finite" where the gradient of step `step + 1` was.

    history: the metrics of each logged step. precision: what its products were computed in. workers: how many there
    were at the end.
    """

    status: Literal["ok", "non-finite"]
    step: int
    history: list[dict[str, float]]
    precision: Precision
    workers: int

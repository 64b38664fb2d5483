"""Exported models, run: a `.onnx` file by onnxruntime, a `.pt2` file by PyTorch, as one more kind of model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.models.layers import slot_noise
from pipeline.models.pixels import input_pixels, label_maps
from pipeline.models.slot_model import SlotModelConfig
from pipeline.models.streaming import INPUTS

ONNX_FILE = "model.onnx"
ABOUT = "slotmatch"  # the key of what a file says of its model: JSON in ONNX's metadata
PT2_ABOUT = "slotmatch.json"  # and the extra file of a `.pt2` archive
SUFFIXES = (".onnx", ".pt2")

Step = Callable[[np.ndarray, Tensor, bool], tuple[Tensor, Tensor, Tensor, Tensor]]


class ExportedModel:
    """The streaming step of an exported file, called frame by frame; on the CPU.

    step: of pixels as `pixels` gives a frame's, the state before it, and whether it is the first; to what
    `StreamingStep` gives.
    """

    def __init__(self, step: Step, about: dict[str, Any]) -> None:
        self.step = step
        self.about = about
        self.config = SlotModelConfig.from_dict(about["config"])
        grid = about["grid"]
        self._grid = (grid[0], grid[1]) if isinstance(grid, list) else (grid, grid)

    def stream(
        self,
        chunks: Iterable[np.ndarray],
        *,
        noise_seed: int = 0,
        rollout: str = "forward",
        masks: str = "decoder",
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """As `SlotModel.stream`. The cyclic roll-out holds the whole video's frames, and sees each of them twice."""
        state = slot_noise(self.config.num_slots, self.config.slot_size, noise_seed)[None]
        back = rollout == "cyclic" and self.config.predictor
        seen: list[tuple[np.ndarray, list[tuple[Tensor, ...]]]] = []
        first = True
        for frames in chunks:
            outputs = []
            for frame in self.pixels(frames):
                *output, state = self.step(frame, state, first)
                outputs.append(tuple(output))
                first = False
            if back:
                seen.append((frames, outputs))
            else:
                yield frames, *_joined(outputs, masks)
        if back:
            self._go_back(seen, state)
            yield from ((frames, *_joined(outputs, masks)) for frames, outputs in seen)

    def _go_back(self, seen: list[tuple[np.ndarray, list[tuple[Tensor, ...]]]], state: Tensor) -> None:
        """Rolls on from the last frame's prediction to frame 0, and puts what this gives in the forward one's place."""
        last = True
        for frames, outputs in reversed(seen):
            for index, frame in reversed(list(enumerate(self.pixels(frames)))):
                if not last:
                    *output, state = self.step(frame, state, False)
                    outputs[index] = tuple(output)
                last = False

    def pixels(self, frames: np.ndarray) -> np.ndarray:
        """Frames `(t, h, w, 3)` uint8 as the step takes them, `(t, 1, S, S, 3)`."""
        pixels = input_pixels(frames, self.config.backbone.input_size).mul_(255)
        return pixels.permute(0, 2, 3, 1).contiguous().unsqueeze(1).numpy()

    def label_maps(self, masks_TNP: Tensor, size: tuple[int, int]) -> Tensor:
        return label_maps(masks_TNP, self._grid, size)


def _joined(outputs: list[tuple[Tensor, ...]], masks: str) -> tuple[Tensor, Tensor]:
    """Slots `(t, N, d)` and masks `(t, N, P)` of a chunk's frames."""
    slots, decoded, attention = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
    return slots, (attention if masks == "attention" else decoded).flatten(2)


def is_exported(path: str | Path) -> bool:
    """Whether a model's path names an exported file."""
    return str(path).endswith(SUFFIXES)


def load_exported(path: str | Path) -> ExportedModel:
    """Opens a `.onnx` or `.pt2` file that `slotmatch export` wrote; it runs on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no exported model at {path}")
    step, about = _open_pt2(path) if path.suffix == ".pt2" else _open_onnx(path)
    if not about:
        raise ValueError(f"{path}: was not written by slotmatch export: it does not say what it is of")
    return ExportedModel(step, json.loads(about))


def _open_onnx(path: Path) -> tuple[Step, str | None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # what a Ray worker was given
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each way to fail, below Exception
        raise ValueError(f"{path}: can't be read as ONNX: {str(error).splitlines()[0]}") from error

    def step(frames: np.ndarray, state: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (frames, state.numpy(), np.full(len(frames), first))
        slots, masks, attention, after = session.run(None, dict(zip(INPUTS, inputs, strict=True)))
        return (*map(torch.from_numpy, (slots, masks, attention, after)),)  # type: ignore[return-value]

    return step, session.get_modelmeta().custom_metadata_map.get(ABOUT)


def _open_pt2(path: Path) -> tuple[Step, str | None]:
    about = {PT2_ABOUT: ""}
    try:
        module = torch.export.load(path, extra_files=about).module()
    except Exception as error:  # of the archive, of its JSON, or of PyTorch's schema
        raise ValueError(f"{path}: can't be read as an exported PyTorch program ({error})") from error

    @torch.no_grad()
    def step(frames: np.ndarray, state: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return module(torch.from_numpy(frames), state, torch.full((len(frames),), first))

    return step, about[PT2_ABOUT]

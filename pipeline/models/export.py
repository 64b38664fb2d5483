"""Writes the streaming step of a model as ONNX and as a PyTorch program, and holds it against the model."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.models.decoders import untiled
from pipeline.models.exported import ABOUT, PT2_ABOUT, ExportedModel, load_exported
from pipeline.models.layers import slot_noise
from pipeline.models.segmenter import Segmenter, VideoSegmenter
from pipeline.models.slot_model import FIRST_FRAME_ITERATIONS, NEXT_FRAME_ITERATIONS, SlotModel
from pipeline.models.streaming import INPUTS, OUTPUTS, StreamingStep

OPSET = 20  # of onnxruntime 1.17 and onnxruntime-web 1.17, and later
TOLERANCE = 1e-4  # of slots, masks and next state in the median frame, in fp32
LIMIT = 1e-2  # and in any
RESIZE = (
    "the whole frame to size x size, bicubic with a = -0.5, anti-aliased (support grows with the scale), pixel centres "
    "at half, clamped to the range, not rounded"
)


class ExportError(ValueError):
    """A model that can't be exported, or whose exported form computes something else."""


@dataclass(frozen=True)
class Difference:
    """The largest absolute differences to the model over all frames, and the share of patches of the same slot."""

    slots: float
    masks: float
    labels_agree: float


def exportable(model: Segmenter, name: str) -> SlotModel:
    """The model itself, where it has a streaming step.

    Raises:
        ExportError: another system, or an exported model.
    """
    if isinstance(model, SlotModel):
        return model
    if isinstance(model, VideoSegmenter):
        raise ExportError(f"{name} is a {type(model).__name__}, of which there is no exported form")
    raise ExportError(f"{name} is an exported model already: give the one that it was made of")


def describe(model: SlotModel, source: str) -> dict[str, Any]:
    """What a caller has to know to run an exported file; plain values.

    Args:
        source: where the model came from.
    """
    config = model.config
    learned = config.initializer == "learned"
    initial = "not looked at" if learned else "standard normal noise"
    noise = None if learned else slot_noise(config.num_slots, config.slot_size, 0)
    return {
        "format": 1,
        "torch": torch.__version__,
        "precision": "fp32",
        "source": source,
        "weights": hash_weights(model),
        "inputs": {
            "frames": "float32 (B, size, size, 3), RGB from 0 to 255; normalised inside",
            "state": f"float32 (B, num_slots, slot_size): of a first frame {initial}, else the last next_state",
            "first": "bool (B): whether the frame is its clip's first",
        },
        "outputs": {
            "slots": "float32 (B, num_slots, slot_size)",
            "masks": "float32 (B, num_slots, *grid), the decoder's, softmax over slots",
            "attention": "float32 (B, num_slots, *grid), slot attention's, softmax over slots",
            "next_state": "float32 (B, num_slots, slot_size)",
        },
        "labels": "masks resized to the frame (bilinear, pixel centres at half), argmax over slots",
        "size": model.image_size,
        "resize": RESIZE,
        "mean": list(config.mean),
        "std": list(config.std),
        "num_slots": config.num_slots,
        "slot_size": config.slot_size,
        # One side of a square, as it was before there were others; else rows and columns.
        "grid": model.grid[0] if model.grid[0] == model.grid[1] else list(model.grid),
        "iterations": {
            "first": FIRST_FRAME_ITERATIONS,
            "next": NEXT_FRAME_ITERATIONS if config.predictor else FIRST_FRAME_ITERATIONS,
        },
        # The noise of seed 0, which segment and the registered model draw: other languages can't draw the same.
        "noise": None if noise is None else [round(float(value), 7) for value in noise.flatten()],
        "config": config.to_dict(),
    }


def hash_weights(model: torch.nn.Module) -> str:
    """What tells one model from another of its architecture, or their exported forms; SHA-256 of all numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return found.hexdigest()


def trace(model: SlotModel) -> torch.export.ExportedProgram:
    """The streaming step as a program, of any number of clips.

    The size of a frame is fixed, as the decoder has a position embedding for each patch.

    Raises:
        ExportError: PyTorch can't trace it.
    """
    step = StreamingStep(model).eval().cpu()
    state = torch.zeros(2, model.config.num_slots, model.config.slot_size)
    example = (torch.zeros(2, *model.input_size, 3), state, torch.tensor([True, False]))
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    try:
        with torch.no_grad(), untiled(model), _quiet():
            program = torch.export.export(step, example, dynamic_shapes=({0: batch},) * 3)
    except Exception as error:  # PyTorch's own errors have no class in common
        raise ExportError(f"PyTorch can't export this model: {_first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which files would carry along
    return program


def write_pt2(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    torch.export.save(program, path, extra_files={PT2_ABOUT: json.dumps(about)})


def write_onnx(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """Writes one file with its weights and what it says of itself.

    Raises:
        ExportError: an operation that ONNX has not, or more than the 2 GB that one file can hold.
    """
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=INPUTS,
                output_names=OUTPUTS,
                external_data=False,
                verbose=False,
            )
        assert exported is not None
        proto = exported.model_proto
        for node in proto.graph.node:
            node.name = f"{_module(node)}/{node.name}"
            del node.metadata_props[:]  # PyTorch's classes and more, half of a small model's file
        entry = proto.metadata_props.add()
        entry.key, entry.value = ABOUT, json.dumps(about)
        path.write_bytes(proto.SerializeToString())
    except Exception as error:  # of PyTorch's exporter, of onnxscript or of protobuf
        raise ExportError(f"this model can't be written as ONNX: {_first_line(error)}") from error


def _module(node: Any) -> str:
    """The module that an ONNX node comes from, as `model.encoder.backbone.model.blocks.0.attn.proj`; may be empty."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    return next((scope for scope in reversed(ast.literal_eval(scopes)[:-1]) if scope), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the exporters don't say what they leave as it is; their errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def difference(model: SlotModel, exported: Segmenter, chunks: Sequence[np.ndarray]) -> Difference:
    """Streams chunks of frames `(t, h, w, 3)` uint8 through both; the model is on the CPU."""
    slots, masks, agree = 0.0, 0.0, []
    pairs = zip(model.stream(chunks), exported.stream(chunks), strict=True)
    for (_, own_slots, own_masks), (_, its_slots, its_masks) in pairs:
        # NaN compares with nothing, so it is made infinite.
        slots = max(slots, float((own_slots - its_slots).abs().nan_to_num(torch.inf).max()))
        masks = max(masks, float((own_masks - its_masks).abs().nan_to_num(torch.inf).max()))
        agree.append((own_masks.argmax(1) == its_masks.argmax(1)).float().mean(1))
    return Difference(slots, masks, float(torch.cat(agree).mean()))


@torch.no_grad()
def step_differences(
    model: SlotModel, exported: ExportedModel, chunks: Sequence[np.ndarray]
) -> dict[str, list[float]]:
    """The largest absolute difference of each frame's outputs, from the state that the model has before it.

    The model's own are those of its roll-out, which is not the step that was exported.
    """
    found: dict[str, list[float]] = {"slots": [], "masks": []}
    if model.processor.predictor is not None:
        found["next_state"] = []
    before = noise = slot_noise(model.config.num_slots, model.config.slot_size, seed=0)[None]
    state = model.initial_slots(1, [0])
    first = True
    for frame in (frame for frames in chunks for frame in frames):
        features = model.project(model.backbone_features(model.prepare([frame[None]])))
        (slots,), _, state = model.advance(features, state, first=first)
        own = {"slots": slots, "masks": model.decode(slots[None])[1][0], "next_state": state}
        its = dict(zip(OUTPUTS, exported.step(exported.pixels(frame[None])[0], before, first), strict=True))
        for name, differences in found.items():
            apart = own[name].flatten() - its[name].flatten()
            differences.append(float(apart.abs().nan_to_num(torch.inf).max()))  # NaN compares with nothing
        before, first = (state if "next_state" in found else noise), False
    return found


def check(model: SlotModel, path: Path, chunks: Sequence[np.ndarray]) -> Difference:
    """Holds a file in fp32 against the model, frame by frame; returns how far they are apart when streamed.

    Slots are handed from frame to frame, and a model makes much of little where two of them compete for an object, in
    some frames and of PyTorch's own rounding too. A file that computes something else differs in all of them.

    Raises:
        ExportError: the median frame differs by more than `TOLERANCE` or one by more than `LIMIT`, or the file can't be
            run.
    """
    try:
        exported = load_exported(path)
        frames = step_differences(model, exported, chunks)
        found = difference(model, exported, chunks)
    except Exception as error:  # onnxruntime has a class of its own for each way to fail, below Exception
        raise ExportError(f"the exported form ({path.suffix}) can't be run: {_first_line(error)}") from error
    for apart_of, limit, which in (
        (statistics.median, TOLERANCE, "the median frame"),
        (max, LIMIT, "a frame"),
    ):
        apart = {name: apart_of(values) for name, values in frames.items()}
        what = max(apart, key=apart.__getitem__)
        if apart[what] > limit:
            raise ExportError(
                f"the exported form ({path.suffix}) differs from the PyTorch model by {apart[what]:.2g} in {which}'s "
                f"{what}, more than {limit:g}: it was not kept"
            )
    return found

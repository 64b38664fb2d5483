"""How fast one form of a model runs and what memory it takes, in a process that does nothing else.

An ONNX file is run by onnxruntime with numpy alone, as where it is deployed: PyTorch would add to its memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

WARMUP = 3  # frames, the first one with its third iteration among them
SECONDS = 1.0  # that a form streams at least
ROOT = Path(__file__).parents[2]

# Frames (1, S, S, 3), state (1, N, d) and first (1) to the next state.
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Speed:
    """What was measured of a form."""

    one_thread: float  # seconds a frame
    all_threads: float
    peak: float  # MiB that the process held on one thread
    runtime: str  # "onnxruntime 1.23.2"


@dataclass(frozen=True)
class Form:
    """What to measure: a model folder, a public file, an `.onnx` or a `.pt2` file."""

    path: str  # local and absolute
    size: int  # S, of a frame's side
    num_slots: int
    slot_size: int
    hints: Mapping[str, Any] = field(default_factory=dict)  # as `load_slot_model` has them


def measure(form: Form, frames: int, threads: int) -> Speed:
    """Streams frames of noise through a form, on one thread and then on `threads`, in a fresh process.

    Seconds are the median of at least `frames` frames, and of as many as `SECONDS` hold.

    Raises:
        ValueError: it can't be run; the text is what the process said last.
    """
    job = json.dumps({"form": asdict(form), "frames": frames, "threads": threads})
    command = [sys.executable, "-m", "pipeline.report.streamed"]
    # Below the root of this package, so that the process has the same one.
    done = subprocess.run(command, input=job, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise ValueError(f"{form.path} can't be run: {last}")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(form: Form, frames: int, threads: int) -> Speed:
    on_threads, runtime = _opened(form)
    one = _seconds_a_frame(on_threads(1), form, frames)
    peak = _peak_mib()
    every = one if threads == 1 else _seconds_a_frame(on_threads(threads), form, frames)
    return Speed(one, every, peak, runtime)


def _seconds_a_frame(step: Step, form: Form, frames: int) -> float:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (4, 1, form.size, form.size, 3)).astype(np.float32)
    state = random.standard_normal((1, form.num_slots, form.slot_size), np.float32)
    seconds: list[float] = []
    for t in count():
        begin = perf_counter()
        state = step(pictures[t % len(pictures)], state, np.array([t == 0]))
        seconds.append(perf_counter() - begin)
        streamed = seconds[WARMUP:]
        if len(streamed) >= frames and sum(streamed) >= SECONDS:
            return statistics.median(streamed)
    raise AssertionError  # `count` has no end


def _opened(form: Form) -> tuple[Callable[[int], Step], str]:
    """What gives the step on so many threads, and the runtime."""
    return _opened_onnx(form) if form.path.endswith(".onnx") else _opened_pytorch(form)


def _opened_onnx(form: Form) -> tuple[Callable[[int], Step], str]:
    import onnxruntime

    def on_threads(threads: int) -> Step:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(form.path, options, providers=["CPUExecutionProvider"])
        names = [found.name for found in session.get_inputs()]

        def step(*inputs: np.ndarray) -> np.ndarray:
            return session.run(None, dict(zip(names, inputs, strict=True)))[-1]

        return step

    return on_threads, f"onnxruntime {onnxruntime.__version__}"


def _opened_pytorch(form: Form) -> tuple[Callable[[int], Step], str]:
    import torch

    module = torch.export.load(form.path).module() if form.path.endswith(".pt2") else _own_step(form)

    @torch.no_grad()
    def step(*inputs: np.ndarray) -> np.ndarray:
        return module(*map(torch.from_numpy, inputs))[-1].numpy()

    def on_threads(threads: int) -> Step:
        torch.set_num_threads(threads)
        return step

    return on_threads, f"PyTorch {torch.__version__}"


def _own_step(form: Form) -> Any:
    """The step of a model as it was saved."""
    from pipeline.models import CheckpointHints, SlotModel, load_slot_model
    from pipeline.models.streaming import StreamingStep

    hints = CheckpointHints.from_dict(dict(form.hints))
    model = load_slot_model(form.path, **hints.to_dict())
    assert isinstance(model, SlotModel)  # others are not deployed
    return StreamingStep(model).eval()


def _peak_mib() -> float:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux it begins with what the process that started this one held.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    job = json.load(sys.stdin)
    print(json.dumps(asdict(_measure_here(Form(**job["form"]), job["frames"], job["threads"]))))

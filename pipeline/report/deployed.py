"""The table "Deployed": what each form of teacher and students takes where it runs, and what it scores.

Files and scores are found (`exports`); time and memory are measured, each form's in a process of its own
(`streamed`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from pipeline import storage
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.table import DASH, Column, Row, Table, cells, listing, percent, plural
from pipeline.log import Progress, log
from pipeline.models import CheckpointHints, SlotModelConfig
from pipeline.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from pipeline.models.exported import ONNX_FILE
from pipeline.models.slim import CONFIG_KEY
from pipeline.registry.export import HALF_FILE, INT8_FILE, PT2_FILE
from pipeline.report.costs import architecture, busy_note, short_number
from pipeline.report.efficiency import count_parameters, device_name
from pipeline.report.scores import score_columns
from pipeline.report.streamed import SECONDS, WARMUP, Form, Speed, measure

OWN = "PyTorch"  # the model's own file
FORMS = {
    OWN: "PyTorch, safetensors",
    PT2_FILE: "PyTorch, .pt2",
    ONNX_FILE: "ONNX fp32",
    HALF_FILE: "ONNX fp16",
    INT8_FILE: "ONNX int8",
}


@dataclass(frozen=True)
class Deployed:
    """One model in its forms, by the keys of `FORMS`."""

    name: str
    config: SlotModelConfig
    uris: Mapping[str, str]  # its own is a model folder or a public file; what was not exported is not here
    hints: CheckpointHints = field(default_factory=CheckpointHints)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # fractions of 1
    bytes: Mapping[str, int] = field(default_factory=dict)  # of those that are there
    speeds: Mapping[str, Speed] = field(default_factory=dict)  # of those that were measured

    def sized(self) -> Deployed:
        """With the size of each file that is there."""
        found = {}
        for key, uri in self.uris.items():
            inside = storage.join(uri, WEIGHTS_FILE)
            file = inside if key == OWN and storage.exists(inside) else uri
            if storage.exists(file):
                found[key] = storage.size(file) + (_left_out(uri) if file == inside else 0)
            else:
                log(f"report: {self.name} as {FORMS[key]} is not there any more: {uri}")
        return replace(self, bytes=found)


def _left_out(uri: str) -> int:
    """Bytes of the weights that a slim model's file lacks, and without which it does not run."""
    frozen = storage.read_json(storage.join(uri, CONFIG_FILE)).get(CONFIG_KEY)
    return frozen["bytes"] if frozen else 0


def deployed_table(models: Sequence[Deployed], runs: int, part: str = "", notes: Sequence[str] = ()) -> Table:
    """Five rows a model, one a form; what is not there has dashes.

    Args:
        runs: frames that each form streams at least; 0 measures nothing.
    """
    threads = torch.get_num_threads()
    found = [model.sized() for model in models]
    measured = _time_note(runs) if runs else "Time and memory were not measured (--latency-runs 0)."
    found = _measured(found, runs, threads) if runs else found
    if runtimes := listing([speed.runtime for model in found for speed in model.speeds.values()]):
        measured += f" Run by {runtimes}."
    dashes = any(min(len(model.bytes), len(model.scores) or len(FORMS)) < len(FORMS) for model in found)
    rows = [_row(model, key) for model in found for key in FORMS]
    return Table(
        "Deployed",
        "File, time, memory and scores of each form",
        part,
        _columns(threads),
        tuple(rows),
        (_FRAME, measured, *([_MISSING] if dashes else []), *notes),
    )


def _measured(models: Sequence[Deployed], runs: int, threads: int) -> list[Deployed]:
    """The models with what each of their forms takes; one that can't be run has nothing, and is named."""
    total = sum(len(model.bytes) for model in models)
    log(f"report: measuring the time and memory of {plural(total, 'form')} (at least {runs} frames each)")
    done = []
    with Progress("report", total, "forms") as progress:
        for model in models:
            speeds = {}
            for key in model.bytes:
                try:
                    speeds[key] = _speed(model, key, runs, threads)
                except (ValueError, OSError) as error:
                    log(f"report: no speed of {model.name} as {FORMS[key]}: {error}")
                progress.advance()
            done.append(replace(model, speeds=speeds))
    return done


def _speed(model: Deployed, key: str, runs: int, threads: int) -> Speed:
    config = model.config
    with storage.local_copy(model.uris[key]) as path:
        hints = model.hints.to_dict()
        form = Form(path, config.backbone.image_size, config.num_slots, config.slot_size, hints)
        return measure(form, runs, threads)


def _columns(threads: int) -> tuple[Column, ...]:
    return (
        Column("model", numeric=False),
        Column("#params (M)"),
        Column("form", numeric=False),
        Column("file (MB)"),
        Column("one thread", "ms a frame"),
        Column(f"all {threads}", "ms a frame"),
        Column("peak memory (MiB)"),
        *score_columns(SCORES, paper=False),
    )


def _row(model: Deployed, key: str) -> Row:
    size, speed, scores = model.bytes.get(key), model.speeds.get(key), model.scores.get(key, {})
    form = FORMS[key]
    if key == OWN and model.uris[OWN].endswith((".ckpt", ".pt")):
        form = "PyTorch, public file"
    # Said once, in the model's first row.
    what = (
        f"{model.name} ({architecture(model.config)})",
        short_number(count_parameters(model.config) / 1e6),
    )
    name, parameters = what if key == OWN else ("", "")
    return Row(
        cells(
            name,
            parameters,
            form,
            DASH if size is None else short_number(size / 1e6),
            short_number(1000 * speed.one_thread) if speed else DASH,
            short_number(1000 * speed.all_threads) if speed else DASH,
            f"{speed.peak:.0f}" if speed else DASH,
            *(percent(scores.get(score, math.nan)) for score in SCORES),
        )
    )


_FRAME = (
    "A frame: one streaming step of one video, float32 pixels of the model's size to slots and masks. Decoding, "
    "resizing and label maps are not in it."
)
_MISSING = "A dash: not exported, or not scored with the rest; `slotmatch export MODEL OUT CONFIG` does both."


def _time_note(runs: int) -> str:
    """How time and memory are measured; called before."""
    return (
        f"Our time: {device_name('cpu')}, the median of at least {plural(runs, 'frame')} and {SECONDS:g} s of noise, "
        f"streamed after {WARMUP} to warm up. Peak memory: of a process that does nothing else, on one thread, with "
        f"its runtime.{busy_note()}"
    )

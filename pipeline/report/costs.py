"""Table 2: what teacher and student cost. Counted and measured, not recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline import storage
from pipeline.compute import best_device
from pipeline.config import Config
from pipeline.evaluate.table import DASH, Cell, Column, Row, Table, plural
from pipeline.log import log
from pipeline.models import SlotModel, SlotModelConfig
from pipeline.models.build import load_teacher, model_config, student_sizes
from pipeline.models.segmenter import SegmenterConfig
from pipeline.report.efficiency import (
    PAPER_FRAMES,
    PAPER_STUDENT,
    PAPER_TEACHER,
    Cost,
    count_cost,
    device_name,
    measure_latencies,
)

GPUS = ("A100", "3090", "2080")
Pair = tuple[Cost, Cost]  # teacher and student


def config_models(config: Config) -> tuple[SlotModelConfig, SlotModelConfig]:
    """The architectures of a config's teacher and student; weights don't matter.

    Raises:
        ValueError: the teacher's checkpoint can't be read or is of another system, or the student's sizes differ.
        FileNotFoundError: it is not there.
    """
    section = config.teacher
    teacher: SegmenterConfig
    if section.checkpoint:
        teacher = load_teacher(config, storage.absolute(section.checkpoint)).config
    else:
        teacher = model_config(section, **section.sizes)
    if not isinstance(teacher, SlotModelConfig) or section.system != "slotcontrast":
        raise ValueError(f"of {section.name} no products are counted")
    return teacher, model_config(config.student, **student_sizes(config, teacher))


def measure_costs(config: Config, runs: int) -> tuple[list[Pair], list[str]]:
    """The paper's pair and the config's own where it is another one; and notes on both.

    Each architecture is counted and measured once, by `runs` passes after one to warm up; 0 measures nothing.
    """
    pairs = [(PAPER_TEACHER, PAPER_STUDENT)]
    costs = {_key(model): count_cost(model) for model in pairs[0]}
    notes = []
    try:
        own = config_models(config)
        new = {_key(model): model for model in own if _key(model) not in costs}
        costs |= {key: count_cost(model) for key, model in new.items()}
        if new:
            pairs.append(own)
    except (ValueError, FileNotFoundError) as error:  # the report has more to show than this
        notes.append(f"The config's own models are missing here: {error}")
    if runs:
        device = best_device()
        notes.append(_time_note(device, runs))
        log(f"report: measuring the speed of {len(costs)} models ({runs} runs each, on {device.type})")
        models = [SlotModel(cost.config).eval().to(device) for cost in costs.values()]
        seconds = measure_latencies(models, frames_per_run(device), runs)
        costs = {key: replace(cost, seconds=s) for (key, cost), s in zip(costs.items(), seconds, strict=True)}
    else:
        notes.append("Our time was not measured (--latency-runs 0).")
    return [(costs[_key(teacher)], costs[_key(student)]) for teacher, student in pairs], notes


def frames_per_run(device: torch.device) -> int:
    """Of one latency run: a GPU needs more than one to be busy, a CPU would take long."""
    return 4 if device.type == "cuda" else 1


def cost_table(paper: dict[str, Any], pairs: Sequence[Pair], notes: Sequence[str]) -> Table:
    """Rows teacher, student and reduction for each pair, the paper's first."""
    printed = paper["table_2"]
    names = [("Teacher", "SlotMatch")] + [("Teacher of this config", "Student of this config")] * (
        len(pairs) - 1
    )
    rows = []
    for index, ((teacher, student), (first, second)) in enumerate(zip(pairs, names, strict=True)):
        print_it = index == 0
        rows += [
            _row(first, teacher, printed["teacher"] if print_it else None),
            _row(second, student, printed["student"] if print_it else None),
            _reduction(teacher, student, printed["reduction"] if print_it else None),
        ]
    return Table(
        "Table 2",
        "Parameters, multiply-accumulates and inference time",
        "",
        _COLUMNS,
        tuple(rows),
        (*_NOTES, *notes),
    )


_COLUMNS = (
    Column("model", numeric=False),
    Column("ours", "#params (M)"),
    Column("paper", "#params (M)"),
    Column("ours", "GMAC a frame, the paper's count"),
    Column("paper", "GMAC a frame, the paper's count"),
    Column("ours", "GMAC a frame, all products"),
    Column("ours", "GMAC a frame, as run here"),
    Column("ours", "ms a frame, this device"),
    *(Column("paper", f"ms, {gpu}") for gpu in GPUS),
)


def _row(name: str, found: Cost, printed: dict[str, float] | None) -> Row:
    model = found.config
    texts = [
        f"{name} ({architecture(model)})",
        short_number(found.parameters / 1e6),
        f"{printed['parameters']:.1f}" if printed else DASH,
        short_number(found.macs_paper / 1e9),
        f"{printed['gflops'] / PAPER_FRAMES:.1f}" if printed else DASH,
        short_number(found.macs_products / 1e9),
        short_number(found.macs_run / 1e9),
        DASH if found.seconds is None else short_number(1000 * found.seconds),
        *(f"{printed[gpu]:.1f}" if printed else DASH for gpu in GPUS),
    ]
    return Row(tuple(map(Cell, texts)))


def _reduction(teacher: Cost, student: Cost, printed: dict[str, float] | None) -> Row:
    def times(big: float | None, small: float | None) -> str:
        return f"{big / small:.2f}×" if big and small else DASH

    def paper(key: str) -> str:
        return f"{printed[key]:.2f}×" if printed else DASH

    texts = [
        "Reduction",
        times(teacher.parameters, student.parameters),
        paper("parameters"),
        times(teacher.macs_paper, student.macs_paper),
        paper("gflops"),
        times(teacher.macs_products, student.macs_products),
        times(teacher.macs_run, student.macs_run),
        times(teacher.seconds, student.seconds),
        *map(paper, GPUS),
    ]
    return Row(tuple(map(Cell, texts)), "summary")


_NOTES = (
    f"GMAC: 10⁹ multiply-accumulates, the mean over a video of {PAPER_FRAMES} frames: backbone, projection, slot "
    "attention (3 iterations on the first frame, 2 on later ones), predictor and decoder.",
    "The paper's count: linear layers, convolutions and elements of activations, without products of two "
    f"activations (attention). Its printed 8825.7 and 3266.5 GFLOPs are that of {PAPER_FRAMES} frames; here "
    "they are divided by it. All products: with attention. As run here: the same with the exact fast decoder.",
    "The paper does not say how many frames its milliseconds are for, so they compare with one another only.",
)


def _time_note(device: torch.device, runs: int) -> str:
    """How times are measured; called before, so that the load is that of others."""
    note = (
        f"Our time: {device_name(device)}, float32, random weights; the median of {plural(runs, 'run')} of "
        f"{plural(frames_per_run(device), 'frame')} at once, after one to warm up, the models in turn; from "
        "prepared pixels to slots and masks."
    )
    return note + busy_note()


def busy_note() -> str:
    """What to say of times that are measured after this; empty where nothing else runs."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return ""
    return (
        f" The machine was busy before that (load {load:.1f} on {plural(cores, 'core')}): take them as rough."
    )


def short_number(number: float) -> str:
    """Enough digits for large and for small models."""
    return f"{number:.1f}" if number >= 100 else f"{number:.2f}" if number >= 1 else f"{number:#.3g}"


def architecture(model: SlotModelConfig) -> str:
    """What tells models of a table apart."""
    known = {"vit_base_patch14_dinov2": "ViT-B/14", "vit_small_patch14_dinov2": "ViT-S/14"}
    name = known.get(model.backbone.name or "")
    backbone = name + model.backbone.cut if name else model.backbone.label
    return f"{backbone}, {model.backbone.image_size}², N = {model.num_slots}"


def _key(model: SlotModelConfig) -> str:
    """What decides the costs of a model."""
    values = model.to_dict()
    return repr({key: value for key, value in values.items() if key not in ("mean", "std", "feature_scale")})

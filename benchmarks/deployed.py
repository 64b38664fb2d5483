"""What teacher and student of the paper's sizes take where they run: `python -m benchmarks.deployed` prints the table
"Deployed" of the report for the MOVi-E and the YTVIS-2021 config, with random weights and so without scores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import load_config
from pipeline.evaluate.table import Table
from pipeline.models import SlotModel, SlotModelConfig, save_slot_model
from pipeline.models.build import seeded
from pipeline.models.export import describe, trace, write_onnx, write_pt2
from pipeline.models.exported import ONNX_FILE
from pipeline.models.precisions import write_half, write_int8
from pipeline.registry.export import HALF_FILE, INT8_FILE, PT2_FILE
from pipeline.report.costs import config_models
from pipeline.report.deployed import OWN, Deployed, deployed_table
from pipeline.report.render import Page, markdown

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = {"MOVi-E": "movi_e.yaml", "YTVIS-2021": "ytvis2021.yaml"}
NAMES = ("Teacher", "Student")


def paper_models() -> dict[str, tuple[SlotModelConfig, ...]]:
    """Teacher and student by data set."""
    return {name: config_models(load_config(CONFIGS / file)) for name, file in PAPER.items()}


def random_forms(name: str, config: SlotModelConfig, folder: Path) -> Deployed:
    """Writes a model of random weights, and all its exported forms, into a folder."""
    with seeded(0):
        model = SlotModel(config).eval().requires_grad_(False)
    save_slot_model(model, folder / "model")
    program, about = trace(model), describe(model, "random weights")
    uris = {file: str(folder / file) for file in (PT2_FILE, ONNX_FILE, HALF_FILE, INT8_FILE)}
    write_pt2(program, folder / PT2_FILE, about)
    write_onnx(program, folder / ONNX_FILE, about)
    write_half(folder / ONNX_FILE, folder / HALF_FILE)
    write_int8(folder / ONNX_FILE, folder / INT8_FILE)
    return Deployed(name, config, {OWN: str(folder / "model"), **uris})


def measured_table(configs: Sequence[SlotModelConfig], frames: int) -> Table:
    with tempfile.TemporaryDirectory() as scratch:
        models = [
            random_forms(name, config, Path(scratch) / name)
            for name, config in zip(NAMES, configs, strict=True)
        ]
        return deployed_table(models, frames, "random weights")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployed", description=__doc__)
    parser.add_argument("--frames", type=int, default=10, help="that each form streams at least")
    parser.add_argument("--data-set", choices=PAPER, help="of one alone")
    arguments = parser.parse_args()
    for title, configs in paper_models().items():
        if arguments.data_set in (None, title):
            table = measured_table(configs, arguments.frames)
            sys.stdout.write(markdown(Page(title, [], [table], [], [])))
            sys.stdout.flush()


if __name__ == "__main__":
    main()

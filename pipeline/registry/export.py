"""Stage `export`: a model as ONNX in three precisions and as a PyTorch program or with a web page, each with its size,
its differences to the model and, where there are masks to score against, its scores."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.clips.library import artifacts_of, open_clips
from pipeline.config import Config, with_overrides
from pipeline.evaluate.scoring import SCORES, score_table
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import Subject, named_model
from pipeline.evaluate.table import plain_text
from pipeline.log import log
from pipeline.models import CheckpointHints, SlotModel
from pipeline.models.export import (
    check,
    describe,
    difference,
    exportable,
    trace,
    write_onnx,
    write_pt2,
)
from pipeline.models.exported import ONNX_FILE, load_exported
from pipeline.models.precisions import write_half, write_int8
from pipeline.models.segmenter import Segmenter
from pipeline.registry.pack import frames_of
from pipeline.registry.web import write_page
from pipeline.segment.stage import video_reference
from pipeline.tracking.moved import check_not_moved

HALF_FILE, INT8_FILE, PT2_FILE = "model_fp16.onnx", "model_int8.onnx", "model.pt2"
ABOUT_FILE = "export.json"


def export(
    config: Config,
    model: Segmenter,
    name: str,
    folder: str,
    *,
    video: str | None = None,
    hints: CheckpointHints | None = None,
    runtime: str | None = None,
) -> dict[str, Any]:
    """Writes `model.onnx`, `model_fp16.onnx`, `model_int8.onnx`, `model.pt2` and `export.json` into a folder.

    For the web it is a page, with what that needs, instead of `model.pt2`.

    Args:
        config: its evaluation split, if it names one, is what all forms are scored on.
        name: what the user calls the model.
        folder: local or remote; files of an earlier export there are replaced, once all are made.
        video: what the forms are compared on, a generated video by default.
        hints: what a public file does not tell, which `model` was loaded with; None: the config's.
        runtime: the folder of onnxruntime-web, for the web; None: no page.

    Raises:
        ExportError: a model that can't be exported, or is an exported one; or a form in fp32 that computes something
            else: then nothing is written.
        FileNotFoundError, BadVideo: the video is not there, or can't be decoded.
        ValueError: the runtime is not there.
    """
    model = exportable(model, name)
    target = storage.absolute(folder)
    with tempfile.TemporaryDirectory() as scratch:
        chunks = list(frames_of(video_reference(video) if video else None))
        if runtime is not None:
            write_page(runtime, Path(scratch))
        forms = _write(model, Path(scratch), name, chunks, pt2=runtime is None)
        storage.upload_tree(scratch, target)
    about = describe(model, name)
    # Again after the scores: to have made the files is worth something where scoring fails.
    storage.write_json(storage.join(target, ABOUT_FILE), {**about, "forms": forms})
    if config.evaluate.split is not None:
        _score(config, name, hints, target, forms)
        storage.write_json(storage.join(target, ABOUT_FILE), {**about, "forms": forms})
    return {"uri": target, "model": name, "frames_compared": sum(map(len, chunks)), "forms": forms}


def _write(
    model: SlotModel, scratch: Path, name: str, chunks: list[np.ndarray], *, pt2: bool
) -> dict[str, dict[str, Any]]:
    """Writes all forms into a local folder; returns by file what is known of each."""
    about, program = describe(model, name), trace(model)
    source = scratch / ONNX_FILE
    write_onnx(program, source, about)
    if pt2:
        write_pt2(program, scratch / PT2_FILE, about)
    exact = (ONNX_FILE, PT2_FILE) if pt2 else (ONNX_FILE,)
    found = {file: ("fp32", check(model, scratch / file, chunks)) for file in exact}
    for file, precision, write in ((HALF_FILE, "fp16", write_half), (INT8_FILE, "int8", write_int8)):
        write(source, scratch / file)
        found[file] = (precision, difference(model, load_exported(scratch / file), chunks))
    forms = {}
    for file, (precision, how_far) in found.items():
        size = (scratch / file).stat().st_size
        forms[file] = {"precision": precision, "bytes": size, "difference": asdict(how_far)}
        log(
            f"export: {file}, {precision}, {size / 1e6:.1f} MB, differs by {how_far.slots:.1g} in slots and "
            f"{how_far.masks:.1g} in masks; the same slot in {100 * how_far.labels_agree:.1f} % of patches"
        )
    return forms


def _score(
    config: Config, name: str, hints: CheckpointHints | None, target: str, forms: dict[str, dict[str, Any]]
) -> None:
    """Adds each form's scores on the config's evaluation split, and prints them below the model's own."""
    check_not_moved(config)
    artifacts = artifacts_of(config)
    clips = open_clips(artifacts.evaluation_clips)
    own = next(iter(named_model(with_overrides(config, {"evaluate.model": name})).values()))
    own = own if hints is None else replace(own, hints=hints)
    subjects = {"PyTorch": own} | {file: Subject(model_uri=storage.join(target, file)) for file in forms}
    results = score_subjects(artifacts, clips, subjects)
    for file, form in forms.items():
        form["scores"] = {score: results[file].scores[score] for score in SCORES}
    rows = [(file, result.scores) for file, result in results.items()]
    print(plain_text(score_table(rows, results["PyTorch"].protocol.warnings)))

"""Stage `rivals`: the systems that the paper compares with, trained on a config's videos, beside the config's models.

They are trained on clips of their own lengths, and scored on the config's, under its protocol.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from pipeline import storage, tracking
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.manifests import MODEL_FOLDER, RunManifest
from pipeline.artifacts.once import is_whole
from pipeline.clips.library import ClipLibrary, artifacts_of, check_disjoint, open_clips
from pipeline.clips.stage import shard_split
from pipeline.clips.table import ClipSet
from pipeline.compute import one_ray
from pipeline.config import Config
from pipeline.config.protocols import choose_protocol
from pipeline.distill.stage import run_files, train_teacher
from pipeline.distill.students import students_of
from pipeline.evaluate.records import METHODS, Evaluation
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import Subject, run_subject, teacher_subject, trivial_subjects
from pipeline.evaluate.table import DASH, Cell, Column, Row, Table, cells, mean_and_std, percent, plain_text
from pipeline.log import log
from pipeline.models.build import load_model
from pipeline.report.costs import short_number
from pipeline.report.document import update_document
from pipeline.report.efficiency import count_stream
from pipeline.report.render import Page, Picture, markdown
from pipeline.report.scores import SAMPLE_STD, score_columns
from pipeline.report.select import NothingToShow
from pipeline.sweep.gallery import Shown, median_picture
from pipeline.sweep.settings import Rival, plan_rivals
from pipeline.tracking.client import optional

PAGE, PICTURE = "rivals.md", "rivals-frames.png"
COUNTED_FRAMES = 10  # of one video, to count what a frame costs
_COLUMNS = ("seeds", "steps", "s a step", "parameters (M)", "GMAC a frame")
_COSTS_NOTE = (
    "Seconds a step: means over the trainings, on the machines that they ran on; steps differ in clips and frames. "
    "Parameters: all. GMAC: 10⁹ multiply-accumulates (all products) of what gives a video's slots and masks: neither "
    "STEVE's dVAE and token decoder nor DIOD's decoder."
)


def rivals(config: Config) -> dict[str, Any]:
    """Trains what is wanted of `config.rivals`, scores all that is there, and writes the table.

    What was made before is reused, an unfinished training goes on. Returns the job's summary.

    Raises:
        ConfigError: see `plan_rivals`; or there is no model to score yet.
        As `train_teacher`.
    """
    plan, library = plan_rivals(config), ClipLibrary()
    assert config.evaluate.split is not None
    with one_ray():
        artifacts = artifacts_of(config, library=library)
        check_disjoint(artifacts)
        for rival in plan:
            if rival.wanted:
                _train(rival, library)
        shard_split(config, config.evaluate.split, library)
        entries = [*_own(artifacts), *_trained(plan, library)]
        clips = open_clips(artifacts.evaluation_clips)
        found = _score(artifacts, clips, entries)
    table, pictures = rival_table(config, clips, entries, found), _pictures(config, clips, entries, found)
    folder = storage.join(storage.absolute(config.storage.root), "rivals")
    page = markdown(Page("Rivals", [_intro(config, entries, found)], [table], pictures, []))
    for picture in pictures:
        storage.write_bytes(storage.join(folder, picture.link), picture.content)
    storage.write_bytes(uri := storage.join(folder, PAGE), page.encode())
    print(plain_text(table), flush=True)
    if config.rivals.document:
        update_document("rivals", config.rivals.document, page, pictures)
    scores = {entry.title: _means([found[name] for name in entry.subjects]) for entry in entries}
    return {"uri": uri, "scores": scores, "missing": _missing(entries)}


def _train(rival: Rival, library: ClipLibrary) -> None:
    log(f"rivals: {rival.title}")
    shard_split(rival.config, rival.config.dataset.split, library)
    train_teacher(rival.config, artifacts_of(rival.config, library=library))


@dataclass(frozen=True)
class Entry:
    """A row of models that differ by their seed alone.

    subjects: those that are there, by the names that they are recorded by. wanted: how many there shall be. frames:
    that a training step sees.
    """

    title: str
    subjects: Mapping[str, Subject]
    wanted: int = 1
    frames: int = 0

    @property
    def runs(self) -> list[RunManifest]:
        """The trainings; none of a teacher that came as a file."""
        uris = [str(s.model_uri).removesuffix(f"/{MODEL_FOLDER}") for s in self.subjects.values()]
        return [RunManifest.read(uri) for uri in uris if storage.is_complete(uri)]


def _own(artifacts: Artifacts) -> list[Entry]:
    """The config's teacher and the whole line's students, as far as they are there."""
    config = artifacts.config
    if not storage.exists(artifacts.teacher.uri):
        return []
    teacher = {"teacher": teacher_subject(config, artifacts.teacher.uri)}
    entries = [Entry(f"{config.teacher.title} (teacher)", teacher)]
    for name, of in students_of(config).items():
        uri = artifacts.of(of).student.uri
        if is_whole(uri, run_files):
            frames = of.distill.batch_size * of.clips.clip_frames
            entries.append(Entry(METHODS[of.distill.method], {name: run_subject(uri)}, frames=frames))
    return entries


def _trained(plan: Sequence[Rival], library: ClipLibrary) -> list[Entry]:
    """A row of each system, with those of its seeds that have been trained."""
    entries = []
    for system in dict.fromkeys(rival.system for rival in plan):
        of = [rival for rival in plan if rival.system == system]
        uris = {r.title: artifacts_of(r.config, library=library).teacher_run.uri for r in of}
        subjects = {title: run_subject(uri) for title, uri in uris.items() if is_whole(uri, run_files)}
        config = of[0].config
        frames = config.teacher.train.batch_size * config.clips.clip_frames
        entries.append(Entry(config.teacher.title, subjects, len(of), frames))
    return entries


def _score(artifacts: Artifacts, clips: ClipSet, entries: Sequence[Entry]) -> dict[str, Evaluation]:
    """The scores of all models that are there, and before them of trivial segmentations."""
    models = {name: subject for entry in entries for name, subject in entry.subjects.items()}
    if not models:
        raise ValueError("rivals: nothing has been trained yet that could be scored; leave rivals.train out")
    first = next(iter(models.values()))
    slots = load_model(str(first.model_uri), first.hints).config.num_slots
    return score_subjects(artifacts, clips, trivial_subjects(artifacts.config, slots, models) | models)


# --- the page ---------------------------------------------------------------------------------------


def rival_table(
    config: Config, clips: ClipSet, entries: Sequence[Entry], found: Mapping[str, Evaluation]
) -> Table:
    """A row an entry, then those of `found` that are no models; costs are counted on the first video of `clips`."""
    frames = _frames(clips, COUNTED_FRAMES)
    rows = [_row(config, entry, [found[name] for name in entry.subjects], frames) for entry in entries]
    models = {name for entry in entries for name in entry.subjects}
    for name, evaluation in found.items():
        if name not in models:
            numbers = [percent(evaluation.scores[score]) for score in SCORES]
            rows.append(Row(cells(name, *[DASH] * len(_COLUMNS), *numbers), "baseline"))
    notes = [_COSTS_NOTE, *next(iter(found.values())).protocol.warnings]
    if missing := _missing(entries):
        notes.insert(0, f"Not trained yet: {'; '.join(missing)}.")
    columns = (Column("system", numeric=False), *map(Column, _COLUMNS), *score_columns(SCORES, paper=False))
    part = f"{config.dataset.title}, {config.evaluate.split}"
    return Table("Scores", "Every system under one protocol", part, columns, tuple(rows), tuple(notes))


def _row(config: Config, entry: Entry, found: Sequence[Evaluation], frames: np.ndarray) -> Row:
    if not found:
        return Row(cells(entry.title, *[DASH] * (len(_COLUMNS) + len(SCORES))))
    subject, runs = next(iter(entry.subjects.values())), entry.runs
    model = load_model(str(subject.model_uri), subject.hints)
    speeds = [speed for run in runs if (speed := seconds_a_step(config, run, entry.frames))]
    texts = [
        str(len(runs)) if runs else DASH,
        f"{runs[0].steps:,}" if runs else DASH,
        short_number(statistics.fmean(speeds)) if speeds else DASH,
        short_number(model.num_parameters() / 1e6),
        short_number(count_stream(model, frames).products / len(frames) / 1e9),
        *(mean_and_std([100 * one.scores[score] for one in found]) for score in SCORES),
    ]
    return Row((Cell(entry.title), *map(Cell, texts)))


def seconds_a_step(config: Config, run: RunManifest, frames: int) -> float | None:
    """As MLflow has a training's speed from log to log, however often it was stopped; None where it does not."""
    speeds: list[float] = []
    with optional(f"the speed of run {run.fingerprint}", "read"):
        found = tracking.connect(config).get_metric_history(run.mlflow_run, "frames_per_second")
        speeds = [metric.value for metric in found]
    return frames * statistics.fmean(1 / speed for speed in speeds) if speeds else None


def _frames(clips: ClipSet, count: int) -> np.ndarray:
    """The first frames `(count, h, w, 3)` of the first video, or all if it has fewer."""
    video = clips.videos[0]
    with contextlib.closing(clips.iter_videos([video])) as decoded:
        return np.stack(list(islice((frame for clip in decoded for frame in clip.frames), count)))


def _pictures(
    config: Config, clips: ClipSet, entries: Sequence[Entry], found: Mapping[str, Evaluation]
) -> list[Picture]:
    """Frames under each system's first seed; none where no video has a score."""
    rows = {}
    for entry in entries:
        if entry.subjects:
            name, subject = next(iter(entry.subjects.items()))
            rows[entry.title] = Shown.of(subject, found[name])
    try:
        return [median_picture(clips, choose_protocol(config.evaluate), rows, PICTURE)]
    except NothingToShow as reason:
        log(f"rivals: no picture, as {reason}")
        return []


def _missing(entries: Sequence[Entry]) -> list[str]:
    lacking = [(entry, entry.wanted - len(entry.subjects)) for entry in entries]
    return [f"{entry.title}, {count} of {entry.wanted} seeds" for entry, count in lacking if count]


def _means(found: Sequence[Evaluation]) -> dict[str, float]:
    """Over the seeds; empty where there is none."""
    return {score: statistics.fmean(one.scores[score] for one in found) for score in SCORES if found}


def _intro(config: Config, entries: Sequence[Entry], found: Mapping[str, Evaluation]) -> str:
    one = next(iter(found.values()))
    runs = [run for entry in entries for run in entry.runs]
    precisions = " and ".join(sorted({run.tags.get("precision", "fp32") for run in runs}))
    return (
        f"{one.videos} videos of the split {config.evaluate.split!r}, protocol {one.protocol.name} "
        f"({one.protocol.in_words}); {os.cpu_count()} cores, torch {torch.__version__}, trained in {precisions}. "
        f"{SAMPLE_STD}"
    )

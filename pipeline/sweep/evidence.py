"""Stage `evidence`: a sweep's students on the test split, and which claimed orderings hold there.

The sweep trains, and is compared on the validation split, where choices are made. Here everything that
finished is scored on another split, once, and every claim is held against the paired differences.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline import storage
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.manifests import RunManifest, SweepManifest, TrialEntry
from pipeline.clips.library import artifacts_of, check_held_out, open_clips
from pipeline.clips.stage import shard_split
from pipeline.compute import one_ray
from pipeline.config import Config, with_overrides
from pipeline.config.protocols import choose_protocol
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.scoring import SCORES, TITLES
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import (
    Subject,
    baseline_subjects,
    feature_subjects,
    run_subject,
    teacher_subject,
)
from pipeline.evaluate.table import (
    DASH,
    Cell,
    Column,
    Row,
    Table,
    cells,
    mean_and_std,
    one_decimal,
    plain_text,
)
from pipeline.models.build import load_teacher
from pipeline.report.charts import chart_png
from pipeline.report.document import update_document
from pipeline.report.render import Page, Picture, markdown
from pipeline.report.scores import SAMPLE_STD, score_columns
from pipeline.sweep.comparisons import PerVideo, Scored, claim_table, compare
from pipeline.sweep.curves import curve_chart, curve_table, read_curves
from pipeline.sweep.gallery import Shown, frames_pictures
from pipeline.sweep.page import sweep_chart
from pipeline.sweep.results import Result
from pipeline.sweep.settings import TEACHER, Setting, check_evidence
from pipeline.sweep.stage import sweep

PAGE, PLOT, CURVES = "evidence.md", "evidence.png", "evidence-curves.png"
MASKS = {"decoder": "the decoder", "attention": "slot attention"}


def evidence(config: Config) -> dict[str, Any]:
    """Runs the config's sweep, scores it on `evidence.split`, and writes tables, plot and verdicts.

    What is there already is reused. Returns the job's summary.

    Raises:
        ConfigError: see `check_evidence`, `check_held_out`.
        RuntimeError: trials of the sweep that are worth another try.
    """
    check_evidence(config)
    check_held_out(artifacts_of(config))
    with one_ray():
        uri = sweep(config)["uri"]
        if not storage.is_complete(uri):
            raise RuntimeError(f"the sweep has not ended ({uri}); start this again")
        manifest = SweepManifest.read(uri)
        assert config.evidence.split is not None
        shard_split(config, config.evidence.split)
        artifacts = artifacts_of(config, manifest.clips_uri)
        masks = config.evidence.masks or (choose_protocol(config.evaluate).masks,)
        # Trivial segmentations have one kind of masks.
        scored = [_score(artifacts, manifest, kind, baselines=kind == masks[0]) for kind in masks]
        frames = _frames(artifacts, manifest, scored[0]) if config.evidence.pictures else []
    return _write(config, manifest, scored, frames)


@dataclass(frozen=True)
class MaskScores:
    """What was scored on the test split by one kind of masks; scores are fractions of 1.

    others: of baselines and of the teacher, by name. found: everything that was scored, and how, by name.
    """

    masks: str
    students: Scored
    others: Mapping[str, Mapping[str, float]]
    found: Mapping[str, tuple[Subject, Evaluation]]

    @property
    def evaluation(self) -> Evaluation:
        """The teacher's."""
        return self.found[TEACHER][1]


def _score(artifacts: Artifacts, manifest: SweepManifest, masks: str, *, baselines: bool) -> MaskScores:
    """Scores each setting's seeds on the test split, the teacher, and trivial segmentations if they are asked for."""
    test = _on_test_split(artifacts, masks)
    finished = _finished(manifest)
    students = {_title(trial): run_subject(trial.run) for trial in finished}
    teacher_uri = artifacts.require_teacher()
    teacher = {TEACHER: teacher_subject(artifacts.config, teacher_uri, artifacts.teacher_config)}
    trivial: dict[str, Subject] = {}
    if baselines:
        trivial = baseline_subjects(load_teacher(artifacts.config, teacher_uri).config.num_slots)
        if artifacts.config.evaluate.feature_kmeans:
            of_settings: dict[str, Subject] = {}
            for trial in finished:
                of_settings.setdefault(trial.setting, students[_title(trial)])
            trivial |= feature_subjects(teacher | of_settings)
    subjects = {**trivial, **teacher, **students}
    found = score_subjects(test, open_clips(test.evaluation_clips), subjects)
    results = []
    for name, values in {trial.setting: trial.values for trial in manifest.trials}.items():
        scores = {trial.seed: found[_title(trial)].scores for trial in finished if trial.setting == name}
        results.append(Result(Setting(name, values), scores))
    per_video: dict[tuple[str, int | None], PerVideo] = {
        (trial.setting, trial.seed): found[_title(trial)].per_video() for trial in finished
    }
    per_video[TEACHER, None] = found[TEACHER].per_video()
    others = {name: found[name].scores for name in (*trivial, TEACHER)}
    return MaskScores(
        masks,
        Scored(results, found[TEACHER].scores, per_video),
        others,
        {name: (subject, found[name]) for name, subject in subjects.items()},
    )


def _on_test_split(artifacts: Artifacts, masks: str) -> Artifacts:
    overrides = {"evaluate.split": artifacts.config.evidence.split, "evaluate.masks": masks}
    return artifacts.of(with_overrides(artifacts.config, overrides))


def _finished(manifest: SweepManifest) -> list[TrialEntry]:
    return [trial for trial in manifest.trials if trial.status == "finished"]


def _title(trial: TrialEntry) -> str:
    return f"{trial.setting}, seed {trial.seed}"


def setting_table(
    results: Sequence[Result],
    others: Mapping[str, Mapping[str, float]],
    details: Mapping[str, tuple[int, float]],
    part: str,
) -> Table:
    """Mean ± std over seeds of every setting; `details` has its steps and minutes a run, see `_details`."""
    rows = []
    for result in results:
        steps, minutes = details[result.setting.name]
        line = [result.setting.name, str(len(result.scores)), f"{steps:,}", f"{minutes:.1f}"]
        line += [mean_and_std([100 * value for value in result.values(score)]) for score in SCORES]
        rows.append(Row(cells(*line)))
    for name, scores in others.items():
        numbers = [one_decimal(100 * scores[score]) for score in SCORES]
        kind = "method" if name == TEACHER else "baseline"
        rows.append(Row((Cell(name), *[Cell(DASH)] * 3, *map(Cell, numbers)), kind))
    columns = (Column("setting", numeric=False), Column("seeds"), Column("steps"), Column("min. a run"))
    return Table(
        "Scores", "Every way to distil", part, (*columns, *score_columns(SCORES, paper=False)), tuple(rows)
    )


def _details(manifest: SweepManifest) -> dict[str, tuple[int, float]]:
    """Steps, and mean minutes a run, of every setting."""
    runs: dict[str, list[RunManifest]] = {}
    for trial in manifest.trials:
        of_setting = runs.setdefault(trial.setting, [])
        if trial.status == "finished":
            of_setting.append(RunManifest.read(trial.run))
    return {
        name: (found[0].steps, statistics.fmean(run.seconds for run in found) / 60) if found else (0, 0.0)
        for name, found in runs.items()
    }


def _tables(config: Config, manifest: SweepManifest, scored: Sequence[MaskScores]) -> list[Table]:
    """Scores and orderings by each kind of masks, and the curves of those that validated."""
    tables, orderings, details = [], [], _details(manifest)
    for kind in scored:
        part = f"{config.dataset.title}, {config.evidence.split}"
        if len(scored) > 1:
            part += f", masks of {MASKS[kind.masks]}"
        table = setting_table(kind.students.results, kind.others, details, part)
        tables.append(replace(table, notes=kind.evaluation.protocol.warnings))
        comparisons = compare(config.evidence.claims, kind.students, config.evidence.scores)
        orderings.append(claim_table(comparisons, part))
    curves = read_curves(manifest.trials, config.evaluate.score)
    part = f"{config.dataset.title}, {config.evaluate.split}"
    return [*tables, *orderings, *([curve_table(curves, config.evaluate.score, part)] if curves else [])]


def _pictures(config: Config, manifest: SweepManifest, scored: Sequence[MaskScores]) -> list[Picture]:
    pictures = []
    for number, kind in enumerate(scored):
        title = "Scores on the test split" + (f", masks of {MASKS[kind.masks]}" if len(scored) > 1 else "")
        chart = sweep_chart(kind.students.results, {TEACHER: kind.others[TEACHER]}, config.evidence.scores)
        link = f"evidence-{kind.masks}.png" if number else PLOT
        pictures.append(
            Picture(chart_png(chart), link, title, "Error bars: sample standard deviation over seeds.")
        )
    score = config.evaluate.score
    if curves := read_curves(manifest.trials, score):
        title = f"{TITLES[score]} on the validation split while training"
        content = chart_png(curve_chart(curves, score))
        pictures.append(Picture(content, CURVES, title, "Lines: the mean over seeds; areas: their range."))
    return pictures


def _frames(artifacts: Artifacts, manifest: SweepManifest, scored: MaskScores) -> list[Picture]:
    """Frames of the test split under k-means on the teacher's features, the teacher and `evidence.pictures`."""
    rows = {
        name: name for name, (one, _) in scored.found.items() if one.features is not None and TEACHER in name
    }
    rows[TEACHER] = TEACHER
    first_seeds = {trial.setting: _title(trial) for trial in reversed(_finished(manifest))}
    rows |= {name: first_seeds[name] for name in artifacts.config.evidence.pictures if name in first_seeds}
    shown = {row: Shown.of(*scored.found[name]) for row, name in rows.items()}
    test = _on_test_split(artifacts, scored.masks)
    return frames_pictures(open_clips(test.evaluation_clips), choose_protocol(test.config.evaluate), shown)


def _intro(config: Config, manifest: SweepManifest, scored: MaskScores) -> str:
    seeds = sorted({trial.seed for trial in manifest.trials})
    noise = f"{_noise(config, scored):.1f} points of {TITLES[config.evaluate.score]}"
    return (
        f"{scored.evaluation.videos} videos of the split {config.evidence.split!r}, which nothing was chosen on; seeds "
        f"{', '.join(map(str, seeds))}; {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{_precisions(manifest)}, a run a core, so that minutes are of a machine that does something else too. "
        f"{SAMPLE_STD} The pooled standard deviation over seeds is {noise}."
    )


def _noise(config: Config, scored: MaskScores) -> float:
    """The pooled standard deviation over seeds, in points."""
    stds = [std for r in scored.students.results if (std := r.std(config.evaluate.score)) is not None]
    return 100 * math.sqrt(statistics.fmean(std**2 for std in stds)) if stds else math.nan


def _precisions(manifest: SweepManifest) -> str:
    """In which the runs computed."""
    runs = [RunManifest.read(trial.run) for trial in _finished(manifest)]
    return " and ".join(sorted({run.tags.get("precision", "fp32") for run in runs}))


def _write(
    config: Config, manifest: SweepManifest, scored: Sequence[MaskScores], frames: Sequence[Picture]
) -> dict[str, Any]:
    tables, pictures = _tables(config, manifest, scored), [*_pictures(config, manifest, scored), *frames]
    page = markdown(Page("Evidence", [_intro(config, manifest, scored[0])], tables, pictures, []))
    folder = storage.join(storage.absolute(config.storage.root), "evidence", manifest.fingerprint)
    for picture in pictures:
        storage.write_bytes(storage.join(folder, picture.link), picture.content)
    storage.write_bytes(storage.join(folder, PAGE), page.encode())
    for table in tables:
        print(plain_text(table), end="\n\n", flush=True)
    if config.evidence.document:
        update_document("evidence", config.evidence.document, page, pictures)
    comparisons = compare(config.evidence.claims, scored[0].students, config.evidence.scores)
    return {
        "uri": folder,
        "sweep": manifest.fingerprint,
        "noise": _noise(config, scored[0]),
        "verdicts": {f"{c.claim} ({TITLES[c.score]})": c.verdict for c in comparisons},
        "table": storage.join(folder, PAGE),
        "plot": storage.join(folder, PLOT),
    }

"""Stage `evidence`: a sweep's students on the test split, and which claimed orderings hold there.

The sweep trains, and is compared on the validation split, where choices are made. Here everything that
finished is scored on another split, once, and every claim is held against the paired differences over seeds.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t

from pipeline import storage
from pipeline.artifacts.manifests import RunManifest, SweepManifest
from pipeline.clips.library import artifacts_of, open_clips
from pipeline.clips.stage import shard_split
from pipeline.compute import one_ray
from pipeline.config import Config, with_overrides
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.scoring import SCORES, TITLES
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import (
    Subject,
    baseline_subjects,
    feature_subjects,
    student_subject,
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
from pipeline.log import log
from pipeline.models.build import load_teacher
from pipeline.report.charts import chart_png
from pipeline.report.render import Page, Picture, markdown
from pipeline.report.scores import SAMPLE_STD, score_columns
from pipeline.sweep.page import sweep_chart
from pipeline.sweep.results import Result
from pipeline.sweep.settings import TEACHER, Setting, check_evidence, parse_claim
from pipeline.sweep.stage import sweep

CONFIDENCE = 0.95
PAGE, PLOT = "evidence.md", "evidence.png"
BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"


@dataclass(frozen=True)
class Comparison:
    """One claim, `better > worse`, in one score: the differences of the seeds that both have, in points."""

    claim: str
    score: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def margin(self) -> float:
        """Half the confidence interval of the mean difference (Student's t); infinite for one seed."""
        count = len(self.differences)
        if count < 2:
            return math.inf
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return quantile * statistics.stdev(self.differences) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        if self.mean - self.margin > 0:
            return "holds"
        if self.mean + self.margin < 0:
            return "reversed"
        return "can't be told"


def evidence(config: Config) -> dict[str, Any]:
    """Runs the config's sweep, scores it on `evidence.split`, and writes tables, plot and verdicts.

    What is there already is reused. Returns the job's summary.

    Raises:
        ConfigError: see `check_evidence`.
        RuntimeError: trials of the sweep that are worth another try.
    """
    check_evidence(config)
    with one_ray():
        uri = sweep(config)["uri"]
        if not storage.is_complete(uri):
            raise RuntimeError(f"the sweep has not ended ({uri}); start this again")
        manifest = SweepManifest.read(uri)
        assert config.evidence.split is not None
        shard_split(config, config.evidence.split)
        results, others, evaluation = _score(config, manifest)
    return _write(config, manifest, results, others, evaluation)


def _score(
    config: Config, manifest: SweepManifest
) -> tuple[list[Result], dict[str, dict[str, float]], Evaluation]:
    """Scores of each setting's seeds on the test split, those of teacher and baselines, and the teacher in full."""
    artifacts = artifacts_of(config, manifest.clips_uri)
    test = artifacts.of(with_overrides(config, {"evaluate.split": config.evidence.split}))
    finished = [trial for trial in manifest.trials if trial.status == "finished"]
    teacher_uri = artifacts.require_teacher()
    baselines = baseline_subjects(load_teacher(config, teacher_uri).config.num_slots)
    titles = {trial.run: f"{trial.setting}, seed {trial.seed}" for trial in finished}
    students = {title: student_subject(run) for run, title in titles.items()}
    teacher = {TEACHER: teacher_subject(config, teacher_uri)}
    if config.evaluate.feature_kmeans:
        of_settings: dict[str, Subject] = {}
        for trial in finished:
            of_settings.setdefault(trial.setting, students[titles[trial.run]])
        baselines |= feature_subjects(teacher | of_settings)
    clips = open_clips(test.evaluation_clips)
    found = score_subjects(test, clips, {**baselines, **teacher, **students})
    results = []
    for name, values in {trial.setting: trial.values for trial in manifest.trials}.items():
        scores = {trial.seed: found[titles[trial.run]].scores for trial in finished if trial.setting == name}
        results.append(Result(Setting(name, values), scores))
    others = {name: found[name].scores for name in (*baselines, TEACHER)}
    return results, others, found[TEACHER]


def compare(
    claims: Sequence[str],
    results: Sequence[Result],
    teacher: Mapping[str, float],
    scores: Sequence[str],
) -> list[Comparison]:
    """Every claim in every score; one whose sides share no seed is left out."""
    by_name = {result.setting.name: result.scores for result in results}
    comparisons = []
    for claim in claims:
        better, worse = parse_claim(claim)
        seeds = [
            seed
            for seed in next(by_name[side] for side in (better, worse) if side != TEACHER)
            if all(side == TEACHER or seed in by_name[side] for side in (better, worse))
        ]
        for score in scores:
            sides = [
                [100 * (teacher if side == TEACHER else by_name[side][seed])[score] for seed in seeds]
                for side in (better, worse)
            ]
            if seeds:
                differences = tuple(a - b for a, b in zip(*sides, strict=True))
                comparisons.append(Comparison(claim, score, differences))
    return comparisons


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


def claim_table(comparisons: Sequence[Comparison], part: str) -> Table:
    rows = [
        Row(
            cells(
                comparison.claim,
                TITLES[comparison.score],
                str(len(comparison.differences)),
                f"{comparison.mean:+.1f}",
                f"± {comparison.margin:.1f}" if math.isfinite(comparison.margin) else DASH,
                comparison.verdict,
            )
        )
        for comparison in comparisons
    ]
    columns = (
        Column("claim", numeric=False),
        Column("score", numeric=False),
        Column("seeds"),
        Column("difference"),
        Column("95 % of it"),
        Column("verdict", numeric=False),
    )
    notes = (
        "Differences in points, paired by seed, with Student's t interval: a claim holds, or is reversed, where "
        "the interval leaves out 0. The teacher is one model: its own spread over seeds is not in these intervals.",
    )
    return Table("Orderings", "Which claims hold", part, columns, tuple(rows), notes)


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


def _write(
    config: Config,
    manifest: SweepManifest,
    results: list[Result],
    others: dict[str, dict[str, float]],
    evaluation: Evaluation,
) -> dict[str, Any]:
    comparisons = compare(config.evidence.claims, results, others[TEACHER], config.evidence.scores)
    seeds = sorted({trial.seed for trial in manifest.trials})
    spread = [std for r in results if (std := r.std(config.evaluate.score)) is not None]
    noise = 100 * math.sqrt(statistics.fmean(std**2 for std in spread)) if spread else math.nan
    part = f"{config.dataset.title}, {config.evidence.split}"
    settings = setting_table(results, others, _details(manifest), part)
    tables = [
        replace(settings, notes=evaluation.protocol.warnings),
        claim_table(comparisons, part),
    ]
    intro = [
        f"{evaluation.videos} videos of the split {config.evidence.split!r}, which nothing was chosen on; seeds "
        f"{', '.join(map(str, seeds))}; {os.cpu_count()} cores, torch {torch.__version__}, fp32, a run a core, so "
        f"that minutes are of a machine that does something else too. {SAMPLE_STD} "
        f"The pooled standard deviation over seeds is {noise:.1f} points of {TITLES[config.evaluate.score]}."
    ]
    picture = Picture(
        chart_png(sweep_chart(results, {TEACHER: others[TEACHER]})),
        PLOT,
        "Scores on the test split",
        "Error bars: sample standard deviation over seeds.",
    )
    page = markdown(Page("Evidence", intro, tables, [picture], []))
    folder = storage.join(storage.absolute(config.storage.root), "evidence", manifest.fingerprint)
    storage.write_bytes(storage.join(folder, PLOT), picture.content)
    storage.write_bytes(storage.join(folder, PAGE), page.encode())
    for table in tables:
        print(plain_text(table), end="\n\n", flush=True)
    if config.evidence.document:
        update_document(Path(config.evidence.document), page, picture.content)
    return {
        "uri": folder,
        "sweep": manifest.fingerprint,
        "noise": noise,
        "verdicts": {f"{c.claim} ({TITLES[c.score]})": c.verdict for c in comparisons},
        "table": storage.join(folder, PAGE),
        "plot": storage.join(folder, PLOT),
    }


def update_document(document: Path, page: str, picture: bytes) -> None:
    """Puts the tables between a document's two marks, and the picture beside it.

    Raises:
        ValueError: the document has no such marks.
    """
    old = document.read_text(encoding="utf-8")
    body = re.sub(r"^#", "##", page.split("\n", 2)[2], flags=re.MULTILINE).strip()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"evidence.document: {document} has no {BEGIN} … {END}")
    document.write_text(pattern.sub(lambda _: f"{BEGIN}\n{body}\n{END}", old), encoding="utf-8")
    document.with_name(PLOT).write_bytes(picture)
    log(f"evidence: wrote {document}")

"""Stage `sweep`: Ray Tune over Ray Train, from the trials to a table, a plot and a registered student.

All trials read the same clips, and the same targets unless `targets.*` is what differs. A trial is a run of
`distill`, found again by its fingerprint, and has a record in `<storage.root>/sweeps/<fingerprint>/trials` once it
has ended: whatever happens to the driver, a sweep that is started again goes on with the trials that have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import stages, storage
from pipeline.artifacts.identity import teacher_location
from pipeline.artifacts.once import lease
from pipeline.clips.stage import find_clips
from pipeline.clips.table import ClipSet
from pipeline.compute import gpus_to_use, ray_session
from pipeline.config import Config, ConfigError
from pipeline.distill.stage import find_student
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.subjects import Subject
from pipeline.log import log
from pipeline.models import CheckpointHints
from pipeline.models.build import load_model
from pipeline.registry.stage import appoint, register
from pipeline.report.charts import chart_png
from pipeline.report.pictures import Picture
from pipeline.report.render import Page, markdown
from pipeline.report.table import Table
from pipeline.sweep.ended import Ended, find_ended
from pipeline.sweep.page import (
    NUMBERS,
    TABLE_CSV,
    TABLE_MD,
    TABLE_TEXT,
    _best_summary,
    _without_nan,
    sweep_chart,
)
from pipeline.sweep.results import Best, Result, as_csv, as_json, choose_best, sweep_table, text
from pipeline.sweep.runs import adopt, log_results, parent_run
from pipeline.sweep.settings import Setting, Trial, plan_trials
from pipeline.sweep.trials import run_trials
from pipeline.targets.stage import cache

FORMAT = 1


class SweepFailed(RuntimeError):
    """Not one trial finished."""


@dataclass(frozen=True)
class Plan:
    """The trials with their run folders, and where the sweep's own files go."""

    uri: str
    clips_uri: str
    trials: list[Trial]


@dataclass(frozen=True)
class Outcome:
    """The scores of everything that finished, each as `evaluate` returned it."""

    results: list[Result]
    evaluations: dict[str, dict[str, Any]]  # by the trial's title
    others: dict[str, dict[str, float]]  # teachers
    baselines: dict[str, dict[str, float]]


def run_sweep(config: Config) -> dict[str, Any]:
    """Trains, scores, compares and registers the students of a config's `sweep` section.

    Whatever is there already is reused: clips, targets, students, scores. Returns the job's summary.

    Raises:
        ConfigError: trials that can't be run, or a teacher that is not there.
        SweepFailed: no trial finished.
    """
    trials = plan_trials(config)
    stages.check_disjoint(config)
    plan = _find_plan(config, trials)
    if plan is not None and storage.is_complete(plan.uri) and not _left(plan):
        log(f"sweep: this sweep is finished, reusing {plan.uri}")
        return _conclude(config, plan)
    with ray_session(config):
        plan = plan or _prepare(config, trials)
        with lease(plan.uri, "sweep"):
            if _left(plan):
                gpus_to_use(config)  # as many trials run at a time as there is room for now
            return _conclude(config, plan)


def _left(plan: Plan) -> int:
    """Trials that have not ended."""
    return len(plan.trials) - len(find_ended(plan.uri, plan.trials))


def _find_plan(config: Config, trials: Sequence[Trial]) -> Plan | None:
    """The plan where clips and targets are there; None where they have to be made first."""
    try:
        clips_uri = stages.training_clips(config)
        if not storage.is_complete(find_clips(config, config.evaluate.split or "")):
            return None
        return _locate(config, clips_uri, trials)
    except (storage.IncompleteError, ConfigError):
        return None  # `_prepare` makes it or says what is wrong


def _prepare(config: Config, trials: Sequence[Trial]) -> Plan:
    """Clips, and the targets of every setting."""
    stages.shard_stage(config)
    clips_uri = stages.training_clips(config)
    done: set[str] = set()
    for trial in trials:
        if trial.setting.name in done:
            continue  # seeds share their targets
        done.add(trial.setting.name)
        try:
            try:
                find_student(trial.config, clips_uri)
            except storage.IncompleteError:
                cache(trial.config, clips_uri)
        except ConfigError as error:
            raise ConfigError(f"{trial.setting.name}: {error}") from error
    return _locate(config, clips_uri, trials)


def _locate(config: Config, clips_uri: str, trials: Sequence[Trial]) -> Plan:
    """Gives every trial its run folder, and the sweep its own.

    Raises:
        ConfigError: two settings that are one student.
    """
    located = [replace(trial, run_uri=find_student(trial.config, clips_uri)) for trial in trials]
    first: dict[str, Trial] = {}
    for trial in located:
        other = first.setdefault(trial.run_uri, trial)
        if other is not trial:
            raise ConfigError(
                f"sweep: {other.title!r} and {trial.title!r} train the same student, as what they differ in "
                "decides nothing about it; leave one out"
            )
    sweep = config.sweep
    content = {
        "format": FORMAT,
        "trials": [[t.setting.name, t.seed, t.key] for t in located],
        "asha": [sweep.grace_steps, sweep.reduction_factor, config.distill.validate_every]
        if sweep.asha
        else None,
        "clips": storage.name(find_clips(config, config.evaluate.split or "")),
        "evaluate": config.evaluate.model_dump(mode="json", exclude={"model"}),
    }
    root = storage.absolute(config.storage.root)
    return Plan(storage.join(root, "sweeps", storage.fingerprint(content)), clips_uri, located)


def _conclude(config: Config, plan: Plan) -> dict[str, Any]:
    before = find_ended(plan.uri, plan.trials)
    if not storage.is_complete(plan.uri):
        storage.write_bytes(storage.join(plan.uri, "config.yaml"), config.to_yaml().encode())
    with parent_run(config, plan.uri) as parent:
        ended = run_trials(config, plan.uri, plan.clips_uri, plan.trials, parent)
        adopt(config, parent, plan.uri, plan.trials, ended)
        if not any(e.status == "finished" for e in ended.values()):
            errors = "; ".join(f"{e.trial}: {e.error or e.status}" for e in ended.values())
            raise SweepFailed(f"sweep: none of {len(ended)} trials finished: {errors}")
        outcome = _score(config, plan, ended)
        best = choose_best(outcome.results, config.evaluate.score)
        files, table = _write(config, plan, outcome, best, ended)
        print(text(table), flush=True)
        metrics, params = _best_numbers(best)
        log_results(config, parent, files, metrics, params)
        if best is not None:
            log(f"sweep: {best.reason}")
        registered = _register(config, plan, outcome, best)
    return _summary(plan, ended, before, outcome, best, registered)


def _score(config: Config, plan: Plan, ended: dict[str, Ended]) -> Outcome:
    """Every finished student with teachers and baselines, in one pass over the evaluation clips."""
    students = {
        trial.title: stages.student_subject(trial.run_uri)
        for trial in plan.trials
        if ended[trial.key].status == "finished"
    }
    teachers = _teachers(config, plan) if config.evaluate.teacher else {}
    baselines = {}
    if config.evaluate.baselines:
        uri = next(iter(students.values())).model_uri
        assert uri is not None
        baselines = stages.baseline_subjects(load_model(uri, CheckpointHints()).config.num_slots)
    found = stages.evaluate_subjects(config, {**baselines, **teachers, **students})
    results = []
    for setting in dict.fromkeys(trial.setting.name for trial in plan.trials):
        of_setting = [trial for trial in plan.trials if trial.setting.name == setting]
        by_status = {
            status: [t for t in of_setting if ended[t.key].status == status]
            for status in ("finished", "failed", "stopped")
        }
        results.append(
            Result(
                of_setting[0].setting,
                {t.seed: found[t.title]["scores"] for t in by_status["finished"]},
                {t.seed: ended[t.key].error or "" for t in by_status["failed"]},
                {t.seed: ended[t.key].step for t in by_status["stopped"]},
            )
        )
    return Outcome(
        results,
        {name: found[name] for name in students},
        {name: found[name]["scores"] for name in teachers},
        {name: found[name]["scores"] for name in baselines},
    )


def _teachers(config: Config, plan: Plan) -> dict[str, Subject]:
    """Each teacher of a trial once, where it is there."""
    fingerprint = ClipSet(plan.clips_uri).fingerprint
    teachers: dict[str, Subject] = {}
    known = set()
    for trial in plan.trials:
        uri = teacher_location(trial.config, fingerprint)
        if uri not in known and storage.exists(uri):
            known.add(uri)
            # Most sweeps have one; those of several need their names.
            name = "teacher" if not teachers else f"teacher ({trial.setting.name})"
            teachers[name] = stages.teacher_subject(trial.config, uri)
    return teachers


def _write(
    config: Config, plan: Plan, outcome: Outcome, best: Best | None, ended: dict[str, Ended]
) -> tuple[list[tuple[str, bytes]], Table]:
    """The sweep's files, then its manifest, unless a trial is worth another try; returns them and the table."""
    results, score = outcome.results, config.evaluate.score
    protocol = next(iter(outcome.evaluations.values()))
    notes = [f"Protocol {protocol['protocol']['name']}: {protocol['protocol']['in_words']}; "]
    notes[0] += f"{protocol['videos']} videos."
    notes += [f"Chosen: {best.reason}."] if best else []
    table = sweep_table(
        results, outcome.others, outcome.baselines, score=score, dataset=config.dataset.title, notes=notes
    )
    plot = Picture(Path("/") / PLOT, "Scores", "Error bars: sample standard deviation over seeds.")
    page = Page(f"Sweep {storage.name(plan.uri)}", [], [table], [plot], [])
    numbers = as_json(results, {**outcome.others, **outcome.baselines})
    numbers["best"] = _best_summary(best, score)
    files = [
        (TABLE_TEXT, (text(table) + "\n").encode()),
        (TABLE_CSV, as_csv(results).encode()),
        (TABLE_MD, markdown(page, Path("/")).encode()),
        (NUMBERS, (json.dumps(_without_nan(numbers), indent=2) + "\n").encode()),
        (PLOT, chart_png(sweep_chart(results, outcome.others))),
    ]
    if storage.is_complete(plan.uri):
        return files, table
    for name, content in files:
        storage.write_bytes(storage.join(plan.uri, name), content)
    again = [e.trial for e in ended.values() if not e.final]
    if again:
        log(f"sweep: start it again to try once more: {'; '.join(again)}")
        return files, table
    storage.publish(
        plan.uri,
        {
            "kind": "sweep",
            "fingerprint": storage.name(plan.uri),
            "created": storage.timestamp(),
            "clips_uri": plan.clips_uri,
            "trials": [
                {
                    "setting": t.setting.name,
                    "values": dict(t.setting.values),
                    "seed": t.seed,
                    "run": t.run_uri,
                    "status": ended[t.key].status,
                }
                for t in plan.trials
            ],
            "best": _best_summary(best, score),
        },
    )
    return files, table


def _best_numbers(best: Best | None) -> tuple[dict[str, float], dict[str, Any]]:
    """What the parent run shows of the best setting: metrics and parameters."""
    if best is None:
        return {}, {}
    metrics = {}
    for score in SCORES:
        for name, number in ((score, best.result.mean(score)), (f"{score}_std", best.result.std(score))):
            if number is not None:
                metrics[name] = number
    params = {f"best.{key}": value for key, value in best.result.setting.values.items()}
    return metrics, {"best.setting": best.result.setting.name, **params}


def _register(config: Config, plan: Plan, outcome: Outcome, best: Best | None) -> dict[str, Any]:
    """A version for each student, then the alias for the chosen one if it has earned it."""
    if not config.sweep.register_students:
        return {"versions": {}, "champion": False, "reason": "sweep.register_students is off"}
    by_setting = {result.setting.name: result for result in outcome.results}
    score = config.evaluate.score
    versions: dict[str, int] = {}
    for trial in plan.trials:
        if trial.title not in outcome.evaluations:
            continue
        tags = _version_tags(plan, trial.setting, by_setting[trial.setting.name], score)
        evaluation = outcome.evaluations[trial.title]
        done = register(trial.config, trial.run_uri, evaluation, contend=False, more_tags=tags)
        versions[trial.title] = done["version"]
    if best is None:
        return {"versions": versions, "champion": False, "reason": f"no trial has a {score}"}
    chosen = next(
        t for t in plan.trials if t.setting.name == best.result.setting.name and t.seed == best.seed
    )
    champion, reason = appoint(config, versions[chosen.title], set(versions.values()))
    log(f"register: {reason}")
    return {"versions": versions, "champion": champion, "reason": reason}


def _version_tags(plan: Plan, setting: Setting, result: Result, score: str) -> dict[str, str]:
    tags = {"sweep": storage.name(plan.uri), "sweep.setting": setting.name, "sweep.score": score}
    for name, number in (("mean", result.mean(score)), ("std", result.std(score))):
        if number is not None:
            tags[f"sweep.{name}"] = f"{number:.6f}"
    return tags


def _summary(
    plan: Plan,
    ended: dict[str, Ended],
    before: dict[str, Ended],
    outcome: Outcome,
    best: Best | None,
    registered: dict[str, Any],
) -> dict[str, Any]:
    counts = {
        status: sum(e.status == status for e in ended.values())
        for status in ("finished", "failed", "stopped")
    }
    chosen = None
    if best is not None:
        chosen = {"setting": best.result.setting.name, "seed": best.seed, "reason": best.reason}
    return {
        "uri": plan.uri,
        "best": chosen,
        "means": {r.setting.name: {score: r.mean(score) for score in SCORES} for r in outcome.results},
        "trials": {**counts, "reused": len(before)},
        "failed": {e.trial: e.error for e in ended.values() if e.status == "failed"},
        **registered,
        "table": storage.join(plan.uri, TABLE_MD),
        "plot": storage.join(plan.uri, PLOT),
    }

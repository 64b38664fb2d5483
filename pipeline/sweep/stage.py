"""Stage `sweep`: Ray Tune over Ray Train, from the trials to a table, a plot and a registered student.

All trials read the same clips, and the same targets unless `targets.*` is what differs. A trial is a run of
`distill`, found again by its fingerprint, and has a record in `<storage.root>/sweeps/<fingerprint>/trials` once it
has ended: whatever happens to the driver, a sweep that is started again goes on with the trials that have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import storage
from pipeline.artifacts.identity import Artifacts
from pipeline.artifacts.manifests import SweepManifest, TrialEntry
from pipeline.artifacts.once import is_whole, lease, say_inputs
from pipeline.clips.library import ClipLibrary, artifacts_of, check_disjoint, open_clips
from pipeline.clips.stage import shard
from pipeline.compute import gpus_to_use, ray_session
from pipeline.config import Config, ConfigError
from pipeline.evaluate.records import Evaluation
from pipeline.evaluate.scoring import SCORES
from pipeline.evaluate.stage import score_subjects
from pipeline.evaluate.subjects import Subject, run_subject, teacher_subject, trivial_subjects
from pipeline.evaluate.table import plain_text
from pipeline.log import log
from pipeline.models import CheckpointHints
from pipeline.models.build import load_model
from pipeline.registry.stage import register_run, set_champion
from pipeline.sweep.ended import Ended, find_ended
from pipeline.sweep.page import PLOT, TABLE_MD, best_summary, page_files
from pipeline.sweep.results import Best, Result, choose_best
from pipeline.sweep.runs import log_results, nest_runs, parent_run
from pipeline.sweep.settings import Setting, Trial, plan_trials
from pipeline.sweep.trials import run_trials
from pipeline.targets.stage import cache, cache_features, feature_files, target_files


class SweepFailed(RuntimeError):
    """Not one trial finished."""


@dataclass(frozen=True)
class Plan:
    """The trials with their run folders, and where the sweep's own files go."""

    uri: str
    artifacts: Artifacts  # of the config itself
    trials: list[Trial]


@dataclass(frozen=True)
class Outcome:
    """The scores of everything that finished."""

    results: list[Result]
    evaluations: dict[str, Evaluation]  # by the trial's title
    others: dict[str, dict[str, float]]  # teachers
    baselines: dict[str, dict[str, float]]


def sweep(config: Config) -> dict[str, Any]:
    """Trains, scores, compares and registers the students of a config's `sweep` section.

    Whatever is there already is reused: clips, targets, students, scores. Returns the job's summary.

    Raises:
        ConfigError: trials that can't be run, or a teacher that is not there.
        SweepFailed: no trial finished.
    """
    trials = plan_trials(config)
    library = ClipLibrary()
    artifacts = artifacts_of(config, library=library)
    check_disjoint(artifacts)
    plan = _find_plan(artifacts, trials)
    if plan is not None and storage.is_complete(plan.uri) and not _left(plan):
        log(f"sweep: this sweep is finished, reusing {plan.uri}")
        return _conclude(config, plan)
    with ray_session(config):
        plan = plan or _prepare(artifacts, library, trials)
        with lease(plan.uri, "sweep"):
            if _left(plan):
                gpus_to_use(config)  # as many trials run at a time as there is room for now
            return _conclude(config, plan)


def _left(plan: Plan) -> int:
    """Trials that have not ended."""
    return len(plan.trials) - len(find_ended(plan.uri, plan.trials))


def _find_plan(artifacts: Artifacts, trials: Sequence[Trial]) -> Plan | None:
    """The plan where clips and targets are there; None where they have to be made first."""
    try:
        open_clips(artifacts.clips)
        open_clips(artifacts.evaluation_clips)
        if any(
            _lacks_targets(one) or _lacks_features(one) for one in _one_a_setting(artifacts, trials).values()
        ):
            return None
        return _locate(artifacts, trials)
    except ConfigError:
        return None  # `_prepare` makes it or says what is wrong


def _prepare(artifacts: Artifacts, library: ClipLibrary, trials: Sequence[Trial]) -> Plan:
    """Clips, and the targets and stored features of every setting.

    Raises:
        ConfigError: a setting that can't be trained, by its name; or as `_locate`.
    """
    shard(artifacts.config, library)
    for setting, one in _one_a_setting(artifacts, trials).items():
        try:
            one.student  # noqa: B018  does it fit the teacher? That is said before anything is computed.
            if _lacks_targets(one):
                cache(one.config, one)
            if _lacks_features(one):
                cache_features(one, one.config.student)
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error}") from error
    return _locate(artifacts, trials)


def _one_a_setting(artifacts: Artifacts, trials: Sequence[Trial]) -> dict[str, Artifacts]:
    """By the names of the settings what is made of each: seeds share their targets."""
    first: dict[str, Artifacts] = {}
    for trial in trials:
        if trial.setting.name not in first:
            first[trial.setting.name] = artifacts.of(trial.config)
    return first


def _lacks_targets(artifacts: Artifacts) -> bool:
    """Whether a student would learn from targets that have not been made, or have lost files."""
    uri = artifacts.student_inputs.targets_uri
    return uri is not None and not is_whole(uri, target_files)


def _lacks_features(artifacts: Artifacts) -> bool:
    """Whether a student would read stored features that have not been made, or have lost files."""
    student = artifacts.config.student
    return student.cached_features and not is_whole(artifacts.features(student).uri, feature_files)


def _locate(artifacts: Artifacts, trials: Sequence[Trial]) -> Plan:
    """Gives every trial its run folder, and the sweep its own.

    Raises:
        ConfigError: two settings that are one student.
    """
    located = [replace(trial, run_uri=artifacts.of(trial.config).student.uri) for trial in trials]
    first: dict[str, Trial] = {}
    for trial in located:
        other = first.setdefault(trial.run_uri, trial)
        if other is not trial:
            raise ConfigError(
                f"sweep: {other.title!r} and {trial.title!r} train the same student, as what they differ in "
                "decides nothing about it; leave one out"
            )
    uri = artifacts.sweep([(trial.setting.name, trial.seed, trial.key) for trial in located]).uri
    return Plan(uri, artifacts, located)


def places_of_trials(artifacts: Artifacts, trials: Sequence[Trial]) -> list[str | None]:
    """All that the trials (with their run folders) are made of, and are."""
    uris: list[str | None] = [artifacts.clips.uri, artifacts.evaluation_clips.uri]
    for one in _one_a_setting(artifacts, trials).values():
        uris += one.student_inputs
    return [*uris, *(trial.run_uri for trial in trials)]


def sweep_places(artifacts: Artifacts) -> list[str | None]:
    """The sweep of a config that has one, and `places_of_trials`; raises ConfigError as `plan_trials`, `_locate`."""
    plan = _locate(artifacts, plan_trials(artifacts.config))
    return [plan.uri, *places_of_trials(artifacts, plan.trials)]


def _conclude(config: Config, plan: Plan) -> dict[str, Any]:
    before = find_ended(plan.uri, plan.trials)
    if not storage.is_complete(plan.uri):
        storage.write_bytes(storage.join(plan.uri, "config.yaml"), config.to_yaml().encode())
        say_inputs(plan.uri, places_of_trials(plan.artifacts, plan.trials))
    with parent_run(config, plan.uri) as parent:
        ended = run_trials(config, plan.uri, plan.artifacts.clips.uri, plan.trials, before, parent)
        nest_runs(config, parent, plan.uri, plan.trials, ended)
        if not any(e.status == "finished" for e in ended.values()):
            errors = "; ".join(f"{e.trial}: {e.error or e.status}" for e in ended.values())
            raise SweepFailed(f"sweep: none of {len(ended)} trials finished: {errors}")
        outcome = _score(config, plan, ended)
        best = choose_best(outcome.results, config.evaluate.score)
        score = config.evaluate.score
        first = next(iter(outcome.evaluations.values()))
        files, table = page_files(
            storage.name(plan.uri), outcome.results, outcome.others, outcome.baselines, first, best, config
        )
        _publish(plan, files, best_summary(best, score), ended)
        print(plain_text(table), flush=True)
        metrics, params = _best_numbers(best)
        log_results(config, parent, files, metrics, params)
        if best is not None:
            log(f"sweep: {best.reason}")
        registered = _register(config, plan, outcome, best)
    return _summary(plan, ended, before, outcome, best, registered)


def _score(config: Config, plan: Plan, ended: dict[str, Ended]) -> Outcome:
    """Every finished student with teachers and baselines, in one pass over the evaluation clips."""
    students = {
        trial.title: run_subject(trial.run_uri)
        for trial in plan.trials
        if ended[trial.key].status == "finished"
    }
    teachers = _teachers(plan) if config.evaluate.teacher else {}
    uri = next(iter(students.values())).model_uri
    assert uri is not None
    slots = load_model(uri, CheckpointHints()).config.num_slots
    baselines = trivial_subjects(config, slots, teachers | _one_student_a_setting(plan, students))
    clips = open_clips(plan.artifacts.evaluation_clips)
    found = score_subjects(plan.artifacts, clips, {**baselines, **teachers, **students})
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
                {t.seed: found[t.title].scores for t in by_status["finished"]},
                {t.seed: ended[t.key].error or "" for t in by_status["failed"]},
                {t.seed: ended[t.key].step for t in by_status["stopped"]},
            )
        )
    return Outcome(
        results,
        {name: found[name] for name in students},
        {name: found[name].scores for name in teachers},
        {name: found[name].scores for name in baselines},
    )


def _one_student_a_setting(plan: Plan, students: Mapping[str, Subject]) -> dict[str, Subject]:
    """Students by the names of their settings."""
    first: dict[str, Subject] = {}
    for trial in plan.trials:
        if trial.title in students:
            first.setdefault(trial.setting.name, students[trial.title])
    return first


def _teachers(plan: Plan) -> dict[str, Subject]:
    """Each teacher of a trial once, where it is there."""
    teachers: dict[str, Subject] = {}
    known = set()
    for setting, artifacts in _one_a_setting(plan.artifacts, plan.trials).items():
        uri = artifacts.teacher.uri
        if uri not in known and storage.exists(uri):
            known.add(uri)
            # Most sweeps have one; those of several need their names.
            name = "teacher" if not teachers else f"teacher ({setting})"
            teachers[name] = teacher_subject(artifacts.config, uri, artifacts.teacher_config)
    return teachers


def _publish(
    plan: Plan,
    files: Sequence[tuple[str, bytes]],
    best: dict[str, Any] | None,
    ended: dict[str, Ended],
) -> None:
    """Writes the sweep's files, then its manifest, unless a trial is worth another try."""
    if storage.is_complete(plan.uri):
        return
    for name, content in files:
        storage.write_bytes(storage.join(plan.uri, name), content)
    again = [e.trial for e in ended.values() if not e.final]
    if again:
        log(f"sweep: start it again to try once more: {'; '.join(again)}")
        return
    SweepManifest(
        fingerprint=storage.name(plan.uri),
        created=storage.timestamp(),
        clips_uri=plan.artifacts.clips.uri,
        trials=tuple(
            TrialEntry(
                setting=t.setting.name,
                values=dict(t.setting.values),
                seed=t.seed,
                run=t.run_uri,
                status=ended[t.key].status,
            )
            for t in plan.trials
        ),
        best=best,
    ).publish(plan.uri)


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
        done = register_run(trial.config, trial.run_uri, evaluation, contend=False, more_tags=tags)
        versions[trial.title] = done["version"]
    if best is None:
        return {"versions": versions, "champion": False, "reason": f"no trial has a {score}"}
    chosen = next(
        t for t in plan.trials if t.setting.name == best.result.setting.name and t.seed == best.seed
    )
    champion, reason = set_champion(config, versions[chosen.title], set(versions.values()))
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

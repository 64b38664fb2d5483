"""Trials on Ray Tune: as many at a time as can't starve each other, each in Ray Train or in its own process."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from pipeline import storage
from pipeline.clips.library import artifacts_of
from pipeline.compute import arrow_filesystem
from pipeline.config import Config, ConfigError
from pipeline.distill.ray_internals import has_dashboard, keep_aws_keys_from_tune
from pipeline.distill.ray_train import worker_places
from pipeline.distill.stage import distill
from pipeline.evaluate.scoring import TITLES
from pipeline.log import log, root_cause
from pipeline.sweep.ended import Ended, failed, finished, read_ended, write_ended
from pipeline.sweep.runs import child_tags, end_child
from pipeline.sweep.settings import Trial, grace_steps

# What a trial holds beside its Train workers, and what one without workers trains on.
WAITING_CPUS, TRAINING_CPUS = 0.1, 1.0


def run_trials(
    config: Config,
    sweep_uri: str,
    clips_uri: str,
    trials: Sequence[Trial],
    before: Mapping[str, Ended],
    parent: str,
) -> dict[str, Ended]:
    """Runs the trials that have not ended yet, in the connected Ray.

    Args:
        before: how those have ended that have (`find_ended`).
        parent: the id of the MLflow run that their runs belong to.

    Returns how each ended, by `Trial.key`; a trial that failed does not end the sweep.

    Raises:
        ConfigError: a trial that needs more than the cluster has.
    """
    ended = dict(before)
    pending = [trial for trial in trials if trial.key not in ended]
    if ended:
        names = "; ".join(trial.title for trial in trials if trial.key in ended)
        log(f"sweep: {len(ended)} of {len(trials)} trials have ended before and are not run again: {names}")
    if pending:
        _run_on_tune(config, sweep_uri, clips_uri, trials, pending, ended, parent)
    for trial in pending:
        lost = Ended("failed", trial.title, trial.run_uri, error="it was lost without a word", final=False)
        ended[trial.key] = read_ended(sweep_uri, trial) or lost
    return ended


def trial(options: Mapping[str, Any], jobs: Mapping[str, Any]) -> None:
    """What Tune runs, in a process of its own; `options["trial"]` says which. Ray shows its name before messages."""
    from ray import tune

    one: Trial = jobs["trials"][options["trial"]]
    started = time.monotonic()
    # A worker a trial, where there may be more: what is left is for other trials.
    settings: dict[str, Any] = {"workers": one.config.distill.fewest_workers}
    if one.config.distill.workers == 0:
        import torch

        torch.set_num_threads(1)  # of the one CPU that it holds
        settings["on_validation"] = lambda step, scores: tune.report({"step": step, **scores})
    else:
        from ray.tune.integration.ray_train import TuneReportCallback

        settings["train_callbacks"] = [TuneReportCallback()]
    try:
        artifacts = artifacts_of(one.config, jobs["clips"])
        distill(one.config, artifacts, title=one.title, run_tags=jobs["tags"], **settings)
        ended = finished(one, round(time.monotonic() - started, 1))
    except Exception as error:  # one trial's end is not the sweep's
        ended = failed(one, root_cause(error), round(time.monotonic() - started, 1))
    write_ended(jobs["sweep"], one, ended)
    tune.report({"ended": ended.status})


def concurrent_trials(nodes: Sequence[Mapping[str, float]], trials: Sequence[Config]) -> int:
    """How many of the trials may run at a time, so that the Train workers of each always find their place.

    Train reserves a trial's workers all together, but only after the trial itself has taken its CPUs: so there
    must be room for everybody's workers wherever the trials themselves have landed.

    Args:
        nodes: `CPU` and `GPU` of each.

    Raises:
        ConfigError: there is no place for even one.
    """
    settings = [config.distill for config in trials]
    workers = max(s.fewest_workers for s in settings)
    per_worker = max((s.cpus_per_worker for s in settings if s.workers), default=TRAINING_CPUS)
    own = max(WAITING_CPUS if s.workers else TRAINING_CPUS for s in settings)
    gpus = any(node.get("GPU", 0) for node in nodes)

    def fits(count: int) -> bool:
        if not workers:
            return sum(int(node.get("CPU", 0) // own) for node in nodes) >= count
        return worker_places(nodes, per_worker, on_gpus=gpus, taken=own * count) >= count * workers

    count = 0
    while count < len(trials) and fits(count + 1):
        count += 1
    if count == 0:
        total = sum(node.get("CPU", 0) for node in nodes)
        more = f" and {sum(node.get('GPU', 0) for node in nodes):g} GPUs" if gpus and workers else ""
        share = math.floor(100 * (total - own) / max(workers, 1)) / 100
        hint = (
            f"; nearest valid: distill.cpus_per_worker={share:g}"
            if workers and share > 0 and not more
            else ""
        )
        raise ConfigError(
            f"distill.workers: {workers} workers of {per_worker:g} CPUs, and {own:g} for the trial itself, don't "
            f"fit this cluster's {total:g} CPUs{more}{hint}"
            if workers
            else f"sweep: a trial needs {own:g} CPU, and no node of this cluster has one"
        )
    return count


def _quieten_tune() -> None:
    """Before Tune is imported: results are recorded here, and messages are this program's own."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # not every report is of a validation
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the sweep, not only this part of it
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "30")  # which a busy machine is soon over
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other one prints tables at any verbosity
    # It looks for the result files that were turned off.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


def _run_on_tune(
    config: Config,
    sweep_uri: str,
    clips_uri: str,
    trials: Sequence[Trial],
    pending: Sequence[Trial],
    ended: Mapping[str, Ended],
    parent: str,
) -> None:
    _quieten_tune()
    import ray
    from ray import tune

    keep_aws_keys_from_tune()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = concurrent_trials(nodes, [one.config for one in pending])
    if config.sweep.max_concurrent is not None:
        most = min(most, config.sweep.max_concurrent)
    log(f"sweep: {len(pending)} trials to run, up to {most} at a time")
    jobs = {
        "trials": {one.key: one for one in pending},
        "clips": clips_uri,
        "sweep": sweep_uri,
        "tags": child_tags(parent, sweep_uri),
    }
    holds = {one.key: WAITING_CPUS if one.config.distill.workers else TRAINING_CPUS for one in pending}
    scheduler = _asha(config, [ended[t.key] for t in trials if t.key in ended]) if config.sweep.asha else None
    root = storage.join(storage.absolute(config.storage.root), "ray")
    name = f"sweep-{storage.name(sweep_uri)}"
    storage.delete(storage.join(root, name))  # of a driver that was killed: our own records say what is done
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial, jobs=jobs),
            lambda options: tune.PlacementGroupFactory([{"CPU": holds[options["trial"]]}]),
        ),
        param_space={"trial": tune.grid_search([one.key for one in pending])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=most,
            # Saves the start of a process a trial; one that was stopped half-way is not used again.
            reuse_actors=scheduler is None,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage.filesystem(root)[1],
            storage_filesystem=arrow_filesystem(root),
            verbose=0,
            callbacks=[_follower(config, sweep_uri, pending, len(trials))],
            # Of the process; what goes wrong in the training is caught in it.
            failure_config=tune.FailureConfig(max_failures=config.distill.max_failures),
        ),
    )
    try:
        tuner.fit()
    finally:
        storage.delete(storage.join(root, name))


def _asha(config: Config, ended: Sequence[Ended]) -> Any:
    """The scheduler, which knows the validations of all trials that have ended before.

    Raises:
        ConfigError: the cluster has no dashboard, without which Ray leaks what a stopped trial with Train workers
            held, and the next one waits for ever.
    """
    from ray.tune.schedulers import ASHAScheduler

    if config.distill.workers and not has_dashboard():
        raise ConfigError(
            "sweep.asha: this Ray cluster runs without its dashboard, and would not get back what stopped trials "
            "held; start it with --include-dashboard=true, or use distill.workers=0"
        )
    scheduler = ASHAScheduler(
        time_attr="step",
        metric=f"validation_{config.evaluate.score}",
        mode="max",
        # Never reached: the validation at the end is not reported, as a trial that got there shall publish.
        max_t=config.distill.steps,
        grace_period=grace_steps(config),
        reduction_factor=config.sweep.reduction_factor,
    )
    for number, one in enumerate(ended):
        known: Any = SimpleNamespace(trial_id=f"ended-{number}")
        nobody: Any = None
        scheduler.on_trial_add(nobody, known)
        for row in one.validations:
            scheduler.on_trial_result(nobody, known, row)
        scheduler.on_trial_remove(nobody, known)
    return scheduler


def _follower(config: Config, sweep_uri: str, pending: Sequence[Trial], total: int) -> Any:
    """A Tune callback in the driver: a line when a trial begins and ends, and the records of what ASHA stops."""
    from ray.tune import Callback

    by_key = {one.key: one for one in pending}
    metric = f"validation_{config.evaluate.score}"

    class Follower(Callback):
        def __init__(self) -> None:
            self.left = len(pending)
            self.running: set[str] = set()
            self.validations: dict[str, list[dict[str, float]]] = {}

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            key = trial.config["trial"]
            if key not in self.running:
                log(f"sweep: {by_key[key].title} begins")
            self.running.add(key)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            row = {k: float(v) for k, v in result.items() if k == "step" or k.startswith("validation_")}
            known = self.validations.setdefault(trial.config["trial"], [])
            if metric in row and row not in known:
                known.append(row)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            key = trial.config["trial"]
            ended = None
            if "ended" in trial.last_result:
                ended = read_ended(sweep_uri, by_key[key])
            elif storage.is_complete(by_key[key].run_uri):  # was done before it could be stopped
                ended = finished(by_key[key])
                write_ended(sweep_uri, by_key[key], ended)
            self._end(key, ended or self._stopped(key))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            key = trial.config["trial"]
            error = RuntimeError("its process ended, out of memory or killed")
            ended = failed(by_key[key], error)
            write_ended(sweep_uri, by_key[key], ended)
            self._end(key, ended)

        def _stopped(self, key: str) -> Ended:
            one, rows = by_key[key], self.validations.get(key, [])
            step = int(rows[-1]["step"]) if rows else None
            run_id = end_child(one.config, one.run_uri, "KILLED")
            ended = Ended("stopped", one.title, one.run_uri, run_id, step=step, validations=rows)
            write_ended(sweep_uri, one, ended)
            return ended

        def _end(self, key: str, ended: Ended) -> None:
            self.left -= 1
            self.running.discard(key)
            seconds = f" in {ended.seconds:.0f} s" if ended.seconds is not None else ""
            log(
                f"sweep: {ended.trial} {_ended_as(ended, metric)}{seconds}; {total - self.left} of {total} ended, "
                f"{len(self.running)} running, {self.left - len(self.running)} waiting"
            )

    return Follower()


def _ended_as(ended: Ended, metric: str) -> str:
    if ended.status == "failed":
        return f"FAILED: {ended.error}"
    last = ended.losses if ended.status == "finished" else ended.validations[-1] if ended.validations else {}
    score = ""
    if metric in last:
        score = f" with {TITLES[metric.removeprefix('validation_')]} {100 * last[metric]:.1f} in validation"
    elif "total" in last:
        score = f" with loss {last['total']:.4f}"
    return (
        f"finished{score}" if ended.status == "finished" else f"stopped early after step {ended.step}{score}"
    )

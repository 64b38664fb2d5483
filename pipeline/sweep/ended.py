"""How each trial of a sweep ended: one small JSON file, by which a sweep that is started again skips it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from pipeline import storage
from pipeline.artifacts.manifests import RunManifest
from pipeline.artifacts.once import is_whole
from pipeline.distill.stage import NonFiniteLoss, run_files
from pipeline.log import redact
from pipeline.sweep.settings import Trial
from pipeline.tracking import HISTORY_FILE

TRIALS_FOLDER = "trials"


@dataclass(frozen=True)
class Ended:
    """The end of one trial."""

    status: Literal["finished", "stopped", "failed"]  # stopped: by ASHA, before its last step
    trial: str
    run_uri: str
    mlflow_run: str | None = None
    error: str | None = None
    final: bool = True  # False: failed for a reason that another try may not meet
    step: int | None = None  # the last one known
    seconds: float | None = None
    # Of each validation but the last: `step`, and scores as `validation_video_mbo`. What ASHA decides by.
    validations: list[dict[str, float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)  # of the last step


def _uri(sweep_uri: str, trial: Trial) -> str:
    return storage.join(sweep_uri, TRIALS_FOLDER, f"{trial.key}.json")


def write_ended(sweep_uri: str, trial: Trial, ended: Ended) -> None:
    storage.write_json(_uri(sweep_uri, trial), asdict(ended))


def read_ended(sweep_uri: str, trial: Trial) -> Ended | None:
    """The record of a trial; None where it has not ended."""
    try:
        return Ended(**storage.read_json(_uri(sweep_uri, trial)))
    except FileNotFoundError:
        return None


def failed(trial: Trial, error: BaseException, seconds: float | None = None) -> Ended:
    """A non-finite loss comes back with the same seed; whatever else went wrong is worth another try."""
    text = redact(f"{type(error).__name__}: {error}")
    final = isinstance(error, NonFiniteLoss)
    return Ended("failed", trial.title, trial.run_uri, error=text, final=final, seconds=seconds)


def finished(trial: Trial, seconds: float | None = None) -> Ended:
    """The record of a trial whose student is published."""
    manifest = RunManifest.read(trial.run_uri)
    history = storage.read_json(storage.join(trial.run_uri, HISTORY_FILE))
    return Ended(
        "finished",
        trial.title,
        trial.run_uri,
        manifest.mlflow_run,
        step=manifest.steps,
        seconds=seconds if seconds is not None else manifest.seconds,
        validations=[scores for row in history[:-1] if (scores := _validation(row))],
        losses=manifest.losses,
    )


def _validation(row: dict[str, float]) -> dict[str, float]:
    scores = {key: value for key, value in row.items() if key.startswith("validation_")}
    return {"step": row["step"], **scores} if scores else {}


def find_ended(sweep_uri: str, trials: Sequence[Trial]) -> dict[str, Ended]:
    """What has ended, by `Trial.key`: by its record, or because its student is there, from whatever job.

    Failures that are worth another try are left out, and students of which files are gone.
    """
    found = {}
    for trial in trials:
        ended, is_there = read_ended(sweep_uri, trial), is_whole(trial.run_uri, run_files)
        if is_there and (ended is None or ended.status != "finished"):
            ended = finished(trial)
            write_ended(sweep_uri, trial, ended)
        if ended is not None and ended.final and (is_there or ended.status != "finished"):
            found[trial.key] = ended
    return found

"""What is needed below a storage.root, and why: by MLflow, by a config, by jobs at work, or by what is needed itself.

In doubt a folder is needed: a name is enough for it, whatever path is before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import tracking
from pipeline.artifacts.manifests import RunManifest
from pipeline.config import Config
from pipeline.distill.checkpoint import CHECKPOINT_FOLDER
from pipeline.evaluate.records import ROLE
from pipeline.registry.stage import CHAMPION
from pipeline.registry.stock import Folder, Stock, places_of, read_manifests
from pipeline.tracking.client import all_pages


@dataclass(frozen=True)
class Known:
    """What MLflow knows of all roots."""

    versions: tuple[Any, ...]  # registered ones, but for `superseded`
    superseded: tuple[Any, ...]  # that shall go
    runs: tuple[Any, ...]  # of the pipeline, deleted ones too

    def active(self) -> list[Any]:
        return [run for run in self.runs if run.info.lifecycle_stage == "active"]

    def recorded(self, runs: Iterable[Any]) -> set[str]:
        """The places that runs are of."""
        return places_of(run.data.tags.get(tracking.RUN_TAG) for run in runs)


def ask_mlflow(client: Any, config: Config, superseded: Callable[[float], bool]) -> Known:
    """
    Args:
        superseded: whether a version of the config's registered model that no alias names shall go, by the time
            when it was made.

    Raises:
        ServerUnavailable, AccessDenied: MLflow, without which nobody knows what is needed.
    """
    from mlflow.entities import ViewType

    versions = list(all_pages(client.search_model_versions))
    experiments = [
        found.experiment_id for found in all_pages(client.search_experiments, view_type=ViewType.ALL)
    ]
    tagged = f"tags.`{tracking.RUN_TAG}` LIKE '%'"
    runs = tuple(all_pages(client.search_runs, experiments, tagged, run_view_type=ViewType.ALL))
    going = _superseded(client, config.mlflow.model_name, versions)
    going = [version for version in going if superseded(version.creation_timestamp / 1000)]
    numbers = {(version.name, version.version) for version in going}
    staying = tuple(version for version in versions if (version.name, version.version) not in numbers)
    return Known(staying, tuple(going), runs)


def _superseded(client: Any, name: str, versions: Iterable[Any]) -> list[Any]:
    """Versions of this pipeline that no alias names, where there is a champion."""
    own = [v for v in versions if v.name == name and tracking.RUN_TAG in v.tags]
    aliases = client.get_registered_model(name).aliases if own else {}
    named = {str(number) for number in aliases.values()}
    return [v for v in own if str(v.version) not in named] if CHAMPION in aliases else []


@dataclass(frozen=True)
class Marked:
    """The places that are needed, each with a reason in words."""

    reasons: dict[str, str]
    at_work: bool  # whether any job is
    named: frozenset[str]  # all that a reason names, those of checkpoints too

    def needs_checkpoints(self, folder: Folder) -> bool:
        """Whether one of a run's checkpoints is used as a model, such as a teacher."""
        return f"{folder.place}/{CHECKPOINT_FOLDER}" in self.named


def mark(stock: Stock, known: Known, own: Iterable[str], *, young: Callable[[float], bool]) -> Marked:
    """
    Args:
        own: places of the config that this was asked with.
        young: whether a time is too recent for what was changed then to go.

    Raises:
        ConfigError: a damaged manifest, so that nobody knows what its folder needs.
    """
    folders = list(stock.folders.values())
    read_manifests(f for f in folders if f.complete and f.kind != "pulled")
    holders = {folder.place: holder for folder in folders if (holder := folder.holder())}
    roots: list[tuple[str, Iterable[str]]] = [("this config uses it", own)]
    roots += [(f"models:/{v.name}/{v.version} needs it", _of_version(v)) for v in known.versions]
    finished = set(_finished_sweeps(folders, known))
    roots.append(("it is a finished sweep", finished))
    for run in known.active():
        if run.data.tags.get("role") == ROLE:
            roots.append(("a recorded evaluation needs it", places_of(run.data.tags.values())))
    roots += [(f"{holder} is at work in it", [place]) for place, holder in holders.items()]
    roots.append(("another MLflow has recorded it", _foreign(folders, known)))
    roots.append(("it was changed lately", [f.place for f in folders if young(f.changed)]))
    roots.append(("it is a link to another place", stock.links))
    reasons: dict[str, str] = {}
    named: set[str] = set()
    for reason, places in roots:
        named |= (here := set(places))
        for place in sorted(stock.matching(here)):
            reasons.setdefault(place, reason)
    _close(stock, reasons, named)
    return Marked(reasons, bool(holders), frozenset(named))


def _close(stock: Stock, reasons: dict[str, str], named: set[str]) -> None:
    """Adds what the needed folders are made of, and so on."""
    left = list(reasons)
    while left:
        place = left.pop()
        named |= (made_of := stock.folders[place].made_of())
        for below in stock.matching(made_of):
            if below not in reasons:
                reasons[below] = f"{place} is made of it"
                left.append(below)


def _of_version(version: Any) -> set[str]:
    """What a version names: its run, sweep and evaluation, and what a run that is gone was made of."""
    tags = version.tags
    pairs = (("clips", "clips"), ("targets", "targets"), ("sweeps", "sweep"))
    more = [f"{kind}/{tags[key]}" for kind, key in pairs if key in tags]
    return places_of([tags.get(tracking.RUN_TAG), tags.get("evaluation_uri"), *more])


def _finished_sweeps(folders: Iterable[Folder], known: Known) -> Iterator[str]:
    """But for those whose run somebody has deleted in MLflow."""
    deleted = known.recorded(known.runs) - known.recorded(known.active())
    yield from (f.place for f in folders if f.kind == "sweeps" and f.complete and f.place not in deleted)


def _foreign(folders: Iterable[Folder], known: Known) -> Iterator[str]:
    """Finished work that this MLflow has no run of, not even a deleted one."""
    ids, places = {run.info.run_id for run in known.runs}, known.recorded(known.runs)
    for folder in folders:
        if not folder.complete:
            continue
        if folder.kind == "evaluations" and folder.place not in places:
            yield folder.place
        elif folder.kind in ("students", "teachers"):
            manifest = folder.manifest
            assert isinstance(manifest, RunManifest)
            if manifest.mlflow_run not in ids:
                yield folder.place

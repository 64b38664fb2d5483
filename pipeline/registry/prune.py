"""Stage `prune`: what nothing needs any more, listed with its size, and deleted where that is asked for.

It marks what is needed (`needed`) and lists the rest. Before each kind is deleted, and again while that takes long,
everything is marked anew; before each folder its lease and its files are looked at again. A folder loses its
manifest first, under a lease of this job: nobody takes a half-deleted one for whole, and whoever wants to make it again
waits for the end. Whatever is interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from pipeline import storage, tracking
from pipeline.artifacts.once import LEASE_FILE, held_by, is_whole, lease
from pipeline.config import Config, ConfigError
from pipeline.distill.checkpoint import CHECKPOINT_FOLDER
from pipeline.distill.stage import run_files
from pipeline.log import Progress, log
from pipeline.registry.needed import Known, Marked, ask_mlflow, mark
from pipeline.registry.stock import KINDS, Folder, Spared, Stock, places_of, take_stock
from pipeline.registry.uploads import delete_upload, delete_version, find_uploads
from pipeline.tracking.client import ServerUnavailable

DAY = 86400.0  # seconds
TEMPORARY_DAYS = 1.0  # since a temporary file was written, before it counts as left behind
SHOWN = 100  # items in the summary
PLAN_HOLDS = 30.0  # seconds, after which everything is marked again,
PLAN_SHARE = 0.1  # of all time, which marking shall not exceed
VERSIONS, MODELS, TEMPORARY, CHECKPOINTS, RAY = (
    "registered versions",
    "models in MLflow",
    "temporary files",
    "checkpoints",
    "ray",
)
# In the order in which they are deleted: what depends comes before what it depends on.
ORDER = (VERSIONS, MODELS, TEMPORARY, CHECKPOINTS, RAY, *KINDS)
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}")


@dataclass(frozen=True)
class Item:
    """Something that can go."""

    kind: str
    path: str
    size: int  # bytes
    changed: float  # seconds since 1970
    reason: str
    delete: Callable[[], None]  # raises Spared

    def shown(self) -> dict[str, Any]:
        day = time.strftime("%Y-%m-%d", time.gmtime(self.changed))
        return {
            "path": self.path,
            "kind": self.kind,
            "bytes": self.size,
            "changed": day,
            "reason": self.reason,
        }


def prune(
    config: Config,
    made_of: Callable[[Config], Collection[str]],
    *,
    delete: bool = False,
    older_than: float = 7.0,
    versions: bool = False,
) -> dict[str, Any]:
    """Lists what nothing below `storage.root` needs, as a table, and deletes it where `delete` says so.

    Args:
        made_of: gives the URIs of what a config uses, which stays.
        older_than: days since the last change; what is younger stays, with all that it is made of.
        versions: whether versions of the registered model without an alias go too, where there is a champion.

    Returns the summary.

    Raises:
        ConfigError: nobody can know what is needed: no database, a damaged manifest, or as `made_of`.
        ServerUnavailable, AccessDenied: MLflow.
    """
    _require_database(config)
    work = _Pruning(config, places_of(made_of(config)), older_than, versions)
    try:
        plan = work.plan()
        _print(plan, work.stock, delete)
        deleted, spared, failed = _delete(plan, work) if delete else ([], {}, {})
    except ServerUnavailable as error:
        way_out = "without it nobody knows what is needed: give the same command again once it is there"
        raise ServerUnavailable(error.problem, way_out) from None
    items = deleted if delete else plan
    kinds = {kind: [item for item in items if item.kind == kind] for kind in ORDER}
    return {
        "status": "incomplete" if failed else "ok",
        "uri": work.root,
        "deleted": delete,
        "items": len(items),
        "bytes": sum(item.size for item in items),
        "kinds": {
            kind: {"items": len(found), "bytes": sum(i.size for i in found)}
            for kind, found in kinds.items()
            if found
        },
        "list": [item.shown() for item in items[:SHOWN]],
        "spared": spared,
        "failed": failed,
        "unknown": list(work.stock.unknown[:SHOWN]),
    }


def _require_database(config: Config) -> None:
    """Raises ConfigError where there is none: a new one would know of nothing that is needed."""
    uri = config.tracking_uri
    if uri.startswith("sqlite:///") and not storage.exists(uri.removeprefix("sqlite:///")):
        raise ConfigError(
            f"there is no MLflow database at {uri}, so nobody knows what is needed in {config.storage.root}; "
            "give mlflow.tracking_uri=… of your jobs"
        )


class _Pruning:
    """What can go below a config's root, found as often as it is asked for."""

    def __init__(self, config: Config, own: set[str], older_than: float, versions: bool) -> None:
        self.config, self.own, self.older_than, self.versions = config, own, older_than, versions
        self.root = storage.absolute(config.storage.root)
        self.client = tracking.connect(config)
        self.stock = Stock(self.root, {}, ())

    def plan(self) -> list[Item]:
        """What can go now, in the order in which it would be deleted."""
        # The folders first: what a job publishes and registers meanwhile is then in MLflow, and not in this list.
        self.stock = take_stock(self.root)
        known = ask_mlflow(
            self.client, self.config, lambda made: self.versions and not _young(self.older_than, made)
        )
        marked = mark(self.stock, known, self.own, young=partial(_young, self.older_than))
        items = [*self._in_mlflow(known)]
        for folder in self.stock.folders.values():
            if folder.place in self.stock.links:
                continue
            if folder.place not in marked.reasons:
                items.append(self._folder(folder, _why(folder)))
            elif not folder.holder():
                items += self._parts(folder, marked)
        if not marked.at_work:
            for folder in self.stock.ray:
                if not _young(max(self.older_than, TEMPORARY_DAYS), folder.changed):
                    items.append(self._folder(folder, "Ray's own files, of a job that was killed"))
        return sorted(items, key=lambda item: (ORDER.index(item.kind), item.path))

    def _folder(self, folder: Folder, reason: str) -> Item:
        delete = partial(_delete_folder, folder)
        kind = RAY if folder.kind == "ray" else folder.kind
        return Item(kind, folder.uri, folder.size, folder.changed, reason, delete)

    def _parts(self, folder: Folder, marked: Marked) -> Iterator[Item]:
        """Of a folder that stays: what was left in it when its job ended."""
        for file in folder.files:
            limit = max(self.older_than, TEMPORARY_DAYS)
            if _TEMPORARY.fullmatch(PurePosixPath(file.name).name) and not _young(limit, file.changed):
                uri = storage.join(folder.uri, file.name)
                reason = "left by a job that was killed while it wrote"
                yield Item(
                    TEMPORARY, uri, file.size, file.changed, reason, partial(_delete_part, folder, uri)
                )
        steps = [file for file in folder.files if file.name.startswith(f"{CHECKPOINT_FOLDER}/")]
        finished = folder.kind in ("students", "teachers") and folder.complete
        # Where the model has lost a file, the last checkpoint is what it is made from again.
        whole = finished and set(run_files(folder.uri)) <= folder.names
        used = marked.needs_checkpoints(folder)
        if whole and steps and not used and not _young(self.older_than, folder.changed):
            uri, size = storage.join(folder.uri, CHECKPOINT_FOLDER), sum(file.size for file in steps)
            changed, reason = max(file.changed for file in steps), "of a finished run, which has its model"
            yield Item(CHECKPOINTS, uri, size, changed, reason, partial(_delete_checkpoints, folder, uri))

    def _in_mlflow(self, known: Known) -> Iterator[Item]:
        for version in known.superseded:
            path, changed = f"models:/{version.name}/{version.version}", version.creation_timestamp / 1000
            delete = partial(delete_version, self.client, version)
            yield Item(VERSIONS, path, 0, changed, "no alias names it, and --versions was given", delete)
        for upload in find_uploads(self.config, known, self.root):
            if not _young(self.older_than, upload.changed):
                delete = partial(delete_upload, self.client, upload)
                reason = "no registered version has it"
                yield Item(MODELS, upload.uri, upload.size, upload.changed, reason, delete)


def _young(days: float, changed: float) -> bool:
    return not time.time() - changed >= days * DAY


def _why(folder: Folder) -> str:
    if not folder.complete:
        return "unfinished, and no job is at work in it"
    if folder.kind in ("evaluations", "sweeps"):
        return "its MLflow run was deleted"
    if folder.kind == "pulled":
        return "a copy of a registered version, which is fetched again where it is needed"
    if folder.kind == "students":
        return "not registered, not evaluated, in no finished sweep"
    return "nothing that is needed is made of it"


def _delete(plan: Sequence[Item], work: _Pruning) -> tuple[list[Item], dict[str, str], dict[str, str]]:
    """Deletes what was listed and still can go; returns that, and by their paths what was spared or failed, and why."""
    from mlflow.exceptions import MlflowException

    deleted: list[Item] = []
    spared: dict[str, str] = {}
    failed: dict[str, str] = {}
    with Progress("prune", len(plan), "items") as progress:
        for kind in ORDER:
            listed = [item.path for item in plan if item.kind == kind]
            stale_at = -math.inf
            for path in listed:
                if time.monotonic() >= stale_at:
                    began = time.monotonic()
                    now = {item.path: item for item in work.plan()}
                    ended = time.monotonic()
                    stale_at = ended + max(PLAN_HOLDS, (ended - began) / PLAN_SHARE)
                try:
                    if path not in now:
                        raise Spared("it is needed now, or gone")
                    now[path].delete()
                    deleted.append(now[path])
                except Spared as error:
                    spared[path] = str(error)
                    log(f"prune: {path} stays: {error}")
                except storage.UnavailableError:
                    raise
                except (OSError, MlflowException) as error:  # such as another user's files
                    failed[path] = str(error)
                    log(f"prune: {path} could not be deleted: {error}")
                progress.advance()
    return deleted, spared, failed


def _delete_folder(folder: Folder) -> None:
    """Raises Spared where a job is at work in it, or has been since it was listed."""
    _check_unchanged(folder)
    with lease(folder.uri, "prune"):
        _check_unchanged(folder, ours=True)
        storage.delete(storage.join(folder.uri, storage.MANIFEST))
        storage.empty_folder(folder.uri, but=LEASE_FILE)
    storage.remove_if_empty(folder.uri)


def _delete_checkpoints(folder: Folder, uri: str) -> None:
    with lease(folder.uri, "prune"):
        _check_unchanged(folder, ours=True)
        if not is_whole(folder.uri, run_files):
            raise Spared("its model is gone")
        storage.delete(uri)


def _delete_part(folder: Folder, uri: str) -> None:
    if holder := held_by(folder.uri):
        raise Spared(f"{holder} is at work there")
    storage.delete(uri)


def _check_unchanged(folder: Folder, *, ours: bool = False) -> None:
    if not ours and (holder := held_by(folder.uri)):
        raise Spared(f"{holder} is at work in it")
    now = {file for file in storage.list_files(folder.uri) if file.name != LEASE_FILE}
    if now != {file for file in folder.files if file.name != LEASE_FILE}:
        raise Spared("it has changed since it was listed")


def _print(plan: Sequence[Item], stock: Stock, delete: bool) -> None:
    for kind in ORDER:
        if found := [item for item in plan if item.kind == kind]:
            print(f"{kind}: {len(found)}, {in_bytes(sum(item.size for item in found))}")
            for item in found:
                day = item.shown()["changed"]
                print(f"  {in_bytes(item.size):>9}  {day}  {item.path}  ({item.reason})")
    if stock.unknown:
        more = f" and {len(stock.unknown) - 10} more" if len(stock.unknown) > 10 else ""
        print(f"unknown, left alone: {', '.join(stock.unknown[:10])}{more}")
    total = in_bytes(sum(item.size for item in plan))
    then = "" if delete or not plan else "; the same command with --delete deletes them"
    print(f"{len(plan)} things, {total}, that nothing below {stock.root} needs{then}", flush=True)


def in_bytes(count: float) -> str:
    """1.5 MB"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

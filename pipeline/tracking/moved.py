"""A moved storage.root: the records of its SQLite MLflow database, and its manifests, name folders by absolute paths.

`check_not_moved` says so before anything is written; `relocate` writes what was recorded for the place that is now.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline import storage
from pipeline.artifacts.once import LEASE_FILE, held_by
from pipeline.config import Config, ConfigError
from pipeline.log import log

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
# MLflow's tables that hold places. Not `params`: they say what a run was given, wherever that is now.
_TABLES = (
    *("experiments", "experiment_tags", "runs", "tags", "datasets"),
    *("logged_models", "logged_model_tags", "logged_model_params"),
    *("registered_models", "registered_model_tags", "model_versions", "model_version_tags"),
)


def check_not_moved(config: Config) -> None:
    """Raises ConfigError where the config's experiment keeps its files in a root that is not `storage.root`.

    Only of the default database, which lies in the root: whoever names a database may share it among roots.
    """
    root = storage.absolute(config.storage.root)
    if storage.is_remote(root) or config.tracking_uri != f"sqlite:///{Path(root) / DATABASE}":
        return
    if location := _locations(Path(root) / DATABASE).get(config.mlflow.experiment):
        _refuse_another(location, root)


def check_source(source: str, tracking_uri: str) -> None:
    """Raises ConfigError where a registered version's files are gone from their place but lie beside the database."""
    path = _local_path(source)
    if path is None or path.exists() or not tracking_uri.startswith("sqlite:///"):
        return
    root = Path(tracking_uri.removeprefix("sqlite:///")).absolute().parent
    old, found, below = str(path).partition(f"/{ARTIFACTS}/")
    if found and (root / ARTIFACTS / below).exists():
        raise ConfigError(_moved(old, str(root)))


def _locations(database: Path) -> dict[str, str]:
    """Where each experiment keeps its files; empty where the database is not there, or has no tables yet."""
    if not database.exists():
        return {}
    uri = f"{database.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60)) as connection:
        try:
            return dict(connection.execute("SELECT name, artifact_location FROM experiments"))
        except sqlite3.DatabaseError:  # MLflow says what is wrong with it
            return {}


def _refuse_another(location: str, root: str) -> None:
    path = _local_path(location)
    if path is None or path.name != ARTIFACTS:  # not by this pipeline
        return
    if os.path.realpath(path.parent) != os.path.realpath(root):
        raise ConfigError(_moved(str(path.parent), root))


def _moved(old: str, root: str) -> str:
    repair = shlex.join(["slotmatch", "relocate", old, f"storage.root={root}"])
    return (
        f"storage.root: {root} was {old} when {root}/{DATABASE} was made, which still leads there; "
        f"if it was moved or copied, let it follow: {repair}"
    )


def _local_path(uri: str) -> Path | None:
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if uri.startswith("/") else None


def relocate(config: Config, old: str) -> dict[str, Any]:
    """Makes the database and the manifests of a moved `storage.root` name it instead of `old`; returns the summary.

    What names it already stays, so that it may be done again. The database is copied first, and follows all in one
    transaction, after the manifests: one that was interrupted is still refused by `check_not_moved`.

    Raises:
        ConfigError: there is nothing that was at `old`, or a job is at work in the folder.
    """
    root = storage.absolute(config.storage.root)
    before = os.path.normpath(storage.absolute(old))
    database = Path(root) / DATABASE
    if storage.is_remote(root) or not database.exists():
        raise ConfigError(f"storage.root: there is no {DATABASE} in {root}; give the folder that was moved")
    if before == root:
        raise ConfigError(f"{old!r} is storage.root itself; give the folder that it was before")
    _check_at_rest(root)
    rewrite = _rewriter(before, root)
    with contextlib.closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        changes = list(_changes(connection, rewrite))
        manifests = _manifests(root, rewrite)
        backup = _back_up(database) if changes else None
        for uri, content in manifests:
            storage.write_json(uri, content)
        for statement, values in changes:
            connection.execute(statement, values)
        connection.execute("COMMIT")
    if not changes and not manifests:  # was done before, or `old` is mistyped
        for location in _locations(database).values():
            _refuse_another(location, root)
    log(
        f"relocate: {len(changes)} records and {len(manifests)} manifests lead to {root} now, not to {before}"
    )
    return {"uri": root, "records": len(changes), "manifests": len(manifests), "backup": backup}


def _check_at_rest(root: str) -> None:
    for folder, _, files in os.walk(root):
        if LEASE_FILE in files and (holder := held_by(folder)):
            raise ConfigError(f"storage.root: {holder} is at work in {folder}; wait for its end, or stop it")


def _rewriter(old: str, new: str) -> Callable[[str], str]:
    """What replaces `old` by `new` in a text, as a path or a file URI: at its beginning, or where quoted in JSON."""
    pairs = {old: new, Path(old).as_uri(): Path(new).as_uri()}
    # A folder that was moved into itself, /a to /a/b: what lies in /a/b has followed already.
    done = re.escape(new[len(old) :]) + r"(?=/|\"|$)" if new.startswith(f"{old}/") else r"$^"
    either = "|".join(re.escape(text) for text in sorted(pairs, key=len, reverse=True))
    pattern = re.compile(rf'(?:(?<=^)|(?<=")|(?<=\s)|(?<=`))({either})(?!{done})(?=/|"|\s|`|$)')
    return lambda text: pattern.sub(lambda match: pairs[match[1]], text)


def _changes(
    connection: sqlite3.Connection, rewrite: Callable[[str], str]
) -> Iterator[tuple[str, tuple[str, int]]]:
    """The updates that let every record follow."""
    for table in _TABLES:
        for column in [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]:
            rows = connection.execute(f"SELECT rowid, {column} FROM {table} WHERE typeof({column}) = 'text'")
            for row, text in rows:
                if (changed := rewrite(text)) != text:
                    yield f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (changed, row)


def _manifests(root: str, rewrite: Callable[[str], str]) -> list[tuple[str, Any]]:
    """The manifests, and the records of a sweep's trials, that have to change, with their new content."""
    changed = []
    for folder, below, files in os.walk(root):
        if folder == root:
            below[:] = [name for name in below if name != ARTIFACTS]
        for name in files:
            if name == storage.MANIFEST or (name.endswith(".json") and os.path.basename(folder) == "trials"):
                uri = os.path.join(folder, name)
                before = storage.read_json(uri)
                after = _each_text(before, rewrite)
                if after != before:
                    changed.append((uri, after))
    return changed


def _each_text(value: Any, rewrite: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _each_text(one, rewrite) for key, one in value.items()}
    if isinstance(value, list):
        return [_each_text(one, rewrite) for one in value]
    return rewrite(value) if isinstance(value, str) else value


def _back_up(database: Path) -> str:
    """Copies the database, whose transaction keeps others from writing, to a name that is free."""
    copy = database.with_name(f"{DATABASE}.before-{storage.timestamp().replace(':', '')}")
    with (
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return str(copy)

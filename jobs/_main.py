"""What every entry point does: parse, call the library, end stdout with one line of JSON.

Exit codes: 0 done, 1 failed, 2 a command line or config that can't be run (before Ray starts).
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import storage
from pipeline.compute import root_cause
from pipeline.config import Config, ConfigError, load_config, resolve_config
from pipeline.log import log, redact, redact_output, redacted, traceback_text


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line without the secrets in it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(redact(message), file)


def run_stage(
    job: str,
    description: str,
    stage: Callable[[Config], dict[str, Any]],
    check: Callable[[Config], object] = lambda config: None,
) -> int:
    """The command line of a stage that takes a config.

    `check` may raise a ConfigError for a config that this stage can't run, also in a dry run.
    """
    redact_output()
    parser = Parser(f"python -m jobs.{job}", description=description)
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="PRESET.yaml or section.key=value",
        help="what differs from it: files of a few settings, as in configs/methods/, and settings",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    arguments = parser.parse_intermixed_args()
    try:
        presets = [word for word in arguments.changes if re.fullmatch(r"[^=]+\.ya?ml", word)]
        overrides = [word for word in arguments.changes if word not in presets]
        config = load_config(arguments.config, overrides, presets=presets)
        check(config)
    except ConfigError as error:
        return refuse(job, error)
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0
    return report(job, lambda: stage(config))


def split_settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command-line words that are no settings, and the `key=value` ones."""
    words = [a for a in arguments if not re.match(r"[a-z_.]+=", a)]
    return words, dict(a.split("=", 1) for a in arguments if a not in words)


REGISTRY_SETTINGS = ("mlflow.tracking_uri", "storage.root")


def check_settings(settings: dict[str, str], known: Sequence[str]) -> None:
    """Raises ConfigError for the first key that is not among the known ones."""
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(known)}"
            raise ConfigError(f"{key}: unknown setting (value {value!r}); {hint}")


def registry_uri(settings: dict[str, str]) -> str:
    """The tracking server or database, for jobs that take no config file."""
    chosen = {k: v for k, v in settings.items() if k in REGISTRY_SETTINGS}
    if "storage.root" in chosen:
        chosen["storage.root"] = storage.absolute(chosen["storage.root"])
    return resolve_config({}, [f"{k}={v}" for k, v in chosen.items()]).tracking_uri


def refuse(job: str, error: Exception) -> int:
    """Says what can't be run; returns the exit code."""
    log("\n".join(f"error: {line}" for line in str(error).splitlines()))
    _print_summary({"job": job, "status": "refused", "error": str(error)})
    return 2


def _print_summary(summary: dict[str, Any]) -> None:
    sys.stdout.flush()
    print(json.dumps(redacted(summary)))


def report(job: str, work: Callable[[], dict[str, Any]]) -> int:
    """Runs a job and prints its summary; an error is one clear line, with its traceback before it."""
    redact_output()
    started = time.monotonic()

    def elapsed() -> float:
        return round(time.monotonic() - started, 1)

    try:
        summary = work()
    except ConfigError as error:
        return refuse(job, error)
    except KeyboardInterrupt:
        log(f"{job}: interrupted; run it again to go on")
        _print_summary({"job": job, "status": "interrupted", "seconds": elapsed()})
        return 1
    except Exception as error:
        cause = root_cause(error)
        if not _is_ours(cause):
            log(traceback_text(error).rstrip())
        log(f"error: {cause}")
        _print_summary({"job": job, "status": "failed", "seconds": elapsed(), "error": str(cause)})
        return 1
    _print_summary({"job": job, "status": "ok", "seconds": elapsed(), **summary})
    return 0


def _is_ours(error: BaseException) -> bool:
    """Errors that were raised for the user to read, so that a traceback would only hide them."""
    return type(error).__module__.startswith("pipeline") or isinstance(error, (FileNotFoundError, ValueError))

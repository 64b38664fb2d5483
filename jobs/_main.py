"""What every entry point does: parse, call the stage, end stdout with one line of JSON.

One grammar: `python -m jobs.STAGE [WORDS …] CONFIG.yaml [PRESET.yaml …] [section.key=value …] [--flags]`. Each
`jobs/STAGE.py` declares a `Job`, which `run` runs and `parse` only reads.
Exit codes: 0 done, 1 failed, 2 a command line or config that can't be run (before Ray starts).
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from jobs._help import help_text
from jobs._job import Job
from pipeline.config import Config, ConfigError, Section, load_config, read_settings, shipped_configs
from pipeline.log import log, redact, redact_output, redacted, root_cause, traceback_text
from pipeline.tracking.moved import check_not_moved

STAGES = (
    # In the order of the flow; train is teacher by another name.
    *("shard", "teacher", "train", "cache", "distill", "evaluate", "register", "pipeline"),
    *("pull", "segment", "export", "lineage"),  # what to do with a registered model
    *("relocate", "prune"),  # a storage.root that was moved, or is full
    *("sweep", "evidence", "rivals", "report"),  # comparisons
)


@dataclass(frozen=True)
class Call:
    """A command line that can be run: `job.stage(config, **arguments)`."""

    job: Job
    config: Config
    arguments: dict[str, Any]
    dry_run: bool

    def to_yaml(self) -> str:
        """What it would be run with."""
        if not self.job.keys:
            return self.config.to_yaml()
        values = dict(self.arguments)
        if isinstance(settings := values.pop("settings", None), Section):
            values |= settings.model_dump(mode="json")
        for key in self.job.keys:
            section, name = key.split(".")
            values[key] = getattr(getattr(self.config, section), name)
        values |= {s: getattr(self.config, s).model_dump(mode="json") for s in self.job.sections}
        return yaml.safe_dump(values, sort_keys=False)


def find_job(stage: str) -> Job:
    """The job of a stage. Raises ConfigError, which names the nearest one, for any other word."""
    if stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(STAGES)}"
        raise ConfigError(f"{stage!r} is no stage; {hint}")
    return importlib.import_module(f"jobs.{stage}").JOB


def _function(named: str | Callable[..., Any]) -> Callable[..., Any]:
    """A job's function, imported now where it is only named."""
    return pkgutil.resolve_name(named) if isinstance(named, str) else named


def parse(job: str, words: Sequence[str]) -> Call:
    """Reads the command line of a stage, its config included, without running it.

    Raises:
        ConfigError: no such stage, or what can't be run: words, files, keys or values.
        SystemExit: --help or --schema, after it was printed.
    """
    return _parse(find_job(job), words, f"python -m jobs.{job}")


def run(job: Job, words: Sequence[str] | None = None, *, called: str = "") -> int:
    """Runs a job from its command line (`sys.argv`'s by default) and prints its summary; returns the exit code."""
    redact_output()
    try:
        call = _parse(job, sys.argv[1:] if words is None else words, called or f"python -m jobs.{job.name}")
    except ConfigError as error:
        return refuse(job.name, error)
    if call.dry_run:
        print(redact(call.to_yaml()), end="")
        return 0
    started = time.monotonic()
    try:
        if not call.job.keys:
            check_not_moved(call.config)
        summary = _function(job.stage)(call.config, **call.arguments)
    except ConfigError as error:
        return refuse(job.name, error)
    except (Exception, KeyboardInterrupt) as error:
        summary = _failure(job.name, error)
    seconds = round(time.monotonic() - started, 1)
    summary = {"job": job.name, "status": "ok", "seconds": seconds, **summary}
    _print_summary(summary)
    return int(summary["status"] != "ok")  # a summary may have a status of its own


class _Parser(argparse.ArgumentParser):
    def __init__(self, job: Job, called: str) -> None:
        super().__init__(add_help=False)
        self._job, self._called = job, called
        self.add_argument("words", nargs="*")
        for option in job.options:
            if option.metavar:
                self.add_argument(option.flag, type=option.type, default=option.default)
            else:
                self.add_argument(option.flag, action="store_true")
        self.add_argument("--dry-run", action="store_true")
        self.add_argument("--schema", action=_Schema, nargs=0)
        self.add_argument("-h", "--help", action="help")

    def format_help(self) -> str:
        return help_text(self._job, self._called)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self._called} --help")


class _Schema(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(json.dumps(Config.model_json_schema(), indent=2))
        parser.exit()


def _parse(job: Job, words: Sequence[str], called: str) -> Call:
    parser = _Parser(job, called)
    parsed, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_flag_hint(job, unknown[0])}")
    options = vars(parsed)
    typed, dry_run = options.pop("words"), options.pop("dry_run")
    del options["schema"]
    others = [word for word in typed if not _is_setting(word)]
    # The first word is the config, whatever it is called, of a job that has no words of its own.
    files = [word for n, word in enumerate(others) if _is_yaml(word) or (n == 0 and not job.words)]
    arguments, overrides = {}, [word for word in typed if word not in files]
    if job.words:
        own, overrides = _split(job, [word for word in typed if _is_setting(word)])
        arguments = _fill(job, [word for word in others if word not in files], called)
        if job.settings is not None:
            arguments["settings"] = read_settings(job.settings, own)
    path: str | Path | None = files[0] if files else None
    if path is None and job.default_config:
        path = shipped_configs().get(job.default_config, Path(job.default_config))
    if path is None and not job.keys:
        raise ConfigError(f"no config given{_file_hint(typed)}; see {called} --help")
    config = load_config(path, overrides, presets=files[1:])
    arguments |= options
    if job.check is not None:
        _function(job.check)(config, **arguments)
    return Call(job, config, arguments, dry_run)


def _is_setting(word: str) -> bool:
    return re.match(r"[a-z_.]+=", word) is not None


def _is_yaml(word: str) -> bool:
    return re.fullmatch(r"[^=]+\.ya?ml", word) is not None


def _fill(job: Job, words: list[str], called: str) -> dict[str, Any]:
    """The job's words by their names, as its stage takes them."""
    arguments: dict[str, Any] = {}
    for word in job.words:
        if not words:
            raise ConfigError(f"no {word.shown.split()[0].lower()} given; see {called} --help")
        arguments[word.name] = words if word.many else words[0]
        words = [] if word.many else words[1:]
    if words:
        raise ConfigError(f"{words[0]!r} is not of the form key=value")
    return arguments


def _split(job: Job, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The job's own settings, and the overrides of the config.

    Raises:
        ConfigError: a key that is neither.
    """
    own = list(job.settings.model_fields) if job.settings is not None else []
    known = [*own, *job.keys]
    settings, overrides = {}, []
    for word in words:
        key, value = word.split("=", 1)
        if key not in known and key.split(".")[0] not in job.sections:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(known)}"
            raise ConfigError(f"{key}: unknown setting (value {value!r}){_file_hint([word]) or hint}")
        if key in own:
            settings[key] = value
        else:
            overrides.append(word)
    return settings, overrides


def _flag_hint(job: Job, word: str) -> str:
    """What to type for a flag that there is none of."""
    key = word.lstrip("-").split("=")[0]
    if os.path.exists(word):
        return f"; the file of this name is ./{word}"
    if "." in key or (job.settings is not None and key in job.settings.model_fields):
        return f"; a setting has no dashes: {key}=…"
    near = difflib.get_close_matches(
        word, [*(o.flag for o in job.options), "--dry-run", "--schema", "--help"], n=1
    )
    return f"; did you mean {near[0]!r}?" if near else ""


def _file_hint(words: Sequence[str]) -> str:
    """What to type for a file whose name reads as a setting."""
    file = next((word for word in words if _is_setting(word) and os.path.exists(word)), None)
    return f"; the file of this name is ./{file}" if file else ""


def refuse(job: str, error: Exception) -> int:
    """Says what can't be run; returns the exit code."""
    log("\n".join(f"error: {line}" for line in str(error).splitlines()))
    _print_summary({"job": job, "status": "refused", "error": str(error)})
    return 2


def _print_summary(summary: dict[str, Any]) -> None:
    sys.stdout.flush()
    print(json.dumps(redacted(summary)))


def _failure(job: str, error: BaseException) -> dict[str, Any]:
    """Says why a job ended in one clear line, with the traceback before it; returns what its summary says of it."""
    if isinstance(error, KeyboardInterrupt):
        log(f"{job}: interrupted; run it again to go on")
        return {"status": "interrupted"}
    cause = root_cause(error)
    if not _is_ours(cause):
        log(traceback_text(error).rstrip())
    said = str(cause) or type(cause).__name__
    log(f"error: {said}")
    return {"status": "failed", "error": said}


def _is_ours(error: BaseException) -> bool:
    """Errors that were raised for the user to read, so that a traceback would only hide them."""
    return type(error).__module__.startswith("pipeline") or isinstance(error, (FileNotFoundError, ValueError))

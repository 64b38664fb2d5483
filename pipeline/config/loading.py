"""From YAML files and overrides to a `Config`, or to an error that explains what is wrong."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.checks import check_combinations, check_dataset, check_models, check_secrets
from pipeline.config.fields import ConfigError, Section
from pipeline.config.models import ViT
from pipeline.config.sections import Config
from pipeline.config.shipped import find_config, with_shipped_models
from pipeline.log import redact

S = TypeVar("S", bound=Section)


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, presets: Sequence[str | Path] = ()
) -> Config:
    """Reads a YAML config, lays presets over it, and applies overrides of the form `section.key=value`.

    Without a path it is the defaults. A preset is a YAML file that holds a few keys only, as those in
    configs/methods/; the last one wins. Files that are not there are looked for among those shipped.

    Raises:
        ConfigError: no such file, not YAML, or any key or value that can't be used.
    """
    values: dict[str, Any] = {}
    for file in (path, *presets):
        if file is not None:
            _lay_over(values, _read_yaml(file))
    return _with_absolute_paths(resolve_config(values, overrides))


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        file = find_config(path)
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} can't be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(redact(f"config file {str(path)!r} is not YAML: {error}")) from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r} must hold sections, not {type(values).__name__}")
    with_shipped_models(file, values)
    return values


def _lay_over(values: dict[str, Any], others: dict[str, Any]) -> None:
    """Changes `values` where `others` have something to say."""
    for key, other in others.items():
        if isinstance(other, dict) and isinstance(values.get(key), dict):
            _lay_over(values[key], other)
        else:
            values[key] = other


def _with_absolute_paths(config: Config) -> Config:
    """The config with local paths made absolute: Ray's workers run in other folders than the job."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).expanduser().absolute())

    values = config.model_dump(mode="json")
    values["dataset"]["path"] = absolute(config.dataset.path)
    values["teacher"]["checkpoint"] = absolute(config.teacher.checkpoint)
    values["storage"] |= {key: absolute(values["storage"][key]) for key in ("root", "cache")}
    if not (config.evaluate.model or "").startswith("models:/"):
        values["evaluate"]["model"] = absolute(config.evaluate.model)
    for name in ("teacher", "student"):
        weights = values[name]["backbone_weights"]
        values[name]["backbone_weights"] = weights if weights in ("timm", "random") else absolute(weights)
    uri = config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri.startswith("sqlite:///"):
        uri = "sqlite:///" + str(absolute(uri.removeprefix("sqlite:///")))
    values["mlflow"]["tracking_uri"] = uri  # as the job's environment has it, for workers that have another
    return Config.model_validate(values)


def resolve_config(values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A `Config` from nested plain values and overrides; errors as in `load_config`."""
    # A section is None where all that is below its name is commented out.
    values = {k: v for k, v in copy.deepcopy(values).items() if v is not None}
    for override in overrides:
        _apply_override(values, override)
    config = _validated(Config, values)
    checks = (check_secrets, check_dataset, check_models, check_combinations)
    problems = [problem for check in checks for problem in check(config)]
    if problems:
        raise ConfigError(redact("\n".join(problems)))
    return config


def read_settings(model: type[S], settings: Mapping[str, str]) -> S:
    """A job's own settings, which stand in no section, from what was typed; errors as in `load_config`."""
    texts = {name for name, field in model.model_fields.items() if field.annotation is str}
    return _validated(model, {k: v if k in texts else _value(v) for k, v in settings.items()})


def _validated(model: type[S], values: dict[str, Any]) -> S:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A union complains once for each of its members; a mapping was never meant to be a name.
        errors = [e for e in error.errors() if not (e["loc"][-1] == "str" and isinstance(e["input"], dict))]
        raise ConfigError(redact("\n".join(_explain(e, model) for e in errors))) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or "." not in key:
        raise ConfigError(redact(f"override {override!r} is not of the form section.key=value"))
    _assign(values, key, _value(text), override)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return text


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, last = key.split(".")
    node = values
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(redact(f"override {override!r}: {section!r} is a value, not a section"))
    node[last] = value


def with_presets(config: Config, *presets: str | Path) -> Config:
    """The same config with presets laid over it; errors as in `load_config`."""
    values = config.model_dump(mode="json")
    for file in presets:
        _lay_over(values, _read_yaml(file))
    return _with_absolute_paths(resolve_config(values))


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The same config with other values under some keys (`distill.beta`); errors as in `load_config`."""
    values = config.model_dump(mode="json")
    for key, value in overrides.items():
        if "." not in key:
            raise ConfigError(f"{key}: is not of the form section.key")
        _assign(values, key, copy.deepcopy(value), key)
    return _with_absolute_paths(resolve_config(values))


def _explain(error: Any, model: type[Section]) -> str:
    """One line for one pydantic error: the key, the value, and what would be valid."""
    location = [part for part in error["loc"] if part not in ("str", "ViT")]
    key = ".".join(str(part) for part in location)
    value, kind, limits = error.get("input"), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        names = _field_names(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.4)
        prefix = ".".join(str(part) for part in location[:-1])
        hint = f"did you mean {'.'.join(filter(None, [prefix, near[0]]))!r}?" if near else ""
        return f"{key}: unknown key (value {value!r}); {hint or 'valid: ' + ', '.join(names)}"
    if kind == "invalid_key":
        return f"{key}: keys must be text"
    if kind == "model_type":
        return f"{key}: {value!r} is not a section of keys and values"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(limits.get("expected", "")))
        near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)
        return f"{key}: {value!r} is not one of {', '.join(valid)}; nearest: {near[0] if near else valid[0]}"
    for name, word in (("ge", "at least"), ("le", "at most"), ("gt", "more than"), ("lt", "less than")):
        if name in limits:
            nearest = f"; nearest valid: {limits[name]}" if name in ("ge", "le") else ""
            return f"{key}: {value!r} must be {word} {limits[name]}{nearest}"
    if kind == "missing" and len(location) == 1:
        return f"{key}: is missing; give {key}=…"
    if kind == "missing":
        return f"{key}: is missing (needed beside {', '.join(map(str, value)) if isinstance(value, dict) else value!r})"
    message = error["msg"].removeprefix("Input should be ").split(", unable")[0]
    return f"{key}: {value!r} is not {message}"


def _field_names(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    at: Any = model
    for part in location:
        if get_origin(at) is dict:
            at = get_args(at)[1]
            continue
        annotation = at.model_fields[str(part)].annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        at = annotation if is_section or get_origin(annotation) is dict else ViT
    return list(at.model_fields)

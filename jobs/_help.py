"""What `--help` says of a stage: its words, its options and the keys of the config that matter to it."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from jobs._job import Job, Option
from pipeline.config import Config, shipped_configs

_COMMON = (
    Option("--dry-run", "print what it would be run with, and stop"),
    Option("--schema", "print the JSON schema of configs, and stop"),
    Option("--help", "print this, and stop"),
)


def help_text(job: Job, called: str) -> str:
    """All of `--help`, as wide as the terminal; `called` is how the stage was called."""
    width = min(shutil.get_terminal_size().columns, 120)
    config = "CONFIG.yaml" if not (job.keys or job.default_config) else "[CONFIG.yaml]"
    key = "key" if job.keys else "section.key"
    words = [
        *((word.shown, word.help) for word in job.words),
        ("CONFIG.yaml", _config_help(job)),
        ("PRESET.yaml", "a file of a few keys that lies over it, as in methods/"),
        (f"{key}=value", "one key, listed below"),
    ]
    options = [(f"{o.flag} {o.metavar}".strip(), o.help) for o in (*job.options, *_COMMON)]
    usage = " ".join(
        [called, *(w.shown for w in job.words), config, "[PRESET.yaml …]", f"[{key}=value …]", "[options]"]
    )
    parts = [
        textwrap.fill(f"usage: {usage}", width, subsequent_indent="    ", break_on_hyphens=False),
        "\n".join(textwrap.fill(line, width) for line in job.description.splitlines()),
        _rows(words, width),
        "options:\n" + _rows(options, width),
        *_keys(job, width),
    ]
    return "\n\n".join(parts) + "\n"


def _config_help(job: Job) -> str:
    shipped = ", ".join(name for name in shipped_configs() if "/" not in name)
    text = f"your own file, or one that is shipped: {shipped}"
    if job.default_config:
        return f"{text}; default: {job.default_config}"
    return f"{text}; only {' and '.join([*job.keys, *job.sections])} count" if job.keys else text


def _rows(rows: list[tuple[str, str]], width: int) -> str:
    """Two columns; what is too long for the first one stands on a line of its own."""
    column = 32 if any(len(left) > 20 for left, _ in rows) else 22
    lines = []
    for left, right in rows:
        # A no-break space holds a limit and its number together.
        wrapped = textwrap.wrap(right, width - column, break_on_hyphens=False) or [""]
        if len(left) + 4 > column:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {left}".ljust(column) + wrapped.pop(0))
        lines += [" " * column + line for line in wrapped]
    return "\n".join(line.rstrip().replace("\xa0", " ") for line in lines)


def _keys(job: Job, width: int) -> Iterator[str]:
    """A block of rows for each section that matters, and what else there is."""
    schema = Config.model_json_schema()
    if job.settings is not None:
        own = job.settings.model_json_schema()
        yield "settings:\n" + _rows(list(_properties(own, own, "")), width)
    if job.keys:
        rows = dict(row for name in schema["properties"] for row in _section(schema, name))
        yield "keys of the config:\n" + _rows(
            [
                (left, right)
                for left, right in rows.items()
                if left.split("=")[0] in job.keys or left.split(".")[0] in job.sections
            ],
            width,
        )
        return
    for name in job.sections:
        about = inspect.cleandoc(_follow(schema["properties"][name], schema).get("description", ""))
        title = textwrap.fill(f"{name}: {' '.join(about.split(chr(10) * 2)[0].split())}", width)
        yield title + "\n" + _rows(list(_section(schema, name)), width)
    others = [name for name in schema["properties"] if name not in job.sections]
    if others:
        yield textwrap.fill(f"Other sections, which --schema describes: {', '.join(others)}.", width)
    yield textwrap.fill("A run detail changes how a job runs, not what it makes.", width)


def _section(schema: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    return _properties(_follow(schema["properties"][name], schema), schema, f"{name}.")


def _properties(node: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """`key=default` and what it is, for each key, those of nested sections too."""
    for name, field in node["properties"].items():
        nested = _follow(field, schema)
        if "properties" in nested:
            yield from _properties(nested, schema, f"{prefix}{name}.")
            continue
        default = _typed(field["default"]) if "default" in field else "…"
        detail = "; run detail" if field.get("run_detail") else ""
        yield f"{prefix}{name}={default}", f"{field.get('description', '')} ({_kind(field, schema)}{detail})"


def _follow(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rsplit("/", 1)[-1]] if "$ref" in field else field


def _typed(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


_KINDS = {
    "integer": "int",
    "number": "float",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
}
_LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}


def _kind(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """The type of a key in words, from its JSON schema."""
    field = _follow(field, schema)
    if "anyOf" in field:
        return " or ".join(_kind(one, schema) for one in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(map(str, field.get("enum", [field.get("const")])))
    if "properties" in field:
        return "{" + ", ".join(field["properties"]) + "}"
    if field.get("type") == "array":
        items = field.get("prefixItems") or [field["items"]]
        more = "" if "prefixItems" in field else ", …"
        return "[" + ", ".join(_kind(item, schema) for item in items) + more + "]"
    kind = field.get("type", "any")
    kind = _KINDS.get(kind, kind)
    limits = [f"{sign}\xa0{field[limit]:g}" for limit, sign in _LIMITS.items() if limit in field]
    return "\xa0".join([kind, ", ".join(limits)]) if limits else kind

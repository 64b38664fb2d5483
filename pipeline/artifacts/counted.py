"""Which of a section's settings decide content.

- A setting counts where its value differs from its default, so that a later version may add one and everybody's
  folders stay what they were. The settings of the first format (`first_format`) count whatever their value, which
  keeps the folders that it made.
- A run detail (`run_detail` in `config.fields`) never counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from pipeline.artifacts.first_format import FIRST_KEYS
from pipeline.config import Section, run_details


def counted(section: Section, *, but: Iterable[str] = ()) -> dict[str, Any]:
    """Of a section's settings what decides content, by key; without those of `but`."""
    first = FIRST_KEYS.get(type(section).__name__, frozenset())
    defaults = type(section).model_fields
    ignored = run_details(type(section)) | set(but)
    return {
        key: counted(value) if isinstance(value, Section) else value
        for key, value in section
        if key not in ignored
        and (key in first or value != defaults[key].get_default(call_default_factory=True))
    }


def later(section: Section) -> dict[str, Any]:
    """Of a section whose first settings are counted one by one: the later ones that are not at their defaults.

    Their keys have the section before them, as they stand among another section's.
    """
    kind = type(section).__name__
    return {f"{kind.lower()}.{key}": value for key, value in counted(section, but=FIRST_KEYS[kind]).items()}


def counted_fields(values: Any) -> dict[str, Any]:
    """`counted` for a dataclass: its fields without defaults, those of the first format, and what differs."""
    kinds = [kind.__name__ for kind in type(values).__mro__]
    first = next(FIRST_KEYS[kind] for kind in kinds if kind in FIRST_KEYS)
    known = {field.name: (getattr(values, field.name), field.default) for field in fields(values)}
    return {key: value for key, (value, default) in known.items() if key in first or value != default}

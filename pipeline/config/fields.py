"""What the sections are written in: their base class, kinds of numbers, and marks on fields.

The docstring below a field is what `--help` and the JSON schema say of it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A config that can't be run; the message has one line per problem."""


_BOOLEAN = (bool, bool | None)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in _BOOLEAN:
            raise PydanticCustomError("bool", "a number or text")
        return value


def run_detail(default: Any) -> Any:
    """A field with this default that changes how a job runs, but not what it makes."""
    return Field(default, json_schema_extra={"run_detail": True})


def run_details(section: type[Section]) -> set[str]:
    """The names of a section's own fields that are marked as `run_detail`."""
    return {
        name
        for name, field in section.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("run_detail")
    }

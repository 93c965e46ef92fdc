"""Defines knobs: config fields with a help text, bounds or choices, and checks of their values."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import Field
from typing import Any

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


def knob(
    default: Any,
    text: str,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Returns a dataclass field with its help text, unit, and inclusive bounds or allowed values.

    The upper bound of an int is INT32_MAX by default: devices count steps in int32. The return type
    is Any, like that of dataclasses.field, so that the class may declare the value's type.
    """
    if type(default) is int and high is None:
        high = INT32_MAX
    meta = {"text": text, "unit": unit, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


def plain_fields(cls: type) -> Iterator[Field]:
    """Yields the fields of a dataclass that are not sections."""
    yield from (f for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(f.type))


def list_sections(cls: type) -> Iterator[tuple[str, type]]:
    """Yields (prefix, dataclass) of a config's top level and of each section, as declared."""
    yield "", cls
    for f in dataclasses.fields(cls):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            yield f"{f.name}.", f.type


def default_of(f: Field) -> Any:
    """Returns the default of a dataclass field."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def find_fault(f: Field, value: Any) -> str:
    """Returns the rule that a field's value breaks, as "must be ..."; "" if it is valid."""
    if not isinstance(f.type, type) or f.type not in (bool, int, float, str):
        return ""
    if type(value) is not f.type and not (f.type is float and type(value) is int):
        return f"must be of type {f.type.__name__}"
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if choices and value not in choices:
        return f"must be one of {', '.join(map(repr, choices))}"
    if low is not None and not value >= low:  # `value < low` would accept NaN
        return f"must be at least {low}"
    if high is not None and not value <= high:
        return f"must be at most {high}"
    if f.type is float and not is_finite(value):
        return "must be a finite number"
    return ""


def is_finite(value: Any) -> bool:
    """Returns whether a number is finite as a float; False for NaN and for ints that overflow."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of fields, each checked by type, bounds and choices when the section is built."""

    PREFIX = ""  # prefix of its flags, as "model."; not annotated, so it is not a dataclass field

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if reason := find_fault(f, value):
                self.fail(f.name, reason)
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))

    def fail(self, name: str, reason: str) -> None:
        """Raises a ValueError that names the field, its value and the flag that sets it."""
        raise field_error(type(self), name, reason, getattr(self, name))


def field_error(cls: type, name: str, reason: str, value: Any) -> ValueError:
    """Returns the error for a field whose value breaks a rule, `reason`, as "must be ..."."""
    flag = f"{getattr(cls, 'PREFIX', '')}{name}"
    return ValueError(f"{flag} {reason}; got {value!r}. Set --{flag}.")

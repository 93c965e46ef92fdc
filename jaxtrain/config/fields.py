"""Knobs: config fields that carry their help text and check their values when built."""

import dataclasses
import math
from dataclasses import field

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


def knob(default, text, unit="", low=None, high=None, choices=None):
    """Returns a field with its help text, unit, inclusive bounds or allowed values.

    The upper bound of an int is INT32_MAX by default: devices count steps in int32.
    """
    if type(default) is int and high is None:
        high = INT32_MAX
    meta = {"text": text, "unit": unit, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=meta)


def plain_fields(cls):
    """Yields the fields of a dataclass that are no sections."""
    yield from (f for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(f.type))


def find_fault(f, value) -> str:
    """Returns what a field's value must be and is not; "" where it is valid."""
    if not isinstance(f.type, type) or f.type not in (bool, int, float, str):
        return ""
    if type(value) is not f.type and not (f.type is float and type(value) is int):
        return f"must be of type {f.type.__name__}"
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if choices and value not in choices:
        return f"must be one of {', '.join(map(repr, choices))}"
    if low is not None and not value >= low:  # not >= : a nan fails too
        return f"must be at least {low}"
    if high is not None and not value <= high:
        return f"must be at most {high}"
    if f.type is float and not is_finite(value):
        return "must be a finite number"
    return ""


def is_finite(value: float | int) -> bool:
    """Returns whether a float can hold the value; False for inf, nan and ints past its range."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


class Section:
    """Checks every field's type, bounds and choices when built."""

    PREFIX = ""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if what := find_fault(f, value):
                self.fail(f.name, what)
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))

    def fail(self, name, what):
        """Raises ValueError naming this field, its value and the flag that sets it."""
        raise field_error(type(self), name, what, getattr(self, name))


def field_error(cls, name, what, value) -> ValueError:
    """The error for a Section's field whose value is not what it must be."""
    flag = f"{cls.PREFIX}{name}"
    return ValueError(f"{flag} {what}; got {value!r}. Set --{flag}.")


def list_sections(cls):
    """(prefix, dataclass) of the top level and of every section, in declared order."""
    yield "", cls
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield f"{f.name}.", f.type


def describe_flags(top) -> str:
    """The table of all flags for --help: flag, default, unit, meaning."""
    lines = ["Fields of the config (set with --NAME=VALUE, or --config.NAME=VALUE):", ""]
    for prefix, cls in list_sections(top):
        for f in plain_fields(cls):
            meta = f.metadata
            allowed = f" One of {', '.join(meta['choices'])}." if meta["choices"] else ""
            unit = f" [{meta['unit']}]" if meta["unit"] else ""
            name = f"{prefix}{f.name}={f.default!r}"
            lines.append(f"  {name:<40} {meta['text']}{unit}.{allowed}")
        lines.append("")
    return "\n".join(lines)

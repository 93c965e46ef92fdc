"""Knobs: config fields that carry their help text and check their values when built."""

import dataclasses
from dataclasses import field


def knob(default, text, unit="", low=None, high=None, choices=None):
    """A field with its help text, unit, inclusive bounds or allowed values."""
    meta = {"text": text, "unit": unit, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=meta)


class Section:
    """Checks every field's type, bounds and choices when built."""

    PREFIX = ""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if isinstance(f.type, type) and f.type in (bool, int, float, str):
                self._check(f)

    def _check(self, f):
        value = getattr(self, f.name)
        if f.type is float and type(value) is int:
            value = float(value)
            object.__setattr__(self, f.name, value)
        if type(value) is not f.type:
            self.fail(f.name, f"must be of type {f.type.__name__}")
        low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
        if choices and value not in choices:
            self.fail(f.name, f"must be one of {', '.join(map(repr, choices))}")
        if low is not None and not value >= low:  # not >= : a nan fails too
            self.fail(f.name, f"must be at least {low}")
        if high is not None and not value <= high:
            self.fail(f.name, f"must be at most {high}")

    def fail(self, name, what):
        """Raises ValueError naming this field, its value and the flag that sets it."""
        flag = f"{self.PREFIX}{name}"
        raise ValueError(f"{flag} {what}; got {getattr(self, name)!r}. Set --config.{flag}.")


def sections(cls):
    """(prefix, dataclass) of the top level and of every section, in declared order."""
    yield "", cls
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield f"{f.name}.", f.type


def describe(top) -> str:
    """The table of all flags for --help: flag, default, unit, meaning."""
    lines = ["Fields (override with --config.NAME=VALUE):", ""]
    for prefix, cls in sections(top):
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.type):
                continue
            meta = f.metadata
            allowed = f" One of {', '.join(meta['choices'])}." if meta["choices"] else ""
            unit = f" [{meta['unit']}]" if meta["unit"] else ""
            name = f"{prefix}{f.name}={f.default!r}"
            lines.append(f"  {name:<40} {meta['text']}{unit}.{allowed}")
        lines.append("")
    return "\n".join(lines)

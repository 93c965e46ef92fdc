"""Checks the types and ranges of what hosts answer: a host's answer is untrusted input.

A shape is one of these:
    a type               a float must be finite; a bool is not a number
    a Range              a number in it
    a compiled pattern   a string that matches
    None                 null
    [shape], [shape, n]  a list; one of at least n
    {str: shape}         an object with any keys; {pattern: shape}: with keys that match
    {"a": shape, "b?": shape}  an object with the key a and perhaps b; it may have others
    (shape, shape)       one of the shapes must fit
"""

import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from launch.host_process import HostError
from launch.inventory import Host
from launch.terminal import visible

T = TypeVar("T")
WORDS = {str: "a string", bool: "true or false", int: "an integer", float: "a finite number"}
SHOWN = 80  # characters of a value that an error quotes


class Range(NamedTuple):
    """A number from `least` to `most`."""

    kind: type
    least: float
    most: float


COUNT = Range(int, 0, 1 << 62)
SECONDS = Range(float, 0, 1e9)


def check(host: Host, answer: T, shape: Any) -> T:
    """Returns the answer.

    Raises:
        HostError: it does not have the shape. The text names the host, the part and its value.
    """
    if problem := mismatch(answer, shape, "its answer"):
        raise HostError(f"{host.name}: {problem}.")
    return answer


def mismatch(value: Any, shape: Any, place: str) -> str:
    """Returns how a value of an answer does not have the shape; "" if it does."""
    words = ""
    if isinstance(shape, Range):
        if not _is(value, shape.kind) or not shape.least <= value <= shape.most:
            words = f"{WORDS[shape.kind]} from {shape.least:g} to {shape.most:g}"
    elif isinstance(shape, type):
        words = "" if _is(value, shape) else WORDS[shape]
    elif isinstance(shape, re.Pattern):
        valid = isinstance(value, str) and shape.fullmatch(value)
        words = "" if valid else f"text that matches {shape.pattern}"
    elif shape is None:
        words = "" if value is None else "null"
    elif isinstance(shape, tuple):
        found = [mismatch(value, option, place) for option in shape]
        return "" if "" in found else found[0]
    elif isinstance(shape, list):
        least = shape[1] if len(shape) > 1 else 0
        if isinstance(value, list) and len(value) >= least:
            return _first(mismatch(x, shape[0], f"{place}[{i}]") for i, x in enumerate(value))
        words = f"a list of at least {least}" if least else "a list"
    elif isinstance(value, dict):
        return _mismatch_of_object(value, shape, place)
    else:
        words = "an object"
    return f"{place} must be {words}; got {_quote(value)}" if words else ""


def _quote(value: Any) -> str:
    try:
        return visible(ascii(value)[:SHOWN])
    except RecursionError:
        return "something nested too deeply"


def _mismatch_of_object(value: Mapping[str, Any], shape: Mapping[Any, Any], place: str) -> str:
    [(key_shape, of_all), *_] = shape.items()
    if not isinstance(key_shape, str):
        if problem := _first(mismatch(key, key_shape, f"a key of {place}") for key in value):
            return problem
        keys = dict.fromkeys(value, of_all)
    else:
        keys = {k.rstrip("?"): s for k, s in shape.items() if k[-1] != "?" or k[:-1] in value}
    return _first(mismatch(value.get(k), s, visible(f"{place}.{k}")) for k, s in keys.items())


def _first(problems) -> str:
    return next((problem for problem in problems if problem), "")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        # An integer can be too large for a float.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind

"""Reads the fields of a mixture: data.mixture, data.stages and data.max_epochs.

    web=DIR1 code=DIR2 math='DIR 3'
    web 0.9, code 0.1 until 80%; web 0.5, code 0.2, math 0.3
    web 1, math 4

Spaces and line breaks between the parts do not matter. The functions raise a ValueError that says
what a field must be; the section of the config adds the field's name and value.
"""

import math
import re
import shlex
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import NamedTuple

MAX_PERIOD = 100_000
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
STAGE = re.compile(r"(.*?)(?:\suntil\s+(\S+?)\s*(%|tokens)?)?\s*", re.DOTALL)


class Stage(NamedTuple):
    """A part of the run in which each source has one weight."""

    weights: dict[str, Fraction]  # sorted by name, so that another order of writing is no change
    share: Fraction | None = None  # of the run's steps, at which the stage ends
    tokens: int | None = None  # at which the stage ends; the last stage has neither

    @property
    def quotas(self) -> dict[str, int]:
        """Returns how many sequences of each source are in the shortest period that is exact."""
        period = math.lcm(*(weight.denominator for weight in self.weights.values()))
        return {name: int(weight * period) for name, weight in self.weights.items()}


def parse_sources(text: str) -> dict[str, str]:
    """Returns the path of each source by its name, as written.

    Raises:
        ValueError: the text is not a list of NAME=PATH, or a name comes twice.
    """
    sources = {}
    for part in _split_words(text):
        name, equals, path = part.partition("=")
        if not (equals and path and NAME.fullmatch(name)):
            raise ValueError(
                f"must be a list of NAME=PATH separated by spaces, with names of letters, digits "
                f"and _; {part!r} is not one"
            )
        if name in sources:
            raise ValueError(f"must name each source once; {name} comes twice")
        sources[name] = path
    return sources


def write_sources(sources: Mapping[str, str]) -> str:
    """Returns the text that parse_sources reads."""
    return shlex.join(f"{name}={path}" for name, path in sources.items())


def parse_stages(text: str, sources: Collection[str]) -> tuple[Stage, ...]:
    """Returns the stages in their order; all but the last have an end.

    Raises:
        ValueError: a stage has an unknown source, a weight that is not positive, or weights whose
            sum is not 1; an end is missing, not positive or not after the one before.
    """
    if not text.strip():
        equal = ", ".join(f"{name} 1/{len(sources)}" for name in sources)
        raise ValueError(f"must give the sources' weights with data.mixture, such as {equal!r}")
    parts = text.split(";")
    stages = []
    for i, part in enumerate(parts, start=1):
        match = STAGE.fullmatch(part)
        assert match, "the pattern matches every text"
        weights, end, unit = match.groups()
        stage = Stage(_parse_weights(weights, sources, f"stage {i}"))
        if not end and i < len(parts):
            raise ValueError(f"must say where stage {i} ends, as 'until 80%' or 'until 2e9'")
        if end:
            if i == len(parts):
                raise ValueError(f"must not end stage {i}, the last one: it ends with the run")
            stage = _add_end(stage, end, unit, i)
        stages.append(stage)
    for kind in ("share", "tokens"):
        ends = [getattr(stage, kind) for stage in stages if getattr(stage, kind)]
        if ends != sorted(set(ends)):
            raise ValueError("must list the stages in the order of their ends")
    return tuple(stages)


def parse_epochs(text: str, sources: Collection[str]) -> dict[str, Fraction]:
    """Returns the most epochs of each source that has a limit: '4', or 'web 1, code 4'.

    Raises:
        ValueError: a source is unknown, or a limit is not positive.
    """
    if not text.strip():
        return {}
    if len(text.split()) == 1 and "," not in text:
        return dict.fromkeys(sources, _positive(text.strip(), "the limit"))
    return _parse_pairs(text, sources, "the limits")


def _parse_weights(text: str, sources: Collection[str], what: str) -> dict[str, Fraction]:
    weights = dict(sorted(_parse_pairs(text, sources, what).items()))
    if sum(weights.values()) != 1:
        total = float(sum(weights.values()))
        raise ValueError(f"must have weights whose sum is 1 in each stage; {what} has {total:.12g}")
    period = math.lcm(*(weight.denominator for weight in weights.values()))
    if period > MAX_PERIOD:
        raise ValueError(
            f"must have weights with a common denominator of at most {MAX_PERIOD:,}, so that they "
            f"are exact in that many sequences; {what} has {period:,}. Round them"
        )
    return weights


def _parse_pairs(text: str, sources: Collection[str], what: str) -> dict[str, Fraction]:
    """Returns {name: number} of a text such as 'web 0.9, code 1/10'."""
    numbers = {}
    for pair in text.split(","):
        words = pair.split()
        if len(words) != 2:
            raise ValueError(f"must be NAME NUMBER, NAME NUMBER, ...; {what} has {pair.strip()!r}")
        name, number = words
        if name not in sources:
            raise ValueError(
                f"must name sources of data.mixture, {', '.join(sources)}; {what} has {name!r}"
            )
        if name in numbers:
            raise ValueError(f"must name a source once in each stage; {what} has {name} twice")
        numbers[name] = _positive(number, f"{name} in {what}")
    return numbers


def _positive(text: str, what: str) -> Fraction:
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = None
    if number is None or number <= 0:
        raise ValueError(f"must have positive numbers, such as 0.25 or 1/4; {what} is {text}")
    return number


def _add_end(stage: Stage, end: str, unit: str | None, i: int) -> Stage:
    number = _positive(end, f"the end of stage {i}")
    if unit != "%":
        return stage._replace(tokens=int(number))
    if number >= 100:
        raise ValueError(f"must end stage {i} before 100%; it ends at {end}%")
    return stage._replace(share=number / 100)


def _split_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:  # an open quotation mark
        raise ValueError(f"must have pairs of quotation marks: {error}") from error

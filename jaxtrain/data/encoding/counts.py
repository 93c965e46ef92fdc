"""Counts over an encoding, and when it cannot be used: too few documents, or too many bad ones."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtrain.data.encoding.documents import PROBLEMS, Encoded, Forced, Problem
from jaxtrain.data.encoding.formats import NO_FIELD
from jaxtrain.data.encoding.held_out import merge_drawn
from jaxtrain.data.encoding.roundtrip import Refused

HOPELESS = 1_000  # documents that cannot be used, and none that can: the input is another


class Flags(NamedTuple):
    """What the user's command calls the options that errors name."""

    text: str = "--data.text"
    text_field: str = "--data.text_field"
    val_fraction: str = "--data.val_fraction"


class Rules(NamedTuple):
    """When an encoding is refused."""

    on_bad_document: str
    val_fraction: float
    flags: Flags
    files: int
    size: int  # bytes on disk


@dataclass
class Totals:
    """Counts over all that is encoded so far."""

    documents: Counter = field(default_factory=Counter)  # by split
    skipped: Counter = field(default_factory=Counter)  # by reason
    bad: int = 0  # of the skipped, those that should have held text
    lost_bytes: int = 0  # on disk, of what could not be read
    problems: list[Problem] = field(default_factory=list)  # the first ones
    drawn: dict = field(default_factory=dict)  # split -> (draw, name, at) nearest to the other

    def add(self, encoded: Encoded) -> None:
        """Adds what a process made of a task."""
        self.documents += encoded.documents
        self.skipped += encoded.skipped
        self.lost_bytes += encoded.lost_bytes
        merge_drawn(self.drawn, encoded.drawn)
        for problem in encoded.problems:
            self.add_problem(problem)

    def add_problem(self, problem: Problem, lost_bytes: int = 0) -> None:
        """Adds a document, or the rest of a file, that could not be used."""
        self.bad += 1
        self.lost_bytes += lost_bytes
        self.skipped[problem.reason] += 1
        if len(self.problems) < PROBLEMS:
            self.problems.append(problem)

    def describe_problems(self) -> list[str]:
        """Returns a line for each of the first problems."""
        lines = [problem.describe() for problem in self.problems]
        more = self.bad - len(lines)
        return [*lines, f"and {more:,} more"] if more else lines


def totals_of(stored: dict) -> Totals:
    """Returns the Totals that stored_totals made a dictionary of, by way of JSON."""
    counts = {key: Counter(stored[key]) for key in ("documents", "skipped")}
    return Totals(**stored | counts | {"problems": [Problem(*p) for p in stored["problems"]]})


def stored_totals(totals: Totals) -> dict:
    """Returns what totals_of takes; JSON-able."""
    return dict(vars(totals))  # not asdict: it turns a Counter into one of pairs


def describe_skipped(skipped) -> str:
    """Returns `skipped 3 not UTF-8, 1 empty`, or nothing skipped."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f"skipped {counts}" if counts else "nothing skipped"


def check_so_far(totals: Totals, rules: Rules) -> None:
    """Raises Refused where it is of no use to go on."""
    documents = sum(totals.documents.values())
    if totals.bad and rules.on_bad_document == "stop":
        advice = _advice(totals, rules) + " Or set --on_bad_document=skip."
        raise Refused(f"{totals.problems[0].describe()}.{advice}")
    if totals.bad >= HOPELESS and not documents:
        _refuse(f"the first {totals.bad:,} documents cannot be used", totals, rules)


def check_all(totals: Totals, rules: Rules) -> None:
    """Raises Refused where the input holds too little text, or too much that is not usable."""
    documents = sum(totals.documents.values())
    if 2 * totals.bad > totals.bad + documents:
        _refuse(f"{totals.bad:,} of {totals.bad + documents:,} documents", totals, rules)
    if 2 * totals.lost_bytes > rules.size:
        _refuse(f"{totals.lost_bytes:,} of {rules.size:,} bytes on disk", totals, rules)
    if not documents:
        other = any(reason.startswith(NO_FIELD) for reason in totals.skipped)
        raise Refused(
            "the input must hold at least one document of UTF-8 without NUL bytes; got "
            f"{rules.files:,} file(s), {describe_skipped(totals.skipped)}. "
            f"Set {rules.flags.text_field if other else rules.flags.text}."
        )
    if rules.val_fraction and len(+totals.documents) < 2:
        raise Refused(
            "the input must hold two documents, or one that can be cut, so that a part is held "
            f"out; got {documents}. Add text to {rules.flags.text}."
        )


def next_forced(totals: Totals, val_fraction: float) -> Forced | None:
    """Returns the document that has to change its split, where the draws left a split empty.

    The one whose draw is nearest to the other split; a document that is alone is cut.
    """
    filled = [split for split in ("train", "val") if totals.documents[split]]
    if not val_fraction or len(filled) != 1 or filled[0] not in totals.drawn:
        return None
    _, name, at = totals.drawn[filled[0]]
    other = "val" if filled == ["train"] else "train"
    return Forced(name, at, other if totals.documents[filled[0]] > 1 else "cut")


def _refuse(what, totals, rules):
    first = totals.problems[0].describe()
    if not sum(totals.documents.values()):
        raise Refused(f"{first}; no document can be used.{_advice(totals, rules)}")
    raise Refused(
        f"at least half of the input must be text that can be used; got {what} that cannot, "
        f"first {first}.{_advice(totals, rules)}"
    )


def _advice(totals, rules) -> str:
    reason = totals.problems[0].reason
    if reason.startswith("without a string"):
        return f" Set {rules.flags.text_field} to the one that holds the text."
    return " Repair or remove what is named here."

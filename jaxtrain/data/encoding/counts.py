"""Counts what is encoded and skipped, and refuses an input with too little usable text."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NoReturn

from jaxtrain.data.encoding.documents import Encoded
from jaxtrain.data.encoding.formats import NO_FIELD
from jaxtrain.data.encoding.held_out import Nearest, merge_nearest
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.roundtrip import UnusableInput
from jaxtrain.data.encoding.work_units import DocumentProblem

MAX_PROBLEMS = 5  # described in full; the others are only counted
HOPELESS = 1_000  # reading stops after this many bad documents without a good one


@dataclass
class Counts:
    """Counts over everything encoded so far. The journal stores the fields under their names."""

    documents: Counter = field(default_factory=Counter)  # by split
    skipped: Counter = field(default_factory=Counter)  # by reason
    bad: int = 0  # skipped documents that should have contained text
    lost_bytes: int = 0  # bytes on disk that could not be read
    problems: list[DocumentProblem] = field(default_factory=list)  # the first MAX_PROBLEMS
    drawn: Nearest = field(default_factory=dict)  # the documents whose split find_forced may change

    def add(self, encoded: Encoded) -> None:
        """Adds the documents of a task."""
        self.documents += encoded.documents
        self.skipped += encoded.skipped
        self.lost_bytes += encoded.lost_bytes
        merge_nearest(self.drawn, encoded.nearest)
        for problem in encoded.problems:
            self.add_problem(problem)

    def add_problem(self, problem: DocumentProblem, lost_bytes: int = 0) -> None:
        """Adds a document, or the rest of a file, that could not be used."""
        self.bad += 1
        self.lost_bytes += lost_bytes
        self.skipped[problem.reason] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def describe_problems(self) -> list[str]:
        """Returns a line for each of the first problems."""
        lines = [problem.describe() for problem in self.problems]
        more = self.bad - len(lines)
        return [*lines, f"and {more:,} more"] if more else lines

    def to_json(self) -> dict:
        """Returns the counts as a dictionary for JSON."""
        return dict(vars(self))  # asdict would turn a Counter into a Counter of pairs

    @classmethod
    def from_json(cls, stored: dict) -> "Counts":
        """Returns the counts that to_json stored."""
        return cls(
            documents=Counter(stored["documents"]),
            skipped=Counter(stored["skipped"]),
            bad=stored["bad"],
            lost_bytes=stored["lost_bytes"],
            problems=[DocumentProblem(*problem) for problem in stored["problems"]],
            drawn={split: tuple(document) for split, document in stored["drawn"].items()},
        )


def describe_skipped(skipped: dict[str, int]) -> str:
    """Returns a text like `skipped 1 empty, 3 not UTF-8`, or `nothing skipped`."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f"skipped {counts}" if counts else "nothing skipped"


def check_so_far(counts: Counts, options: EncodeOptions) -> None:
    """Raises UnusableInput if reading further is pointless."""
    if counts.bad and options.on_bad_document == "stop":
        advice = f"{_advice(counts, options)} Or set --on_bad_document=skip."
        raise UnusableInput(f"{counts.problems[0].describe()}. {advice}")
    if counts.bad >= HOPELESS and not sum(counts.documents.values()):
        _refuse(f"the first {counts.bad:,} documents cannot be used", counts, options)


def check_all(counts: Counts, options: EncodeOptions, files: int, size: int) -> None:
    """Raises UnusableInput if the input has too little text, or too much unusable content.

    Args:
        size: bytes of the files on disk.
    """
    documents = sum(counts.documents.values())
    if 2 * counts.bad > counts.bad + documents:
        _refuse(f"{counts.bad:,} of {counts.bad + documents:,} documents", counts, options)
    if 2 * counts.lost_bytes > size:
        _refuse(f"{counts.lost_bytes:,} of {size:,} bytes on disk", counts, options)
    if not documents:
        advice = f"Set {options.flags.text} to a file or folder of text."
        if any(reason.startswith(NO_FIELD) for reason in counts.skipped):
            advice = f"Set {options.flags.text_field} to the key of the text."
        raise UnusableInput(
            "the input must contain at least one document of UTF-8 without NUL bytes; got "
            f"{files:,} file(s), {describe_skipped(counts.skipped)}. {advice}"
        )
    if options.val_fraction and len(+counts.documents) < 2:
        [(split, count)] = (+counts.documents).items()
        raise UnusableInput(
            "the input must contain two documents, or one that is long enough to be cut, so that a "
            f"part can be held out for validation; got {count} document(s), all in {split}. "
            f"Add text to {options.flags.text}."
        )


def _refuse(what: str, counts: Counts, options: EncodeOptions) -> NoReturn:
    first, advice = counts.problems[0].describe(), _advice(counts, options)
    if not sum(counts.documents.values()):
        raise UnusableInput(f"{first}; no document can be used. {advice}")
    raise UnusableInput(
        f"at least half of the input must be text that can be used; got {what} that cannot, "
        f"first {first}. {advice}"
    )


def _advice(counts: Counts, options: EncodeOptions) -> str:
    if counts.problems[0].reason.startswith("without a string"):
        return f"Set {options.flags.text_field} to the key or column that holds the text."
    return "Repair or remove the file or document named here."

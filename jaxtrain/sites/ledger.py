"""Records the rounds of a site in sites.jsonl, and what a resumed run has to apply again.

A line describes a round that was applied. When a round is applied depends on the network,
so a resumed run takes the step of application from here and not from a clock.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtrain.file_errors import Appender
from jaxtrain.files import strict_json, sync_to_disk, write_atomic

FILE = "sites.jsonl"
REPLAY_FILE = "sites.replay.jsonl"


@dataclass(frozen=True)
class Round:
    """A round of a fragment.

    Attributes:
        started_step, applied_step: inner steps after which it was started and applied.
        tokens: {participating site: tokens since its round before}.
        participants: names of the sites whose codes count, in the order of the sites file.
        code_checksums: {participating site: CRC-32 of its code}.
        reference_checksum: CRC-32 of the reference after the round.
        payload_bytes: bytes of codes (sent, received) by all processes of the site.
        wire_bytes: all bytes (sent, received) since the line before, with headers and
            retransmissions.
        seconds: from the start until all codes were here.
        waited_s: seconds for which training stood still.
    """

    fragment: int
    round: int
    started_step: int
    applied_step: int
    tokens: dict[str, int]
    participants: tuple[str, ...]
    code_checksums: dict[str, int]
    reference_checksum: int
    payload_bytes: tuple[int, int]
    wire_bytes: tuple[int, int]
    seconds: float
    waited_s: float

    @property
    def place(self) -> tuple[int, int]:
        return self.fragment, self.round


MEASURED = ("payload_bytes", "wire_bytes", "seconds", "waited_s")  # these differ in a replay
DECIDED = tuple(f.name for f in dataclasses.fields(Round) if f.name not in MEASURED)


class Ledger:
    """Appends rounds to workdir/sites.jsonl. One process of a site writes it.

    Lines of rounds that the resumed checkpoint has not applied move to sites.replay.jsonl, which
    also keeps those of earlier attempts until they were applied again.

    Args:
        workdir: existing folder of the run.
        applied: newest round of each fragment that the run has applied when it resumes; 0 if none.

    Attributes:
        replay: {(fragment, round): the round} to be applied at exactly its applied_step.
        absent: {site: round since which it has had no part} after the applied rounds.

    Raises:
        ValueError: a line is invalid.
        OSError: a file cannot be written.
    """

    def __init__(self, workdir: Path, applied: Sequence[int]):
        self._path = Path(workdir) / FILE
        self.replay, remaining = split_ledger(workdir, applied)
        self.absent = absent_since(remaining)
        # The lines are in the second file before they leave the first one.
        _rewrite(self._path.with_name(REPLAY_FILE), list(self.replay.values()))
        _rewrite(self._path, remaining)
        self._lines = Appender(self._path)

    def write(self, entry: Round) -> str:
        """Appends a round; returns how it differs from the one that it replays, "" if it does not.

        The line is on disk when this returns: another site may soon have a code that depends on
        when the round was applied.
        """
        before = self.replay.get(entry.place)
        self._lines.write(strict_json(dataclasses.asdict(entry)).encode() + b"\n")
        sync_to_disk(self._path)
        different = [n for n in DECIDED if before and getattr(before, n) != getattr(entry, n)]
        if not different:
            return ""
        changes = [f"{n} {getattr(before, n)}, now {getattr(entry, n)}" for n in different]
        return (
            "this run differs from the one before its restart from round "
            f"{entry.round} of fragment {entry.fragment} on: {'; '.join(changes)}"
        )

    def close(self) -> None:
        self._lines.close()


def split_ledger(
    workdir: Path, applied: Sequence[int]
) -> tuple[dict[tuple[int, int], Round], list[Round]]:
    """Returns the rounds that a resumed run applies again, and those that it has applied.

    The step of a round does not tell which: a round may be pending in the checkpoint of a step and
    be applied after that same step, once the run resumes.

    Every process of a site can call this; only one creates the Ledger, which writes.
    """
    path = Path(workdir) / FILE
    # A round can be in both files after a crash; the newest attempt's line counts.
    lines = [*read_ledger(path.with_name(REPLAY_FILE)), *read_ledger(path)]
    newest = {entry.place: entry for entry in lines}.values()
    newest = sorted(newest, key=lambda entry: (entry.applied_step, entry.fragment))
    remaining = [entry for entry in newest if entry.round <= applied[entry.fragment]]
    replay = [entry for entry in newest if entry.round > applied[entry.fragment]]
    return {entry.place: entry for entry in replay}, remaining


def absent_since(rounds: Sequence[Round]) -> dict[str, int]:
    """Returns {site that had a part before, and none in the newest: the first round without it}."""
    absent: dict[str, int] = {}
    known: set[str] = set()
    for entry in rounds:
        known.update(entry.participants)
        for site in known.difference(entry.participants):
            absent.setdefault(site, entry.round)
        for site in entry.participants:
            absent.pop(site, None)
    return absent


def read_ledger(path: str | Path) -> list[Round]:
    """Returns the rounds of a sites.jsonl, without a last line that is cut off.

    Returns an empty list if there is no such file.

    Raises:
        ValueError: another line is invalid; the error names file, line and field.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rounds = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is cut off
        try:
            rounds.append(_parse(json.loads(line)))
        except ValueError as error:
            raise ValueError(
                f"each line of {path.name} must describe a round; got {line[:80]!r} in {path}, "
                f"line {number}: {error}. Restore the file, or resume from before that round."
            ) from error
    return rounds


def _parse(record: dict[str, Any]) -> Round:
    fields = {field.name for field in dataclasses.fields(Round)}
    if not isinstance(record, dict) or record.keys() != fields:
        raise ValueError(f"the fields must be {sorted(fields)}; got {str(record)[:80]}")
    counts = ("fragment", "round", "started_step", "applied_step", "reference_checksum")
    valid = {name: _is_count(record[name]) for name in counts}
    valid |= {name: _is_map(record[name]) for name in ("tokens", "code_checksums")}
    valid |= {name: _is_pair(record[name]) for name in ("payload_bytes", "wire_bytes")}
    valid |= {name: type(record[name]) in (int, float) for name in ("seconds", "waited_s")}
    names = record["participants"]
    valid["participants"] = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if invalid := [name for name, is_valid in valid.items() if not is_valid]:
        raise ValueError(f"invalid {invalid[0]}: {str(record[invalid[0]])[:80]}")
    # JSON has lists, a Round has tuples.
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in record.items()}
    return Round(**values)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _rewrite(path: Path, rounds: list[Round]) -> None:
    text = "".join(strict_json(dataclasses.asdict(entry)) + "\n" for entry in rounds)
    if text.encode() != (path.read_bytes() if path.exists() else b""):
        write_atomic(path, text)

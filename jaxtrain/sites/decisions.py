"""Decides who takes part in a round, where sites may go on without one that is lost.

The first site of the sites file is the leader: it decides each round, and the others wait for its
decision. So two halves of a job that cannot reach each other never both continue. A round is
decided once each other site has either sent its whole code, or has not been heard for
sites.lost_s, or asks for the leader's weights because it was left out before.

A decision is on the leader's disk before anyone acts on it, so a restart decides the same again.
"""

import json
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxtrain.distributed.key_value import KeyValueStore
from jaxtrain.file_errors import Appender
from jaxtrain.files import sync_to_disk, write_atomic

FILE = "decisions.jsonl"
LEADER = 0  # the index of the site that decides
NEVER = -1


@dataclass(frozen=True)
class Decision:
    """Who takes part in a round.

    Attributes:
        participants: sites whose codes count.
        admitted: sites that get the outer state after this round and take part from the next one.
    """

    participants: tuple[int, ...]
    admitted: tuple[int, ...] = ()

    def leaves_out(self, site: int) -> bool:
        """Returns whether a site has no part in this round, nor gets what it led to."""
        return site not in self.participants and site not in self.admitted

    def to_bytes(self) -> bytes:
        return json.dumps([self.participants, self.admitted]).encode()


def parse_decision(content: bytes) -> Decision:
    """Inverts Decision.to_bytes."""
    participants, admitted = json.loads(content)
    return Decision(tuple(participants), tuple(admitted))


class View(NamedTuple):
    """What one process of the leader knows about the other sites in a round.

    Attributes:
        complete: sites whose code is here.
        lost: sites that have not been heard for too long.
        requests: (site, fragment, round) of each request for the outer state of any fragment.
    """

    complete: tuple[int, ...]
    lost: tuple[int, ...]
    requests: tuple[tuple[int, int, int], ...]

    def to_text(self) -> str:
        return json.dumps(self)


def parse_view(text: str) -> View:
    """Inverts View.to_text."""
    complete, lost, requests = json.loads(text)
    return View(tuple(complete), tuple(lost), tuple(map(tuple, requests)))


def decide(
    sites: int,
    views: Sequence[View],
    before: Decision | None,
    asking: Set[int],
    returning: Set[int],
) -> Decision | None:
    """Returns who takes part in a round; None if that is still open.

    Args:
        sites: number of all sites.
        views: of all processes of the leader.
        before: the decision on the round before.
        asking: sites that ask for the outer state of this fragment.
        returning: sites that have asked for that of any fragment, and for whose code this round has
            waited for long. They send none before they have all states, and the leader may send the
            last one only after this round.
    """
    participants, admitted = [LEADER], []
    for site in range(1, sites):
        if site in asking:
            admitted.append(site)
        elif before and before.leaves_out(site):
            continue
        elif all(site in view.complete for view in views):
            participants.append(site)
        elif site not in returning and not any(site in view.lost for view in views):
            return None
    return Decision(tuple(participants), tuple(admitted))


class Decider:
    """The decisions of the leader. Its processes agree on each.

    Process 0 decides when it has the views of all, and writes the decision to its disk.

    Args:
        sites: number of all sites.
        folder: of the exchange's files; process 0 of the leader has the decisions there.
        process, processes: this process and their number at the leader.
        store: shared by the leader's processes; None if there is one.
        lost_s: seconds for which a round waits for a site that has asked for a state.

    Raises:
        ValueError: the file of decisions is damaged.
    """

    def __init__(
        self,
        sites: int,
        folder: Path,
        process: int,
        processes: int,
        store: KeyValueStore | None,
        lost_s: float,
    ):
        assert store is not None or processes == 1
        self._sites, self._process, self._processes = sites, process, processes
        self._store, self._lost_s = store, lost_s
        self._open_since_s: dict[tuple[int, int], float] = {}
        self._published: dict[tuple[int, int], str] = {}
        self._known: dict[tuple[int, int], Decision] = {}
        self._admitted_at: dict[tuple[int, int], int] = {}  # (fragment, site): newest round
        if process == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / FILE
            for place, decision in _read_decisions(self._path).items():
                self._add(*place, decision)
            self._file = Appender(self._path)

    def close(self) -> None:
        if self._process == 0:
            self._file.close()

    def decide(self, fragment: int, round_: int, view: View) -> Decision | None:
        """Returns the decision on a round; None if it is still open."""
        place, key = (fragment, round_), f"sites/{fragment}/{round_}"
        if self._process:
            self._publish(place, f"{key}/view/{self._process}", view.to_text())
            assert self._store is not None
            found = self._store.read(f"{key}/decision")
            return parse_decision(next(iter(found.values())).encode()) if found else None
        decision = self._known.get(place)
        if decision is None:
            decision = self._make_decision(fragment, round_, view)
        if decision:
            self._publish(place, f"{key}/decision/0", decision.to_bytes().decode())
        return decision

    def _make_decision(self, fragment: int, round_: int, view: View) -> Decision | None:
        views = [view]
        if self._store is not None:
            others = self._store.read(f"sites/{fragment}/{round_}/view")
            if len(others) < self._processes - 1:
                return None
            views += map(parse_view, others.values())
        before = self._known.get((fragment, round_ - 1))
        open_requests = {
            (f, site)
            for view in views
            for site, f, number in view.requests
            if number > self._admitted_at.get((f, site), NEVER)
        }
        asking = {site for f, site in open_requests if f == fragment}
        waited_s = time.monotonic() - self._open_since_s.setdefault(
            (fragment, round_), time.monotonic()
        )
        returning = {site for _, site in open_requests} if waited_s >= self._lost_s else set()
        decision = decide(self._sites, views, before, asking, returning)
        if decision:
            line = [fragment, round_, decision.participants, decision.admitted]
            self._file.write(json.dumps(line).encode() + b"\n")
            sync_to_disk(self._path)
            self._add(fragment, round_, decision)
        return decision

    def _add(self, fragment: int, round_: int, decision: Decision) -> None:
        self._known[fragment, round_] = decision
        for site in decision.admitted:
            self._admitted_at[fragment, site] = round_

    def _publish(self, place: tuple[int, int], key: str, text: str) -> None:
        if self._store is not None and self._published.get(place) != text:
            self._published[place] = text
            self._store.write(key, text)


def _read_decisions(path: Path) -> dict[tuple[int, int], Decision]:
    """Returns {(fragment, round): decision}, and drops a last line that was cut off."""
    complete, _, rest = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    known = {}
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            fragment, round_, participants, admitted = json.loads(line)
            known[fragment, round_] = Decision(tuple(participants), tuple(admitted))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}") from None
    if rest:
        write_atomic(path, complete + b"\n" if complete else b"")
    return known

"""Exchanges the codes of rounds with the other sites, and finds out when sites disagree."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.sites.errors import Disagreement, PeerRefused, SiteError, SiteLeftOut
from jaxtrain.sites.frames import Key, Message
from jaxtrain.sites.layout import Link, SitesFile
from jaxtrain.sites.transport import Transport

__all__ = ["Arrived", "Disagreement", "Exchange", "PeerRefused", "SiteError", "SiteLeftOut"]


@dataclass(frozen=True)
class Arrived:
    """A complete round.

    Attributes:
        codes: {other site: {link index: code}}.
        tokens: {other site: tokens of its round}.
        participants: sites whose codes count, this one included.
        payload_bytes: codes (sent, received) over this process's links.
        wire_bytes: all bytes (sent, received) since the round before was returned, with headers,
            retransmissions and what other rounds sent meanwhile: the sum over rounds is exact.
        seconds: from sending the own code until the last one was here; 0 if that was here before,
            or if a restart was in between.
    """

    codes: dict[int, dict[int, bytes]]
    tokens: dict[int, int]
    participants: tuple[int, ...]
    payload_bytes: tuple[int, int]
    wire_bytes: tuple[int, int]
    seconds: float


class Exchange(Transport):
    """The rounds of one process with the other sites; see Transport for its arguments.

    Args:
        decided: whether a round is complete only once site 0 has decided who takes part.
    """

    def __init__(
        self,
        sites_file: SitesFile,
        site: str,
        process: int,
        blocks: Sequence[int],
        identity: dict[str, str],
        folder: Path,
        note: Callable[[str], None] = print,
        streams: int = 0,
        decided: bool = False,
    ):
        self._decided = decided
        self._checksums: dict[tuple[int, Key], int] = {}  # own ones, by link index
        self._sent: dict[Key, tuple[float, int]] = {}  # time, bytes of own codes
        self._decisions: dict[tuple[int, int], tuple[int, ...]] = {}
        self._last_wire = (0, 0)
        super().__init__(sites_file, site, process, blocks, identity, folder, note, streams)

    def send(
        self,
        fragment: int,
        round_: int,
        codes: dict[int, bytes],
        tokens: int,
        checksum: dict[int, int],
    ) -> None:
        """Starts to send this site's code of a round; returns at once.

        Sending the same again after a restart is expected: a peer that has the code is not sent it
        twice.

        Args:
            codes: {link index: code of the link's range}, for every link.
            tokens: tokens on which this site trained since its round before.
            checksum: {link index: CRC-32 of the reference's range after the round before}; empty if
                that is not known.

        Raises:
            Disagreement, PeerRefused, OSError: the exchange has failed before.
        """
        self._check()
        if codes.keys() != set(range(len(self.links))):
            raise ValueError(f"codes must be of links 0 to {len(self.links) - 1}; got {set(codes)}")
        key = Key("code", fragment, round_)
        with self.lock:
            self._sent[key] = (time.monotonic(), sum(map(len, codes.values())))
            for i, value in checksum.items():
                self._checksums[i, key] = value
                if message := self.mailbox.received.get((self.channels[i].peer, key)):
                    self._compare(i, message)
        for i, code in codes.items():
            self._submit(i, key, code, tokens, checksum.get(i))

    def poll(self, fragment: int, round_: int) -> Arrived | None:
        """Returns a round if it is complete, else None.

        Raises:
            SiteLeftOut: the others finish this round without this site.
            Disagreement, PeerRefused, OSError: the exchange has failed.
        """
        return self.wait(fragment, round_, 0.0)

    def wait(self, fragment: int, round_: int, timeout_s: float) -> Arrived | None:
        """Returns a round once it is complete; None if it is not after `timeout_s`."""
        with self.lock:
            if not self.lock.wait_for(lambda: self._is_over(fragment, round_), timeout_s):
                return None
            participants = self._participants(fragment, round_)
        assert participants is not None
        return self._collect(Key("code", fragment, round_), participants)

    def decide(self, fragment: int, round_: int, participants: Sequence[int]) -> None:
        """Announces who takes part in a round. Only site 0 calls this, and only if `decided`."""
        assert self.site == 0 and self._decided
        participants = tuple(sorted(participants))
        with self.lock:
            self._decisions[fragment, round_] = participants
        content = json.dumps(participants).encode()
        for i, link in enumerate(self.links):
            self._submit(i, Key("decision", fragment, round_), content)
            if link.site not in participants:
                key = Key("code", fragment, round_)
                self._loop.call_soon_threadsafe(self.channels[i].outbox.cancel, key)

    def missing(self, fragment: int, round_: int) -> tuple[int, ...]:
        """Returns the other sites whose code of a round is not complete here."""
        with self.lock:
            key = Key("code", fragment, round_)
            absent = [c for c in self.channels if (c.peer, key) not in self.mailbox.received]
            return tuple(sorted({channel.link.site for channel in absent}))

    def durable(self, oldest: dict[int, int]) -> None:
        """Removes received messages that no checkpoint needs that can still be restored.

        Args:
            oldest: {fragment: its first round that is still needed}.
        """
        for channel in self.channels:
            self._loop.call_soon_threadsafe(channel.inbox.forget, oldest)
        with self.lock:
            self.mailbox.forget(oldest)
            old = lambda fragment, round_: round_ < oldest.get(fragment, 0)
            self._sent = {k: v for k, v in self._sent.items() if not old(*k[1:])}
            self._checksums = {k: v for k, v in self._checksums.items() if not old(*k[1][1:])}
            self._decisions = {p: v for p, v in self._decisions.items() if not old(*p)}

    def offered(self, link: Link, message: Message) -> None:
        with self.lock:
            self._compare(self.links.index(link), message)

    def _compare(self, i: int, message: Message) -> None:
        """Compares the checksums of the reference that this process and a peer have."""
        own, channel = self._checksums.get((i, message.key)), self.channels[i]
        if message.kind != "code" or None in (own, message.checksum) or own == message.checksum:
            return
        self.fail(
            Disagreement(
                f"the sites must have equal weights after each round; before round {message.round} "
                f"of fragment {message.fragment} those of {channel} have the checksum "
                f"{message.checksum:08x}, those of this site {own:08x}. Restart all sites from one "
                "checkpoint."
            )
        )

    def _participants(self, fragment: int, round_: int) -> tuple[int, ...] | None:
        """Returns the sites that take part in a round; None if that is not decided yet."""
        if not self._decided:
            return (self.site, *(link.site for link in self.links))
        self._read_decisions()
        return self._decisions.get((fragment, round_))

    def _read_decisions(self) -> None:
        """Reads the decisions that arrived from site 0."""
        for channel in self.channels:
            if channel.link.site == 0:
                for peer, key in self.mailbox.received:
                    place = (key.fragment, key.round)
                    if peer == channel.peer and key.kind == "decision":
                        if place not in self._decisions:
                            content = json.loads(self.mailbox.read_received(peer, key))
                            self._decisions[place] = tuple(content)

    def _is_over(self, fragment: int, round_: int) -> bool:
        """Returns whether all codes of a round are here.

        Raises:
            SiteLeftOut: this site takes no part.
            Disagreement: a peer no longer sends a code that this process does not have.
            SiteError, OSError: the exchange has failed.
        """
        self._check()
        participants = self._participants(fragment, round_)
        for place, sites in self._decisions.items():
            if place[0] == fragment and place[1] >= round_ and self.site not in sites:
                raise SiteLeftOut(*place)
        if participants is None:
            return False
        key = Key("code", fragment, round_)
        absent = [
            channel
            for channel in self.channels
            if channel.link.site in participants
            and (channel.peer, key) not in self.mailbox.received
        ]
        for channel in absent:
            # The peer has removed what this process acknowledged.
            if (first := channel.inbox.first.get(fragment, 0)) > round_:
                raise Disagreement(
                    f"{channel} is at round {first} of fragment {fragment}. This site had stored "
                    f"its code of round {round_}, but it is missing in {self.mailbox.folder}. "
                    "Restore that folder, or restart all sites from one checkpoint."
                )
        return not absent

    def _collect(self, key: Key, participants: tuple[int, ...]) -> Arrived:
        """Reads a complete round from disk; the lock is free, so that the link is served."""
        codes: dict[int, dict[int, bytes]] = {}
        tokens: dict[int, int] = {}
        for i, channel in enumerate(self.channels):
            site = channel.link.site
            if site in participants:
                codes.setdefault(site, {})[i] = self.mailbox.read_received(channel.peer, key)
                count = self.mailbox.received[channel.peer, key].tokens
                if tokens.setdefault(site, count) != count:
                    raise Disagreement(
                        "all processes of a site must train on the same number of tokens; "
                        f"{channel} has {count}, another one has {tokens[site]}."
                    )
        received = sum(len(code) for of_site in codes.values() for code in of_site.values())
        with self.lock:  # threads of several fragments may be here
            counts = [channel.wire_bytes() for channel in self.channels]
            wire = (sum(sent for sent, _ in counts), sum(arrived for _, arrived in counts))
            since = (wire[0] - self._last_wire[0], wire[1] - self._last_wire[1])
            self._last_wire = wire
        started_s, sent = self._sent.get(key, (float("inf"), 0))
        last_s = max(self.mailbox.arrived_s.get((c.peer, key), 0.0) for c in self.channels)
        participants = tuple(sorted(set(participants)))
        return Arrived(
            codes, tokens, participants, (sent, received), since, max(last_s - started_s, 0.0)
        )

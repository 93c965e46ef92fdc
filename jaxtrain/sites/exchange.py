"""Exchanges the codes of rounds with the other sites, and finds out when sites disagree."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtrain.distributed.key_value import KeyValueStore
from jaxtrain.sites.arrived import Arrived
from jaxtrain.sites.decisions import LEADER, Decider, Decision, View, parse_decision
from jaxtrain.sites.errors import Disagreement, PeerRefused, SiteError, SiteLeftOut
from jaxtrain.sites.frames import Key, Message
from jaxtrain.sites.layout import Link, SitesFile
from jaxtrain.sites.transport import Transport

DECIDE_S = 0.2  # between the leader's checks for lost sites and for views of its other processes

__all__ = ["Arrived", "Disagreement", "Exchange", "PeerRefused", "SiteError", "SiteLeftOut"]


class Exchange(Transport):
    """The rounds of one process with the other sites; see Transport for its arguments.

    Args:
        lost_s: seconds without a byte from a site after which the others continue without it; 0
            waits for all sites. Above 0, a round is complete once the leader has decided it.
        store: shared by the processes of this site; needed by a leader with several.
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
        lost_s: float = 0.0,
        store: KeyValueStore | None = None,
    ):
        self._lost_s, self.ping_s = lost_s, min(self.ping_s, lost_s / 4 or self.ping_s)
        self._checksums: dict[tuple[int, Key], int] = {}  # own ones, by link index
        self._sent: dict[Key, tuple[float, int]] = {}  # time, bytes of own codes
        self._decisions: dict[tuple[int, int], Decision] = {}
        self._last_wire = (0, 0)
        sites, index = sites_file.sites, sites_file.index(site)
        self._decider: Decider | None = None
        if lost_s and index == LEADER:
            processes = len(sites[index].processes)
            args = len(sites), Path(folder), process, processes, store
            self._decider = Decider(*args, lost_s)
        super().__init__(sites_file, site, process, blocks, identity, folder, note, streams)

    def close(self) -> None:
        super().close()
        if self._decider:
            self._decider.close()
            self._decider = None

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
        deadline_s, place = time.monotonic() + timeout_s, (fragment, round_)
        while True:
            view = self._decide(*place)
            has_news = lambda seen=view: self._is_over(*place) or seen != self._look(*place)
            with self.lock:
                left_s = max(deadline_s - time.monotonic(), 0.0)
                self.lock.wait_for(has_news, min(left_s, DECIDE_S) if view else left_s)
                if self._is_over(*place):
                    break
            if time.monotonic() >= deadline_s:
                return None
        return self._collect(Key("code", fragment, round_))

    def _look(self, fragment: int, round_: int) -> View | None:
        """Returns what the leader must know to decide a round; None if there is nothing to do."""
        if not self._decider or (fragment, round_) in self._decisions:
            return None
        others, missing = {link.site for link in self.links}, self.missing(fragment, round_)
        silent = self.silent_s()
        lost = [site for site in others if silent[site] > self._lost_s]
        complete, requests = sorted(others - set(missing)), tuple(self.posted("request"))
        return View(tuple(complete), tuple(sorted(lost)), requests)

    def _decide(self, fragment: int, round_: int) -> View | None:
        """Decides a round if this is the leader and it can; returns what is known if it cannot."""
        with self.lock:
            view = self._look(fragment, round_)
        if not view or not self._decider:
            return None
        decision = self._decider.decide(fragment, round_, view)
        if decision is None:
            return view
        with self.lock:
            self._decisions[fragment, round_] = decision
        before = self._decisions.get((fragment, round_ - 1), decision)
        for i, channel in enumerate(self.channels):
            self._submit(i, Key("decision", fragment, round_), decision.to_bytes())
            self._cancel_old(i, fragment, round_, decision)
            site, silent_s = channel.link.site, time.monotonic() - channel.last_s
            is_new = before is decision or not before.leaves_out(site)
            if is_new and decision.leaves_out(site) and silent_s > self._lost_s:
                self.note(f"nothing has come from {channel} for {silent_s:.0f} s")
        return None

    def _cancel_old(self, i: int, fragment: int, round_: int, decision: Decision) -> None:
        """Stops sending a site what it no longer needs, because it is left out of a round."""
        if self.links[i].site not in decision.participants:
            cancel = self.channels[i].outbox.cancel_until
            self._loop.call_soon_threadsafe(cancel, fragment, round_)

    def decisions(self, fragment: int) -> dict[int, Decision]:
        """Returns {round: who takes part} of all decisions that are known here."""
        self._check()
        with self.lock:
            self._read_decisions()
            return {r: decision for (f, r), decision in self._decisions.items() if f == fragment}

    def first(self, fragment: int, site: int) -> int:
        """Returns the oldest round whose code a site still sends to this process; 0 if unknown."""
        inboxes = [channel.inbox for channel in self.channels if channel.link.site == site]
        return max(inbox.first.get(fragment, 0) for inbox in inboxes)

    def away(self) -> set[int]:
        """Returns the sites that were left out of the newest decided round of any fragment."""
        newest: dict[int, int] = {}
        for fragment, round_ in self._decisions:
            newest[fragment] = max(round_, newest.get(fragment, 0))
        found = [self._decisions[place] for place in newest.items()]
        return {k.site for k in self.links if any(d.leaves_out(k.site) for d in found)}

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
        if not self._lost_s:
            return tuple(sorted({self.site, *(link.site for link in self.links)}))
        self._read_decisions()
        decision = self._decisions.get((fragment, round_))
        return decision.participants if decision else None

    def _read_decisions(self) -> None:
        """Reads the decisions that arrived from the leader."""
        for peer, key in list(self.mailbox.received):
            place = (key.fragment, key.round)
            if key.kind == "decision" and place not in self._decisions:
                decision = parse_decision(self.mailbox.read_received(peer, key))
                self._decisions[place] = decision
                for i in range(len(self.links)):
                    self._cancel_old(i, *place, decision)

    def _is_over(self, fragment: int, round_: int) -> bool:
        """Returns whether all codes of a round are here.

        Raises:
            SiteLeftOut: this site takes no part.
            Disagreement: a peer no longer sends a code that this process does not have.
            SiteError, OSError: the exchange has failed.
        """
        self._check()
        participants = self._participants(fragment, round_)
        key = Key("code", fragment, round_)
        needed = (LEADER,) if participants is None else participants
        absent = [
            channel
            for channel in self.channels
            if channel.link.site in needed and (channel.peer, key) not in self.mailbox.received
        ]
        if participants and self.site in participants and not absent:
            return True  # a resumed site may know that the others later went on without it
        for place, decision in self._decisions.items():
            is_later = place[0] == fragment and place[1] >= round_
            if is_later and self.site not in decision.participants:
                raise SiteLeftOut(*place)
        for channel in absent:
            # The peer has removed what this process acknowledged.
            if (first := channel.inbox.first.get(fragment, 0)) > round_:
                if self._lost_s and self.site != LEADER:
                    raise SiteLeftOut(fragment, round_)
                raise Disagreement(
                    f"{channel} is at round {first} of fragment {fragment}. This site had stored "
                    f"its code of round {round_}, but it is missing in {self.mailbox.folder}. "
                    "Restore that folder, or restart all sites from one checkpoint."
                )
        if participants and self._lost_s and self.site != LEADER:
            silent = [c for c in absent if time.monotonic() - c.last_s > self._lost_s]
            if any(channel.link.site != LEADER for channel in silent):
                raise SiteLeftOut(fragment, round_)  # only the leader has a lost site's code
        return False

    def _collect(self, key: Key) -> Arrived:
        """Reads a complete round from disk; the lock is free, so that the link is served."""
        with self.lock:
            participants = self._participants(key.fragment, key.round) or ()
        decision = self._decisions.get((key.fragment, key.round), Decision(participants))
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
        payload, seconds = (sent, received), max(last_s - started_s, 0.0)
        return Arrived(codes, tokens, participants, decision.admitted, payload, since, seconds)

"""The messages of a link that its peer has not stored yet, and which chunk is sent next."""

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from jaxtrain.sites.errors import Disagreement
from jaxtrain.sites.frames import (
    NO_RECORD,
    OFFER,
    BadFrame,
    Key,
    Message,
    pack,
    pack_chunk,
    parse_key,
)
from jaxtrain.sites.mailbox import Mailbox, Peer
from jaxtrain.sites.stream import Stream


@dataclass
class Outgoing:
    """A message that the peer has not stored yet.

    Attributes:
        todo: chunks to be sent.
        sent_on: {chunk: the stream on which it was last sent}.
        ask: whether to ask the peer what has arrived.
        question: number of the newest reason to ask; an answer to an older one is out of date.
        on_disk, stored: whether this process and the peer have written it to disk.
    """

    message: Message
    content: memoryview
    todo: deque[int] = field(default_factory=deque)
    sent_on: dict[int, Stream] = field(default_factory=dict)
    ask: bool = True
    question: int = 1
    on_disk: bool = False
    stored: bool = False


class Outbox:
    """The outgoing messages of one link, in the order of sending.

    Attributes:
        messages: other threads may read it while they hold the transport's lock.
        newest: {fragment: newest round whose code the peer is known to have}; None before the first
            connection.
    """

    def __init__(self, peer: Peer, mailbox: Mailbox, lock: Any):
        self._peer, self._mailbox, self._lock = peer, mailbox, lock
        self.newest: dict[int, int] | None = None
        self.messages: dict[Key, Outgoing] = {}
        for (other, key), (message, content) in mailbox.sent.items():
            if other == peer:  # sent before a restart; the peer may have any part of it
                self.messages[key] = Outgoing(message, memoryview(content), on_disk=True)

    def add(self, message: Message, content: bytes) -> None:
        """Starts to send a message."""
        # A peer that may have the message already is asked first; a new one is sent at once.
        seen = self.newest is None or message.round <= self.newest.get(message.fragment, -1)
        todo = deque(range(0 if seen and message.kind == "code" else message.chunks))
        with self._lock:
            self.messages[message.key] = Outgoing(message, memoryview(content), todo)

    def note_on_disk(self, key: Key) -> None:
        """Records that this process has written a message to disk."""
        if out := self.messages.get(key):
            out.on_disk = True
            self._remove_if_done(key, out)

    def cancel(self, key: Key) -> None:
        """Stops sending a message, which the peer has stored or no longer needs."""
        if out := self.messages.get(key):
            out.stored = True
            out.todo.clear()
            self._remove_if_done(key, out)

    def cancel_until(self, fragment: int, round_: int) -> None:
        """Cancels what a peer that is left out of a round does not need.

        These are the codes of all rounds until this one, and older decisions and states.
        """
        for key in list(self.messages):
            is_old = key.round < round_ or key.kind == "code" and key.round == round_
            if key.fragment == fragment and is_old and key.kind != "request":
                self.cancel(key)

    def _remove_if_done(self, key: Key, out: Outgoing) -> None:
        if out.stored and out.on_disk:  # a file that is still being written is removed later
            with self._lock:
                del self.messages[key]
            self._mailbox.remove_sent(self._peer, key)

    def ask_again(self) -> None:
        """Asks for the state of all messages: a lost stream may have lost chunks or answers."""
        for out in self.messages.values():
            out.ask, out.question = True, out.question + 1

    def next_frame(self, stream: Stream) -> bytes | None:
        """Returns the next frame for a stream; None if everything is sent."""
        # Decisions and requests are small, and others wait for them: they overtake codes.
        urgent = lambda item: item[0].kind in ("code", "state")
        for key, out in sorted(self.messages.items(), key=urgent):
            if out.stored:
                continue
            if out.ask or (out.todo and key not in stream.offered):
                # A peer never needs older rounds than `first` again, unless it lost its disk.
                first = min(k.round for k in self.messages if k[:2] == key[:2])
                ask = out.question if out.ask else 0
                body = out.message.to_dict() | {"ask": ask, "first": first}
                out.ask = False
                stream.offered.add(key)  # the peer must know a message before its first chunk
                return pack(OFFER, body)
            if out.todo:
                index = out.todo.popleft()
                out.sent_on[index] = stream
                return pack_chunk(key, index, out.content)
        return None

    def on_have(self, body: Any, streams: set[Stream]) -> None:
        """Sends the chunks again that are missing and not under way on a stream that lives."""
        out = self.messages.get(parse_key(body))
        if out is None or out.stored or body.get("ask") != out.question:
            return
        queued = set(out.todo)
        try:
            for start, stop in body["missing"]:
                for index in range(max(start, 0), min(stop, out.message.chunks)):
                    if index not in queued and out.sent_on.get(index) not in streams:
                        out.todo.append(index)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFrame(
                f"HAVE must list ranges of chunks; got {json.dumps(body)[:80]}"
            ) from error

    def on_stored(self, body: Any) -> None:
        """Removes a message that the peer has on disk, or that came too late for it.

        NO_RECORD means that the peer went on without this site, which learns that from the
        leader's decision. A peer that waits for all sites answers it only if it lost its folder.
        Then its own code of that round is missing too, and `Exchange` raises an error.

        Raises:
            Disagreement: the peer has stored another message.
        """
        key = parse_key(body)
        out = self.messages.get(key)
        if out is None or out.stored:
            return
        if body.get("crc") not in (out.message.crc, NO_RECORD):
            raise different_code(self._peer, key)
        if key.kind == "code":
            self.newest = self.newest or {}
            self.newest[key.fragment] = max(key.round, self.newest.get(key.fragment, -1))
        self.cancel(key)


def different_code(peer: Peer, key: Key) -> Disagreement:
    """Returns the error for a restart that did not compute the same code again."""
    return Disagreement(
        f"this site computed another {describe(key)} than it sent to process {peer[1]} of site "
        f"{peer[0]} before its restart. Resume with the devices, mesh and versions of the first "
        "attempt, or restart all sites from one checkpoint."
    )


def describe(key: Key) -> str:
    return f"{key.kind} of round {key.round} of fragment {key.fragment}"

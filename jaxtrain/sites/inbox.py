"""The messages that arrive over a link. They are acknowledged once they are on disk."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from jaxtrain.sites import BLOCK
from jaxtrain.sites.errors import Disagreement
from jaxtrain.sites.frames import (
    HAVE,
    NO_RECORD,
    STORED,
    BadFrame,
    Key,
    Message,
    is_count,
    pack,
    parse_message,
    unpack_chunk,
)
from jaxtrain.sites.layout import Link
from jaxtrain.sites.mailbox import Incoming, Mailbox, Peer
from jaxtrain.sites.outbox import describe

BYTES_AN_ELEMENT = 8  # no codec needs more; a larger message is refused
CODES_IN_A_STATE = 3  # messages of other kinds may have this many times the bytes of a code
LEAST_LIMIT = 1 << 16  # bytes on top of that, as a link may have no blocks


class Owner(Protocol):
    """What a link needs of the transport that it belongs to."""

    lock: Any
    mailbox: Mailbox
    note: Callable[[str], None]
    ping_s: float

    def fail(self, error: Exception) -> None: ...
    def offered(self, link: Link, message: Message) -> None: ...
    def changed(self) -> None: ...
    def in_thread(self, function: Callable[[], Any]) -> Awaitable[Any]: ...


class Inbox:
    """The incoming messages of one link.

    Args:
        link: the link.
        peer: its other end.
        owner: the transport.
        answer: sends a frame to the peer.

    Attributes:
        first: {fragment: oldest round that the peer still sends}.
    """

    def __init__(self, link: Link, peer: Peer, owner: Owner, answer: Callable[[bytes], None]):
        self._link, self._peer, self._owner, self._answer = link, peer, owner, answer
        self._arriving: dict[Key, Incoming] = {}
        self._finishing: dict[Key, asyncio.Future] = {}
        self.first: dict[int, int] = {}

    def newest(self) -> dict[int, int]:
        """Returns {fragment: newest round whose code was ever received}."""
        newest: dict[int, int] = {}
        for peer, key in self._owner.mailbox.history:
            if peer == self._peer and key.kind == "code":
                newest[key.fragment] = max(key.round, newest.get(key.fragment, -1))
        return newest

    def on_offer(self, body: Any) -> None:
        """Prepares to receive a message, or answers which part of it is here already.

        Raises:
            BadFrame: the offer is invalid or too large.
        """
        extra = {k: body.pop(k, 0) for k in ("ask", "first")} if isinstance(body, dict) else {}
        message = parse_message(body)
        self._check_size(message)
        self._owner.offered(self._link, message)
        if message.kind == "code" and is_count(extra["first"]):
            self.first[message.fragment] = extra["first"]
        key, mailbox = message.key, self._owner.mailbox
        known = mailbox.history.get((self._peer, key))
        is_old = message.round < mailbox.oldest.get(message.fragment, 0)
        if known is None and is_old and message.kind == "code":
            known = NO_RECORD
        if known is not None:
            if known not in (message.crc, NO_RECORD):
                name, process = self._peer
                self._owner.note(
                    f"refused {describe(key)} from process {process} of site {name}: the code "
                    "differs from the one that it sent before."
                )
            self._answer(pack(STORED, {"key": key, "crc": known}))
        elif key not in self._finishing:
            self._expect(message, extra["ask"])

    def _expect(self, message: Message, ask: Any) -> None:
        key, incoming = message.key, self._arriving.get(message.key)
        if incoming and incoming.message != message:  # a restart computed another code
            self._arriving.pop(key).discard()
            incoming = None
        if incoming is None:
            if len(self._arriving) > 4 * len(self._link.ranges) + 8:
                raise BadFrame(f"{len(self._arriving)} unfinished messages at once")
            try:
                incoming = self._owner.mailbox.receive(self._peer, message)
            except OSError as error:  # not the connection's fault
                self._owner.fail(error)
                return
            self._arriving[key] = incoming
        if not incoming.missing:
            self._start_finish(key)
        elif ask:
            self._answer_have(key, incoming, ask)

    def _check_size(self, message: Message) -> None:
        if message.fragment >= len(self._link.ranges):
            raise BadFrame(f"fragment {message.fragment} of {len(self._link.ranges)}")
        limit = len(self._link.ranges[message.fragment]) * BLOCK * BYTES_AN_ELEMENT
        if message.kind != "code":
            limit = limit * CODES_IN_A_STATE + LEAST_LIMIT
        if message.size > limit:
            raise BadFrame(f"{describe(message.key)} of {message.size} bytes; the most is {limit}")

    def _answer_have(self, key: Key, incoming: Incoming, ask: Any) -> None:
        ranges: list[list[int]] = []
        for index in sorted(incoming.missing):
            if ranges and ranges[-1][1] == index:
                ranges[-1][1] += 1
            else:
                ranges.append([index, index + 1])
        body = {"key": key, "ask": ask, "missing": ranges}
        self._answer(pack(HAVE, body))

    def on_chunk(self, data: bytes) -> None:
        """Writes a chunk to disk.

        Raises:
            BadFrame: it does not fit its message.
        """
        key, index, content = unpack_chunk(data)
        incoming = self._arriving.get(key)
        if incoming is None:  # its message was completed meanwhile
            return
        try:
            incoming.write(index, content)
        except OSError as error:
            self._owner.fail(error)
            return
        if not incoming.missing:
            self._start_finish(key)

    def _start_finish(self, key: Key) -> None:
        work = self._finish(key, self._arriving.pop(key))
        task = self._finishing[key] = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._finishing.pop(key))

    async def _finish(self, key: Key, incoming: Incoming) -> None:
        """Puts a complete message on disk for good, and only then acknowledges it."""
        try:
            complete = await self._owner.in_thread(incoming.finish)
            if complete:
                with self._owner.lock:
                    self._owner.mailbox.record(self._peer, incoming.message)
        except OSError as error:
            self._owner.fail(error)
            return
        if not complete:  # no fault of the link: TLS and the frames have their own checksums
            name, process = self._peer
            self._owner.fail(
                Disagreement(
                    f"process {process} of site {name} sent a {describe(key)} that does not have "
                    "its checksum: the memory or disk of one of the hosts is damaged."
                )
            )
            return
        self._answer(pack(STORED, {"key": key, "crc": incoming.message.crc}))
        self._owner.changed()

    def forget(self, oldest: dict[int, int]) -> None:
        """Removes incomplete codes of rounds before the oldest one of their fragment."""
        for key in list(self._arriving):
            if key.kind == "code" and key.round < oldest.get(key.fragment, 0):
                self._arriving.pop(key).discard()

    async def close(self) -> None:
        """Waits for messages that are being put on disk, and removes incomplete ones."""
        await asyncio.gather(*self._finishing.values(), return_exceptions=True)
        while self._arriving:
            self._arriving.popitem()[1].discard()

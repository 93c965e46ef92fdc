"""One link: its streams, and the frames that go over them.

Runs in the event loop of the transport, so it needs no locks except for what other threads read.
"""

import asyncio
import time
from collections import deque

from jaxtrain.sites.errors import SiteError
from jaxtrain.sites.frames import (
    CHUNK,
    HAVE,
    OFFER,
    PING,
    STORED,
    BadFrame,
    Key,
    Message,
    pack,
    read_frame,
)
from jaxtrain.sites.inbox import Inbox, Owner
from jaxtrain.sites.layout import Link
from jaxtrain.sites.mailbox import Peer
from jaxtrain.sites.outbox import Outbox
from jaxtrain.sites.stream import Stream

PING_S = 5.0  # an idle stream sends a byte at least this often
SILENT_S = 20.0  # a stream without a byte for so long is closed: its link drops packets silently


class Channel:
    """One link.

    Args:
        link: the processes and the blocks that it connects.
        peer: (name of the other site, process).
        owner: the transport.

    Attributes:
        session: changes when the peer is restarted; "" before the first connection.
        last_s: when the last frame arrived, or when this channel was created.
    """

    def __init__(self, link: Link, peer: Peer, owner: Owner):
        self.link, self.peer, self._owner = link, peer, owner
        self.streams: set[Stream] = set()
        self.session, self.last_s = "", time.monotonic()
        self.outbox = Outbox(peer, owner.mailbox, owner.lock)
        self.inbox = Inbox(link, peer, owner, self._answer)
        self.answers: deque[bytes] = deque()  # frames that go before all others
        self._closed_wire = self._counted_wire = (0, 0)

    def __str__(self) -> str:
        return f"process {self.peer[1]} of site {self.peer[0]}"

    def send(self, message: Message, content: bytes) -> None:
        """Starts to send a message."""
        self.outbox.add(message, content)
        self._wake()

    def note_on_disk(self, key: Key) -> None:
        """Records that this process has written a message to disk."""
        self.outbox.note_on_disk(key)
        self._owner.changed()

    def wire_bytes(self) -> tuple[int, int]:
        """Returns the (sent, received) bytes of all streams that this link ever had."""
        counts = [self._closed_wire, *(stream.wire_bytes() for stream in tuple(self.streams))]
        # A stream that ends at this moment may be missing: it is in neither of the two.
        sums = sum(sent for sent, _ in counts), sum(received for _, received in counts)
        before = self._counted_wire
        self._counted_wire = max(sums[0], before[0]), max(sums[1], before[1])
        return self._counted_wire

    async def run(self, stream: Stream) -> None:
        """Sends and receives over a stream until it ends.

        Raises:
            BadFrame: the peer sent something invalid.
            OSError, EOFError: the connection ended.
        """
        self.streams.add(stream)
        self._ask_again()
        parts = (self._send(stream), self._receive(stream), self._watch(stream))
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            sent, received = stream.wire_bytes()
            self.streams.discard(stream)
            self._closed_wire = (self._closed_wire[0] + sent, self._closed_wire[1] + received)
            self._ask_again()

    def _ask_again(self) -> None:
        self.outbox.ask_again()
        self._wake()

    def _wake(self) -> None:
        for stream in self.streams:
            stream.wake.set()

    def _answer(self, frame: bytes) -> None:
        self.answers.append(frame)
        self._wake()

    async def _watch(self, stream: Stream) -> None:
        while True:
            await asyncio.sleep(self._owner.ping_s)
            if (silent_s := stream.silent_s()) > SILENT_S:
                raise TimeoutError(f"nothing arrived for {silent_s:.0f} s")
            stream.ping_due = True
            stream.wake.set()

    async def _send(self, stream: Stream) -> None:
        while True:
            stream.wake.clear()
            if self.answers:
                frame = self.answers.popleft()
            elif stream.ping_due:
                stream.ping_due, frame = False, pack(PING, None)
            else:
                frame = self.outbox.next_frame(stream)
            if frame is None:
                await stream.wake.wait()
            else:
                stream.writer.write(frame)
                await stream.writer.drain()

    async def _receive(self, stream: Stream) -> None:
        while True:
            kind, body = await read_frame(stream.reader)
            self.last_s = time.monotonic()
            if kind == CHUNK:
                self.inbox.on_chunk(body)
            elif kind == OFFER:
                self.inbox.on_offer(body)
            elif kind == HAVE:
                self.outbox.on_have(body, self.streams)
                self._wake()
            elif kind == STORED:
                try:
                    self.outbox.on_stored(body)
                except SiteError as error:
                    self._owner.fail(error)
                self._owner.changed()
            elif kind != PING:
                raise BadFrame(f"unexpected frame {kind!r}")

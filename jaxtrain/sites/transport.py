"""Moves messages between a process and its linked processes, with no loss and no repetition.

An event loop in one thread serves all connections; other threads write to disk. A message is kept
until its peer has stored it on disk, and is sent again after a lost connection or a restart.
"""

import asyncio
import concurrent.futures
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, Self

from jaxtrain.sites.certificate import build_tls
from jaxtrain.sites.channel import PING_S, Channel
from jaxtrain.sites.connections import Connections
from jaxtrain.sites.frames import Key, Message
from jaxtrain.sites.greeting import Greeter
from jaxtrain.sites.layout import Link, SitesFile, links
from jaxtrain.sites.listener import open_listener
from jaxtrain.sites.mailbox import Mailbox
from jaxtrain.sites.outbox import different_code
from jaxtrain.sites.stream import CLOSE_S

DISK_THREADS = 4


class Transport:
    """The messages of one process. A context manager.

    Args:
        sites_file: sites, addresses and the job's key.
        site: name of this process's site.
        process: number of this process in its site.
        blocks: blocks of each fragment.
        identity: what must be equal at all sites, such as hashes of configuration, data and code.
        folder: the run's folder for exchanges, in which each process has its own subfolder.
        note: receives messages for the log, from any thread.
        streams: connections of each link; 0 chooses by the round-trip time. The site that connects,
            the later one in the sites file, decides.

    Attributes:
        ping_s: an idle connection sends a byte this often, so that its site does not look lost.
        links: the links of this process. A "link index" is an index into it.

    Raises:
        ValueError: the port is in use, or the folder belongs to another layout or is damaged.
        OSError: the folder cannot be written to, or the own address cannot be resolved.
    """

    ping_s = PING_S

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
    ):
        self.site, names = sites_file.index(site), sites_file.names
        self.links = links(blocks, sites_file, self.site, process)
        self.lock, self.note = threading.Condition(), note
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stop, self._closed = asyncio.Event(), False
        self._writes: set[concurrent.futures.Future] = set()
        peers = [(names[link.site], link.process) for link in self.links]
        ranges = [list(link.ranges) for link in self.links]
        own = sites_file.sites[self.site].processes[process]
        listens = any(link.site > self.site for link in self.links)
        listener = open_listener(own, note) if listens else None
        try:
            folder = Path(folder) / str(process)
            self.mailbox = Mailbox(folder, dict(zip(peers, ranges, strict=True)))
        except BaseException:
            if listener:
                listener.close()
            raise
        pairs = zip(self.links, peers, strict=True)
        self.channels = [Channel(link, peer, self) for link, peer in pairs]
        counts = [f"{s.name}: {len(s.processes)}" for s in sites_file.sites]
        layout = {"processes of the sites": ", ".join(counts), "fragments": str(list(blocks))}
        session = secrets.token_hex(8)
        channels = {channel.peer: channel for channel in self.channels}
        greeter = Greeter(channels, (site, process), sites_file.job, session, identity | layout)
        tls = build_tls(sites_file.key)
        self._connections = Connections(greeter, tls, streams, self.fail, note)
        self._pool = concurrent.futures.ThreadPoolExecutor(DISK_THREADS, "sites-disk")
        started = threading.Event()

        serve = self._serve(sites_file, listener, started)
        self._thread = threading.Thread(
            target=asyncio.run, args=(serve,), name="sites-exchange", daemon=True
        )
        self._thread.start()
        started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections and files, and ends the threads. What was not sent is dropped."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._pool.shutdown()
        self.mailbox.close()

    async def _serve(
        self, sites_file: SitesFile, listener: socket.socket | None, started: threading.Event
    ) -> None:
        """Runs all connections until close()."""
        self._loop = asyncio.get_running_loop()
        if listener:
            self._connections.listen(listener)
        for channel in self.channels:
            if channel.link.site < self.site:
                other = sites_file.sites[channel.link.site]
                self._connections.connect(channel, other.processes[channel.link.process])
        started.set()
        await self._stop.wait()
        await self._drain()
        await self._connections.close()
        await asyncio.gather(*(channel.inbox.close() for channel in self.channels))

    async def _drain(self) -> None:
        """Gives the last acknowledgements time to leave; without them a peer would wait longer."""
        deadline_s = time.monotonic() + CLOSE_S
        while any(c.answers for c in self.channels if c.streams):
            if time.monotonic() > deadline_s:
                return
            await asyncio.sleep(0.01)

    def post(self, kind: str, fragment: int, round_: int, contents: dict[int, bytes]) -> None:
        """Starts to send a "request", "state" or "end" over some links, as durably as a code."""
        self._check()
        for i, content in contents.items():
            self._submit(i, Key(kind, fragment, round_), content)

    def is_here(self, kind: str, fragment: int, round_: int, site: int) -> bool:
        """Returns whether all that a site posted is on this process's disk."""
        self._check()
        key = Key(kind, fragment, round_)
        peers = [c.peer for c in self.channels if c.link.site == site]
        with self.lock:
            return all((peer, key) in self.mailbox.received for peer in peers)

    def take(self, kind: str, fragment: int, round_: int, site: int) -> dict[int, bytes]:
        """Returns {link index: content} of what a site posted and is_here."""
        key = Key(kind, fragment, round_)
        found = [i for i, link in enumerate(self.links) if link.site == site]
        return {i: self.mailbox.read_received(self.channels[i].peer, key) for i in found}

    def posted(self, kind: str) -> list[tuple[int, int, int]]:
        """Returns the (site, fragment, round) of all received messages of a kind."""
        with self.lock:
            received = set(self.mailbox.received)
        sites = {channel.peer: channel.link.site for channel in self.channels}
        return sorted({(sites[p], k.fragment, k.round) for p, k in received if k.kind == kind})

    def flush(self) -> None:
        """Waits until everything sent before is on this process's disk.

        Call it before a checkpoint is saved: after a restart from there the messages are sent again
        from disk.

        Raises:
            OSError: the disk is full.
        """
        with self.lock:
            writes = list(self._writes)
        for write in writes:
            write.result()
        self._check()

    def finish(self, timeout_s: float, without: Set[int] = frozenset()) -> bool:
        """Waits until all peers have stored everything; returns whether they have.

        Call it before the program ends: later nobody could send the last codes again.

        Args:
            without: sites that are not waited for.
        """
        waits_for = [c for c in self.channels if c.link.site not in without]
        with self.lock:
            idle = lambda: self._error or not any(c.outbox.messages for c in waits_for)
            self.lock.wait_for(lambda: idle() and not self._writes, timeout_s)
            return not self._writes and not any(c.outbox.messages for c in waits_for)

    def silent_s(self) -> dict[int, float]:
        """Returns {other site: seconds since anything arrived from its quietest process}."""
        now, silent = time.monotonic(), {}
        for link, channel in zip(self.links, self.channels, strict=True):
            silent[link.site] = max(silent.get(link.site, 0.0), now - channel.last_s)
        return silent

    # What the channels and connections call.

    def fail(self, error: Exception) -> None:
        """Stops the exchange: every later call, in any thread, raises the error."""
        with self.lock:
            self._error = self._error or error
            self.lock.notify_all()

    def changed(self) -> None:
        """Wakes the threads that wait for something."""
        with self.lock:
            self.lock.notify_all()

    def offered(self, link: Link, message: Message) -> None:
        """Is called when a peer announces a message."""

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Runs a function that waits for the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _submit(
        self, i: int, key: Key, content: bytes, tokens: int = 0, checksum: int | None = None
    ) -> None:
        """Sends a message and writes it to disk, in a thread."""
        write = self._pool.submit(self._write, self.channels[i], key, content, tokens, checksum)
        with self.lock:
            self._writes.add(write)
        write.add_done_callback(self._written)

    def _write(self, channel: Channel, key: Key, content: bytes, tokens, checksum) -> None:
        message = Message(*key, len(content), zlib.crc32(content), tokens, checksum)
        with self.lock:
            before = channel.outbox.messages.get(key)
        if before:  # sent before a restart
            if before.message.crc != message.crc:
                raise different_code(channel.peer, key)
            return
        self._loop.call_soon_threadsafe(channel.send, message, content)
        self.mailbox.write_sent(channel.peer, message, content)
        self._loop.call_soon_threadsafe(channel.note_on_disk, key)

    def _written(self, write: concurrent.futures.Future) -> None:
        with self.lock:
            self._writes.discard(write)
        if not write.cancelled() and (error := write.exception()):
            self.fail(error if isinstance(error, Exception) else RuntimeError(str(error)))
        self.changed()

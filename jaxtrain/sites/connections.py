"""Opens, accepts and identifies the connections of a process, and opens lost ones again.

Of two linked processes that of the earlier site listens. A peer without the job's key gets no
further than the TLS handshake: such connections are few at a time, end after HELLO_S, and reach
neither the channels nor the disk.
"""

import asyncio
import contextlib
import random
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

from jaxtrain.sites.channel import Channel
from jaxtrain.sites.errors import PeerRefused
from jaxtrain.sites.frames import BadFrame
from jaxtrain.sites.greeting import HELLO_S, Greeter
from jaxtrain.sites.layout import Address
from jaxtrain.sites.stream import (
    CLOSE_S,
    MOST_STREAMS,
    Stream,
    choose_streams,
    close_writer,
    read_window_bytes,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0  # between attempts to connect
WAITING = 32  # connections before their greeting; a new one then replaces the oldest
BUFFER_BYTES = 1 << 19
# What a connection buffers beyond the bytes in flight. Buffered chunks cannot move to another
# connection that is free, so with a large buffer a slow connection would delay a round.
UNSENT_BYTES = 1 << 17
REPORT_S = 60.0  # refused connections are counted, and reported this often at most


class Connections:
    """The connections of all links of a process; its coroutines run until they are cancelled.

    Args:
        greeter: identifies the peers.
        tls: settings of the end that listens, and of the end that connects.
        streams: connections of a link; 0 chooses by the round-trip time.
        fail: stops the exchange with an error.
        note: receives messages for the log.
    """

    def __init__(
        self,
        greeter: Greeter,
        tls: tuple[ssl.SSLContext, ssl.SSLContext],
        streams: int,
        fail: Callable[[Exception], None],
        note: Callable[[str], None],
    ):
        self._greeter, self._tls = greeter, tls
        self._streams, self._fail, self._note = streams, fail, note
        # Connections before their greeting, oldest first: {host has proved to have the key: tasks}
        self._greeting: dict[bool, dict[asyncio.Task, asyncio.Task]] = {True: {}, False: {}}
        self._tasks: set[asyncio.Task] = set()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._known_hosts: set[str] = set()
        self._refused, self._reported_s = 0, -REPORT_S
        self._accepting: tuple[socket.socket, asyncio.Task] | None = None
        self._reasons: dict[Channel, str] = {}

    async def close(self) -> None:
        """Ends all connections."""
        if self._accepting:
            listener, accepting = self._accepting
            accepting.cancel()
            await asyncio.sleep(0)  # connections accepted before now begin to be served
            listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        deadline_s = time.monotonic() + CLOSE_S
        while any(c.fileno() >= 0 for c in self._sockets) and time.monotonic() < deadline_s:
            await asyncio.sleep(0.001)

    def _start(self, function: Callable[..., Coroutine], *args: Any) -> asyncio.Task:
        task = asyncio.ensure_future(self._guard(function, *args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guard(self, function: Callable[..., Coroutine], *args: Any) -> None:
        try:
            await function(*args)
        except Exception as error:  # a fault of this program must stop the run, not one thread
            self._fail(error)

    # The end that listens.

    def listen(self, listener: socket.socket) -> None:
        """Starts to accept connections."""
        self._accepting = (listener, self._start(self._accept, listener))

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                await _wait_readable(listener)
                connection, address = listener.accept()
            except BlockingIOError:
                continue
            except OSError:  # out of file descriptors, or the peer has gone
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            # Hosts that held the key before keep their own places, so that strangers cannot
            # take them all.
            waiting = self._greeting[address[0] in self._known_hosts]
            if len(waiting) >= WAITING:
                oldest = next(iter(waiting))
                waiting.pop(oldest).cancel()
            task = self._start(self._serve, connection, address[0], waiting)
            waiting[task] = task
            task.add_done_callback(lambda task, waiting=waiting: waiting.pop(task, None))
            await asyncio.sleep(0)  # a task that is cancelled before it runs closes nothing

    async def _serve(self, connection: socket.socket, host: str, waiting: dict) -> None:
        try:
            reader, writer = await self._secure(connection, listens=True)
        except (OSError, EOFError) as error:  # ssl.SSLError is an OSError
            self._refuse(host, error)
            return
        channel = None
        try:
            channel = await self._greeter.greet(reader, writer)
            self._known_hosts.add(host)
            waiting.pop(asyncio.current_task(), None)
            await self._run(channel, Stream(reader, writer))
        except (OSError, EOFError, BadFrame) as error:
            self._explain(channel, error) if channel else self._refuse(host, error)
        except PeerRefused as error:
            self._fail(error)
        finally:
            await close_writer(writer)

    def _refuse(self, host: str, error: BaseException) -> None:
        self._refused += 1
        if time.monotonic() - self._reported_s >= REPORT_S:
            self._reported_s = time.monotonic()
            self._note(
                f"refused {self._refused} connection(s) that did not prove to have the key of "
                f"this job; the last from {host}: {_reason(error)}"
            )
            self._refused = 0

    # The end that connects.

    def connect(self, channel: Channel, address: Address) -> None:
        """Starts to connect to a peer, and to replace connections that end."""
        self._start(self._connect_first, channel, address)

    async def _connect_first(self, channel: Channel, address: Address) -> None:
        """Runs the first stream of a link, and starts the others when it is connected."""
        others = False

        def connected(stream: Stream) -> None:
            nonlocal others
            if others:
                return
            others = True
            rtt_s = stream.rtt_s()
            count = self._streams or choose_streams(rtt_s, read_window_bytes())
            self._note(f"link to {channel}: {count} streams, round trip {1e3 * rtt_s:.0f} ms")
            for _ in range(count - 1):
                self._start(self._keep_connected, channel, address)

        await self._keep_connected(channel, address, connected)

    async def _keep_connected(
        self, channel: Channel, address: Address, connected: Callable | None = None
    ) -> None:
        """Runs a stream, and replaces it when it ends.

        Args:
            connected: called with each connection of the first stream; None for the others.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            writer = None
            try:
                async with asyncio.timeout(HELLO_S):
                    connection = await self._connect_socket(address)
                    reader, writer = await self._secure(connection, listens=False)
                    await self._greeter.greet(reader, writer, channel)
                pause_s = FIRST_PAUSE_S
                stream = Stream(reader, writer)
                if connected:
                    connected(stream)
                await self._run(channel, stream)
            except (OSError, EOFError, BadFrame) as error:
                self._explain(channel, error, f" at {address}")
            except PeerRefused as error:
                self._fail(error)
                return
            finally:
                if writer:
                    await close_writer(writer)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _connect_socket(self, address: Address) -> socket.socket:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.address, address.port, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, where)
        except BaseException:
            connection.close()
            raise
        return connection

    # Both ends.

    async def _secure(
        self, connection: socket.socket, listens: bool
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Makes the TLS handshake; both ends prove that they have the key."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=BUFFER_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        self._sockets.add(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        try:
            if listens:
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    connection,
                    ssl=self._tls[0],
                    ssl_handshake_timeout=HELLO_S,
                    ssl_shutdown_timeout=CLOSE_S,
                )
            else:
                transport, _ = await loop.create_connection(
                    lambda: protocol,
                    ssl=self._tls[1],
                    sock=connection,
                    server_hostname="",
                    ssl_handshake_timeout=HELLO_S,
                    ssl_shutdown_timeout=CLOSE_S,
                )
        except BaseException:  # a cancelled handshake would wait for its peer
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            raise
        transport.set_write_buffer_limits(high=UNSENT_BYTES)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _run(self, channel: Channel, stream: Stream) -> None:
        try:
            await self._run_open(channel, stream)
        finally:
            stream.close()

    async def _run_open(self, channel: Channel, stream: Stream) -> None:
        if len(channel.streams) >= 2 * MOST_STREAMS:
            raise BadFrame(f"{channel} has {len(channel.streams)} connections already")
        if not channel.streams:
            self._reasons.pop(channel, None)
            self._note(f"connected to {channel}")
        await channel.run(stream)

    def _explain(self, channel: Channel, error: BaseException, where: str = "") -> None:
        """Reports why a link has no connection, once for each reason."""
        reason = _reason(error)
        if not channel.streams and self._reasons.get(channel) != reason:
            self._reasons[channel] = reason
            self._note(f"no connection to {channel}{where}: {reason}")


async def _wait_readable(listener: socket.socket) -> None:
    """Waits for a connection. loop.sock_accept leaves it open if it is cancelled at that moment."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(listener, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(listener)


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "the other end does not have the key of this job"
    if isinstance(error, TimeoutError):
        return str(error) or f"no answer within {HELLO_S:.0f} s"
    if isinstance(error, EOFError):
        return "the connection was closed"
    return str(error) or type(error).__name__

"""Two or three sites on this machine, and a proxy between them that cuts, damages or stops."""

import contextlib
import select
import socket
import threading
import time
from pathlib import Path

from jaxtrain.sites.exchange import Exchange
from jaxtrain.sites.layout import Address, Site, SitesFile

KEY = bytes(range(32))
NAMES = ("a", "b", "c")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


class Scene:
    """Sites of one process each.

    Attributes:
        notes: {site: what its exchange reported}.
    """

    def __init__(self, folder: Path, blocks: tuple[int, ...] = (4,), sites: int = 2):
        self.folder, self.blocks, self.names = folder, blocks, NAMES[:sites]
        self.ports = dict(zip(self.names, free_ports(sites), strict=True))
        self.notes = {name: [] for name in self.names}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def sites_file(self, ports: dict[str, int] | None = None, key: bytes = KEY) -> SitesFile:
        ports = self.ports | (ports or {})
        sites = [Site(name, (Address("127.0.0.1", ports[name]),)) for name in self.names]
        return SitesFile("j-1", key, tuple(sites))

    def start(self, name: str, ports=None, key=KEY, identity=None, **options) -> Exchange:
        """Starts a site; `ports` replaces ports of others, for example by that of a proxy."""
        return self._stack.enter_context(
            Exchange(
                self.sites_file(ports, key),
                name,
                0,
                self.blocks,
                identity or {"config": "1"},
                self.folder / name,
                note=self.notes[name].append,
                **{"streams": 2} | options,
            )
        )

    def files(self, name: str) -> set[str]:
        """Returns the names of a site's files, without the history."""
        found = {path.name for path in (self.folder / name / "0").iterdir()}
        return found - {"received.jsonl"}

    def noted(self, name: str, text: str, timeout_s: float = 5.0) -> bool:
        """Waits until a site has reported a text."""
        return wait_until(lambda: any(text in note for note in self.notes[name]), timeout_s)


def wait_until(condition, timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


class Proxy:
    """Passes connections on to a port, and disturbs what the connecting end sends.

    Args:
        cut_at: all connections are closed once, after so many bytes.
        damage_at: the bit of one byte is flipped, after so many bytes.
        stop_at: connections stay open, but pass nothing more, after so many bytes; later
            connections pass everything.
        bytes_s: passes at most so many bytes a second.
    """

    def __init__(self, port: int, cut_at=0, damage_at=0, stop_at=0, bytes_s=0):
        self._target, self._bytes_s = port, bytes_s
        self._marks = {"cut": cut_at, "damage": damage_at, "stop": stop_at}
        self.events: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._stopped: list[tuple[socket.socket, socket.socket]] = []
        self._passed, self._end = 0, False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._end = True
        self._thread.join()
        self._server.close()
        self._close_all()

    def _close_all(self):
        for pair in self._pairs + self._stopped:
            for sock in pair:
                sock.close()
        self._pairs.clear()

    def _run(self):
        while not self._end:
            sources = {pair[i]: (pair, pair[1 - i]) for pair in self._pairs for i in (0, 1)}
            ready, _, _ = select.select([self._server, *sources], [], [], 0.02)
            for sock in ready:
                if sock is self._server:
                    self._accept()
                elif sock.fileno() >= 0:
                    with contextlib.suppress(OSError):
                        self._pass(sock, *sources[sock])

    def _accept(self):
        client = self._server.accept()[0]
        try:
            self._pairs.append((client, socket.create_connection(("127.0.0.1", self._target))))
        except OSError:  # the site does not listen yet
            client.close()

    def _pass(self, source, pair, to):
        data = source.recv(1 << 16)
        if not data:
            self._pairs.remove(pair)
            for sock in pair:
                sock.close()
            return
        if source is pair[0]:
            if self._bytes_s:
                time.sleep(len(data) / self._bytes_s)
            self._passed += len(data)
            for event, mark in self._marks.items():
                if mark and self._passed >= mark and event not in self.events:
                    self.events.append(event)
                    if event == "damage":
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    elif event == "cut":
                        return self._close_all()
                    else:
                        self._stopped = list(self._pairs)  # open, but no longer read
                        return self._pairs.clear()
        to.sendall(data)

"""A stranger who reaches the listening port can neither fill memory or disk nor keep a peer out."""

import asyncio
import os
import resource
import socket
import ssl
import threading
import time
import zlib

import pytest
from sites_scene import KEY, Scene, wait_until

from jaxtrain.sites import connections, frames, greeting
from jaxtrain.sites.certificate import build_tls
from jaxtrain.sites.layout import Address
from jaxtrain.sites.listener import open_listener


@pytest.fixture
def scene(tmp_path):
    with Scene(tmp_path) as scene:
        yield scene


def _dial(scene):
    return socket.create_connection(("127.0.0.1", scene.ports["a"]), timeout=5)


def _works(scene, a, round_=0):
    """Returns whether a peer with the key can connect and exchange a code."""
    b = scene.start("b")
    a.send(0, round_, {0: b"a"}, 1, {})
    b.send(0, round_, {0: b"b"}, 1, {})
    return a.wait(0, round_, 10).codes == {1: {0: b"b"}} and bool(b.wait(0, round_, 10))


CONTEXT = build_tls(KEY)[1]


def _tls(scene):
    return CONTEXT.wrap_socket(_dial(scene), server_hostname="any")


GARBAGE = {
    "nothing": b"",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "random bytes": os.urandom(1 << 20),
    "a large TLS record": b"\x16\x03\x01\xff\xff" + bytes(1 << 16),
    "a large TLS handshake": b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(0x3FFC),
    "our frame without TLS": frames.pack(frames.HELLO, {"job": "j-1"}),
}


def test_bytes_of_strangers_are_refused_and_leave_no_trace(scene):
    a = scene.start("a")
    for data in GARBAGE.values():
        with _dial(scene) as sock:
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
            except OSError:
                pass  # it has hung up
    assert scene.noted("a", "did not prove to have the key of this job; the last from 127.0.0.1")
    assert len(scene.notes["a"]) == 1  # the log does not grow with the number of attempts
    assert scene.files("a") == set()
    assert _works(scene, a)


def test_many_silent_connections_are_bounded_and_keep_no_peer_out(scene):
    a = scene.start("a")
    strangers = [_dial(scene) for _ in range(3 * connections.WAITING)]
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        waiting = a._connections._greeting[False]
        assert wait_until(lambda: len(waiting) == connections.WAITING)
        hung_up = lambda: sum(_has_ended(sock) for sock in strangers)
        assert wait_until(lambda: hung_up() == 2 * connections.WAITING)
        assert _works(scene, a)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    finally:
        for sock in strangers:
            sock.close()


def test_closing_closes_connections_that_arrive_at_that_moment():
    errors = []

    async def close_after(turns):
        greeter = greeting.Greeter({}, ("a", 0), "j-1", "s", {})
        arriving = connections.Connections(greeter, build_tls(KEY), 1, errors.append, print)
        listener = open_listener(Address("127.0.0.1", 0), print)
        arriving.listen(listener)
        with socket.create_connection(listener.getsockname()):
            for _ in range(turns):
                await asyncio.sleep(0)
            await arriving.close()
        assert listener.fileno() < 0

    for turns in range(12):  # of the event loop; a socket left open is a warning, so a failure
        asyncio.run(close_after(turns))
    assert errors == []


def _has_ended(sock):
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_connection_without_a_greeting_ends_soon(scene, monkeypatch):
    monkeypatch.setattr(greeting, "HELLO_S", 0.2)
    monkeypatch.setattr(connections, "HELLO_S", 0.2)
    a = scene.start("a")
    with _dial(scene) as silent, _tls(scene) as without_greeting:
        start_s = time.monotonic()
        assert silent.recv(1) == b""
        without_greeting.recv(1)
        assert time.monotonic() - start_s < 3
    assert _works(scene, a)


def test_a_stranger_that_completes_its_side_of_the_handshake_is_refused(scene):
    a = scene.start("a")
    other_key = build_tls(bytes(32))[1]
    other_key.verify_mode = ssl.CERT_NONE  # a stranger does not check its peer
    no_certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    no_certificate.check_hostname, no_certificate.verify_mode = False, ssl.CERT_NONE
    for context in (other_key, no_certificate):
        with _dial(scene) as sock, _any():
            with context.wrap_socket(sock, server_hostname="any") as tls:
                tls.sendall(frames.pack(frames.HELLO, HELLO | {"identity": {}}))
                assert tls.recv(1) == b""  # nothing, not even a greeting
    assert scene.files("a") == set() and not a.channels[0].session and _works(scene, a)


HELLO = {"protocol": 1, "job": "j-1", "from": ["b", 0], "to": ["a", 0], "session": "s"}
GREETINGS = {
    "another job": {"job": "j-2"},
    "another protocol": {"protocol": 2},
    "an unknown site": {"from": ["x", 0]},
    "an unknown process": {"from": ["b", 7]},
    "itself": {"from": ["a", 0]},
    "no process": {"from": "b"},
    "for another process": {"to": ["a", 1]},
}


def test_a_greeting_of_or_for_someone_else_is_refused(scene):
    a = scene.start("a")
    for change in GREETINGS.values():
        with _tls(scene) as tls:
            tls.sendall(frames.pack(frames.HELLO, HELLO | {"identity": {}} | change))
            with _any():
                assert tls.recv(1) == b""
    assert not a.channels[0].streams and _works(scene, a)


class _any:
    """Accepts an error of a connection that was closed abruptly."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        return kind is not None and issubclass(kind, OSError)


def _frame(kind, data, length=None, crc=None):
    return frames.HEADER.pack(
        kind, len(data) if length is None else length, zlib.crc32(data) if crc is None else crc
    )


BAD_FRAMES = {
    "an unknown type": _frame(b"X", b""),
    "a wrong checksum": _frame(frames.PING, b"null", crc=1) + b"null",
    "a length of 4 GiB": _frame(frames.OFFER, b"", length=0xFFFFFFFF),
    "a chunk that is too long": _frame(frames.CHUNK, b"", length=frames.CHUNK_BYTES + 100),
    "no JSON": frames.pack_bytes(frames.OFFER, b"{"),
    "deep JSON": frames.pack_bytes(frames.OFFER, b"[" * 100_000),
    "cut off": _frame(frames.PING, b"null") + b"nu",
}


@pytest.mark.parametrize("data", BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_an_invalid_frame_is_refused_before_its_body_is_read(data):
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await frames.read_frame(reader)

    with pytest.raises((frames.BadFrame, EOFError)):
        asyncio.run(read())


MESSAGE = {"kind": "code", "fragment": 0, "round": 0, "size": 1, "crc": 0}
BAD_MESSAGES = [
    {"kind": "../../etc"},
    {"fragment": -1},
    {"fragment": 1},
    {"round": 1 << 64},
    {"round": "0"},
    {"size": 1 << 40},
    {"size": True},
    {"crc": None},
    {"tokens": 0.5},
    {"checksum": "x"},
    {"colour": 1},
]


def test_invalid_messages_of_a_peer_with_the_key_end_its_connection_and_write_no_file(scene):
    a = scene.start("a")
    identity = {"config": "1", "processes of the sites": "a: 1, b: 1", "fragments": "[4]"}
    offers = [frames.pack(frames.OFFER, MESSAGE | change) for change in BAD_MESSAGES]
    offers += [frames.pack(frames.OFFER, value) for value in (None, [], 3, {})]
    offers += [frames.pack(kind, v) for kind in (frames.HAVE, frames.STORED) for v in (None, {})]
    chunk = frames.CHUNK_HEADER.pack(0, 0, 0, 9) + b"xx"  # index 9 of a message of one chunk
    good = frames.pack(frames.OFFER, MESSAGE)
    offers += [good + frames.pack_bytes(frames.CHUNK, chunk), frames.pack_bytes(frames.CHUNK, b"")]
    for offer in offers:
        with _tls(scene) as tls:
            tls.sendall(frames.pack(frames.HELLO, HELLO | {"identity": identity}))
            tls.sendall(offer)
            with _any():
                while tls.recv(1 << 16):  # its greeting, then the end
                    pass
    assert scene.files("a") <= {"received-b-0-code-0-0.part"}
    assert _works(scene, a, round_=1)


def test_a_busy_port_and_an_address_of_another_host_are_reported(scene):
    with socket.create_server(("127.0.0.1", scene.ports["a"])):
        with pytest.raises(ValueError, match="--sites_file gives this process .* port is in use"):
            scene.start("a")
    notes = []
    elsewhere = Address("192.0.2.1", scene.ports["a"])  # RFC 5737: an address for documentation
    open_listener(elsewhere, notes.append).close()
    assert notes == ["this host does not own 192.0.2.1: listening on all its addresses."]
    assert not [t for t in threading.enumerate() if t.name.startswith("sites-")]

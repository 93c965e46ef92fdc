"""Checks the signed messages between supervisors on real sockets."""

import contextlib
import random
import socket
import struct
import threading
import time

import pytest

from launch.host import channel
from launch.host.channel import (
    CLOSED,
    RUNNING,
    UNKNOWN,
    UP,
    Channel,
    FollowerChannel,
    InvalidMessage,
    LeaderChannel,
)
from launch.host.interfaces import free_port

TOKEN = "a" * 64


@pytest.fixture(params=[TOKEN])
def pair(request):
    left, right = socket.socketpair()
    with left, right:
        yield Channel(left, TOKEN, "n"), Channel(right, request.param, "n")


@pytest.mark.parametrize("pair", ["b" * 64], indirect=True)
def test_a_message_without_the_jobs_token_is_refused(pair):
    leader, follower = pair
    follower.send({"host": 1}, UP)
    with pytest.raises(InvalidMessage):
        leader.receive(UP)


def test_a_replayed_message_is_refused(pair):
    leader, follower = pair
    follower.send({"host": 1}, UP)
    line = leader.sock.recv(1 << 16)
    follower.sock.sendall(line + line)
    with pytest.raises(InvalidMessage):
        leader.receive(UP)


@pytest.fixture
def connect():
    """Yields functions that create a leader and a follower of one address; closes both."""
    port, channels = free_port("127.0.0.1"), []

    def make(kind):
        channels.append(kind("127.0.0.1", port, TOKEN))
        return channels[-1]

    yield lambda: make(LeaderChannel), lambda: make(FollowerChannel)
    for each in channels:
        each.close()


def talk(leader, follower, report, target):
    """Exchanges until the follower has the target; returns the reports that the leader took."""
    reports, answers = [], []

    def follow():
        deadline = time.monotonic() + 20
        while target not in answers and time.monotonic() < deadline:
            answers.append(follower.exchange(report))
            time.sleep(0.01)

    following = threading.Thread(target=follow)
    following.start()
    while following.is_alive():
        reports += leader.receive_reports()
        leader.send_target(target)
        time.sleep(0.01)
    assert answers[-1] == target
    return reports


def test_a_follower_finds_a_leader_that_was_restarted(connect):
    new_leader, new_follower = connect
    follower = new_follower()
    report = {"host": 1, "text": "é$(x)\n"}
    for target in ({"do": "run"}, {"do": "kill"}):
        leader = new_leader()
        assert talk(leader, follower, report, target)[0] == report
        leader.close()


def test_the_last_target_arrives_even_if_the_leader_ended_with_an_unread_report(connect):
    leader, follower = (new() for new in connect)
    talk(leader, follower, {"host": 1}, {"do": "run"})
    follower.exchange({"host": 1})
    leader.send_target({"do": "end"})
    leader.close()  # with unread bytes, so the kernel resets the connection
    time.sleep(0.05)
    assert follower.exchange({"host": 1}) == {"do": "end"}


def test_a_connection_reset_before_the_greeting_does_not_affect_others(connect):
    leader, follower = (new() for new in connect)
    scanner = socket.create_connection(leader._server.getsockname())
    scanner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    scanner.close()  # with a reset instead of an end
    assert talk(leader, follower, {"host": 1}, {"do": "run"})[0] == {"host": 1}


def wait_until(leader, condition):
    """Lets the leader take reports until a condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        leader.receive_reports()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_leader_knows_that_a_hosts_kernel_is_up_while_its_supervisor_is_silent(connect):
    leader, follower = (new() for new in connect)
    assert leader.kernel_state(1, 0.5) == UNKNOWN
    talk(leader, follower, {"host": 1}, {"do": "run"})
    for _ in range(20):  # the follower neither reads nor answers, as a stopped process
        leader.send_target({"do": "run"})
        time.sleep(0.05)
    assert leader.kernel_state(1, 0.5) == RUNNING


def test_a_leader_knows_that_a_supervisor_has_ended_until_a_new_one_reports(connect):
    leader, follower = (new() for new in connect)
    talk(leader, follower, {"host": 1}, {"do": "run"})
    follower.close()  # as the kernel does when the process ends
    wait_until(leader, lambda: leader.kernel_state(1, 0.5) == CLOSED)
    talk(leader, connect[1](), {"host": 1}, {"do": "kill"})
    assert leader.kernel_state(1, 5.0) == RUNNING


def test_a_follower_that_hears_nothing_does_not_look_like_one_that_has_ended(connect):
    leader, follower = (new() for new in connect)
    talk(leader, follower, {"host": 1}, {"do": "run"})
    follower._silent_s, channel_then = 0.05, follower._channel
    while follower._channel is channel_then:  # until it gives this connection up
        follower.exchange({"host": 1})
        time.sleep(0.02)
    for _ in range(5):
        leader.receive_reports()
        time.sleep(0.01)
    assert leader.kernel_state(1, 0.0) == UNKNOWN
    following = threading.Thread(target=lambda: follower.exchange({"host": 1}))
    follower._try_at = 0.0
    following.start()
    wait_until(leader, lambda: not following.is_alive() and len(leader._host_of) == 1)
    wait_until(leader, lambda: [*leader._host_of.values()] == [1])
    assert leader.kernel_state(1, 0.0) == UNKNOWN


def exchange_until(follower, condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        follower._try_at = 0.0  # it would wait for a second
        follower.exchange({"host": 1})


def test_a_follower_knows_that_the_leaders_kernel_is_up_until_the_supervisor_has_ended(
    connect, monkeypatch
):
    monkeypatch.setattr(channel, "CONNECT_S", 0.05)
    monkeypatch.setattr(channel, "PROBE_S", 1)
    leader, follower = (new() for new in connect)
    assert follower.kernel_state(9.0) == UNKNOWN
    talk(leader, follower, {"host": 1}, {"do": "run"})
    leader._server.listen(1)
    follower._silent_s = 0.05
    # The leader is not called any more, as if it were stopped: its kernel accepts connections...
    exchange_until(follower, lambda: follower._former and follower._accepted_at > follower._try_at)
    assert follower.kernel_state(0.2) == RUNNING
    # ...until its queue is full; then it still acknowledges probes.
    exchange_until(follower, lambda: time.monotonic() - follower._accepted_at > 2.5)
    assert follower._closed is False and follower.kernel_state(1.5) == RUNNING
    assert follower.kernel_state(0.0) == UNKNOWN  # as after a loss of power
    leader.close()
    exchange_until(follower, lambda: follower.kernel_state(0.0) == CLOSED)
    follower.close()
    talk(connect[0](), follower, {"host": 1}, {"do": "kill"})
    assert follower.kernel_state(5.0) == RUNNING


CLIENT_HELLO = b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(range(160)) + b"\n"
NOISE = {
    "not text": b"\xff\n",
    "TLS": CLIENT_HELLO,
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "random": random.Random(0).randbytes(1 << 16),
    "a long line": b"x" * (2 << 20),
    "a long line that is not text": b"\xff" * (2 << 20) + b"\n",
    "many lines": b"\n" * (2 << 20),
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_a_stranger_without_the_token_is_disconnected_and_does_not_affect_others(connect, noise):
    leader, follower = (new() for new in connect)
    with socket.create_connection(leader._server.getsockname()) as stranger:

        def send():
            with contextlib.suppress(OSError):  # disconnected
                stranger.sendall(noise)

        sending = threading.Thread(target=send)
        sending.start()
        wait_until(leader, lambda: not sending.is_alive() and not leader._host_of)
        sending.join()
        assert talk(leader, follower, {"host": 1}, {"do": "run"})[0] == {"host": 1}


class Endless:
    """A socket from which there is always more to read, as from one who sends fast enough."""

    def setblocking(self, flag):
        self.received = 0

    def recv(self, size):
        self.received += size
        assert self.received < 16 << 20, "read without a limit"
        return b"x" * size


def test_an_endless_stream_is_cut_off_before_it_fills_memory():
    with pytest.raises(InvalidMessage, match="over 1 MiB"):
        Channel(Endless(), TOKEN, "n").receive(UP)


def test_silent_and_dripping_strangers_are_disconnected(connect, monkeypatch):
    monkeypatch.setattr(channel, "STRANGER_S", 0.2)
    monkeypatch.setattr(channel, "STRANGERS", 4)
    leader, follower = (new() for new in connect)
    address = leader._server.getsockname()
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
        for _ in range(10):
            leader.receive_reports()
            assert len(leader._host_of) <= 4
        assert talk(leader, follower, {"host": 1}, {"do": "run"})[0] == {"host": 1}
        drip = lambda: strangers[-1].send(b"x")
        wait_until(leader, lambda: drip() and [*leader._host_of.values()] == [1])


@pytest.mark.parametrize("noise", [b"\xff" * 40, CLIENT_HELLO, b"SSH-2.0-x\r\n" * 9, b"0", b""])
def test_a_follower_gives_up_on_a_port_that_another_service_has(noise, monkeypatch):
    monkeypatch.setattr(channel, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        follower = FollowerChannel(*server.getsockname(), TOKEN)
        exchanged = []
        exchanging = threading.Thread(
            target=lambda: exchanged.append(follower.exchange({"host": 1})), daemon=True
        )
        exchanging.start()
        with server.accept()[0] as sock:
            deadline = time.monotonic() + 5
            with contextlib.suppress(OSError):
                sock.sendall(noise)
                while exchanging.is_alive() and time.monotonic() < deadline and noise == b"0":
                    sock.sendall(noise)  # a byte at a time, each of which could be a nonce's
                    time.sleep(0.1)
            exchanging.join(5)
        assert exchanged == [None] and follower._channel is None

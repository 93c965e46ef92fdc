"""Checks the signed messages between supervisors on real sockets."""

import math
import socket
import struct
import threading
import time

import pytest

from launch.host.channel import (
    UP,
    Channel,
    FollowerChannel,
    InvalidMessage,
    LeaderChannel,
    free_port,
)

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
    for channel in channels:
        channel.close()


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


def test_a_leader_knows_that_a_hosts_kernel_is_up_while_its_supervisor_is_silent(connect):
    leader, follower = (new() for new in connect)
    assert leader.acknowledged_s(1) == math.inf
    talk(leader, follower, {"host": 1}, {"do": "run"})
    for _ in range(20):  # the follower neither reads nor answers, as a stopped process
        leader.send_target({"do": "run"})
        time.sleep(0.05)
    assert leader.acknowledged_s(1) < 0.5
    follower.close()
    deadline = time.monotonic() + 5
    while leader.acknowledged_s(1) < math.inf and time.monotonic() < deadline:
        leader.receive_reports()
        time.sleep(0.01)
    assert leader.acknowledged_s(1) == math.inf

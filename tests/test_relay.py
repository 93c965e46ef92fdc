"""Links of the relayed bed have the delay, rate, loss and cuts that they are told to have."""

import hashlib
import socket
import subprocess
import sys
import time

import bed as beds
import pytest

reason = beds.available(relayed=True)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)

TAKE = """
import hashlib, socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
taken, hashed, start = 0, hashlib.sha256(), None
with server.accept()[0] as sock:
    while data := sock.recv(1 << 20):
        start = start or time.perf_counter()
        taken += len(data)
        hashed.update(data)
print(taken / (time.perf_counter() - start), hashed.hexdigest(), flush=True)
"""


@pytest.fixture(scope="module")
def whole():
    with beds.Bed(2, relayed=True) as made:
        yield made


@pytest.fixture
def bed(whole):
    whole.link("*", "*", delay_ms=0, jitter_ms=0, rate_mbit=0, loss=0, up=True)
    return whole


def round_trip_s(bed, name="h0", timeout_s=5.0):
    start = time.perf_counter()
    socket.create_connection((bed.address[name], 22), timeout_s).close()
    return time.perf_counter() - start


def counts(bed, name="h0"):
    return bed.traffic()[f"{beds.OPERATOR} > {name}"]


def test_a_round_trip_takes_the_delays_of_both_ways_and_of_its_own_pair_alone(bed):
    bed.link(beds.OPERATOR, "h0", delay_ms=75)
    assert min(round_trip_s(bed) for _ in range(5)) == pytest.approx(0.150, abs=0.006)
    assert min(round_trip_s(bed, "h1") for _ in range(3)) < 0.006


def test_bytes_arrive_whole_at_the_links_rate_and_headers_are_counted(bed):
    bed.link(beds.OPERATOR, "h0", rate_mbit=80, delay_ms=5)
    command = bed.inside("h0", sys.executable, "-c", TAKE, bed.address["h0"])
    taker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    taker.stdout.readline()
    data, before = bytes(range(256)) * 32_768, counts(bed)
    with socket.create_connection((bed.address["h0"], 5000)) as sock:
        sock.sendall(data)
    rate, digest = taker.communicate(timeout=30)[0].split()
    assert digest == hashlib.sha256(data).hexdigest()
    after = counts(bed)
    header_share = (after["bytes"] - before["bytes"]) / len(data) - 1
    assert 0.045 < header_share < 0.06  # 66 of each 1,514 bytes, and what was sent again
    assert float(rate) * 1.0457 == pytest.approx(10e6, rel=0.15)  # 80 Mbit/s with headers


def test_a_lossy_link_loses_its_share_and_gives_the_rest(bed):
    bed.link(beds.OPERATOR, "h0", loss=0.3)
    udp = lambda: bed.run("h0", "cat", "/proc/net/snmp").split("\nUdp: ")[2].split()
    arrived, lost = int(udp()[1]), counts(bed)["lost"]  # NoPorts: nobody listens
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(2000):
            sock.sendto(b"x", (bed.address["h0"], 9))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        arrived_now, lost_now = int(udp()[1]) - arrived, counts(bed)["lost"] - lost
        if arrived_now + lost_now == 2000:
            break
        time.sleep(0.05)
    assert arrived_now + lost_now == 2000 and 500 < lost_now < 700


def test_a_cut_drops_also_what_is_under_way_and_heals(bed):
    bed.link(beds.OPERATOR, "h0", delay_ms=200)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect_ex((bed.address["h0"], 22))
        time.sleep(0.1)  # half of the way
        bed.cut("h0")
        bed.link(beds.OPERATOR, "h0", delay_ms=0)
        with pytest.raises(TimeoutError):
            round_trip_s(bed, timeout_s=0.5)
        assert round_trip_s(bed, "h1") < 1.0
        with pytest.raises(OSError):
            sock.getpeername()  # not connected: its SYN is gone
    bed.heal("h0")
    assert round_trip_s(bed) < 3.0

"""Links of a relayed test bed have the delay, rate, loss and cuts that are set."""

import hashlib
import socket
import subprocess
import sys
import time

import bed as beds
import pytest

reason = beds.available(relayed=True)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)

RECEIVE = """
import hashlib, socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
received, hashed, start = 0, hashlib.sha256(), None
with server.accept()[0] as sock:
    while data := sock.recv(1 << 20):
        start = start or time.perf_counter()
        received += len(data)
        hashed.update(data)
print(received / (time.perf_counter() - start), hashed.hexdigest(), flush=True)
"""


@pytest.fixture(scope="module")
def shared_bed():
    with beds.Bed(2, relayed=True) as bed:
        yield bed


@pytest.fixture
def bed(shared_bed):
    shared_bed.link("*", "*", delay_ms=0, jitter_ms=0, rate_mbit=0, loss=0, up=True)
    return shared_bed


def round_trip_s(bed, name="h0", timeout_s=5.0):
    start = time.perf_counter()
    socket.create_connection((bed.address[name], 22), timeout_s).close()
    return time.perf_counter() - start


def counts(bed, name="h0"):
    return bed.traffic()[f"{beds.OPERATOR} > {name}"]


def test_a_round_trip_takes_both_delays_of_its_own_link_only(bed):
    bed.link(beds.OPERATOR, "h0", delay_ms=75)
    assert min(round_trip_s(bed) for _ in range(5)) == pytest.approx(0.150, abs=0.006)
    assert min(round_trip_s(bed, "h1") for _ in range(3)) < 0.006


def test_bytes_arrive_unchanged_at_the_links_rate_and_headers_are_counted(bed):
    bed.link(beds.OPERATOR, "h0", rate_mbit=80, delay_ms=5)
    command = bed.inside("h0", sys.executable, "-c", RECEIVE, bed.address["h0"])
    receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    receiver.stdout.readline()
    data, before = bytes(range(256)) * 32_768, counts(bed)
    with socket.create_connection((bed.address["h0"], 5000)) as sock:
        sock.sendall(data)
    rate, digest = receiver.communicate(timeout=30)[0].split()
    assert digest == hashlib.sha256(data).hexdigest()
    after = counts(bed)
    header_share = (after["bytes"] - before["bytes"]) / len(data) - 1
    assert 0.045 < header_share < 0.06  # 66 of each 1,514 bytes, and retransmissions
    assert float(rate) * 1.0457 == pytest.approx(10e6, rel=0.15)  # 80 Mbit/s with headers


def datagrams(bed, name="h0") -> int:
    """Returns how many came to a port without a listener: NoPorts of /proc/net/snmp."""
    return int(bed.run(name, "cat", "/proc/net/snmp").split("\nUdp: ")[2].split()[1])


def send(bed, count, name="h0"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(count):
            sock.sendto(b"x", (bed.address[name], 9))


def test_a_lossy_link_loses_its_share_and_delivers_the_rest(bed):
    bed.link(beds.OPERATOR, "h0", loss=0.3)
    before, lost_before = datagrams(bed), counts(bed)["lost"]
    send(bed, 2000)
    deadline = time.monotonic() + 5
    arrived = lost = 0
    while arrived + lost < 2000 and time.monotonic() < deadline:
        time.sleep(0.05)
        arrived, lost = datagrams(bed) - before, counts(bed)["lost"] - lost_before
    assert arrived + lost == 2000 and 500 < lost < 700


def test_a_cut_drops_all_packets_of_one_host_until_it_heals(bed):
    before = datagrams(bed)
    bed.link(beds.OPERATOR, "h0", delay_ms=200)
    send(bed, 5)
    time.sleep(0.05)
    bed.cut("h0")
    send(bed, 5)
    bed.link(beds.OPERATOR, "h0", delay_ms=0)
    with pytest.raises(TimeoutError):
        round_trip_s(bed, timeout_s=0.3)
    assert round_trip_s(bed, "h1") < 1.0
    bed.heal("h0")
    assert round_trip_s(bed) < 1.0 and datagrams(bed) == before


def test_packets_on_a_cable_that_is_cut_do_not_arrive_after_it_heals(bed):
    before = datagrams(bed)
    bed.link(beds.OPERATOR, "h0", delay_ms=100)
    send(bed, 5)
    time.sleep(0.05)
    bed.cut("h0")
    bed.heal("h0")
    send(bed, 2)
    time.sleep(0.3)
    assert datagrams(bed) == before + 2

"""Codes reach every other site once, intact and durably, whatever the connection does."""

import concurrent.futures
import contextlib
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from sites_scene import KEY, Proxy, Scene, free_ports, wait_until

from jaxtrain.sites import channel, inbox, mailbox
from jaxtrain.sites.exchange import Disagreement, Exchange, PeerRefused, SiteLeftOut
from jaxtrain.sites.frames import CHUNK_BYTES
from jaxtrain.sites.layout import Address, Site, SitesFile
from jaxtrain.sites.stream import choose_streams
from jaxtrain.sites.transport import Transport

LARGE = 5 * CHUNK_BYTES + 17
LARGE_BLOCKS = (LARGE // 4096 + 1,)  # its code is float32, as large as a code can be


@pytest.fixture
def scene(tmp_path):
    with Scene(tmp_path) as scene:
        yield scene


@pytest.fixture
def large(tmp_path):
    with Scene(tmp_path, LARGE_BLOCKS) as scene:
        yield scene


@pytest.fixture
def writes(monkeypatch):
    """Returns the list of all chunks that arrive."""
    writes = []
    write = mailbox.Incoming.write
    spy = lambda self, i, data: (writes.append(i), write(self, i, data))[1]
    monkeypatch.setattr(mailbox.Incoming, "write", spy)
    return writes


def _exchange_one(a, b, code_a, code_b, round_=0):
    a.send(0, round_, {0: code_a}, 10, {})
    b.send(0, round_, {0: code_b}, 20, {})
    arrived_a, arrived_b = a.wait(0, round_, 10), b.wait(0, round_, 10)
    assert arrived_a and arrived_b
    assert arrived_a.codes == {1: {0: code_b}} and arrived_b.codes == {0: {0: code_a}}
    return arrived_a, arrived_b


@pytest.mark.parametrize("first", ["a", "b"])
def test_sites_exchange_codes_whichever_starts_first(scene, first):
    second = "b" if first == "a" else "a"
    started = {first: scene.start(first)}
    started[first].send(0, 0, {0: first.encode()}, 1, {})
    time.sleep(0.05)
    started[second] = scene.start(second)
    started[second].send(0, 0, {0: second.encode()}, 2, {})
    arrived = started["a"].wait(0, 0, 10)
    assert arrived.codes == {1: {0: b"b"}} and arrived.participants == (0, 1)
    assert started["b"].wait(0, 0, 10).codes == {0: {0: b"a"}}
    assert started["a"].poll(0, 1) is None and started["a"].missing(0, 1) == (1,)


def test_payload_is_counted_apart_from_all_bytes_on_the_wire(large):
    a, b = large.start("a"), large.start("b")
    code_a, code_b = os.urandom(LARGE), os.urandom(LARGE)
    wire = [0, 0]
    for round_ in range(3):
        arrived, _ = _exchange_one(a, b, code_a, code_b, round_)
        assert arrived.payload_bytes == (LARGE, LARGE) and arrived.tokens == {1: 20}
        wire = [total + part for total, part in zip(wire, arrived.wire_bytes, strict=True)]
    assert a.finish(5) and b.finish(5)
    for total in wire:
        assert 3 * LARGE < total < 1.1 * 3 * LARGE


def test_the_count_of_bytes_never_decreases_while_a_connection_ends(scene, monkeypatch):
    a, _ = scene.start("a"), scene.start("b")
    a.send(0, 0, {0: b"code"}, 1, {})
    assert a.finish(10)
    [channel] = a.channels
    before = channel.wire_bytes()
    monkeypatch.setattr(channel, "streams", set())  # they are not yet among the closed ones
    after = channel.wire_bytes()
    assert min(before) > 0 and after[0] >= before[0] and after[1] >= before[1]


def test_chunks_in_any_order_and_twice_give_the_same_file(tmp_path):
    box = mailbox.Mailbox(tmp_path, {("b", 0): [range(LARGE_BLOCKS[0])]})
    content = os.urandom(LARGE)
    chunks = [content[i : i + CHUNK_BYTES] for i in range(0, LARGE, CHUNK_BYTES)]
    for seed in range(4):
        message = mailbox.Message("code", 0, seed, LARGE, mailbox.zlib.crc32(content))
        incoming = box.receive(("b", 0), message)
        order = list(range(len(chunks))) * 2
        random.Random(seed).shuffle(order)
        for index in order:
            incoming.write(index, memoryview(chunks[index]))
        assert not incoming.missing and incoming.finish()
        box.record(("b", 0), message)
        assert box.read_received(("b", 0), message.key) == content
    box.close()


@pytest.mark.parametrize("fault", ["cut_at", "damage_at"])
def test_only_missing_chunks_are_sent_again_after_a_cut_or_a_damaged_byte(large, writes, fault):
    with Proxy(large.ports["a"], **{fault: LARGE // 2}) as proxy:
        a, b = large.start("a"), large.start("b", {"a": proxy.port})
        code = os.urandom(LARGE)
        a.send(0, 0, {0: b""}, 1, {})
        assert b.wait(0, 0, 10)  # connected, so the large code is sent without a question
        b.send(0, 0, {0: code}, 1, {})
        assert a.wait(0, 0, 10).codes == {1: {0: code}}
        assert proxy.events == [fault.removesuffix("_at")]
        assert b.channels[0].wire_bytes()[0] > LARGE  # those of the broken connections included
    assert sorted(writes) == list(range(6))  # each chunk arrived once


def test_the_number_of_connections_follows_from_the_round_trip_time():
    window_bytes = 0.7 * (4 << 20)  # Linux's default
    assert [choose_streams(rtt_s, window_bytes) for rtt_s in (0, 1e-4, 0.15, 9)] == [1, 1, 7, 16]


def test_a_link_that_drops_packets_silently_is_replaced(large, monkeypatch):
    monkeypatch.setattr(Transport, "ping_s", 0.1)
    monkeypatch.setattr(channel, "SILENT_S", 0.5)
    with Proxy(large.ports["a"], stop_at=LARGE // 2) as proxy:
        a, b = large.start("a"), large.start("b", {"a": proxy.port})
        code = os.urandom(LARGE)
        _exchange_one(a, b, b"", code)
        assert proxy.events == ["stop"]
        assert large.noted("b", "no connection to process 0 of site a")
        assert max(b.silent_s().values()) < 5


def test_a_site_without_anything_to_send_does_not_look_lost(scene):
    a, b = scene.start("a", lost_s=0.8), scene.start("b", lost_s=0.8)
    _exchange_one(a, b, b"", b"")
    longest_s, stop = 0.0, time.monotonic() + 1.6
    while time.monotonic() < stop:
        longest_s = max(longest_s, *a.silent_s().values(), *b.silent_s().values())
        time.sleep(0.02)
    assert longest_s < 0.8


def test_a_peer_without_the_key_gets_nothing_and_both_ends_say_why(scene):
    a, b = scene.start("a"), scene.start("b", key=bytes(32))
    a.send(0, 0, {0: b"secret"}, 1, {})
    b.send(0, 0, {0: b"forged"}, 1, {})
    assert scene.noted("a", "did not prove to have the key of this job; the last from 127.0.0.1")
    assert scene.noted("b", "the other end does not have the key of this job")
    assert a.wait(0, 0, 0.1) is None and b.wait(0, 0, 0) is None
    a.flush()
    assert scene.files("a") == {"sent-b-0-code-0-0"}


def test_a_site_with_another_configuration_is_refused_by_field_value_and_name(scene):
    a = scene.start("a", identity={"config": "1", "data": "x"})
    b = scene.start("b", identity={"config": "1", "data": "y"})
    for own, site, other, theirs in (("x", "a", "b", "y"), ("y", "b", "a", "x")):
        expected = f"data must be equal at all sites; got {own} at site {site} and {theirs} at site"
        with pytest.raises(PeerRefused, match=f"{expected} {other}"):
            (a if site == "a" else b).wait(0, 0, 10)


def test_a_site_that_divides_the_model_differently_is_refused(scene):
    a = scene.start("a")
    scene.blocks = (4, 4)
    scene.start("b")
    with pytest.raises(
        PeerRefused, match=r"fragments must be equal .* got \[4\] at site a and \[4, 4"
    ):
        a.wait(0, 0, 10)


def test_sites_with_different_weights_stop_with_the_name_of_the_site_and_round(scene):
    a, b = scene.start("a"), scene.start("b")
    a.send(0, 3, {0: b"1"}, 1, {0: 17})
    b.send(0, 3, {0: b"2"}, 1, {0: 18})
    with pytest.raises(Disagreement, match="before round 3 of fragment 0 .* process 0 of site b"):
        a.wait(0, 3, 10)
        time.sleep(0.2)
        a.poll(0, 3)


def test_a_site_that_restarts_from_an_older_round_sends_the_same_codes_again(scene):
    a, b = scene.start("a"), scene.start("b")
    for round_ in range(3):
        _exchange_one(a, b, b"a%d" % round_, b"b%d" % round_, round_)
    assert a.finish(5) and b.finish(5)
    a.durable({0: 2})
    assert scene.files("a") == {"received-b-0-code-0-2"}
    b.close()
    again = scene.start("b")
    for round_ in range(3):  # also rounds that site a has forgotten
        again.send(0, round_, {0: b"b%d" % round_}, 20, {})
        assert again.wait(0, round_, 10).codes == {0: {0: b"a%d" % round_}}
    assert again.finish(5)
    _exchange_one(a, again, b"a3", b"b3", 3)


def test_a_restart_that_computes_another_code_stops_that_site_and_not_the_others(scene):
    a, b = scene.start("a"), scene.start("b")
    _exchange_one(a, b, b"a0", b"b0")
    assert b.finish(5)
    a.durable({0: 1})
    b.close()
    again = scene.start("b")
    again.send(0, 0, {0: b"xx"}, 20, {})
    with pytest.raises(Disagreement, match="another code of round 0 of fragment 0 than it sent to"):
        again.wait(0, 1, 10)
    assert scene.noted("a", "refused code of round 0 of fragment 0 from process 0 of site b")
    assert a.poll(0, 1) is None


def test_a_code_survives_a_restart_of_its_sender_before_anyone_has_it(scene):
    a = scene.start("a")
    a.send(0, 0, {0: b"before the restart"}, 5, {})
    a.flush()
    a.close()
    scene.start("a")
    b = scene.start("b")
    assert b.wait(0, 0, 10).codes == {0: {0: b"before the restart"}}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import sites_scene
from jaxtrain.sites import mailbox
mailbox.Mailbox.record = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
scene = sites_scene.Scene(Path(sys.argv[2]))
scene.ports = {"a": int(sys.argv[3]), "b": int(sys.argv[4])}
scene.start("b").wait(0, 0, 30)
"""


def test_a_kill_between_storing_and_acknowledging_neither_loses_nor_repeats_a_code(scene):
    a = scene.start("a")
    arguments = [os.path.dirname(__file__), scene.folder, *scene.ports.values()]
    child = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)])
    assert wait_until(lambda: a._connections and any(a.channels[0].streams), 30)
    a.send(0, 0, {0: b"code"}, 1, {})
    assert child.wait(30) == -9
    assert "received-a-0-code-0-0" in scene.files("b") and not a.finish(0)
    b = scene.start("b")
    assert b.poll(0, 0).codes == {0: {0: b"code"}}  # from its own disk
    assert a.finish(10)
    assert '["a", 0, "code", 0, 0,' in (scene.folder / "b" / "0" / "received.jsonl").read_text()


def test_closing_while_sending_ends_all_threads_and_leaves_no_unfinished_file(large):
    with Proxy(large.ports["a"], bytes_s=1 << 20) as proxy:
        a, b = large.start("a"), large.start("b", {"a": proxy.port})
        b.send(0, 0, {0: os.urandom(LARGE)}, 1, {})
        assert wait_until(lambda: any(f.endswith(".part") for f in large.files("a")))
        start_s = time.monotonic()
        a.close()
        b.close()
        assert time.monotonic() - start_s < 4
    assert large.files("a") == set() and large.files("b") == {"sent-a-0-code-0-0"}
    assert not [t for t in threading.enumerate() if t.name.startswith("sites-")]


def test_a_process_exchanges_with_every_process_of_a_site_that_owns_its_blocks(tmp_path):
    ports = iter(free_ports(3))
    processes = lambda count: tuple(Address("127.0.0.1", next(ports)) for _ in range(count))
    sites = SitesFile("j-1", KEY, (Site("a", processes(1)), Site("b", processes(2))))
    start = lambda name, p: Exchange(sites, name, p, (5,), {}, tmp_path / name, list().append)
    with start("a", 0) as a, start("b", 0) as b0, start("b", 1) as b1:
        assert [link.ranges[0] for link in a.links] == [range(2), range(2, 5)]
        a.send(0, 0, {0: b"to b0", 1: b"to b1"}, 1, {})
        b0.send(0, 0, {0: b"of b0"}, 2, {})
        assert b0.wait(0, 0, 10).codes == {0: {0: b"to b0"}}
        assert b1.wait(0, 0, 10).codes == {0: {0: b"to b1"}}
        assert a.wait(0, 0, 0.1) is None and a.missing(0, 0) == (1,)
        b1.send(0, 0, {0: b"of b1"}, 2, {})
        assert a.wait(0, 0, 10).codes == {1: {0: b"of b0", 1: b"of b1"}}


def test_the_first_site_decides_who_takes_part_and_a_site_left_out_gets_the_state(tmp_path):
    with Scene(tmp_path, sites=3) as scene:
        a, b, c = (scene.start(name, lost_s=60.0) for name in "abc")
        a.send(0, 1, {0: b"ab", 1: b"ac"}, 1, {})
        b.send(0, 1, {0: b"ba", 1: b"bc"}, 2, {})
        assert a.wait(0, 1, 0.3) is None  # site c is heard, so it is waited for
        assert wait_until(lambda: a.missing(0, 1) == (2,))
        a._lost_s = 0.2
        c.close()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            of_b = pool.submit(b.wait, 0, 1, 10)
            arrived = a.wait(0, 1, 10)
        a._lost_s = 60.0  # on a busy machine nothing may come from site b for longer
        assert of_b.result().participants == arrived.participants == (0, 1)
        assert scene.noted("a", "nothing has come from process 0 of site c for 0 s")
        assert arrived.codes == {1: {0: b"ba"}} and arrived.tokens == {1: 2}
        c = scene.start("c", lost_s=60.0)
        with pytest.raises(SiteLeftOut) as left_out:
            c.wait(0, 1, 10)
        assert (left_out.value.fragment, left_out.value.round) == (0, 1)
        c.post("request", 0, 1, {0: b""})
        assert wait_until(lambda: a.posted("request") == [(2, 0, 1)])
        a.send(0, 2, {0: b"ab", 1: b"ac"}, 1, {})
        b.send(0, 2, {0: b"ba", 1: b"bc"}, 2, {})
        assert a.wait(0, 2, 10).admitted == (2,) and not a.away()
        a.post("state", 0, 2, {1: b"weights"})
        assert wait_until(lambda: c.is_here("state", 0, 2, 0))
        assert c.take("state", 0, 2, 0) == {0: b"weights"}


def test_a_full_disk_stops_the_exchange_instead_of_acknowledging(scene, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    a, b = scene.start("a"), scene.start("b")
    monkeypatch.setattr(mailbox.Incoming, "finish", full)
    a.send(0, 0, {0: b"x"}, 1, {})
    with pytest.raises(OSError, match="No space left"):
        b.wait(0, 0, 10)
    assert not a.finish(0)


def test_a_folder_of_another_number_of_processes_is_refused(scene):
    a = scene.start("a")
    a.send(0, 0, {0: b"x"}, 1, {})
    a.flush()
    a.close()
    scene.blocks = (5,)
    with pytest.raises(ValueError, match=r"contains blocks \[0, 4\] .* they are \[0, 5\]"):
        scene.start("a")


def test_a_message_that_is_larger_than_its_blocks_is_refused(scene):
    a, b = scene.start("a"), scene.start("b")
    a.send(0, 0, {0: bytes(4 * 1024 * inbox.BYTES_AN_ELEMENT + 1)}, 1, {})
    assert scene.noted("b", "code of round 0 of fragment 0 of 32769 bytes; the most is 32768")
    assert scene.files("b") == set()
    with contextlib.suppress(OSError):
        b.poll(0, 0)

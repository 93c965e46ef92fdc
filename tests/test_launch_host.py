import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.host import agent as net
from launch.host import log, processes
from launch.host import requests as ops
from launch.host.channel import Channel, FollowerChannel, InvalidMessage, LeaderChannel, free_port
from launch.host.hashing import hash_files
from launch.host.ranks import decisive_lines

TOKEN = "a" * 64


def test_a_log_gives_every_byte_once_whatever_the_offsets_and_segments(tmp_path):
    written, kept = b"".join(b"line %d\n" % i for i in range(300)), log.Log(tmp_path, 256, 100)
    for line in written.splitlines(True):
        kept.write(line)
    assert len(log.starts(tmp_path)) > 5 and log.size(tmp_path) == len(written)
    for step in (1, 100, 4096):
        offset, got = 0, b""
        while offset < len(written):
            at, data = log.read(tmp_path, offset, step)
            assert at == offset
            got, offset = got + data, offset + len(data)
        assert got == written


def test_a_log_rotates_and_says_where_it_begins(tmp_path):
    kept = log.Log(tmp_path, 100, 3)
    for _ in range(50):
        kept.write(b"0123456789\n")
    assert len(log.starts(tmp_path)) == 3
    at, data = log.read(tmp_path, 0)
    assert at == log.starts(tmp_path)[0] > 0 and data.startswith(b"0123456789\n")
    with pytest.raises(ValueError, match="at most 550"):
        log.read(tmp_path, 551)


def test_a_full_disk_stops_no_job_and_the_log_says_what_it_lost(tmp_path):
    kept, full = log.Log(tmp_path), os.open("/dev/full", os.O_WRONLY)
    kept._file, real = full, kept._file
    kept.write(b"lost\n")
    kept._file = real
    kept.write(b"kept\n")
    assert log.read(tmp_path, 0)[1] == b"launch: 5 bytes of log lost: disk full\nkept\n"


def test_lines_are_prefixed_at_newlines_only():
    lines = log.LineSplitter(b"[1] ", limit=50)
    assert lines.feed(b"a\nb") == b"[1] a\n"
    assert lines.feed(b"c\r\n") == b"[1] bc\n"
    assert lines.feed(b"x" * 60) == b"[1] " + b"x" * 60 + b"\n"  # without end, cut
    assert lines.feed(b"end") == b"" and lines.flush() == b"[1] end\n"


@pytest.fixture(params=[TOKEN])
def pair(request):
    left, right = socket.socketpair()
    with left, right:
        yield Channel(left, TOKEN, "n"), Channel(right, request.param, "n")


@pytest.mark.parametrize("pair", ["b" * 64], indirect=True)
def test_a_message_without_the_jobs_token_is_refused(pair):
    ours, theirs = pair
    theirs.send({"host": 1}, "up")
    with pytest.raises(InvalidMessage):
        ours.receive("up")


def test_a_message_is_not_taken_twice(pair):
    ours, theirs = pair
    theirs.send({"host": 1}, "up")
    line = ours.sock.recv(1 << 16)
    theirs.sock.sendall(line + line)
    with pytest.raises(InvalidMessage):
        ours.receive("up")


def _ask_until(follower, said, wish, answers):
    deadline = time.monotonic() + 20
    while wish not in answers and time.monotonic() < deadline:
        answers.append(follower.exchange(said))
        time.sleep(0.01)


def _talk(listener, follower, said, wish):
    """(reports that the leader heard, what the follower was told), until it is told the wish."""
    heard, answers = [], []
    ask = threading.Thread(target=_ask_until, args=(follower, said, wish, answers))
    ask.start()
    while ask.is_alive():
        heard += listener.receive_reports()
        listener.send_target(wish)
        time.sleep(0.01)
    return heard, answers


def test_supervisors_talk_and_find_each_other_again():
    port = free_port("127.0.0.1")
    follower = FollowerChannel("127.0.0.1", port, TOKEN)
    said = {"host": 1, "text": "é$(x)\n"}
    for wish in ({"do": "run"}, {"do": "kill"}):  # the leader is killed and comes back
        listener = LeaderChannel("127.0.0.1", port, TOKEN)
        heard, answers = _talk(listener, follower, said, wish)
        assert answers[-1] == wish and heard[0] == said
        listener.close()
    follower.close()


def test_the_last_wish_of_a_leader_is_heard_though_it_ended_with_a_report_unread():
    port = free_port("127.0.0.1")
    listener, follower = (
        LeaderChannel("127.0.0.1", port, TOKEN),
        FollowerChannel("127.0.0.1", port, TOKEN),
    )
    _talk(listener, follower, {"host": 1}, {"do": "run"})
    follower.exchange({"host": 1})
    listener.send_target({"do": "end"})
    listener.close()  # with what it has not read: the kernel resets the connection
    time.sleep(0.05)
    assert follower.exchange({"host": 1}) == {"do": "end"}
    follower.close()


def test_a_connection_that_is_reset_before_it_is_greeted_harms_no_other():
    port = free_port("127.0.0.1")
    listener, follower = (
        LeaderChannel("127.0.0.1", port, TOKEN),
        FollowerChannel("127.0.0.1", port, TOKEN),
    )
    scanner = socket.create_connection(("127.0.0.1", port))
    scanner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    scanner.close()  # a reset, not an end
    heard, answers = _talk(listener, follower, {"host": 1}, {"do": "run"})
    assert heard[0] == {"host": 1} and answers[-1] == {"do": "run"}
    listener.close()
    follower.close()


def test_a_measurement_of_which_a_stream_fails_is_an_error_and_not_a_slower_one():
    token, serve = b"a" * 32, []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            for i in range(1 + 4):  # the ping, then four streams of which the last is closed
                sock, _ = server.accept()
                if i == 4:
                    sock.close()
                    return
                serve.append(threading.Thread(target=net.serve_peer, args=(sock, token)))
                serve[-1].start()

        serve.append(threading.Thread(target=accept))
        serve[0].start()
        order = {"peer": server.getsockname(), "streams": 4, "seconds": 0.1, "pings": 1}
        with pytest.raises(OSError):
            net.ORDERS["measure"](order | {"least_trips": 0, "interface": "lo"}, token)
        for thread in serve:
            thread.join()


def test_all_of_a_tree_ends_also_what_left_its_session_and_its_parent():
    program = "import os, time\nif os.fork() == 0:\n os.setsid()\n os.fork()\ntime.sleep(100)"
    env = os.environ | {processes.JOB_MARK: "test-tree"}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    deadline = time.monotonic() + 10
    while len(processes.marked("test-tree")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(processes.marked("test-tree")) == 3
    parent.kill()
    parent.wait()
    assert len(processes.marked("test-tree")) == 2  # orphans, known by their mark
    assert processes.kill_all(lambda: processes.marked("test-tree"), patience_s=10) == []
    assert processes.marked("test-tree") == []


def test_the_decisive_lines_are_those_that_name_an_error():
    error = "OSError: [Errno 28] No space left"
    assert decisive_lines(["step 1", "Traceback (most recent call last):", error, "bye"]) == [error]
    assert decisive_lines(["only this"]) == ["only this"]


def test_the_name_of_code_is_of_its_paths_modes_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    names = {hash_files(tmp_path, ["a"])}
    (tmp_path / "a").chmod(0o755)
    names.add(hash_files(tmp_path, ["a"]))
    (tmp_path / "a").write_text("2")
    names.add(hash_files(tmp_path, ["a"]))
    (tmp_path / "a").rename(tmp_path / "b")
    names.add(hash_files(tmp_path, ["b"]))
    assert len(names) == 4


def test_what_came_of_code_whose_sending_was_cut_off_goes_after_a_day(tmp_path, monkeypatch):
    ask = {"workdir": str(tmp_path), "hash": "1", "files": []}
    cut_off = Path(ops.land(ask | {"by": "a"})["folder"])
    (cut_off / "file").write_text("half")
    under_way = Path(ops.land(ask | {"by": "b"})["folder"])
    assert cut_off.exists() and under_way.exists()
    monkeypatch.setattr(ops, "STALE_S", -1.0)
    mine = Path(ops.land(ask | {"by": "c"})["folder"])
    assert list((tmp_path / "code").iterdir()) == [mine]


def test_a_beat_says_how_far_the_program_is(tmp_path):
    program = (
        "from jaxtrain.distributed.heartbeat import beat\n"
        "beat('compile', 7)\nbeat('train', 8)\nbeat('train', 8)\nbeat('train', 9)\n"
    )
    env = os.environ | {"JAXTRAIN_BEAT": str(tmp_path / "beat")}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    said = json.loads((tmp_path / "beat").read_text())
    assert (said["beats"], said["step"], said["phase"]) == (4, 9, "train")

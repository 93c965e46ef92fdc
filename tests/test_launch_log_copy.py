import pytest

from launch.log_copy import LogCopy, read_header


@pytest.fixture
def terminals(tmp_path):
    """Two terminals that follow the same host."""
    return LogCopy(tmp_path / "log"), LogCopy(tmp_path / "log")


def test_bytes_that_two_terminals_receive_are_stored_once(terminals, tmp_path):
    written = b"".join(b"line %d\n" % i for i in range(200))
    for start in range(0, len(written), 70):
        terminals[0].add(start, written[start : start + 70])
        if start % 3:  # the other one is late, and receives other pieces
            terminals[1].add(start - 20, written[start - 20 : start + 60])
    assert (tmp_path / "log").read_bytes() == written
    assert LogCopy(tmp_path / "log").end() == len(written)


def test_offsets_are_still_the_hosts_after_a_gap(terminals, tmp_path):
    terminals[0].add(0, b"before\n")
    for terminal in terminals:  # both notice the gap, one writes the line
        terminal.add(500, b"after\n", b"gap\n")
    reopened = LogCopy(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == b"before\ngap\nafter\n"
    assert reopened.end() == 506 and reopened.tail() == b"after\n"
    assert reopened.read(502, 3) == b"ter" and reopened.read(499, 3) == b""


def test_there_is_no_gap_if_another_terminal_has_the_deleted_bytes(terminals, tmp_path):
    terminals[0].add(0, b"0123456789")
    terminals[1].add(6, b"6789ab", b"gap\n")
    assert (tmp_path / "log").read_bytes() == b"0123456789ab"


def test_bytes_that_the_host_replaced_are_appended_after_a_line(terminals, tmp_path):
    terminals[0].add(0, b"old 1\nold 2\n")
    for terminal in terminals:
        terminal.add(6, b"new 2\n", b"lost\n", replaced=True)
    assert (tmp_path / "log").read_bytes() == b"old 1\nold 2\nlost\nnew 2\n"
    assert LogCopy(tmp_path / "log").end() == 12


def test_the_copy_is_bounded_and_keeps_the_newest_bytes_and_their_offsets(tmp_path):
    written = b"".join(b"line %d\n" % i for i in range(5000))
    copy, late = (LogCopy(tmp_path / "log", limit_bytes=2000) for _ in range(2))
    for start in range(0, len(written), 90):
        copy.add(start, written[start : start + 90])
        if start % 7 == 0:  # another terminal, which receives the same bytes later
            late.add(start, written[start : start + 90])
        sizes = [path.stat().st_size for path in tmp_path.iterdir() if "at" not in path.name]
        assert sum(sizes) <= 2000 + 90
    older, newer = (tmp_path / name for name in ("log.1", "log"))
    assert written.endswith(older.read_bytes() + newer.read_bytes())
    assert len(older.read_bytes() + newer.read_bytes()) > 900
    reopened = LogCopy(tmp_path / "log", limit_bytes=2000)
    assert reopened.end() == len(written)
    assert reopened.tail() == written[-len(reopened.tail()) :] != b""


def test_the_tail_is_found_in_the_older_part_just_after_the_copy_was_cut(tmp_path):
    copy = LogCopy(tmp_path / "log", limit_bytes=200)
    copy.add(0, b"a" * 60 + b"b" * 60)
    copy.add(120, b"c")
    assert (tmp_path / "log").read_bytes() == b"c"
    reopened = LogCopy(tmp_path / "log", limit_bytes=200)
    assert reopened.tail() == b"a" * 60 + b"b" * 60 + b"c" and reopened.read(58, 4) == b"aabb"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"3",
        b"{}",
        b'{"at": -1, "bytes": 4}',
        b'{"at": 4611686018427387904, "bytes": 4}',
        b'{"at": 0, "bytes": 99999999999}',
        b'{"at": 0, "bytes": true}',
        b'{"at": 0, "bytes": 4, "status": {}, "alive": true, "known": true}',
        b'{"status": [], "alive": true, "known": true}',
        b'{"status": {}, "alive": 1, "known": true}',
    ],
)
def test_a_header_that_no_host_of_ours_sends_is_refused(line):
    with pytest.raises(ValueError):
        read_header(line)

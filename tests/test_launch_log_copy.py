import pytest

from launch.log_copy import LogCopy


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

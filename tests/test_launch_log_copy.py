from launch.host import log
from launch.log_copy import LogCopy


def test_what_two_terminals_bring_of_one_log_is_stored_once(tmp_path):
    written = b"".join(b"line %d\n" % i for i in range(200))
    one, other = LogCopy(tmp_path / "log"), LogCopy(tmp_path / "log")
    for start in range(0, len(written), 70):
        one.add(start, written[start : start + 70])
        if start % 3:  # the other is late, and brings other pieces
            other.add(start - 20, written[start - 20 : start + 60])
    assert (tmp_path / "log").read_bytes() == written
    assert LogCopy(tmp_path / "log").end() == len(written)


def test_after_a_gap_an_offset_is_still_the_hosts(tmp_path):
    one, other = LogCopy(tmp_path / "log"), LogCopy(tmp_path / "log")
    one.add(0, b"before\n")
    for mirror in (one, other):  # both see it; one says it
        mirror.add(500, b"after\n", b"gap\n")
    again = LogCopy(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == b"before\ngap\nafter\n"
    assert again.end() == 506 and again.tail() == b"after\n"
    assert again.read(502, 3) == b"ter" and again.read(499, 3) == b""


def test_bytes_that_are_gone_for_a_late_terminal_alone_leave_no_gap(tmp_path):
    early, late = LogCopy(tmp_path / "log"), LogCopy(tmp_path / "log")
    early.add(0, b"0123456789")
    late.add(6, b"6789ab", b"gap\n")
    assert (tmp_path / "log").read_bytes() == b"0123456789ab"


def test_bytes_that_a_host_replaced_follow_what_was_here_of_the_others(tmp_path):
    one, other = LogCopy(tmp_path / "log"), LogCopy(tmp_path / "log")
    one.add(0, b"old 1\nold 2\n")
    for mirror in (one, other):
        mirror.add(6, b"new 2\n", b"lost\n", replaced=True)
    assert (tmp_path / "log").read_bytes() == b"old 1\nold 2\nlost\nnew 2\n"
    assert LogCopy(tmp_path / "log").end() == 12


def test_a_reader_goes_on_where_he_was_unless_the_log_holds_other_bytes_there(tmp_path):
    kept = log.Log(tmp_path)
    kept.write(b"0123456789")
    mark = log.checksum(b"6789")
    kept.write(b"more")
    assert log.resume(tmp_path, 10, mark) == 10
    assert log.resume(tmp_path, 0, log.checksum(b"")) == 0
    (tmp_path / f"{0:020d}").write_bytes(b"01234567")  # a power loss took the rest
    assert log.resume(tmp_path, 10, mark) == 0  # to be compared from the segment's start
    log.Log(tmp_path).write(b"the next supervisor's")
    assert log.resume(tmp_path, 10, mark) == 8 == log.starts(tmp_path)[-1]
    assert log.resume(tmp_path, 8, log.checksum(b"4567")) == 8

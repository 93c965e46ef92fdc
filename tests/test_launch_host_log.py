import os

import pytest

from launch.host import log


def test_every_byte_is_read_once_for_any_offset_and_segment_size(tmp_path):
    written, writer = b"".join(b"line %d\n" % i for i in range(300)), log.Log(tmp_path, 256, 100)
    for line in written.splitlines(True):
        writer.write(line)
    assert len(log.starts(tmp_path)) > 5 and log.size(tmp_path) == len(written)
    for step in (1, 100, 4096):
        offset, read = 0, b""
        while offset < len(written):
            start, data = log.read(tmp_path, offset, step)
            assert start == offset
            read, offset = read + data, offset + len(data)
        assert read == written


def test_old_segments_are_deleted_and_reading_starts_at_the_oldest(tmp_path):
    writer = log.Log(tmp_path, 100, 3)
    for _ in range(50):
        writer.write(b"0123456789\n")
    assert len(log.starts(tmp_path)) == 3
    start, data = log.read(tmp_path, 0)
    assert start == log.starts(tmp_path)[0] > 0 and data.startswith(b"0123456789\n")
    with pytest.raises(ValueError, match="at most 550"):
        log.read(tmp_path, 551)


def test_bytes_lost_to_a_full_disk_are_counted_in_the_log(tmp_path):
    writer, full = log.Log(tmp_path), os.open("/dev/full", os.O_WRONLY)
    writer._file, real = full, writer._file
    writer.write(b"lost\n")
    writer._file = real
    writer.write(b"stored\n")
    assert log.read(tmp_path, 0)[1] == b"\x1elaunch: 5 bytes of log lost: disk full\nstored\n"


def test_only_whole_lines_get_a_prefix():
    lines = log.LineSplitter(b"[1] ", limit=50)
    assert lines.feed(b"a\nb") == b"[1] a\n"
    assert lines.feed(b"c\r\n") == b"[1] bc\n"
    assert lines.feed(b"x" * 60) == b"[1] " + b"x" * 60 + b"\n"  # cut, as it has no end
    assert lines.feed(b"end") == b"" and lines.flush() == b"[1] end\n"


def test_a_reader_continues_at_its_offset_unless_the_log_changed_before_it(tmp_path):
    writer = log.Log(tmp_path)
    writer.write(b"0123456789")
    tail = log.checksum(b"6789")
    writer.write(b"more")
    assert log.resume(tmp_path, 10, tail) == 10
    assert log.resume(tmp_path, 0, log.checksum(b"")) == 0
    (tmp_path / f"{0:020d}").write_bytes(b"01234567")  # a power loss took the rest
    assert log.resume(tmp_path, 10, tail) == 0  # the reader compares from the segment's start
    log.Log(tmp_path).write(b"the next supervisor's")
    assert log.resume(tmp_path, 10, tail) == 8 == log.starts(tmp_path)[-1]
    assert log.resume(tmp_path, 8, log.checksum(b"4567")) == 8


def test_every_kind_of_line_end_ends_a_line_however_the_output_is_cut():
    output = b"a\r\nb\rc\n\r\nd\x1ee\r"
    for cut in range(len(output) + 1):
        lines = log.LineSplitter(b"> ")
        text = lines.feed(output[:cut]) + lines.feed(output[cut:]) + lines.flush()
        assert text == b"> a\n> b\n> c\n> \n> d\\x1ee\n"

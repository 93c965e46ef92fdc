"""A log on local disk, read by byte offset. It is stored in segments; the oldest are deleted.

Each segment's file name is the offset of its first byte, so an offset always means the same byte.
"""

import os
import re
import zlib
from pathlib import Path

SEGMENTS = 8  # of equal size, which share the limit of a job's log
LIMIT_MIB = 512
SEGMENT_BYTES = (LIMIT_MIB << 20) // SEGMENTS
READ_BYTES = 1 << 16  # the most of a log that is sent at once
TAIL_BYTES = 4096  # compared on reconnection: does the log still end as the reader saw it?
OWN = b"\x1e"  # begins each line of the launcher; in a program's output it is written as \x1e
LINE_END = re.compile(rb"\r\n|\r|\n")


def own_lines(text: str) -> bytes:
    """Returns a text as lines of the log that no program can forge; the first names the launcher.

    Only a newline ends a line: quoted output may contain other characters that Python counts.
    """
    return b"".join(OWN + line.encode() + b"\n" for line in f"launch: {text}".split("\n"))


class Log:
    """Appends whole lines. A full disk does not stop the job: lost bytes are counted instead."""

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES, segments: int = SEGMENTS):
        self.folder, self._segment_bytes, self._segments = Path(folder), segment_bytes, segments
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lost_bytes = 0
        self._open_segment(size(self.folder))

    def _open_segment(self, offset: int) -> None:
        self._start = self._end = offset
        path = _segment(self.folder, offset)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for old in starts(self.folder)[: -self._segments]:
            _segment(self.folder, old).unlink()

    def write(self, data: bytes) -> None:
        if self.lost_bytes:
            data = own_lines(f"{self.lost_bytes} bytes of log lost: disk full") + data
        try:
            while data:
                written = os.write(self._file, data)
                self._end, data, self.lost_bytes = self._end + written, data[written:], 0
        except OSError:
            self.lost_bytes += len(data)
        if self._end - self._start >= self._segment_bytes:
            os.close(self._file)
            self._open_segment(self._end)


class LineSplitter:
    r"""Cuts a program's output into lines and puts a prefix before each.

    \n, \r\n and \r end a line: a terminal would write over what stands before a \r.
    """

    def __init__(self, prefix: bytes = b"", limit: int = 1 << 16):
        self._prefix, self._limit, self._rest = prefix, limit, b""

    def feed(self, data: bytes) -> bytes:
        """Takes bytes of the stream; returns the lines that are complete now."""
        data = self._rest + data.replace(OWN, rb"\x1e")
        held = data[-1:] if data.endswith(b"\r") else b""  # the first half of \r\n, perhaps
        *lines, rest = LINE_END.split(data.removesuffix(held))
        self._rest = rest + held
        if len(self._rest) > self._limit:  # a line without an end must not fill memory
            lines, self._rest = [*lines, self._rest], b""
        return b"".join(self._prefix + line + b"\n" for line in lines)

    def flush(self) -> bytes:
        """Returns the unfinished line, as a line."""
        return self.feed(b"\n") if self._rest else b""


def _segment(folder: Path, start: int) -> Path:
    return Path(folder) / f"{start:020d}"


def starts(folder: Path) -> list[int]:
    """Returns the offsets at which the stored segments begin, in order."""
    return sorted(int(path.name) for path in Path(folder).glob("[0-9]*"))


def size(folder: Path) -> int:
    """Returns the number of bytes ever written, which is the offset of the next one."""
    segments = starts(folder)
    return segments[-1] + _segment(folder, segments[-1]).stat().st_size if segments else 0


def read(folder: Path, offset: int, limit: int = READ_BYTES) -> tuple[int, bytes]:
    """Returns (offset of the first byte, bytes); the offset skips bytes that were deleted.

    Raises:
        ValueError: the offset is past the end, so it cannot be of this log.
    """
    segments = starts(folder)
    if offset > size(folder):
        raise ValueError(f"log offset must be at most {size(folder)}; got {offset}.")
    offset = max(offset, segments[0]) if segments else offset
    for start in reversed(segments):
        if start <= offset:
            with open(_segment(folder, start), "rb") as file:
                file.seek(offset - start)
                data = file.read(limit)
            if data or start == segments[-1]:
                return offset, data
            return read(folder, min(other for other in segments if other > start), limit)
    return offset, b""


def checksum(data: bytes) -> list[int]:
    """Returns [length, CRC], by which `resume` recognises the bytes that a reader has."""
    return [len(data), zlib.crc32(data)]


def resume(folder: Path, offset: int, tail: list[int]) -> int:
    """Returns the offset at which a reader that has read up to `offset` must continue.

    This is `offset` itself, unless a power loss took bytes that had not reached the disk: then the
    log ends before `offset`, or has other bytes there. Each supervisor starts a new segment, so the
    reader has the right bytes at least before the last segment that starts by `offset`.

    Args:
        tail: the checksum of the last bytes before `offset` that the reader has.
    """
    segments, end = starts(folder), size(folder)
    length = tail[0]
    if offset <= end and (not segments or offset - length < segments[0]):
        return offset  # the bytes before it are deleted, so there is nothing to compare
    if offset <= end and checksum(_read_between(folder, offset - length, offset)) == list(tail):
        return offset
    return max((start for start in segments if start <= offset), default=0)


def _read_between(folder: Path, offset: int, end: int) -> bytes:
    data = b""
    while offset + len(data) < end:
        data += read(folder, offset + len(data), end - offset - len(data))[1]
    return data

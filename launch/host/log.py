"""A log on local disk that is read by byte offset, in segments of which the oldest go.

A segment is named by the offset of its first byte, so an offset means one byte for ever.
"""

import os
import zlib
from pathlib import Path

SEGMENT_BYTES = 64 << 20
SEGMENTS = 8  # 512 MiB a host
TAIL_BYTES = 4096  # by which a reader knows the log that it has read so far


class Log:
    """Appends whole lines. A disk that is full stops no job: what could not be kept is counted."""

    def __init__(self, folder, segment_bytes=SEGMENT_BYTES, segments=SEGMENTS):
        self.folder, self._segment_bytes, self._segments = Path(folder), segment_bytes, segments
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lost_bytes = 0
        self._open(size(self.folder))

    def _open(self, offset: int):
        self._start = self._end = offset
        self._file = os.open(
            self.folder / f"{offset:020d}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        for old in starts(self.folder)[: -self._segments]:
            (self.folder / f"{old:020d}").unlink()

    def write(self, data: bytes) -> None:
        if self.lost_bytes:
            data = b"launch: %d bytes of log lost: disk full\n" % self.lost_bytes + data
        try:
            while data:
                written = os.write(self._file, data)
                self._end, data, self.lost_bytes = self._end + written, data[written:], 0
        except OSError:
            self.lost_bytes += len(data)
        if self._end - self._start >= self._segment_bytes:
            os.close(self._file)
            self._open(self._end)

    def close(self) -> None:
        os.close(self._file)


class Lines:
    """Cuts a stream at newlines, each line after its prefix; `\\r` redraws end a line too."""

    def __init__(self, prefix: bytes, limit: int = 1 << 16):
        self._prefix, self._limit, self._rest = prefix, limit, b""

    def feed(self, data: bytes) -> bytes:
        *lines, self._rest = (self._rest + data.replace(b"\r\n", b"\n")).split(b"\n")
        if len(self._rest) > self._limit:  # a line without end must not fill memory
            lines, self._rest = [*lines, self._rest], b""
        return b"".join(self._prefix + line + b"\n" for line in lines)

    def flush(self) -> bytes:
        return self.feed(b"\n") if self._rest else b""


def starts(folder) -> list[int]:
    return sorted(int(path.name) for path in Path(folder).glob("[0-9]*"))


def size(folder) -> int:
    """Bytes ever written: the offset of the next one."""
    held = starts(folder)
    return held[-1] + (Path(folder) / f"{held[-1]:020d}").stat().st_size if held else 0


def read(folder, offset: int, limit: int = 1 << 20) -> tuple[int, bytes]:
    """(offset of the first byte given, bytes): later than asked where those are rotated away.

    Raises:
        ValueError: the offset is past the end: this is not the log that it was counted on.
    """
    held = starts(folder)
    if offset > size(folder):
        raise ValueError(f"log offset must be at most {size(folder)}; got {offset}.")
    offset = max(offset, held[0]) if held else offset
    for start in reversed(held):
        if start <= offset:
            with open(Path(folder) / f"{start:020d}", "rb") as file:
                file.seek(offset - start)
                data = file.read(limit)
            if data or start == held[-1]:
                return offset, data
            following = min(other for other in held if other > start)
            return read(folder, following, limit)
    return offset, b""


def mark(data: bytes) -> list[int]:
    """What `resume` knows bytes by: how many, and their CRC."""
    return [len(data), zlib.crc32(data)]


def resume(folder, offset: int, tail) -> int:
    """Where one goes on who has read up to `offset`, `tail` being the mark of what came last.

    That is the offset itself, unless the log ends before it or holds other bytes there: what was
    not yet on disk is gone after a power loss. Each supervisor begins a segment, so the bytes
    that were never read begin with the newest one that is not past the offset, or later.
    """
    held, end = starts(folder), size(folder)
    count, _ = tail
    if offset <= end and (not held or offset - count < held[0]):
        return offset  # what came before is rotated away
    if offset <= end and mark(_between(folder, offset - count, offset)) == list(tail):
        return offset
    return max((start for start in held if start <= offset), default=0)


def _between(folder, offset: int, end: int) -> bytes:
    data = b""
    while offset + len(data) < end:
        data += read(folder, offset + len(data), end - offset - len(data))[1]
    return data

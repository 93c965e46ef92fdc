"""This machine's copy of a host's log. Several terminals can add to it at the same time."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from launch.answers import COUNT, Range, mismatch
from launch.host.files import read_json, write_json
from launch.host.log import LIMIT_MIB, READ_BYTES, TAIL_BYTES

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind: use one terminal per job there
    fcntl = None

OUTCOME = {"code": Range(int, -(1 << 31), 1 << 31), "why": str, "attempts?": COUNT}


def read_header(line: bytes) -> dict[str, Any]:
    """Returns the header of a frame.

    Raises:
        ValueError: no host that works correctly sends this.
    """
    problem = ValueError(f"the host sent a frame that has no meaning: {line[:80]!r}")
    try:
        frame = json.loads(line)
    except RecursionError:
        raise problem from None
    if not isinstance(frame, dict):
        raise problem
    is_data = all(type(frame.get(k)) is int for k in ("at", "bytes"))
    is_data = is_data and 0 <= frame["at"] < 1 << 62 and 0 < frame["bytes"] <= READ_BYTES
    is_data = is_data and "status" not in frame
    is_status = "bytes" not in frame and all(type(frame.get(k)) is bool for k in ("alive", "known"))
    is_status = is_status and is_valid_status(frame.get("status"))
    if not ("error" in frame or is_data or is_status):
        raise problem
    return frame


def is_valid_status(status: Any) -> bool:
    """Returns whether a host's status is an object whose outcome, if it has one, can be used."""
    return not mismatch(status, {"outcome?": (None, OUTCOME)}, "status")


_PLACE = ("here", "there")


def _read_at(path: Path, place: Mapping[str, int], offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(place["here"] + offset - place["there"])
        return file.read(min(size, READ_BYTES))


class LogCopy:
    """The file `path`: the host's bytes, plus an explanatory line wherever some are missing.

    Before the file exceeds half of the limit, its bytes replace those of `path`.1.

    After a gap or such a move, `path`.at contains {"here", "there", "gaps", "older"}: byte `here`
    of the copy is byte `there` of the host's log, and the bytes after them correspond; `gaps`
    counts the explanatory lines; `older` is {"here", "there"} of `path`.1, if it exists.

    Args:
        limit_bytes: of both files together. It is exceeded only if it is less than 2 * READ_BYTES.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_MIB << 20):
        self.path, self._anchor_path = Path(path), Path(f"{path}.at")
        self._older_path, self._limit_bytes = Path(f"{path}.1"), limit_bytes
        self.path.touch(mode=0o600)
        self._anchor: dict[str, Any] = self._read_anchor()  # as this process last saw it

    def _read_anchor(self) -> dict[str, Any]:
        new = {"here": 0, "there": 0, "gaps": 0, "older": None}
        return {**new, **read_json(self._anchor_path)}

    def end(self) -> int:
        """Returns the offset in the host's log of the first byte that the copy lacks."""
        return self._anchor["there"] + self.path.stat().st_size - self._anchor["here"]

    def read(self, offset: int, size: int) -> bytes:
        """Returns at most `size` bytes from an offset of the host's log; none from before a gap."""
        data, anchor = b"", dict(self._anchor)
        if offset < self._start():
            return b""
        if offset < anchor["there"]:
            data = _read_at(self._older_path, anchor["older"], offset, size)
            offset, size = offset + len(data), size - len(data)
        return data + (_read_at(self.path, anchor, offset, size) if size else b"")

    def _start(self) -> int:
        """Returns the offset in the host's log after which nothing is missing here."""
        older = None if self._anchor["here"] else self._anchor["older"]  # "here": a gap followed
        return (older or self._anchor)["there"]

    def tail(self) -> bytes:
        """Returns the last bytes, at most TAIL_BYTES."""
        return self.read(max(self._start(), self.end() - TAIL_BYTES), TAIL_BYTES)

    def add(self, offset: int, data: bytes, gap_line: bytes = b"", replaced: bool = False) -> None:
        """Adds the host's bytes from `offset` on, without those that the copy already has.

        Args:
            gap_line: written before them if they do not continue the copy.
            replaced: from `offset` on, the host's bytes differ from those of the copy.
        """
        with open(self.path, "ab") as file, locked(file):
            anchor, size = self._read_anchor(), file.seek(0, os.SEEK_END)
            end = anchor["there"] + size - anchor["here"]
            # If this differs, another terminal has written the gap line.
            unchanged = anchor["gaps"] == self._anchor["gaps"]
            if size and size + len(data) > self._limit_bytes // 2:
                shutil.copyfile(self.path, self._older_path)
                self._older_path.chmod(0o600)
                anchor |= {"here": 0, "there": end, "older": {k: anchor[k] for k in _PLACE}}
                write_json(self._anchor_path, anchor)
                size = file.truncate(0)
            if gap_line and unchanged and (replaced or offset > end):
                file.write(gap_line)
                place = {"here": size + len(gap_line), "there": offset}
                anchor, end = anchor | place | {"gaps": anchor["gaps"] + 1}, offset
                file.flush()
                write_json(self._anchor_path, anchor)
            file.write(data[max(0, end - offset) :])
            self._anchor = anchor


@contextlib.contextmanager
def locked(file: IO[bytes]) -> Iterator[None]:
    """Locks a file against other processes; flushes what was written before it unlocks."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases it if this process dies
    try:
        yield
        file.flush()
    finally:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)

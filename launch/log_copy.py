"""This machine's copy of a host's log. Several terminals can add to it at the same time."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from launch.host.files import read_json, write_json
from launch.host.log import TAIL_BYTES

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind: use one terminal per job there
    fcntl = None

READ_BYTES = 1 << 20  # the most that a host sends at once


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
    is_data = is_data and frame["at"] >= 0 and 0 < frame["bytes"] <= READ_BYTES
    is_status = all(type(frame.get(k)) is bool for k in ("alive", "known"))
    is_status = is_status and is_valid_status(frame.get("status"))
    if not ("error" in frame or is_data or is_status):
        raise problem
    return frame


def is_valid_status(status: Any) -> bool:
    """Returns whether a host's status is an object whose outcome, if it has one, can be used."""
    if not isinstance(status, dict):
        return False
    outcome = status.get("outcome")
    return outcome is None or (
        isinstance(outcome, dict)
        and type(outcome.get("code")) is int
        and isinstance(outcome.get("why"), str)
    )


class LogCopy:
    """The file `path`: the host's bytes, plus an explanatory line wherever some are missing.

    After such a line, the file `path`.at contains {"here", "there"}: byte `here` of the copy is
    byte `there` of the host's log, and the bytes after them correspond.
    """

    def __init__(self, path: Path):
        self.path, self._anchor_path = Path(path), Path(f"{path}.at")
        self.path.touch(mode=0o600)
        self._anchor = self._read_anchor()  # as this process last saw it

    def _read_anchor(self) -> dict[str, int]:
        return {"here": 0, "there": 0} | read_json(self._anchor_path)

    def end(self) -> int:
        """Returns the offset in the host's log of the first byte that the copy lacks."""
        return self._anchor["there"] + self.path.stat().st_size - self._anchor["here"]

    def read(self, offset: int, size: int) -> bytes:
        """Returns at most `size` bytes from an offset of the host's log; none from before a gap."""
        if offset < self._anchor["there"]:
            return b""
        with open(self.path, "rb") as file:
            file.seek(self._anchor["here"] + offset - self._anchor["there"])
            return file.read(min(size, READ_BYTES))

    def tail(self) -> bytes:
        """Returns the last bytes, at most TAIL_BYTES."""
        return self.read(max(self._anchor["there"], self.end() - TAIL_BYTES), TAIL_BYTES)

    def add(self, offset: int, data: bytes, gap_line: bytes = b"", replaced: bool = False) -> None:
        """Adds the host's bytes from `offset` on, without those that the copy already has.

        Args:
            gap_line: written before them if they do not continue the copy.
            replaced: from `offset` on, the host's bytes differ from those of the copy.
        """
        with open(self.path, "ab") as file, _locked(file):
            anchor, size = self._read_anchor(), file.seek(0, os.SEEK_END)
            end = anchor["there"] + size - anchor["here"]
            unchanged = anchor == self._anchor  # else another terminal has written the gap line
            if gap_line and unchanged and (replaced or offset > end):
                file.write(gap_line)
                anchor, end = {"here": size + len(gap_line), "there": offset}, offset
                file.flush()
                write_json(self._anchor_path, anchor)
            file.write(data[max(0, end - offset) :])
            self._anchor = anchor


@contextlib.contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Locks a file against other processes; flushes what was written before it unlocks."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases it if this process dies
    try:
        yield
        file.flush()
    finally:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)

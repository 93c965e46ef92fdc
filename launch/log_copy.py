"""A host's log as this machine holds it, whichever of several terminals brought the bytes."""

import contextlib
import os
from pathlib import Path

from launch.host.files import read_json, write_json
from launch.host.log import TAIL_BYTES

try:
    import fcntl
except ImportError:  # Windows has none: one terminal a job there
    fcntl = None

READ_BYTES = 1 << 20  # the most that a host sends at once


class Mirror:
    """The file `path`: the host's bytes, one for one, but for lines that say where some are gone.

    Beside it, `path`.at holds {"here", "there"} after such a line: from byte `here` of the file
    on, it is the host's log from byte `there` on. Several processes may add to it.
    """

    def __init__(self, path):
        self.path, self._place_path = Path(path), Path(f"{path}.at")
        self.path.touch(mode=0o600)
        self._place = self._read_place()  # as this process knows it

    def _read_place(self) -> dict:
        return {"here": 0, "there": 0} | read_json(self._place_path)

    def end(self) -> int:
        """The host's offset of the first byte that is not here."""
        return self._place["there"] + self.path.stat().st_size - self._place["here"]

    def read(self, at: int, size: int) -> bytes:
        """The host's bytes from offset `at` on, at most 1 MiB; none from before a gap."""
        if at < self._place["there"]:
            return b""
        with open(self.path, "rb") as file:
            file.seek(self._place["here"] + at - self._place["there"])
            return file.read(min(size, READ_BYTES))

    def tail(self) -> bytes:
        """The last bytes that are here, at most TAIL_BYTES."""
        at = max(self._place["there"], self.end() - TAIL_BYTES)
        return self.read(at, TAIL_BYTES)

    def add(self, at: int, data: bytes, line: bytes = b"", replaced=False) -> None:
        """Takes what is not here yet of the host's bytes from offset `at` on.

        Args:
            line: what is to be said before them, where they do not follow on what is here.
            replaced: from `at` on the host has other bytes than those that are here.
        """
        with open(self.path, "ab") as file, locked(file):
            place, size = self._read_place(), file.seek(0, os.SEEK_END)
            held = place["there"] + size - place["here"]
            ours = place == self._place  # else another terminal has said what is missing
            if line and ours and (replaced or at > held):
                file.write(line)
                place, held = {"here": size + len(line), "there": at}, at
                file.flush()
                write_json(self._place_path, place)
            file.write(data[max(0, held - at) :])
            self._place = place


@contextlib.contextmanager
def locked(file):
    """The file as this process's alone, until it is written out."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, if it comes to that
    try:
        yield
        file.flush()
    finally:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)

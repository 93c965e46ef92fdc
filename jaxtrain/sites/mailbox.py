"""Stores the messages of a process on its disk, so that no restart loses one.

A file contains one line of JSON about the message, then its bytes. `sent-...` is a message that a
peer has not stored yet; `received-...` is one that was acknowledged. `received.jsonl` lists every
message that was ever received, so that a peer that sends an old one again is checked against it.
"""

import json
import os
import re
import time
import zlib
from pathlib import Path

from jaxtrain.file_errors import Appender, add_path_to_errors
from jaxtrain.files import atomic_path, sync_to_disk, write_atomic
from jaxtrain.sites.frames import CHUNK_BYTES, KINDS, BadFrame, Key, Message, parse_message

NAME = re.compile(rf"(sent|received)-(.+)-(\d+)-({'|'.join(KINDS)})-(\d+)-(\d+)")
HISTORY = "received.jsonl"
Peer = tuple[str, int]  # name of a site, process


class Mailbox:
    """The files of one process.

    Args:
        folder: created if it is missing.
        ranges: {peer: its link's range of blocks of each fragment}.

    Attributes:
        sent: {(peer, key): (message, content)} not yet stored by the peer.
        received: {(peer, key): message} on this disk.
        arrived_s: {(peer, key): when it was stored} of those that arrived since the start.
        history: {(peer, key): crc} of all messages ever received.
        oldest: {fragment: its first round that was not removed since the start}.

    Raises:
        ValueError: the files belong to other numbers of processes, or are damaged.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, ranges: dict[Peer, list[range]]):
        self.folder, self._ranges = folder, ranges
        folder.mkdir(parents=True, exist_ok=True)
        self.sent: dict[tuple[Peer, Key], tuple[Message, bytes]] = {}
        self.received: dict[tuple[Peer, Key], Message] = {}
        self.arrived_s: dict[tuple[Peer, Key], float] = {}
        self.history: dict[tuple[Peer, Key], int] = {}
        self.oldest: dict[int, int] = {}
        self._read_history()
        for path in sorted(folder.iterdir()):
            if path.name.endswith((".part", ".tmp")):  # a process ended in the middle of it
                path.unlink()
            elif match := NAME.fullmatch(path.name):
                self._load(path, match)
        self._history = Appender(folder / HISTORY)
        for (peer, key), message in self.received.items():
            if (peer, key) not in self.history:  # a process ended between the two writes
                self._add_to_history(peer, message)

    def _load(self, path: Path, match: re.Match) -> None:
        peer = (match[2], int(match[3]))
        with path.open("rb") as file:
            try:
                record = json.loads(file.readline())
                blocks = record.pop("blocks")
                message = parse_message(record)
            except (ValueError, KeyError, AttributeError, BadFrame) as error:
                raise ValueError(
                    f"a stored message must begin with its description; got {path}: {error}. The "
                    "disk damaged it. Restart all sites from a checkpoint that all of them have."
                ) from None
            content = file.read() if match[1] == "sent" else b""
        if blocks != self._blocks(peer, message.fragment):
            raise ValueError(
                f"{path} contains blocks {blocks} for process {peer[1]} of site {peer[0]}; with "
                f"this sites file they are {self._blocks(peer, message.fragment)}. Resume with "
                "the number of processes, sites.fragments and model that the run had before."
            )
        if match[1] == "received":
            self.received[peer, message.key] = message
        elif zlib.crc32(content) == message.crc and len(content) == message.size:
            self.sent[peer, message.key] = (message, content)
        else:
            raise ValueError(f"a stored message must have its checksum; got another one in {path}.")

    def _read_history(self) -> None:
        """Reads received.jsonl and drops a last line that was cut off by a power loss."""
        path = self.folder / HISTORY
        if not path.exists():
            return
        complete, _, rest = path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                site, process, kind, fragment, round_, crc = json.loads(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is damaged: {error}") from None
            self.history[(site, process), Key(kind, fragment, round_)] = crc
        if rest:
            write_atomic(path, complete + b"\n" if complete else b"")

    def _blocks(self, peer: Peer, fragment: int) -> list[int] | None:
        ranges = self._ranges.get(peer, [])
        return [ranges[fragment].start, ranges[fragment].stop] if fragment < len(ranges) else None

    def _path(self, folder: str, peer: Peer, key: Key) -> Path:
        name = f"{folder}-{peer[0]}-{peer[1]}-{key.kind}-{key.fragment}-{key.round}"
        return self.folder / name

    def _head(self, peer: Peer, message: Message) -> bytes:
        record = message.to_dict() | {"blocks": self._blocks(peer, message.fragment)}
        return json.dumps(record).encode() + b"\n"

    def write_sent(self, peer: Peer, message: Message, content: bytes) -> None:
        """Writes a message to disk that is about to be sent."""
        with (
            atomic_path(self._path("sent", peer, message.key)) as hidden,
            hidden.open("wb") as file,
        ):
            file.write(self._head(peer, message))
            file.write(content)

    def remove_sent(self, peer: Peer, key: Key) -> None:
        self.sent.pop((peer, key), None)
        self._path("sent", peer, key).unlink(missing_ok=True)

    def read_received(self, peer: Peer, key: Key) -> bytes:
        """Returns the content of a stored message.

        Raises:
            ValueError: the disk returns other bytes than those that were stored.
        """
        path, message = self._path("received", peer, key), self.received[peer, key]
        with path.open("rb") as file:
            file.readline()
            content = file.read()
        if len(content) != message.size or zlib.crc32(content) != message.crc:
            raise ValueError(f"a stored message must have its checksum; got another one in {path}.")
        return content

    def receive(self, peer: Peer, message: Message) -> "Incoming":
        """Returns the unfinished file of a message whose chunks are to arrive."""
        path = self._path("received", peer, message.key)
        return Incoming(path, message, self._head(peer, message))

    def record(self, peer: Peer, message: Message) -> None:
        """Adds a message to the received ones, once its file is on disk."""
        self.received[peer, message.key] = message
        self.arrived_s[peer, message.key] = time.monotonic()
        if (peer, message.key) not in self.history:
            self._add_to_history(peer, message)

    def _add_to_history(self, peer: Peer, message: Message) -> None:
        self.history[peer, message.key] = message.crc
        self._history.write(json.dumps([*peer, *message.key, message.crc]).encode() + b"\n")

    def forget(self, oldest: dict[int, int]) -> None:
        """Removes the received messages of rounds before the oldest one of their fragment.

        The newest request of each fragment stays: it may still be open.
        """
        sync_to_disk(self.folder / HISTORY)  # it must outlive the files
        self.oldest |= oldest
        requests = sorted((key, peer) for peer, key in self.received if key.kind == "request")
        newest = {(peer, key.fragment): key for key, peer in requests}
        for peer, key in list(self.received):
            is_open = newest.get((peer, key.fragment)) == key
            if key.round < oldest.get(key.fragment, 0) and not is_open:
                del self.received[peer, key]
                self.arrived_s.pop((peer, key), None)
                self._path("received", peer, key).unlink(missing_ok=True)

    def close(self) -> None:
        self._history.close()


class Incoming:
    """A message that is arriving. Its chunks are written to a file, in any order."""

    def __init__(self, path: Path, message: Message, head: bytes):
        self.message, self._path, self._offset = message, path, len(head)
        self.missing = set(range(message.chunks))
        self._part = path.with_name(path.name + ".part")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._file = os.open(self._part, flags, 0o600)
        os.pwrite(self._file, head, 0)

    def write(self, index: int, data: memoryview) -> None:
        """Writes a chunk.

        Raises:
            BadFrame: there is no such chunk, or it has another length.
            OSError: the disk is full.
        """
        start = index * CHUNK_BYTES
        if index >= self.message.chunks or len(data) != min(CHUNK_BYTES, self.message.size - start):
            raise BadFrame(f"chunk {index} of {len(data)} bytes in {self.message}")
        if index not in self.missing:  # sent again because its arrival was in doubt
            return
        with add_path_to_errors(self._part):
            while data:
                written = os.pwrite(self._file, data, self._offset + start)
                start, data = start + written, data[written:]
        self.missing.remove(index)

    def finish(self) -> bool:
        """Puts a complete message on disk for good; returns False if its checksum is wrong.

        Reads and syncs the whole file, so it runs in a thread.
        """
        crc, position = 0, self._offset
        while data := os.pread(self._file, 1 << 20, position):
            crc, position = zlib.crc32(data, crc), position + len(data)
        if crc != self.message.crc or position - self._offset != self.message.size:
            self.discard()
            return False
        with add_path_to_errors(self._part):
            os.fsync(self._file)
            os.close(self._file)
            os.replace(self._part, self._path)
            sync_to_disk(self._path.parent)
        return True

    def discard(self) -> None:
        """Closes and removes the unfinished file."""
        os.close(self._file)
        self._part.unlink(missing_ok=True)

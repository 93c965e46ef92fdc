"""The frames of a connection between two sites: HELLO, then OFFER, HAVE, CHUNK, STORED and PING.

A frame is its type, the length of its body and the CRC-32 of its body, then the body: JSON, or for
a CHUNK a packed key and index before the bytes. TLS already protects the bytes on the wire; the
checksum finds damage in the memory of the hosts.

A sender offers a message and sends its chunks, spread over the streams of a link. The receiver
writes it to its disk and answers STORED. After a stream was lost, the sender asks which chunks
arrived (an OFFER with "ask"); the answer is HAVE with the missing ones, or STORED.
"""

import asyncio
import json
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

CHUNK_BYTES = 1 << 18
LARGEST_CONTROL = 1 << 20
HEADER = struct.Struct("!cII")
CHUNK_HEADER = struct.Struct("!BIQI")
HELLO, OFFER, HAVE, CHUNK, STORED, PING = (bytes([i]) for i in b"HOACSP")
NO_RECORD = -1  # in STORED instead of a CRC: the code never came, and is now too old to be accepted
KINDS = ("code", "decision", "request", "state", "end")


class BadFrame(Exception):
    """A peer sent bytes that are no valid frame; the connection is closed."""


class Key(NamedTuple):
    """Identifies a message of a link in one direction."""

    kind: str
    fragment: int
    round: int


@dataclass(frozen=True)
class Message:
    """What is sent about a message beside its bytes.

    Attributes:
        size: bytes of the content.
        crc: CRC-32 of the content.
        tokens: tokens on which the site trained since its round before.
        checksum: CRC-32 of the link's range of the reference after the round before, if known.
    """

    kind: str
    fragment: int
    round: int
    size: int
    crc: int
    tokens: int = 0
    checksum: int | None = None

    @property
    def key(self) -> Key:
        return Key(self.kind, self.fragment, self.round)

    @property
    def chunks(self) -> int:
        return -(-self.size // CHUNK_BYTES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_message(record: Any) -> Message:
    """Returns the message that a peer or a file describes.

    Raises:
        BadFrame: the description is invalid.
    """
    known = {field.name for field in fields(Message)}
    if not isinstance(record, dict) or not known >= record.keys():
        raise BadFrame(f"a message has the fields {sorted(known)}; got {str(record)[:80]}")
    numbers = ("fragment", "round", "size", "crc", "tokens")
    if record.get("kind") not in KINDS or not all(is_count(record.get(n, 0)) for n in numbers):
        raise BadFrame(f"a message needs a kind of {KINDS} and counts; got {str(record)[:80]}")
    if not (record.get("checksum") is None or is_count(record["checksum"])):
        raise BadFrame(f"checksum must be a number; got {str(record['checksum'])[:80]}")
    try:
        return Message(**record)
    except TypeError as error:
        raise BadFrame(str(error)) from None


def is_count(value: Any) -> bool:
    """Returns whether a value of JSON is a natural number that fits a frame."""
    return type(value) is int and 0 <= value < 1 << 63


def parse_key(body: Any) -> Key:
    """Returns the key of a HAVE or STORED frame.

    Raises:
        BadFrame: there is none.
    """
    key = body.get("key") if isinstance(body, dict) else None
    if not isinstance(key, list) or len(key) != 3 or key[0] not in KINDS:
        raise BadFrame(f"a key must be [kind, fragment, round]; got {str(key)[:80]}")
    if not all(map(is_count, key[1:])):
        raise BadFrame(f"fragment and round must be counts; got {str(key)[:80]}")
    return Key(*key)


def pack(kind: bytes, body: Any) -> bytes:
    """Returns a frame with a JSON body."""
    return pack_bytes(kind, json.dumps(body).encode())


def pack_bytes(kind: bytes, data: bytes) -> bytes:
    return HEADER.pack(kind, len(data), zlib.crc32(data)) + data


def pack_chunk(key: Key, index: int, content: memoryview) -> bytes:
    """Returns the frame of the chunk `index` of a message with this content."""
    head = CHUNK_HEADER.pack(KINDS.index(key.kind), key.fragment, key.round, index)
    start = index * CHUNK_BYTES
    return pack_bytes(CHUNK, b"".join([head, content[start : start + CHUNK_BYTES]]))


def unpack_chunk(data: bytes) -> tuple[Key, int, memoryview]:
    """Returns the key, index and bytes of a CHUNK frame.

    Raises:
        BadFrame: the frame is too short, or its kind is unknown.
    """
    if len(data) < CHUNK_HEADER.size or data[0] >= len(KINDS):
        raise BadFrame("a chunk without a valid header")
    kind, fragment, round_, index = CHUNK_HEADER.unpack_from(data)
    return Key(KINDS[kind], fragment, round_), index, memoryview(data)[CHUNK_HEADER.size :]


async def read_frame(reader: asyncio.StreamReader) -> tuple[bytes, Any]:
    """Reads a frame; returns its type and its body, decoded unless it is a CHUNK.

    Raises:
        BadFrame: type, length, checksum or JSON are invalid.
        EOFError, OSError: the connection ended.
    """
    kind, length, crc = HEADER.unpack(await reader.readexactly(HEADER.size))
    if kind not in (HELLO, OFFER, HAVE, CHUNK, STORED, PING):
        raise BadFrame(f"unknown frame type {kind!r}")
    limit = CHUNK_HEADER.size + CHUNK_BYTES if kind == CHUNK else LARGEST_CONTROL
    if length > limit:
        raise BadFrame(f"a frame of {length} bytes; the most is {limit}")
    data = await reader.readexactly(length)
    if zlib.crc32(data) != crc:
        raise BadFrame("a frame with a wrong checksum")
    if kind == CHUNK:
        return kind, data
    try:
        return kind, json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"a frame that is not JSON: {error}") from None

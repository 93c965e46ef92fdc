"""Reads each kernel's registers, stack and instructions from a serialized XLA executable.

XLA stores GPU executables in riegeli record files, compressed with snappy. Since jax 0.11, one file
is nested in another. The kernels inside are ELF images (cubins).

Source: https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md; section
numbers of ELF64 as in https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html. The attributes
of .nv.info were checked against `cuobjdump -res-usage` of CUDA 12.9 and `nvdisasm`.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import cramjam

from pallas_kernels.machine_code import Loop, count_instructions, count_operations, find_loops

SIGNATURE = bytes.fromhex("83af70d10d884a3f")  # the first block header of a record file
BLOCK, BLOCK_HEADER = 1 << 16, 24
CHUNK_HEADER = struct.Struct("<5Q")  # hash, data size, data hash, type and records, decoded size
ELF = b"\x7fELF\x02"
ABI_VERSION = 8  # where an image stores it; since version 8 the flags are laid out otherwise
FRAME_SIZE, REGISTER_COUNT = 0x11, 0x2F  # attributes of .nv.info, stored as (symbol, value)
SIZED = 4  # the format of an attribute whose size precedes its value


class Resources(NamedTuple):
    """A kernel's registers and stack, its instructions by name, and its innermost loops."""

    registers: int  # per thread
    stack_bytes: int  # per thread; more than 0 means that registers spill
    instructions: Counter
    loops: tuple[Loop, ...] = ()  # those with tensor-core products
    operations: Counter = Counter()  # of each machine_code.Operation

    @property
    def spills(self) -> int:
        return self.instructions["STL"] + self.instructions["LDL"]

    @property
    def tensor_products(self) -> int:
        return self.instructions["HMMA"] + self.instructions["HGMMA"]

    @property
    def tma_copies(self) -> int:
        return self.instructions["UTMALDG"] + self.instructions["UTMASTG"]

    @property
    def async_copies(self) -> int:
        return self.instructions["LDGSTS"] + self.tma_copies


def find_cubins(data: bytes) -> list[bytes]:
    """Returns the ELF images of an executable, in order, without duplicates."""
    images = []
    for record in _records(data):
        images += find_cubins(record) if SIGNATURE in record else _images(record)
    return list(dict.fromkeys(images))


def _records(data: bytes) -> Iterator[bytes]:
    """Yields the records of the first record file in `data`.

    A file is a sequence of chunks, interrupted by a header at each multiple of BLOCK bytes.
    """
    start = data.find(SIGNATURE)
    if start < 0:
        return
    body = bytearray()
    for at in range(start, len(data), BLOCK):
        body += data[at + BLOCK_HEADER : at + BLOCK]
    at = 0
    while at + CHUNK_HEADER.size <= len(body):
        _, size, _, kind, _ = CHUNK_HEADER.unpack_from(body, at)
        at += CHUNK_HEADER.size
        if kind & 0xFF == ord("r"):
            yield from _simple_records(bytes(body[at : at + size]))
        at += size


def _varint(data, at):
    """Reads an integer stored as 7 bits per byte, low bits first: (value, where it ends)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _decompress(data, kind):
    if kind == 0:
        return data
    if kind != ord("s"):
        raise ValueError(f"records must be plain or use snappy; got compression {chr(kind)!r}.")
    _, at = _varint(data, 0)  # skips riegeli's decoded size, which precedes snappy's
    return bytes(cramjam.snappy.decompress_raw(data[at:]))


def _simple_records(data):
    """Yields the records of a chunk that stores all their sizes, then all their values."""
    kind = data[0]
    length, at = _varint(data, 1)
    sizes, values = data[at : at + length], data[at + length :]
    sizes, values = _decompress(sizes, kind), _decompress(values, kind)
    at = start = 0
    while at < len(sizes):
        size, at = _varint(sizes, at)
        yield values[start : start + size]
        start += size


def _images(data):
    """Yields the ELF images in a record. An image ends with the later of its two header tables."""
    at = data.find(ELF)
    while at >= 0:
        tables = struct.unpack_from("<QQ", data, at + 0x20)  # of segments, of sections
        sizes = struct.unpack_from("<4H", data, at + 0x36)
        end = at + max(tables[0] + sizes[0] * sizes[1], tables[1] + sizes[2] * sizes[3])
        yield data[at:end]
        at = data.find(ELF, end)


def _sections(image) -> dict[str, bytes]:
    """Returns {section's name: its data}."""
    (start,) = struct.unpack_from("<Q", image, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, start + i * entry) for i in range(count)]
    text = image[headers[names_at][4] :]
    sections = {}
    for name, kind, _, _, offset, size, *_ in headers:
        label = text[name : text.index(b"\0", name)].decode()
        only_in_memory = kind == 8  # SHT_NOBITS
        sections[label] = b"" if only_in_memory else image[offset : offset + size]
    return sections


def read_resources(image: bytes) -> dict[str, Resources]:
    """Returns {kernel's name: Resources} of one cubin."""
    sections = _sections(image)
    registers, stacks = _attribute(sections, REGISTER_COUNT), _attribute(sections, FRAME_SIZE)
    (flags,) = struct.unpack_from("<I", image, 0x30)
    capability = (flags >> 8 if image[ABI_VERSION] >= 8 else flags) & 0xFF
    resources = {}
    for section, code in sections.items():
        if section.startswith(".text."):
            name = section.removeprefix(".text.")
            counts, loops = count_instructions(code), find_loops(code, capability)
            resources[name] = Resources(
                registers[name], stacks.get(name, 0), counts, loops, count_operations(code)
            )
    return resources


def _attribute(sections, wanted) -> dict[str, int]:
    """Returns {function: value} of one attribute of .nv.info."""
    symbols, names = sections.get(".symtab", b""), sections.get(".strtab", b"")
    labels = []
    for (start,) in (struct.unpack_from("<I", symbols, at) for at in range(0, len(symbols), 24)):
        labels.append(names[start : names.index(b"\0", start)].decode())
    info, at, values = sections.get(".nv.info", b""), 0, {}
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == SIZED:
            if attribute == wanted:
                symbol, value = struct.unpack_from("<II", info, at)
                values[labels[symbol]] = value
            at += size
    return values

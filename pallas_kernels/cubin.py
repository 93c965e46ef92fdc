"""Machine code inside a serialized XLA executable: registers, stack, instructions of each kernel.

XLA keeps its GPU executables in riegeli record files, compressed with snappy, one in another from
jax 0.11 on. Kernels lie in them as ELF images.

Source: https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md; section
numbers of ELF64 as in https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html. What .nv.info
says was held against `cuobjdump -res-usage` of CUDA 12.9 and `nvdisasm`.
"""

import struct
from collections import Counter
from typing import NamedTuple

import cramjam

SIGNATURE = bytes.fromhex("83af70d10d884a3f")  # the first block header of a record file
BLOCK, BLOCK_HEADER = 1 << 16, 24
CHUNK_HEADER = struct.Struct("<5Q")  # hash, data size, data hash, type and records, decoded size
ELF = b"\x7fELF\x02"
FRAME_SIZE, REGISTER_COUNT = 0x11, 0x2F  # attributes of .nv.info: (symbol, value) each
SIZED = 4  # the form of an attribute whose size stands before its value
# Low 12 bits of an instruction, of compute capabilities 8.0 to 9.0.
OPCODES = {
    0x23C: "HMMA",  # tensor core
    0x5F0: "HGMMA",  # tensor core, Hopper's warp groups
    0xDF0: "HGMMA",
    0x9F0: "HGMMA",
    0x1F0: "HGMMA",
    0xFAE: "LDGSTS",  # copies to shared memory behind the threads' back
    0x5B4: "UTMALDG",  # the same by Hopper's tensor memory accelerator
    0x3B5: "UTMASTG",  # and back
    0x387: "STL",  # spills
    0x983: "LDL",
}


class Resources(NamedTuple):
    """What one kernel takes of a multiprocessor, and the instructions of OPCODES in it."""

    registers: int  # a thread
    stack_bytes: int  # a thread; not 0 is a spill
    static_shared_bytes: int
    instructions: Counter

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
    """The ELF images of an executable, in order, each once."""
    images = []
    for record in _records(data):
        images += find_cubins(record) if SIGNATURE in record else _images(record)
    return list(dict.fromkeys(images))


def _records(data):
    """Records of the first record file in `data`."""
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
        raise ValueError(f"records must be plain or snappy's; got compression {chr(kind)!r}.")
    _, at = _varint(data, 0)  # the decoded size, before snappy's own
    return bytes(cramjam.snappy.decompress_raw(data[at:]))


def _simple_records(data):
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
    at = data.find(ELF)
    while at >= 0:
        tables = struct.unpack_from("<QQ", data, at + 0x20)  # of segments, of sections
        sizes = struct.unpack_from("<4H", data, at + 0x36)
        end = at + max(tables[0] + sizes[0] * sizes[1], tables[1] + sizes[2] * sizes[3])
        yield data[at:end]
        at = data.find(ELF, end)


class _Section(NamedTuple):
    name: str
    data: bytes
    size: int


def _sections(image) -> list[_Section]:
    (start,) = struct.unpack_from("<Q", image, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, start + i * entry) for i in range(count)]
    text = image[headers[names_at][4] :]
    sections = []
    for name, kind, _, _, offset, size, *_ in headers:
        label = text[name : text.index(b"\0", name)].decode()
        nothing_stored = kind == 8
        data = b"" if nothing_stored else image[offset : offset + size]
        sections.append(_Section(label, data, size))
    return sections


def read_resources(image: bytes) -> dict[str, Resources]:
    """{kernel's name: Resources} of one cubin."""
    sections = _sections(image)
    sizes = {section.name: section.size for section in sections}
    registers, stacks = _attribute(sections, REGISTER_COUNT), _attribute(sections, FRAME_SIZE)
    found = {}
    for section in sections:
        if not section.name.startswith(".text."):
            continue
        name = section.name.removeprefix(".text.")
        codes = struct.unpack(f"<{len(section.data) // 8}Q", section.data)[::2]
        kinds = Counter(OPCODES[code & 0xFFF] for code in codes if code & 0xFFF in OPCODES)
        shared = sizes.get(f".nv.shared.{name}", 0)
        found[name] = Resources(registers[name], stacks.get(name, 0), shared, kinds)
    return found


def _attribute(sections, wanted) -> dict[str, int]:
    """{function: value} of one attribute of .nv.info."""
    tables = {section.name: section.data for section in sections}
    symbols, names = tables.get(".symtab", b""), tables.get(".strtab", b"")
    labels = []
    for (start,) in (struct.unpack_from("<I", symbols, at) for at in range(0, len(symbols), 24)):
        labels.append(names[start : names.index(b"\0", start)].decode())
    info, at, found = tables.get(".nv.info", b""), 0, {}
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == SIZED:
            if attribute == wanted:
                symbol, value = struct.unpack_from("<II", info, at)
                found[labels[symbol]] = value
            at += size
    return found

"""Recognises the format of a token shard and checks it against the file's size.

    llmc      256 int32 of header (magic, version, tokens), then uint16 or uint32 tokens
    nanogpt   uint16 tokens, no header
    megatron  NAME.idx (dtype, sequence lengths, byte pointers, documents) next to NAME.bin (tokens)

Source: https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py,
https://github.com/karpathy/nanoGPT/blob/master/data/openwebtext/prepare.py,
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py
"""

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from jaxtrain.data.encoding.formats import printable_path

HEADER_BYTES = 256 * 4
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
LLMC_FORMS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic -> version, dtype
NANOGPT_NAMES = ("train.bin", "val.bin", "test.bin")
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
OTHER_FILES = {
    struct.pack("<i", 20240326): "an llm.c model",
    struct.pack("<i", 20240327): "an llm.c debug state",
    struct.pack("<i", 20240328): "an llm.c tokenizer",
    struct.pack("<i", 20240522): "an llm.c evaluation set",
    b"\x93NUMPY": "a NumPy .npy file",
    b"PK\x03\x04": "a zip archive",
}


@dataclass(frozen=True)
class Shard:
    """A file of tokens: its format and where in the file the tokens are."""

    path: str
    format: str
    dtype: str
    offset: int  # bytes before the first token
    tokens: int

    def open(self) -> np.ndarray:
        """Returns the tokens as an array that is mapped from the file and read on access."""
        shape = (self.tokens,)
        return np.memmap(self.path, self.dtype, "r", self.offset, shape).view(np.ndarray)

    def document_starts(self) -> np.ndarray | None:
        """Returns the first token of each document by Megatron's index, int64 [documents].

        Returns None for other formats, and if the index does not divide all of its sequences into
        documents, as that of a converter which leaves the documents out. Empty documents are left
        out.
        """
        if self.format != "megatron":
            return None
        index = _read_megatron_index(Path(self.path).with_suffix(".idx"))
        if [*index.documents[:1], *index.documents[-1:]] != [0, len(index.lengths)]:
            return None
        ends = np.cumsum(index.lengths)
        starts = np.unique(np.append(0, ends)[index.documents])
        return starts[starts < self.tokens]


def _refuse(path: Path, expected: str, found: str) -> NoReturn:
    raise ValueError(f"{printable_path(path)}: expected {expected}; found {found}.")


def probe(path: Path, shard_format: str = "auto") -> Shard:
    """Returns a shard after checking what its header declares against the file's size.

    Raises:
        ValueError: the file is missing, unreadable, empty, truncated or no token shard, or has
            another dtype; the message names the file, what was expected and what was found.
    """
    path = Path(path)
    _check_readable(path, "a token shard", "its .idx, a gap in the file numbers or meta.json")
    if not path.stat().st_size:
        _refuse(path, "a token shard", "an empty file, 0 bytes")
    if shard_format == "auto":
        shard_format = _detect(path)
    return PROBES[shard_format](path, path.stat().st_size)


def _check_readable(path: Path, expected: str, implied_by: str) -> None:
    """Raises ValueError unless a path is a file that can be read."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            _refuse(path, expected, "a folder")
        if not stat.S_ISREG(mode):
            _refuse(path, expected, "a pipe, a socket or a device")
        _head(path, 1)
    except FileNotFoundError:
        if path.is_symlink():
            target = printable_path(os.readlink(path))
            _refuse(path, expected, f"a link to {target}, which does not exist")
        _refuse(path, f"{expected} ({implied_by} implies it)", "no such file")
    except OSError as error:
        _refuse(path, expected, f"a file that cannot be read: {error.strerror}")


def _head(path: Path, size: int = 16) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _magic(path: Path) -> int:
    return int.from_bytes(_head(path, 4), "little")


def _detect(path: Path) -> str:
    if os.path.lexists(path.with_suffix(".idx")):
        return "megatron"
    if _magic(path) in LLMC_FORMS:
        return "llmc"
    _refuse_other_files(path)
    if path.name in NANOGPT_NAMES:
        return "nanogpt"
    _refuse(
        path,
        f"an llm.c header (magic {' or '.join(map(str, LLMC_FORMS))}), an .idx next to it, or "
        f"nanoGPT's file name ({', '.join(NANOGPT_NAMES)})",
        f"none, and first bytes {_head(path, 8).hex(' ')}; if it is headerless uint16, pass "
        "--data.shard_format=nanogpt",
    )


def _refuse_other_files(path: Path) -> None:
    for signature, what in OTHER_FILES.items():
        if _head(path).startswith(signature):
            _refuse(path, "a token shard", what)


def _probe_llmc(path: Path, size: int) -> Shard:
    _refuse_other_files(path)
    magic = _magic(path)
    if magic not in LLMC_FORMS:
        _refuse(path, f"magic {' or '.join(map(str, LLMC_FORMS))}", f"magic {magic}")
    if size < HEADER_BYTES:
        _refuse(path, f"a header of {HEADER_BYTES} bytes", f"a file of {size} bytes (truncated)")
    _, version, tokens = struct.unpack("<3i", _head(path, 12))
    expected_version, dtype = LLMC_FORMS[magic]
    if version != expected_version:
        _refuse(path, f"version {expected_version} with magic {magic}", f"version {version}")
    if tokens < 1:
        _refuse(path, "a declared count of at least 1 token", f"a count of {tokens}")
    width = np.dtype(dtype).itemsize
    if size != HEADER_BYTES + tokens * width:
        payload = size - HEADER_BYTES
        name = np.dtype(dtype).name
        reason = "truncated" if payload < tokens * width else "bytes past the declared end"
        if payload and payload % tokens == 0:
            reason = f"{payload // tokens} bytes a token, so another dtype than {name}"
        expected = f"{HEADER_BYTES + tokens * width} bytes (header + {tokens} {name} tokens)"
        _refuse(path, expected, f"{size} bytes ({reason})")
    return Shard(str(path), "llmc", dtype, HEADER_BYTES, tokens)


def _probe_nanogpt(path: Path, size: int) -> Shard:
    if _magic(path) in LLMC_FORMS:
        _refuse(path, "headerless uint16 tokens", f"an llm.c header, magic {_magic(path)}")
    _refuse_other_files(path)
    if size % 2:
        _refuse(path, "an even number of bytes (uint16 tokens)", f"{size} bytes (truncated)")
    return Shard(str(path), "nanogpt", "<u2", 0, size // 2)


class _MegatronIndex(NamedTuple):
    """The content of a .idx file. A document is one or more sequences."""

    dtype: str
    lengths: np.ndarray  # [sequences] int64, in tokens
    pointers: np.ndarray  # [sequences] int64: the first byte of each sequence
    documents: np.ndarray  # [documents + 1] int64: first sequence of each, then their number


def _read_megatron_index(index: Path) -> _MegatronIndex:
    size, head = index.stat().st_size, _head(index, 34)
    if head[:9] != MEGATRON_MAGIC:
        _refuse(index, f"magic {MEGATRON_MAGIC!r}", f"{head[:9]!r}")
    if len(head) < 34:
        _refuse(index, "a header of 34 bytes", f"a file of {size} bytes (truncated)")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1:
        _refuse(index, "version 1", f"version {version}")
    dtype = MEGATRON_DTYPES.get(code, "")
    if np.dtype(dtype or "f4").kind == "f":
        _refuse(index, "a dtype code of integers (1-5 or 8)", f"code {code}")
    expected = 34 + sequences * 12 + documents * 8
    if size not in (expected, expected + sequences):  # multimodal: +1 byte per sequence
        _refuse(
            index,
            f"{expected} bytes ({sequences} sequences, {documents} documents)",
            f"{size} bytes",
        )
    if not sequences:
        _refuse(index, "at least 1 sequence", "0")
    body = np.memmap(index, "u1", "r", 34).view(np.ndarray)
    at = np.cumsum([0, 4 * sequences, 8 * sequences, 8 * documents])
    lengths, pointers, documents = (
        body[at[i] : at[i + 1]].view(form) for i, form in enumerate(("<i4", "<i8", "<i8"))
    )
    return _MegatronIndex(dtype, lengths.astype(np.int64), pointers, documents)


def _probe_megatron(path: Path, size: int) -> Shard:
    index = path.with_suffix(".idx")
    _check_readable(index, "the index of its .bin", "--data.shard_format=megatron")
    dtype, lengths, pointers, documents = _read_megatron_index(index)
    width = np.dtype(dtype).itemsize
    ends = np.cumsum(lengths) * width
    if lengths.min() < 0 or pointers[0] != 0 or (pointers[1:] != ends[:-1]).any():
        _refuse(index, "pointers that are the running sum of lengths", "other pointers")
    if ends[-1] != size:
        tokens = f"{ends[-1] // width} {np.dtype(dtype).name} tokens by its index"
        _refuse(path, f"{ends[-1]} bytes ({tokens})", f"{size} bytes")
    borders = [0, *documents[:1], *documents[-1:], len(lengths)]
    if documents.size and (borders != sorted(borders) or (np.diff(documents) < 0).any()):
        _refuse(
            index,
            f"documents that begin at ascending sequences from 0 to {len(lengths)}",
            f"sequences {', '.join(map(str, documents[:6].tolist()))}, ...",
        )
    return Shard(str(path), "megatron", dtype, 0, size // width)


PROBES = {"llmc": _probe_llmc, "nanogpt": _probe_nanogpt, "megatron": _probe_megatron}

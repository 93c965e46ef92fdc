"""Token shards on disk: which files, in which format, and whether they are what they say.

    llmc      256 int32 of header (magic, version, tokens), then uint16 or uint32 tokens
    nanogpt   uint16 tokens, no header
    megatron  NAME.idx (dtype, sequence lengths, byte pointers) beside NAME.bin (tokens)

Source: https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py,
https://github.com/karpathy/nanoGPT/blob/master/data/openwebtext/prepare.py,
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py
"""

import glob
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEADER_BYTES = 256 * 4
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
LLMC_FORMS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic -> version, dtype
NANOGPT_NAMES = ("train.bin", "val.bin", "test.bin")
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
FOREIGN = {
    struct.pack("<i", 20240326): "an llm.c model",
    struct.pack("<i", 20240327): "an llm.c debug state",
    struct.pack("<i", 20240328): "an llm.c tokenizer",
    struct.pack("<i", 20240522): "an llm.c evaluation set",
    b"\x93NUMPY": "a NumPy .npy file",
    b"PK\x03\x04": "a zip archive",
}
VAL_NAME = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", re.IGNORECASE)
OUR_NAME = re.compile(r"_(train|val)_[0-9]{6}\.(bin|idx)$")  # of `encode` and of llm.c's scripts
OTHER_NAME = re.compile(r"(^|[^a-z])(test|dev|eval(uation)?)([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """Where the tokens of one file lie."""

    path: str
    format: str
    dtype: str
    offset: int  # bytes before the first token
    tokens: int

    def open(self) -> np.ndarray:
        """[tokens] of dtype, mapped from the file and read as it is touched."""
        shape = (self.tokens,)
        return np.memmap(self.path, self.dtype, "r", self.offset, shape).view(np.ndarray)


def refuse(path, expected: str, found: str):
    """Raises the ValueError of a shard that is not what it should be."""
    raise ValueError(f"{path}: expected {expected}; found {found}.")


def split_of(name: str) -> str:
    """val, train, or other (test sets and the like, which nothing reads), by a file's name."""
    if ours := OUR_NAME.search(name):  # whatever stands before it
        return ours[1]
    other = OTHER_NAME.search(name) and "train" not in name.lower()
    return "val" if VAL_NAME.search(name) else "other" if other else "train"


def find_shards(pattern: str, split: str) -> list[Path]:
    """Sorted shard files of a folder, a file or a glob that belong to a split, as split_of has it.

    Where a folder's numbered files have gaps, the missing ones are in the list too.

    Raises:
        ValueError: there is none.
    """
    found = _all_shards(pattern)
    chosen = [path for path in found if split_of(path.name) == split]
    if not chosen:
        hint = "named with 'val'" if split == "val" else "not named with 'val', 'test', ..."
        fix = "or encode the text again with --val_fraction=0.01" if split == "val" else ""
        raise ValueError(
            f"data.shards must hold a {split} shard, a file {hint}; got {pattern!r} with only "
            f"{', '.join(p.name for p in found[:4])}. Set --data.shards{fix and ', ' + fix}."
        )
    return chosen


def left_out(pattern: str) -> list[str]:
    """Names of the files that find_shards gives to neither train nor val."""
    return [path.name for path in _all_shards(pattern) if split_of(path.name) == "other"]


def _all_shards(pattern) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [*path.glob("[!.]*.bin"), *path.glob("[!.]*.idx")]
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        found = [p for p in found if p.is_file() and p.suffix in (".bin", ".idx")]
    found = sorted({p.with_suffix(".bin") if p.suffix == ".idx" else p for p in found})
    if not found:
        raise ValueError(
            f"data.shards must name token shards (*.bin): a folder, a file or a glob; got "
            f"{pattern!r}, where there is none. Set --data.shards."
        )
    return sorted([*found, *_gaps(found)]) if path.is_dir() else found


def _gaps(paths) -> list[Path]:
    """Files that are missing from rows like NAME_000000.bin, NAME_000001.bin, ..."""
    rows: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*[^0-9])([0-9]{5,6})", path.stem):
            rows.setdefault((path.parent, match[1], len(match[2])), set()).add(int(match[2]))
    return [
        folder / f"{stem}{number:0{digits}d}.bin"
        for (folder, stem, digits), present in rows.items()
        for number in range(min(present), max(present))
        if number not in present
    ]


def probe(path: Path, shard_format: str = "auto") -> Shard:
    """Reads what a shard declares and checks it against the file's size.

    Raises:
        ValueError: the file is missing, empty, truncated, foreign or of another dtype; the
            message holds file, expected and found.
    """
    path = Path(path)
    if not path.is_file():
        refuse(path, "a token shard, by its .idx, its numbered row or meta.json", "no such file")
    if not path.stat().st_size:
        refuse(path, "a token shard", "an empty file, 0 bytes")
    if shard_format == "auto":
        shard_format = _detect(path)
    return PROBES[shard_format](path, path.stat().st_size)


def _head(path, size=16) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _magic(path) -> int:
    return int.from_bytes(_head(path, 4), "little")


def _detect(path) -> str:
    if path.with_suffix(".idx").exists():
        return "megatron"
    if _magic(path) in LLMC_FORMS:
        return "llmc"
    _refuse_foreign(path)
    if path.name in NANOGPT_NAMES:
        return "nanogpt"
    refuse(
        path,
        f"an llm.c header (magic {' or '.join(map(str, LLMC_FORMS))}), an .idx beside it, or "
        f"nanoGPT's file name ({', '.join(NANOGPT_NAMES)})",
        f"none, and first bytes {_head(path, 8).hex(' ')}; if it is headerless uint16, pass "
        "--data.shard_format=nanogpt",
    )


def _refuse_foreign(path):
    for signature, what in FOREIGN.items():
        if _head(path).startswith(signature):
            refuse(path, "a token shard", what)


def _probe_llmc(path, size) -> Shard:
    _refuse_foreign(path)
    magic = _magic(path)
    if magic not in LLMC_FORMS:
        refuse(path, f"magic {' or '.join(map(str, LLMC_FORMS))}", f"magic {magic}")
    if size < HEADER_BYTES:
        refuse(path, f"a header of {HEADER_BYTES} bytes", f"a file of {size} bytes (truncated)")
    _, version, tokens = struct.unpack("<3i", _head(path, 12))
    expected_version, dtype = LLMC_FORMS[magic]
    if version != expected_version:
        refuse(path, f"version {expected_version} with magic {magic}", f"version {version}")
    if tokens < 1:
        refuse(path, "a declared count of at least 1 token", f"a count of {tokens}")
    width = np.dtype(dtype).itemsize
    if size != HEADER_BYTES + tokens * width:
        payload = size - HEADER_BYTES
        name = np.dtype(dtype).name
        reason = "truncated" if payload < tokens * width else "bytes past the declared end"
        if payload and payload % tokens == 0:
            reason = f"{payload // tokens} bytes a token, so another dtype than {name}"
        expected = f"{HEADER_BYTES + tokens * width} bytes (header + {tokens} {name} tokens)"
        refuse(path, expected, f"{size} bytes ({reason})")
    return Shard(str(path), "llmc", dtype, HEADER_BYTES, tokens)


def _probe_nanogpt(path, size) -> Shard:
    if _magic(path) in LLMC_FORMS:
        refuse(path, "headerless uint16 tokens", f"an llm.c header, magic {_magic(path)}")
    _refuse_foreign(path)
    if size % 2:
        refuse(path, "an even number of bytes (uint16 tokens)", f"{size} bytes (truncated)")
    return Shard(str(path), "nanogpt", "<u2", 0, size // 2)


def _probe_megatron(path, size) -> Shard:
    index = path.with_suffix(".idx")
    if not index.is_file():
        refuse(index, "the index of its .bin", "no such file")
    index_size = index.stat().st_size
    head = _head(index, 34)
    if head[:9] != MEGATRON_MAGIC:
        refuse(index, f"magic {MEGATRON_MAGIC!r}", f"{head[:9]!r}")
    if len(head) < 34:
        refuse(index, "a header of 34 bytes", f"a file of {index_size} bytes (truncated)")
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1:
        refuse(index, "version 1", f"version {version}")
    dtype = MEGATRON_DTYPES.get(code, "")
    if np.dtype(dtype or "f4").kind == "f":
        refuse(index, "a dtype code of integers (1-5 or 8)", f"code {code}")
    expected = 34 + sequences * 12 + documents * 8
    if index_size not in (expected, expected + sequences):  # multimodal ones end in a mode each
        found = f"{index_size} bytes"
        refuse(index, f"{expected} bytes ({sequences} sequences, {documents} documents)", found)
    if not sequences:
        refuse(index, "at least 1 sequence", "0")
    lengths = np.memmap(index, "<i4", "r", 34, (sequences,)).astype(np.int64)
    pointers = np.memmap(index, "<i8", "r", 34 + sequences * 4, (sequences,))
    width = np.dtype(dtype).itemsize
    ends = np.cumsum(lengths) * width
    if lengths.min() < 0 or pointers[0] != 0 or (pointers[1:] != ends[:-1]).any():
        refuse(index, "pointers that are the running sum of lengths", "other pointers")
    if ends[-1] != size:
        what = f"{ends[-1]} bytes ({ends[-1] // width} {np.dtype(dtype).name} tokens by its index)"
        refuse(path, what, f"{size} bytes")
    return Shard(str(path), "megatron", dtype, 0, size // width)


PROBES = {"llmc": _probe_llmc, "nanogpt": _probe_nanogpt, "megatron": _probe_megatron}

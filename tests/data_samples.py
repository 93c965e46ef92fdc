"""The same documents in every input format, and helpers to encode them and to read the result."""

import argparse
import csv
import gzip
import json
import logging
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encoding import pipeline
from jaxtrain.data.encoding.divide_input import divide_input
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.pipeline import encode

DOCUMENTS = [f'{i}: "é", a\n' + f"line\t{i}\n" * (i % 13) for i in range(200)]


def zstd(content: bytes, frames=1) -> bytes:
    size = -(-len(content) // frames)
    parts = (content[i * size : (i + 1) * size] for i in range(frames))
    return b"".join(bytes(pa.compress(part, "zstd", asbytes=True)) for part in parts)


def json_lines(field="text") -> bytes:
    return "".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(DOCUMENTS)).encode()


def separated(path, delimiter) -> bytes:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(DOCUMENTS))
    return path.read_bytes()


def arrow(path, stream) -> bytes:
    table = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    return path.read_bytes()


def parquet(path, texts=None, **options) -> bytes:
    texts = DOCUMENTS if texts is None else texts
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, path, row_group_size=70, **options)
    return path.read_bytes()


SAMPLES = {
    "rows.jsonl": lambda path: json_lines(),
    "rows.jsonl.gz": lambda path: gzip.compress(json_lines(), mtime=0),
    "members.jsonl.gz": lambda path: (
        gzip.compress(json_lines()[:777], mtime=0)
        + gzip.compress(json_lines()[777:], mtime=0)
        + bytes(512)
    ),
    "rows.jsonl.zst": lambda path: zstd(json_lines()),
    "frames.jsonl.zst": lambda path: zstd(json_lines(), frames=5),
    "lines.txt": lambda path: json_lines(),
    "array.json": lambda path: json.dumps([{"text": d} for d in DOCUMENTS], indent=1).encode(),
    "strings.json.gz": lambda path: gzip.compress(json.dumps(DOCUMENTS).encode(), mtime=0),
    "table.csv": lambda path: b"\xef\xbb\xbf" + separated(path, ","),
    "table.tsv": lambda path: separated(path, "\t"),
    "table.csv.zst": lambda path: zstd(separated(path, ";")),
    "table.parquet": parquet,
    "dictionary": lambda path: parquet(
        path, pa.array(DOCUMENTS).dictionary_encode(), compression="zstd"
    ),
    "large.parquet": lambda path: parquet(path, pa.array(DOCUMENTS, pa.large_string())),
    "file.arrow": lambda path: arrow(path, stream=False),
    "stream.arrow": lambda path: arrow(path, stream=True),
}


def write_sample(path, kind=None):
    path.write_bytes(SAMPLES[kind or path.name](path))
    return path


def write_modules(folder, count=30, characters=5_000):
    """Writes the beginnings of Python's own modules, as text files in two levels."""
    (folder / "below").mkdir(parents=True)
    for i, path in enumerate(sorted(Path(argparse.__file__).parent.glob("[a-d]*.py"))[:count]):
        text = path.read_text(encoding="utf-8")[:characters]
        (folder / ("below" if i % 3 else "") / path.name).write_text(text, encoding="utf-8")
    return folder


def encode_source(source, out, tokenizer="bytes", note=logging.info, **options):
    """Encodes a file or folder and returns the metadata; holds out 10 % by default."""
    options.setdefault("val_fraction", 0.1)
    files = list_files(str(source), exclude=out)
    return encode(files, out, EncodeOptions(tokenizer, **options), note=note)


def change_after_planning(monkeypatch, change):
    """Calls `change` when the input has been divided, as if another program changed a file."""

    def divide_and_change(*args):
        divided = divide_input(*args)
        change()
        return divided

    monkeypatch.setattr(pipeline, "divide_input", divide_and_change)


def documents_of(folder, split):
    """Returns the texts of a split that was encoded as bytes."""
    documents = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        tokens = np.fromfile(path, "<u2", offset=1024).astype(np.uint8).tobytes()
        assert tokens[:1] == b"\0"
        documents += [document.decode() for document in tokens[1:].split(b"\0")]
    return documents


def all_documents_of(folder):
    return sorted(documents_of(folder, "train") + documents_of(folder, "val"))


def llmc(tokens: ArrayLike, magic=20240520, version=1, count=None, dtype="<u2"):
    """Returns the bytes of an llm.c shard."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, np.size(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens).astype(dtype).tobytes()


def megatron_index(
    lengths, dtype_code=8, version=1, magic=b"MMIDIDX\x00\x00", width=2, documents=None
):
    """Returns the bytes of Megatron's index of sequences; each is a document by default."""
    pointers = (np.cumsum(lengths) - lengths) * width
    documents = np.arange(len(lengths) + 1) if documents is None else documents
    return (
        magic
        + struct.pack("<QBQQ", version, dtype_code, len(lengths), len(documents))
        + np.asarray(lengths, "<i4").tobytes()
        + np.asarray(pointers, "<i8").tobytes()
        + np.asarray(documents, "<i8").tobytes()
    )


def open_shards(folder, split="train", vocab_size=65_536, **options):
    cfg = DataConfig(shards=str(folder), **options)
    return open_corpus(cfg, split, vocab_size, workdir="unused")


def tokens_of(corpus):
    return np.concatenate([corpus.read(i, 0, s.tokens) for i, s in enumerate(corpus.shards)])


def contents(folder, pattern="*"):
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}

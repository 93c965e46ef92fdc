"""The same documents in every input format."""

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.data.encoding.input_files import list_files
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


def parquet(path, texts=None, **knobs) -> bytes:
    texts = DOCUMENTS if texts is None else texts
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, path, **{"row_group_size": 70} | knobs)
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


def write(path, kind=None):
    path.write_bytes(SAMPLES[kind or path.name](path))
    return path


def documents_of(folder, split):
    found = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        tokens = np.fromfile(path, "<u2", offset=1024).astype(np.uint8).tobytes()
        assert tokens[:1] == b"\0"
        found += [document.decode() for document in tokens[1:].split(b"\0")]
    return found


def run(source, out, **knobs):
    files = list_files(str(source), exclude=out)
    return encode(files, out, "bytes", **{"val_fraction": 0.1} | knobs)

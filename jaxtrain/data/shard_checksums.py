"""One pass over every shard: its largest and smallest token and a fingerprint, remembered.

Results are kept in `$XDG_CACHE_HOME/jaxtrain/shards` (default ~/.cache), one small file a shard,
valid while the shard's path, size and modification time stay as they were.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from jaxtrain.data.shards import Shard
from jaxtrain.files import write_atomic

CHUNK_TOKENS = 1 << 20  # 2 MB of uint16: hashed and compared while in the CPU's cache
CACHE_VERSION = 1


@dataclass(frozen=True)
class Scan:
    """Facts about a shard's tokens."""

    smallest: int
    largest: int
    odd_zero: bool  # every second token is 0: the look of uint32 read as uint16
    fingerprint: str  # SHA-256 of the tokens' bytes, first 32 hex digits


def scan_shards(shards: list[Shard]) -> list[Scan]:
    """Scans each shard, or recalls its scan; a bar shows when it takes over a second."""
    keys = [_key(shard) for shard in shards]  # before reading: a later change must not hide
    scans = [_recall(key) for key in keys]
    todo = [i for i, scan in enumerate(scans) if scan is None]
    if not todo:
        return scans
    total = sum(shards[i].tokens * np.dtype(shards[i].dtype).itemsize for i in todo)
    workers = min(len(todo), os.cpu_count() or 1, 8)  # hashing releases the interpreter lock
    with (
        tqdm(total=total, desc="scan shards", unit="B", unit_scale=True, delay=1) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for i, scan in zip(todo, pool.map(lambda i: _scan(shards[i], bar), todo), strict=True):
            scans[i] = scan
            _remember(keys[i], scan)
    return scans


def _scan(shard: Shard, bar=None) -> Scan:
    tokens, digest = shard.open(), hashlib.sha256()
    smallest, largest, odd_zero = np.inf, -np.inf, len(tokens) > 1
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS]
        digest.update(chunk)
        smallest, largest = min(smallest, int(chunk.min())), max(largest, int(chunk.max()))
        odd_zero = odd_zero and not chunk[1::2].any()  # CHUNK_TOKENS is even
        if bar is not None:
            bar.update(chunk.nbytes)
    return Scan(smallest, largest, bool(odd_zero), digest.hexdigest()[:32])


def _cache_file(key: dict) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(key["path"].encode()).hexdigest()[:32]
    return Path(root, "jaxtrain", "shards", f"{name}.json")


def _key(shard: Shard) -> dict:
    stat = os.stat(shard.path)
    known = {"version": CACHE_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return known | asdict(shard) | {"path": str(Path(shard.path).resolve())}


def _recall(key: dict) -> Scan | None:
    try:
        entry = json.loads(_cache_file(key).read_text())
        scan = Scan(**entry["scan"])
        types = [type(value) for value in asdict(scan).values()]
        return scan if entry["key"] == key and types == [int, int, bool, str] else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: scanned again
        return None


def _remember(key: dict, scan: Scan) -> None:
    path = _cache_file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"key": key, "scan": asdict(scan)}))
    except OSError as error:  # costs the next start a scan, nothing else
        logging.warning("shard scan not kept: %s. Set XDG_CACHE_HOME to a writable folder.", error)

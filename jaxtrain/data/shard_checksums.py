"""Computes each shard's fingerprint and its smallest and largest token, and caches them.

The cache is `$XDG_CACHE_HOME/jaxtrain/shards` (default ~/.cache), one small file per shard. An
entry is valid while the shard's path, size and modification time stay the same.
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
class ShardChecksum:
    """The range and the fingerprint of a shard's tokens, computed in one pass."""

    smallest: int
    largest: int
    odd_zero: bool  # every second token is 0, as when uint32 is read as uint16
    fingerprint: str  # SHA-256 of the tokens' bytes, first 32 hex digits


def checksum_shards(shards: list[Shard]) -> list[ShardChecksum]:
    """Returns each shard's checksum, cached or computed; shows a progress bar after a second."""
    # Keys are computed before reading: a file that changes later gets no valid entry.
    keys = [_cache_key(shard) for shard in shards]
    checksums = {i: cached for i, key in enumerate(keys) if (cached := _read_cache(key))}
    missing = [i for i in range(len(shards)) if i not in checksums]
    if missing:
        total = sum(shards[i].tokens * np.dtype(shards[i].dtype).itemsize for i in missing)
        threads = min(len(missing), os.cpu_count() or 1, 8)  # hashing releases the GIL
        with (
            tqdm(total=total, desc="scan shards", unit="B", unit_scale=True, delay=1) as bar,
            ThreadPoolExecutor(threads) as pool,
        ):
            computed = pool.map(lambda i: _compute(shards[i], bar), missing)
            for i, checksum in zip(missing, computed, strict=True):
                checksums[i] = checksum
                _write_cache(keys[i], checksum)
    return [checksums[i] for i in range(len(shards))]


def _compute(shard: Shard, bar: tqdm) -> ShardChecksum:
    tokens, digest = shard.open(), hashlib.sha256()
    smallest, largest = int(tokens[0]), int(tokens[0])
    odd_zero = len(tokens) > 1
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS]
        digest.update(chunk.data)
        smallest, largest = min(smallest, int(chunk.min())), max(largest, int(chunk.max()))
        odd_zero = odd_zero and not chunk[1::2].any()  # CHUNK_TOKENS is even
        bar.update(chunk.nbytes)
    return ShardChecksum(smallest, largest, bool(odd_zero), digest.hexdigest()[:32])


def _cache_file(key: dict) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(key["path"])).hexdigest()[:32]
    return Path(root, "jaxtrain", "shards", f"{name}.json")


def _cache_key(shard: Shard) -> dict:
    stat = os.stat(shard.path)
    key = {"version": CACHE_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return key | asdict(shard) | {"path": str(Path(shard.path).resolve())}


def _read_cache(key: dict) -> ShardChecksum | None:
    try:
        entry = json.loads(_cache_file(key).read_text())
        checksum = ShardChecksum(**entry["scan"])
        types = [type(value) for value in asdict(checksum).values()]
        return checksum if entry["key"] == key and types == [int, int, bool, str] else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: computed again
        return None


def _write_cache(key: dict, checksum: ShardChecksum) -> None:
    path = _cache_file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"key": key, "scan": asdict(checksum)}))
    except OSError as error:
        logging.warning(
            "The checksum of a shard could not be cached, so the next start reads the shard "
            "again: %s. Set XDG_CACHE_HOME to a writable folder.",
            error,
        )

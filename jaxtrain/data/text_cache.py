"""Encoded text on disk: its meta.json, and the tokens of data.text below a run's folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from absl import logging

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.journal import lock_folder
from jaxtrain.data.encoding.pipeline import META_FORMAT, SHARD_TOKENS, encode, encoding_key
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.data.vocabulary import check_vocabulary

META_KEYS = {
    "format": int,
    "source": str,
    "tokenizer": str,
    "vocab_size": int,
    "eot": int,
    "skipped": dict,
    "shards": list,
}
SHARD_KEYS = {"file": str, "split": str, "tokens": int, "text_bytes": int, "fingerprint": str}
FEW_BYTES = 32 << 20  # of text that one process encodes before others have started


def read_meta(folder: Path) -> dict | None:
    """Returns meta.json of `encode` in the folder, or None where there is none.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text())
    except ValueError:
        meta = None
    if not _is_meta(meta):
        raise ValueError(
            f"{path}: expected what `python -m jaxtrain.data.encode` writes; found something "
            "else. Move it away, or encode again."
        )
    if meta["format"] != META_FORMAT:
        raise ValueError(f"{path}: expected format {META_FORMAT}; found {meta['format']}.")
    if meta["tokenizer"] == "tokenizer.json":  # it moves with its folder
        meta["tokenizer"] = str(folder / "tokenizer.json")
    return meta


def _is_meta(meta) -> bool:
    return (
        _holds(meta, META_KEYS)
        and all(_holds(entry, SHARD_KEYS) for entry in meta["shards"])
        and all(type(count) is int for count in meta["skipped"].values())
    )


def _holds(found, types) -> bool:
    """Whether it is a dictionary with a value of the type under each key."""
    return isinstance(found, dict) and all(type(found.get(key)) is types[key] for key in types)


def encode_text(cfg: DataConfig, vocab_size: int, workdir: Path) -> tuple[Path, dict]:
    """Returns folder and meta.json of data.text in tokens, encoded now unless it is already."""
    files = list_files(cfg.text, exclude=workdir)
    options = cfg.val_fraction, SHARD_TOKENS, cfg.text_field, "text"
    key = encoding_key(files, cfg.tokenizer, *options)
    folder = workdir / "data" / key[:12]  # another text or tokenizer is another folder
    meta = _encoded(folder, key)
    check_vocabulary(cfg, build_tokenizer(cfg.tokenizer), vocab_size, meta is not None)
    if meta:
        return folder, meta
    with lock_folder(folder, wait=True) as locked:  # of several processes, one encodes
        if meta := _encoded(folder, key):
            return folder, meta
        logging.info("encoding %d files into %s", len(files), folder)
        text_bytes = sum(path.stat().st_size for path, _ in files)
        many = cfg.tokenizer != "bytes" and text_bytes > FEW_BYTES
        meta = encode(
            files,
            folder,
            cfg.tokenizer,
            "text",
            cfg.val_fraction,
            workers=(os.cpu_count() or 1) if many else 1,
            text_field=cfg.text_field,
            locked=locked,
        )
    for problem in meta["problems"]:
        logging.warning("skipped %s", problem)
    return folder, read_meta(folder)


def _encoded(folder, key) -> dict | None:
    try:
        meta = read_meta(folder)
    except ValueError as error:  # our own, below the run's folder: made again
        logging.warning("%s The text is encoded again.", error)
        return None
    return meta if meta and meta["source"] == key else None


def prepare_again(folder: Path, check: Callable[[], object]) -> bool:
    """Removes meta.json of a damaged encoding, so that the next call encodes the text again.

    Args:
        check: raises ValueError while the encoding is damaged; another process may have
            encoded the text again since.

    Returns:
        whether the folder can be written.
    """
    try:
        with lock_folder(folder, wait=True):
            try:
                check()
            except ValueError:
                (folder / "meta.json").unlink(missing_ok=True)
    except OSError:
        return False
    return True

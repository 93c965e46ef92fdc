"""Encodes data.text into token shards below the run's folder, once; later starts reuse them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from absl import logging

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.journal import lock_folder
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.pipeline import encode
from jaxtrain.data.metadata import META_FILE, read_metadata
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.data.vocabulary import check_vocabulary

SINGLE_PROCESS_BYTES = 32 << 20  # less text is encoded before other processes have started


def encode_text(cfg: DataConfig, vocab_size: int, workdir: Path) -> tuple[Path, dict]:
    """Returns the folder and the metadata of data.text's shards, which it encodes if necessary.

    Raises:
        ValueError: the text cannot be used, or the tokenizer does not fit model.V=vocab_size.
    """
    files = list_files(cfg.text, exclude=workdir)
    options = EncodeOptions(cfg.tokenizer, val_fraction=cfg.val_fraction, text_field=cfg.text_field)
    key = options.key(files)
    folder = workdir / "data" / key[:12]  # another text or tokenizer gets another folder
    metadata = _read_if_current(folder, key)
    check_vocabulary(cfg, build_tokenizer(cfg.tokenizer), vocab_size, metadata is not None)
    if metadata:
        return folder, metadata
    # Where several processes share the folder, the first encodes and the others wait here.
    with lock_folder(folder, wait=True) as locked:
        if metadata := _read_if_current(folder, key):
            return folder, metadata
        logging.info("encoding %d files into %s", len(files), folder)
        text_bytes = sum(path.stat().st_size for path, _ in files)
        parallel = cfg.tokenizer != "bytes" and text_bytes > SINGLE_PROCESS_BYTES
        workers = (os.cpu_count() or 1) if parallel else 1
        metadata = encode(files, folder, replace(options, workers=workers), locked)
    for problem in metadata["problems"]:
        logging.warning("skipped %s", problem)
    return folder, read_metadata(folder) or metadata


def _read_if_current(folder: Path, key: str) -> dict | None:
    try:
        metadata = read_metadata(folder)
    except ValueError as error:  # the folder belongs to the run and can be rewritten
        logging.warning("%s The text is encoded again.", error)
        return None
    return metadata if metadata and metadata["source"] == key else None


def discard_if_damaged(folder: Path, check: Callable[[], object]) -> bool:
    """Removes the metadata of damaged shards, so that encode_text encodes the text again.

    Args:
        check: raises ValueError while the shards are damaged. It is called under the folder's
            lock, because another process may have encoded the text again by then.

    Returns:
        whether the folder could be written.
    """
    try:
        with lock_folder(folder, wait=True):
            try:
                check()
            except ValueError:
                (folder / META_FILE).unlink(missing_ok=True)
    except OSError:
        return False
    return True

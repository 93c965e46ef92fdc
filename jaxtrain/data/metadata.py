"""Reads meta.json, which is stored with encoded shards and describes how they were made."""

import contextlib
import json
from pathlib import Path
from typing import Any

META_FILE = "meta.json"
META_FORMAT = 1
META_TYPES = {
    "format": int,
    "source": str,  # key of the input and the options
    "tokenizer": str,
    "vocab_size": int,
    "eot": int,
    "skipped": dict,
    "shards": list,
}
SHARD_TYPES = {"file": str, "split": str, "tokens": int, "text_bytes": int, "fingerprint": str}


def read_metadata(folder: Path) -> dict | None:
    """Returns the content of a folder's meta.json, or None if there is no such file.

    Raises:
        ValueError: the file is damaged or has another format.
    """
    path = folder / META_FILE
    if not path.is_file():
        return None
    metadata: Any = None
    with contextlib.suppress(ValueError):
        metadata = json.loads(path.read_text())
    if not _is_metadata(metadata):
        raise ValueError(
            f"{path}: expected what `python -m jaxtrain.data.encode` writes; found something "
            "else. Move it away, or encode again."
        )
    if metadata["format"] != META_FORMAT:
        raise ValueError(f"{path}: expected format {META_FORMAT}; found {metadata['format']}.")
    if metadata["tokenizer"] == "tokenizer.json":  # a copy in the same folder
        metadata["tokenizer"] = str(folder / "tokenizer.json")
    return metadata


def shard_entries(metadata_of: dict[Path, dict]) -> dict[Path, dict]:
    """Returns the entry of each shard by its path, from the metadata of each folder."""
    return {
        folder / entry["file"]: entry
        for folder, metadata in metadata_of.items()
        for entry in metadata["shards"]
    }


def _is_metadata(value: Any) -> bool:
    return (
        _has_types(value, META_TYPES)
        and all(_has_types(entry, SHARD_TYPES) for entry in value["shards"])
        and all(type(count) is int for count in value["skipped"].values())
    )


def _has_types(value: Any, types: dict[str, type]) -> bool:
    """Returns whether `value` is a dictionary whose values have the given types."""
    return isinstance(value, dict) and all(type(value.get(key)) is types[key] for key in types)

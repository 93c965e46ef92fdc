"""Finds the files of token shards: in a folder, in the folders below it, or by a glob.

The order of the files, and so of the batches, is that of their paths below the folder, compared
name by name and in each name by code points. Links are followed, to files and to folders.
"""

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from jaxtrain.data.encoding.formats import printable_path

SUFFIXES = (".bin", ".idx")
VAL_NAME = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", re.IGNORECASE)
NUMBERED_NAME = re.compile(r"_(train|val)_[0-9]{6}\.(bin|idx)$")  # of `encode` and llm.c
OTHER_NAME = re.compile(r"(^|[^a-z])(test|dev|eval(uation)?)([^a-z]|$)", re.IGNORECASE)
TRAIN_NAME = re.compile("train", re.IGNORECASE)


def split_of(name: str) -> str:
    """Returns the split that a file's name stands for: train, val, or other (such as test).

    Args:
        name: may be a path below the folder of the shards. A folder's name decides if the names
            after it name no split, as in `val/000.bin`.
    """
    if numbered := NUMBERED_NAME.search(name):  # "test_train_000000.bin" is train
        return numbered[1]
    for part in reversed(name.split("/")):
        if VAL_NAME.search(part):
            return "val"
        if TRAIN_NAME.search(part):
            return "train"
        if OTHER_NAME.search(part):
            return "other"
    return "train"


def find_shards(pattern: str, split: str) -> list[Path]:
    """Returns the shard files of a split (see split_of), in order (see list_shards).

    Raises:
        ValueError: there is none.
    """
    names = list_shards(pattern)
    chosen = [path for path, name in names.items() if split_of(name) == split]
    if not chosen:
        hint, fix = "not named with 'val', 'test', ...", "Set --data.shards."
        if split == "val":
            hint = "named with 'val'"
            fix = "Set --data.shards, or encode the text again with --val_fraction=0.01."
        raise ValueError(
            f"data.shards must contain a {split} shard, a file {hint}; got {pattern!r} with only "
            f"{', '.join(map(printable_path, [*names.values()][:4]))}. {fix}"
        )
    return chosen


def describe_unused(pattern: str) -> list[str]:
    """Returns notes on the shard files that belong to neither train nor val, or are not read."""
    unused = [name for name in list_shards(pattern).values() if split_of(name) == "other"]
    notes = []
    if unused:
        listed = ", ".join(map(printable_path, unused[:4]))
        notes.append(f"{len(unused)} file(s) left out by name: {listed}")
    folder = Path(pattern).expanduser()
    below = _matches(folder, "*/*") if os.path.isdir(folder) and _matches(folder, "*") else []
    if below:
        everything = printable_path(folder / "**" / "*.bin")
        notes.append(
            f"{len(below)} file(s) left out in folders below, such as "
            f"{printable_path(below[0].relative_to(folder))} (--data.shards={everything!r} reads "
            "all)"
        )
    return notes


def list_shards(pattern: str) -> dict[Path, str]:
    """Returns the shard files, each with its name: its path below the folder or the glob's folder.

    A folder stands for the .bin and .idx files in it or, if it has none, for those in the folders
    below it. If its numbered files have gaps, the missing files are listed too, so that probe()
    reports them. In a glob, `**` stands for any number of folders. A part of it such as `run[1]`,
    which does not match its own name, stands for the file or folder of that name if there is one.
    Files and folders whose names begin with a dot are left out.

    Raises:
        ValueError: there is none.
        OSError: the folder cannot be read.
    """
    path, hint = Path(pattern).expanduser(), ""
    folder, rest = (path, "") if os.path.isdir(path) else _existing_part(path)
    if rest:
        found = _matches(folder, rest)
        if not found and (other := next(_expand(folder, rest.split("/"), frozenset()), None)):
            hint = f"; it matches {printable_path(other)}, and {f'{pattern}/*.bin'!r} what is in it"
    elif os.path.isdir(path):
        os.listdir(path)  # raises OSError
        found = _matches(path, "*") or _matches(path, "**/*")
        found += _missing_files(found)
    else:
        found, folder = [_tokens_file(path)], path.parent
    if not found:
        raise ValueError(
            f"data.shards must name token shards (*.bin): a folder, a file or a glob; got "
            f"{pattern!r}, where there is none{hint}. Set --data.shards."
        )
    return {path: path.relative_to(folder).as_posix() for path in sorted(set(found))}


def are_shards(pattern: str) -> bool:
    """Returns whether a folder, file or glob names token shards; see list_shards."""
    try:
        return all(path.suffix in SUFFIXES for path in list_shards(pattern))
    except ValueError:
        return False


def _is_literal(path: Path) -> bool:
    """Returns whether a path exists that its last name, read as a glob, would not match."""
    is_glob = glob.has_magic(path.name) and fnmatch.fnmatchcase(path.name, path.name)
    return os.path.lexists(path) and not is_glob


def _existing_part(path: Path) -> tuple[Path, str]:
    """Returns the folder or file at the beginning of a path, and the rest, which may be a glob."""
    parts = [*reversed(path.parents), path]
    existing = [*itertools.takewhile(_is_literal, parts)][-1]
    return existing, "" if existing == path else path.relative_to(existing).as_posix()


def _tokens_file(path: Path) -> Path:
    return path.with_suffix(".bin") if path.suffix == ".idx" else path


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Returns the shard files below a folder that a glob matches, in order."""
    paths = _expand(folder, pattern.split("/"), frozenset([os.path.realpath(folder)]))
    return sorted({_tokens_file(path) for path in paths if path.suffix in SUFFIXES})


def _expand(folder: Path, parts: list[str], above: frozenset[str]) -> Iterator[Path]:
    """Yields what a glob matches below a folder.

    Unlike glob.glob, it does not enter a folder from inside itself through a link, which would
    list each file up to 40 times.

    Args:
        parts: of the glob, not empty.
        above: real paths of the folders that have been entered through `**`.
    """
    name, *rest = parts
    if name == "**":
        yield from _expand(folder, rest or ["*"], above)
        for child in _children(folder):
            real = os.path.realpath(child)
            if os.path.isdir(child) and real not in above:
                yield from _expand(child, parts, above | {real})
        return
    exact = folder / name
    if _is_literal(exact):
        children = [exact]
    else:
        children = [child for child in _children(folder) if fnmatch.fnmatchcase(child.name, name)]
    for child in children:
        if not rest:
            yield child
        elif os.path.isdir(child):
            yield from _expand(child, rest, above)


def _children(folder: Path) -> list[Path]:
    """Returns what is in a folder under names that do not begin with a dot, in order."""
    try:
        return sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except OSError as error:
        logging.warning("left out a folder that cannot be read: %s", error)
        return []


def _missing_files(paths: list[Path]) -> list[Path]:
    """Returns the gaps in series of files like NAME_000000.bin, NAME_000001.bin, ..."""
    series: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*[^0-9])([0-9]{5,6})", path.stem):
            series.setdefault((path.parent, match[1], len(match[2])), set()).add(int(match[2]))
    return [
        folder / f"{stem}{number:0{digits}d}.bin"
        for (folder, stem, digits), present in series.items()
        for number in range(min(present), max(present))
        if number not in present
    ]

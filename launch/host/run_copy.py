"""A job's run directory, given from where the operator's copy ends."""

import base64
import os
from pathlib import Path

WORKDIR = "--config.workdir"  # or --workdir: a config's fields are flags as they stand
LIMIT_BYTES = 4 << 20  # of one answer


def read_changes(folder: Path, have: dict, skip=(), limit: int = LIMIT_BYTES) -> dict:
    """What is new of the files that a summary reads.

    Args:
        have: file -> [inode, bytes] of the operator's copy. Another inode or a shorter file was
            replaced, and comes again from its first byte.
        skip: file -> inode of files that another host gives, should they be the very same here.

    Returns:
        {"files": {name: {"inode", "at", "base64"}}, "names": all there are, "more": bool}
    """
    whole = [folder / name for name in ("config.json", "summary.json", "metrics.jsonl")]
    paths = [path for path in (*whole, *sorted(folder.glob("hosts/*.jsonl"))) if path.exists()]
    found, more = {}, False
    for path in paths:
        name = str(path.relative_to(folder))
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            if dict(skip).get(name) == stat.st_ino:
                continue
            inode, at = have.get(name, (0, 0))
            if inode != stat.st_ino or at > stat.st_size:
                at = 0
            elif at == stat.st_size:
                continue
            file.seek(at)
            data = file.read(limit)
        limit -= len(data)
        more = more or at + len(data) < stat.st_size
        text = base64.b64encode(data).decode()
        found[name] = {"inode": stat.st_ino, "at": at, "base64": text}
    names = [str(path.relative_to(folder)) for path in paths]
    return {"files": found, "names": names, "more": more}


def run_directory(spec: dict) -> Path | None:
    """Where a job of this specification writes, on this host; None where its flags do not say."""
    named = flag(spec["argv"], WORKDIR)
    return Path(spec["cwd"], os.path.expanduser(named)).resolve() if named else None


def flag(argv, name: str) -> str:
    """The last value of a flag, `--name=value` or `--name value`; "" where it is absent.

    Args:
        name: with `config.` or without; the flag counts in both forms.
    """
    value, bare = "", name.lstrip("-").removeprefix("config.")
    for i, part in enumerate(argv):
        given, equals, text = part.partition("=")
        if given.startswith("-") and given.lstrip("-").removeprefix("config.") == bare:
            if equals:
                value = text
            elif i + 1 < len(argv):
                value = argv[i + 1]
    return value

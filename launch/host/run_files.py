"""Names the files of a run directory, finds them, and reads what is new in them."""

import base64
import os
import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from launch.host.log import TAIL_BYTES

CONFIG, SUMMARY, METRICS = "config.json", "summary.json", "metrics.jsonl"
ROUNDS = "sites.jsonl"  # of a run on several sites
CLOCK = "clock.json"  # only in a copy: {"lead_s": how far the clock that wrote it is ahead of ours}
PROCESSES = "hosts"  # folder of <process>.jsonl, one file per process
# The files that a host may send.
NAME = re.compile(rf"({PROCESSES}/)?[\w.-]{{1,100}}\.jsonl?", re.ASCII)
WORKDIR = "--config.workdir"  # or --workdir: the trainer takes its flags in both forms
ANSWER_BYTES = 4 << 20  # the largest answer


def process_files(folder: Path) -> list[Path]:
    """Returns the existing hosts/<process>.jsonl, sorted by name."""
    return sorted(folder.glob(f"{PROCESSES}/*.jsonl"))


def read_changes(
    folder: Path, have: Mapping, skip: Mapping, limit: int = ANSWER_BYTES
) -> dict[str, object]:
    """Reads what the operator's copy of a run directory lacks.

    Args:
        have: {file: [inode, bytes, tail]} of the copy, where `tail` is the one that was sent with
            those bytes. A file with another inode or tail, or one that is now shorter, was replaced
            and is sent again from its first byte. File systems reuse the inodes of replaced files.
        skip: {file: inode} of files that another host sends: the same inode means that this host
            sees the same file, through a shared file system.

    Returns:
        {"files": {name: {"inode", "at" (offset), "base64", "tail"}}, "names": all files,
        "more": whether the size limit left something out, "time": this host's clock}
    """
    paths = [folder / name for name in (CONFIG, SUMMARY, METRICS, ROUNDS)]
    paths = [path for path in (*paths, *process_files(folder)) if path.exists()]
    files, more = {}, False
    for path in paths:
        name = str(path.relative_to(folder))
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            if skip.get(name) == stat.st_ino:
                continue
            inode, offset, tail = have.get(name, (0, 0, 0))
            if inode != stat.st_ino or offset > stat.st_size or tail != _tail(file, offset):
                offset = 0
            elif offset == stat.st_size:
                continue
            file.seek(offset)
            data = file.read(limit)
            tail = _tail(file, offset + len(data))
        limit -= len(data)
        more = more or offset + len(data) < stat.st_size
        text = base64.b64encode(data).decode()
        files[name] = {"inode": stat.st_ino, "at": offset, "base64": text, "tail": tail}
    names = [str(path.relative_to(folder)) for path in paths]
    return {"files": files, "names": names, "more": more, "time": time.time()}


def _tail(file: BinaryIO, end: int) -> int:
    """Returns a checksum of a file's bytes before `end`: of the last ones, or of all of a .json.

    A .json is small, and is replaced as a whole; its last bytes may stay the same.
    """
    start = 0 if file.name.endswith(".json") else max(0, end - TAIL_BYTES)
    file.seek(start)
    return zlib.crc32(file.read(end - start))


def run_directory(spec: Mapping) -> Path | None:
    """Returns the directory that a job writes to on this host.

    It is the trainer's own answer or, for another program, that of the flags, or None.
    """
    if spec.get("run_directory"):
        return Path(spec["run_directory"])
    workdir = flag_value(spec["argv"], WORKDIR)
    return Path(spec["cwd"], os.path.expanduser(workdir)).resolve() if workdir else None


def flag_value(argv: list[str], name: str) -> str:
    """Returns the last value of a flag, given as `--name=value` or `--name value`; "" if absent.

    Args:
        name: the flag's name, with or without `config.`: both forms are found.
    """
    value, bare_name = "", name.lstrip("-").removeprefix("config.")
    for i, arg in enumerate(argv):
        flag, equals, text = arg.partition("=")
        if flag.startswith("-") and flag.lstrip("-").removeprefix("config.") == bare_name:
            if equals:
                value = text
            elif i + 1 < len(argv):
                value = argv[i + 1]
    return value

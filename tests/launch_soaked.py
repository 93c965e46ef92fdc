"""Runs the trainer beside a thread that prints, and that leaks what SOAK_LEAK names.

The printed lines make the log of every rank large enough to be rotated. The thread also stores how
much memory is in use, in the file MEMORY beside the heartbeat: the resident memory that others can
see also has pages that were freed and are not yet used again.
"""

import ctypes
import json
import os
import runpy
import sys
import tempfile
import threading
import time
from pathlib import Path

TICK_S, LINES, LINE_BYTES, LEAKED_BYTES = 0.25, 10, 100, 1 << 18  # of a tick
LEAKS = ("", "memory", "descriptors", "threads", "files")
MEMORY = "memory.json"


class _Malloc(ctypes.Structure):  # struct mallinfo2, from glibc's malloc.h
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def memory_in_use() -> dict[str, int]:
    """Returns the bytes that malloc has handed out and not got back, and Python's own blocks.

    A Python block has at most 512 bytes; larger objects are from malloc.
    """
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Malloc
    malloc = libc.mallinfo2()
    return {
        "malloc_bytes": malloc.uordblks + malloc.hblkhd,
        "python_blocks": sys.getallocatedblocks(),
    }


def print_and_leak(leak: str) -> None:
    kept, path = [], Path(os.environ["JAXTRAIN_BEAT"]).with_name(MEMORY)
    while True:
        time.sleep(TICK_S)
        path.with_suffix(".new").write_text(json.dumps(memory_in_use()))
        path.with_suffix(".new").rename(path)
        print("\n".join(LINES * ["x" * LINE_BYTES]))
        if leak == "memory":
            kept.append(b"x" * LEAKED_BYTES)
        elif leak == "descriptors":
            kept.append(os.dup(0))
        elif leak == "threads":
            threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
        elif leak == "files":  # in the job's folder, where the heartbeat is
            tempfile.mkstemp(dir=os.path.dirname(os.environ["JAXTRAIN_BEAT"]))


def main():
    leak = os.environ.get("SOAK_LEAK", "")
    if leak not in LEAKS:
        raise ValueError(f"SOAK_LEAK must be one of {LEAKS}; got {leak!r}.")
    threading.Thread(target=print_and_leak, args=(leak,), daemon=True).start()
    runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""A JAX pretraining stack for GPT-2 and Llama; the command `jaxtrain` lists its commands."""

import ctypes
import re
import sys
from pathlib import Path

from pallas_kernels.quiet import WANTS_GPU, has_gpu

__all__ = ["WANTS_GPU", "keep_freed_memory"]
MODULE = re.compile(r"-[bBdEiIOPqRsSuvx]*m(.*)")  # Python's -m, perhaps after other letters


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it; does nothing if there is a GPU.

    XLA on CPU frees and allocates its buffers in every step. Mapping them again cost 84,000 page
    faults a step: 0.25 s of 1.7 s at 3.5M parameters. This sets one arena, no mmap and no trim for
    the whole process, and must run before the first thread starts, so before numpy and jax are
    imported; later it has little effect. Other C libraries are left as they are.
    """
    if has_gpu():
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
        mallopt(option, value)


def _is_own_program() -> bool:
    """Returns whether this process is `jaxtrain ...` or `python -m jaxtrain...`."""
    if sys.argv[0] != "-m":  # which it is until Python has found the module
        return Path(sys.argv[0]).stem == "jaxtrain"
    words = [*sys.orig_argv[1:], ""]
    found = [(match[1], i) for i, word in enumerate(words) if (match := MODULE.fullmatch(word))]
    module = found[0][0] or words[found[0][1] + 1] if found else ""
    return module.split(".")[0] == "jaxtrain"


if _is_own_program():
    keep_freed_memory()

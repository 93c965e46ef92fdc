"""A JAX pretraining stack for GPT-2 and Llama; the command `jaxtrain` lists its commands."""

import ctypes

from pallas_kernels.quiet import WANTS_GPU, has_gpu

__all__ = ["WANTS_GPU"]


def _keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the system.

    XLA on CPU frees and allocates its buffers in every step. Mapping them again cost 84,000 page
    faults a step: 0.25 s of 1.7 s at 3.5M parameters. This sets one arena, no mmap and no trim, and
    must run before the first thread starts. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
        mallopt(option, value)


if not has_gpu():
    _keep_freed_memory()

"""JAX training stack for LLaMA-style transformers; `python -m jaxtrain.train --help` starts it."""

import ctypes
import glob
import importlib.util
import os
import sys
import tempfile

NO_GPU = (b"Could not find cuda drivers", b"before absl::InitializeLog()")  # what plugins print


def _load_without(noise, libraries) -> None:
    """Imports jax and loads the libraries; of what they write, lines that hold `noise` are dropped.

    Static constructors write it before any logging is set up: only the file descriptor sees it.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            import jax  # noqa: F401

            for library in libraries:  # JAX loads them when it looks for devices: then silently
                ctypes.CDLL(library)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            kept = [line for line in written if not any(text in line for text in noise)]
            os.write(2, b"".join(kept))


def _keep_freed_memory() -> None:
    """Tells glibc to reuse freed pages, which XLA on CPU otherwise maps anew in every step.

    84,000 page faults a step, 0.25 s of system time in 1.7 s at 3.5M parameters, become none. One
    arena, no mmap, no trim; must come before the first thread. Other C libraries stay as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
        mallopt(option, value)  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def _cuda_plugins() -> list[str]:
    """Libraries of JAX's CUDA plugins that are installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else ()
    return [path for folder in folders for path in glob.glob(f"{folder}/*/xla_cuda_plugin.so")]


_PLUGINS = _cuda_plugins()
# Whether a run on the processor is a fallback: it could have GPUs, and nobody said not to.
WANTS_GPU = bool(_PLUGINS) and not os.environ.get("JAX_PLATFORMS")

# CUDA plugins without a GPU (as the offline compilers need) log a failed cuInit, and every command
# would look broken. Device nodes are how NVIDIA's driver shows a GPU, /dev/dxg how WSL does.
if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _keep_freed_memory()
    if _PLUGINS and "jax" not in sys.modules:
        _load_without(NO_GPU, _PLUGINS)

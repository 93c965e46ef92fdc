"""Silences JAX's CUDA plugins when jax is imported on a machine without a GPU.

The plugins, which are needed to compile for GPUs without one, print warnings when jax is imported
and when it looks for devices, so that every command would seem broken.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.abc import Loader
from types import ModuleType
from typing import Any

NOISE = (b"Could not find cuda drivers", b"before absl::InitializeLog()")


def cuda_plugins() -> list[str]:
    """Returns the paths of the installed libraries of JAX's CUDA plugins."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = (plugins.submodule_search_locations if plugins else None) or ()
    return [path for folder in folders for path in glob.glob(f"{folder}/*/xla_cuda_plugin.so")]


def has_gpu() -> bool:
    """Returns whether a driver has made the device file of a GPU: NVIDIA's, or /dev/dxg in WSL."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Removes lines that contain a text of NOISE from the output to file descriptor 2.

    C++ static constructors write these lines directly to the descriptor, so replacing sys.stderr
    would not remove them.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # the descriptor is closed, so nothing can be written
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            lines = [line for line in written if not any(text in line for text in NOISE)]
            os.write(2, b"".join(lines))


def load(libraries: Iterable[str]) -> None:
    """Loads libraries as JAX does when it looks for devices.

    A library that fails to load is ignored here; JAX reports it.
    """
    for library in libraries:
        with contextlib.suppress(OSError):
            ctypes.CDLL(library)


class _QuietJax(Loader):
    """An import hook that imports jax, and then loads the plugins' libraries, without the noise.

    Importing jax right away would make the commands that do not need it start ten times slower.
    """

    def __init__(self, libraries: list[str]):
        self.libraries = libraries
        self.loader: Any = None  # jax's own

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "jax":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        with without_noise():
            self.loader.exec_module(module)
            load(self.libraries)
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)


def start_quietly() -> None:
    """If there is no GPU, sets JAX's platform to cpu and makes the import of jax quiet."""
    if has_gpu():
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax = sys.modules.get("jax")
    if jax is None:
        if PLUGINS and not any(isinstance(finder, _QuietJax) for finder in sys.meta_path):
            sys.meta_path.insert(0, _QuietJax(PLUGINS))
    elif hasattr(jax, "config") and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # too late for the variable
        with without_noise():
            load(PLUGINS)


PLUGINS = cuda_plugins()
# Whether the CPU is only a fallback: JAX's GPU support is installed, and no platform was chosen.
WANTS_GPU = bool(PLUGINS) and not os.environ.get("JAX_PLATFORMS")

"""Silences JAX's CUDA plugins when jax is imported on a machine without a GPU.

The plugins, which are installed to compile without a GPU, print warnings when jax is imported and
when it looks for devices. These would make every command look broken.
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


def plugin_folders() -> list[str]:
    """Returns the folders of JAX's installed plugins."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = (plugins.submodule_search_locations if plugins else None) or ()
    return [path for folder in folders for path in glob.glob(f"{folder}/[!_]*/")]


def cuda_plugins() -> list[str]:
    """Returns the paths of the installed libraries of JAX's CUDA plugins."""
    library = "xla_cuda_plugin.so"
    return [path for folder in plugin_folders() for path in glob.glob(f"{folder}{library}")]


def has_gpu() -> bool:
    """Returns whether the driver exposes a GPU: NVIDIA's device nodes, or /dev/dxg in WSL."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Removes the lines that contain a text of NOISE from the output to file descriptor 2.

    C++ static constructors write them directly to the descriptor, so replacing sys.stderr would not
    catch them.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # the descriptor is closed, so there is no output to filter
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
    """Loads libraries before JAX does, so that without_noise can filter what they print.

    A library that fails to load is ignored here; JAX reports it later.
    """
    for library in libraries:
        with contextlib.suppress(OSError):
            ctypes.CDLL(library)


class _QuietJax(Loader):
    """An import hook that imports jax and then the plugins' libraries, without the noise.

    Importing jax here instead would make commands that do not need it start ten times slower.
    """

    def __init__(self, libraries: list[str]):
        self.libraries = libraries
        self.loader: Any = None  # jax's own loader, which this one wraps

    def find_spec(self, name, path=None, target=None):
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


def has_other_backends() -> bool:
    """Returns whether JAX has a backend besides CUDA's and the CPU's, such as a TPU's."""
    names = [os.path.basename(os.path.dirname(folder)) for folder in plugin_folders()]
    others = [name for name in names if not name.startswith("xla_cuda")]
    return bool(others or importlib.util.find_spec("libtpu"))


def start_quietly() -> None:
    """Sets JAX's platform to cpu and silences the import of jax, if JAX can only use the CPU.

    Where JAX may use another device, such as a TPU, JAX chooses, as without this package.
    """
    if has_gpu() or has_other_backends():
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax = sys.modules.get("jax")
    if jax is None:
        if PLUGINS and not any(isinstance(finder, _QuietJax) for finder in sys.meta_path):
            sys.meta_path.insert(0, _QuietJax(PLUGINS))
    elif hasattr(jax, "config") and not jax.config.jax_platforms:
        # jax read the environment variable when it was imported, so setting that is too late.
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        with without_noise():
            load(PLUGINS)


PLUGINS = cuda_plugins()
# Whether running on CPU is a fallback: JAX's GPU support is installed and no platform is set.
WANTS_GPU = bool(PLUGINS) and not os.environ.get("JAX_PLATFORMS")

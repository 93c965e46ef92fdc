"""Lets Python start quietly where JAX's CUDA plugins are installed and there is no GPU.

Such plugins (the offline compilers need them) write to the terminal when jax is imported and log a
failed cuInit when it looks for devices, so that every command would look broken.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import sys
import tempfile

NOISE = (b"Could not find cuda drivers", b"before absl::InitializeLog()")


def cuda_plugins() -> list[str]:
    """Returns the libraries of JAX's CUDA plugins that are installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else ()
    return [path for folder in folders for path in glob.glob(f"{folder}/*/xla_cuda_plugin.so")]


def has_gpu() -> bool:
    """Whether a driver shows a GPU: by NVIDIA's device nodes, or /dev/dxg in WSL."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


@contextlib.contextmanager
def without_noise():
    """Drops the lines of NOISE from what is written to file descriptor 2.

    Static constructors write them before any logging is set up: only the descriptor sees them.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nothing can be written
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
            kept = [line for line in written if not any(text in line for text in NOISE)]
            os.write(2, b"".join(kept))


def load(libraries) -> None:
    """Loads libraries as JAX does when it looks for devices; JAX itself names a broken one."""
    for library in libraries:
        with contextlib.suppress(OSError):
            ctypes.CDLL(library)


class _QuietJax:
    """A finder and loader that imports jax as usual, and the plugins' libraries right after it.

    jax is not imported here and now: a command that does not need it starts in a tenth of the time.
    """

    def __init__(self, libraries):
        self.libraries, self.loader = libraries, None

    def find_spec(self, name, path=None, target=None):
        if name != "jax":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        with without_noise():
            self.loader.exec_module(module)
            load(self.libraries)
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)


def start_quietly() -> None:
    """Chooses the processor where there is no GPU, and imports jax quietly when it is imported."""
    if has_gpu():
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax = sys.modules.get("jax")
    if jax is None:
        if PLUGINS and not any(isinstance(finder, _QuietJax) for finder in sys.meta_path):
            sys.meta_path.insert(0, _QuietJax(PLUGINS))
    elif hasattr(jax, "config") and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # it read the variable
        with without_noise():
            load(PLUGINS)


PLUGINS = cuda_plugins()
# Whether a run on the processor is a fallback: it could have GPUs, and nobody said not to.
WANTS_GPU = bool(PLUGINS) and not os.environ.get("JAX_PLATFORMS")

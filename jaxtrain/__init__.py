"""JAX training stack for LLaMA-style transformers; `python -m jaxtrain.train --help` starts it."""

import glob
import os

# CUDA plugins without a GPU make `import jax` log a failed cuInit and every command look broken.
# Device nodes are how NVIDIA's driver shows a GPU, /dev/dxg how WSL does; the variable wins.
if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

"""Stage machine of suite first-day: the driver, versions, clocks and ceilings of the card.

    python -m jaxtrain.benchmarks.card --out=machine.json

Nothing is changed: nvidia-smi is only asked, and the clocks are those that it reports.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import jax

from jaxtrain.benchmarks.child import BenchJob
from jaxtrain.benchmarks.jax_child import describe_device
from jaxtrain.benchmarks.processor import date_and_commit
from jaxtrain.benchmarks.step_timing import gpu_clocks
from jaxtrain.doctor.gpu import find_gpus
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.ops.cudnn import cudnn_version
from pallas_kernels.arguments import Parser

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "triton")


def installed_versions() -> dict[str, str]:
    """Returns {package: version} of those packages that are installed."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return {name: installed[name] for name in PACKAGES if name in installed}


def describe_card(tiny: bool) -> dict[str, Any]:
    """Returns the row of this stage; clocks are read before and after the ceilings are measured."""
    clocks = gpu_clocks()
    row = describe_device(BenchJob("about", tiny=tiny))
    cudnn = cudnn_version() if jax.default_backend() == "gpu" else None
    return row | {
        "driver": find_gpus().driver or "none",
        "cudnn": cudnn,
        "versions": installed_versions(),
        "clocks": clocks,
        "clocks_after": gpu_clocks(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m jaxtrain.benchmarks.card", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="file for the row")
    parser.add_argument("--tiny", action="store_true", help="a trial on any processor")
    args = parser.parse_args(argv)
    row = describe_card(args.tiny) | date_and_commit() | ({"tiny": True} if args.tiny else {})
    write_atomic(args.out, strict_json(row, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The target of each contest of bench: the serial time of our kernels by the model of their loops.

In the serial time the units of a multiprocessor take turns (see loop_model.py), so a kernel that
overlaps something and loses little to latencies reaches it. `python -m pallas_kernels.find_targets`
writes targets.json; the head's contest has no target, because XLA computes two of its three
products.
"""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels.result_files import read_object

TARGETS = Path(__file__).parent / "targets.json"


class Target(NamedTuple):
    """The serial time of a contest by the model, and the body of our kernels that it is of."""

    body: str
    serial_s: float

    def describe(self, flops: float) -> str:
        """Returns the target as text, with the speed at it.

        Args:
            flops: of the contest.
        """
        return f"{1e6 * self.serial_s:.0f} us, {flops / self.serial_s / 1e12:.0f} TFLOP/s"


def read_targets(path: Path = TARGETS) -> dict[str, dict[str, Target]]:
    """Returns {chip: {contest: its target}}; without the file, an empty table."""
    if not path.exists():
        return {}
    return {
        chip: {name: Target(**target) for name, target in targets.items()}
        for chip, targets in read_object(path)["chips"].items()
    }

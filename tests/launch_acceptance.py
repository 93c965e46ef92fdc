"""Acceptance of the launcher: the real trainer on a test bed of three hosts, struck by faults.

    python tests/launch_acceptance.py                    every row, as root: two hours
    python tests/launch_acceptance.py kill flap --times=1
    python tests/launch_acceptance.py kill --far         the operator 150 ms away

Prints a JSON object per row, after a minute or two each. Exits nonzero if any check is false.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from launch.host.exit_codes import STOPPED

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bed as beds  # noqa: E402
import launch_distance  # noqa: E402
import launch_faults  # noqa: E402
import launch_storage  # noqa: E402
from launch_scene import Scene, passes  # noqa: E402

NEAR = launch_faults.ROWS | launch_storage.ROWS  # {name: function of (scene, repetition)}
FAR = launch_distance.ROWS  # they need a bed whose links have a delay
ONCE = {**launch_storage.ROWS, **launch_distance.ROWS}  # repetitions would not differ


def run_rows(names: list[str], times: int, far: bool) -> int:
    """Runs and prints the rows on one test bed; returns how many failed."""
    folder, failed = Path(tempfile.mkdtemp(prefix="jaxtrain-acceptance-")), 0
    shared = folder / "shared"
    shared.mkdir()
    with beds.Bed(3, shared, relayed=far) as bed:
        if far:
            launch_distance.set_operator_far(bed)
        scene = Scene(bed, folder, shared)
        for name in names:
            for i in range(1 if name in ONCE else times):
                start = time.monotonic()
                row = {"row": name} | (NEAR | FAR)[name](scene, i)
                row["took_s"] = round(time.monotonic() - start)
                failed += not passes(row)
                print(json.dumps(row), flush=True)
    print(f"{failed} failed; outputs: {folder}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join([*NEAR, *FAR]))
    parser.add_argument(
        "--times", type=int, default=3, help="repetitions of a fault, at different steps"
    )
    parser.add_argument("--far", action="store_true", help="the operator is 150 ms away")
    args = parser.parse_args()
    names = args.rows or [*NEAR, *FAR]
    if unknown := set(names) - {*NEAR, *FAR}:
        parser.error(f"no row {sorted(unknown)}")
    near = [name for name in names if name in NEAR and not args.far]
    far = [name for name in names if name in FAR or args.far]
    groups = [(group, is_far) for group, is_far in ((near, False), (far, True)) if group]
    return sum(run_rows(group, args.times, is_far) for group, is_far in groups) > 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    sys.exit(main())

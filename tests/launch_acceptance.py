"""The launcher's promises on a bed of three hosts, with the real trainer: a minute or two a row.

    python tests/launch_acceptance.py                    all of it, as root: two hours
    python tests/launch_acceptance.py kill flap --times=1
    python tests/launch_acceptance.py kill --far         the operator 150 ms away

Prints a JSON object a row; exits nonzero unless every yes-or-no of every row is yes.
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
from launch_scene import Scene, holds  # noqa: E402

NEAR = launch_faults.ROWS | launch_storage.ROWS  # name: a function of (scene, which time)
FAR = launch_distance.ROWS  # need a bed whose links have a length
ONCE = {**launch_storage.ROWS, **launch_distance.ROWS}  # say the same each time


def show(names, times, far) -> int:
    """Prints the rows, on one bed; returns how many failed."""
    folder, failed = Path(tempfile.mkdtemp(prefix="jaxtrain-acceptance-")), 0
    shared = folder / "shared"
    shared.mkdir()
    with beds.Bed(3, shared, relayed=far) as bed:
        if far:
            launch_distance.place(bed)
        scene = Scene(bed, folder, shared)
        for name in names:
            for i in range(1 if name in ONCE else times):
                start = time.monotonic()
                row = {"row": name} | (NEAR | FAR)[name](scene, i)
                row["took_s"] = round(time.monotonic() - start)
                failed += not holds(row)
                print(json.dumps(row), flush=True)
    print(f"{failed} failed; outputs: {folder}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join([*NEAR, *FAR]))
    parser.add_argument("--times", type=int, default=3, help="of a fault, at different steps")
    parser.add_argument("--far", action="store_true", help="the operator is 150 ms away")
    args = parser.parse_args()
    names = args.rows or [*NEAR, *FAR]
    if unknown := set(names) - {*NEAR, *FAR}:
        parser.error(f"no row {sorted(unknown)}")
    near = [name for name in names if name in NEAR and not args.far]
    far = [name for name in names if name in FAR or args.far]
    groups = [(group, is_far) for group, is_far in ((near, False), (far, True)) if group]
    return sum(show(group, args.times, is_far) for group, is_far in groups) > 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    sys.exit(main())

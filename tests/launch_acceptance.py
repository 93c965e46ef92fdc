"""Checks the launcher with the real trainer and injected faults, on a test bed of three hosts.

    python tests/launch_acceptance.py                        all cases: two hours
    python tests/launch_acceptance.py kill flap --times=1    two cases, once each
    python tests/launch_acceptance.py kill --far             with the operator 150 ms away

Needs root. Prints a JSON object per case, which takes one or two minutes; the boolean values are
checks. Exits nonzero if any check is false.
"""

import json
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from launch.host.exit_codes import STOPPED

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bed as beds  # noqa: E402
import launch_differences  # noqa: E402
import launch_distance  # noqa: E402
import launch_faults  # noqa: E402
import launch_pairs  # noqa: E402
import launch_storage  # noqa: E402
from launch_scene import Scene, passes  # noqa: E402
from small_disk import small_disk  # noqa: E402

from launch.arguments import Parser  # noqa: E402

# {name: function of (scene, repetition)}
NEAR = launch_faults.CASES | launch_pairs.CASES | launch_differences.CASES | launch_storage.CASES
FAR = launch_distance.CASES  # they need a bed whose links have a delay
ONCE = {**launch_storage.CASES, **launch_distance.CASES}  # repetitions would not differ
SHARED_MB = 256


def run_cases(names: list[str], repetitions: range, far: bool, references: str) -> int:
    """Runs the cases on one test bed and prints their results; returns how many failed."""
    folder, failed = Path(tempfile.mkdtemp(prefix="jaxtrain-acceptance-")), 0
    disk = small_disk(folder / "shared", SHARED_MB)
    with disk as disk, beds.Bed(3, disk.path, relayed=far) as bed:
        if far:
            launch_distance.set_operator_far(bed)
        scene = Scene(bed, folder, disk, Path(references) if references else None)
        for name in names:
            for i in repetitions[:1] if name in ONCE else repetitions:
                start = time.monotonic()
                result = {"case": name, "repetition": i}
                try:
                    result |= (NEAR | FAR)[name](scene, i)
                except Exception as error:  # the other cases still run
                    result |= {"ran": False, "error": f"{type(error).__name__}: {error}"[-2000:]}
                result["took_s"] = round(time.monotonic() - start)
                failed += not passes(result)
                print(json.dumps(result), flush=True)
    print(f"{failed} failed; the launchers' output is in {folder}", flush=True)
    return failed


def main() -> int:
    listed = textwrap.fill(" ".join([*NEAR, *FAR]), 96, break_on_hyphens=False)
    parser = Parser("python tests/launch_acceptance.py", f"{__doc__}\nCases:\n{listed}")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="the cases to run; default: all")
    parser.add_argument(
        "--times", type=int, choices=(1, 2, 3), default=3, help="repetitions of a fault"
    )
    parser.add_argument(
        "--first", type=int, choices=(0, 1, 2), default=0, help="the first repetition, from 0"
    )
    parser.add_argument(
        "--references", default="", metavar="FILE", help="keeps undisturbed runs of the same code"
    )
    parser.add_argument(
        "--far", action="store_true", help="the operator is 150 ms away in all cases"
    )
    args = parser.parse_args()
    names = args.cases or [*NEAR, *FAR]
    if unknown := set(names) - {*NEAR, *FAR}:
        parser.error(f"CASE must be one of those above; got {sorted(unknown)}")
    near = [name for name in names if name in NEAR and not args.far]
    far = [name for name in names if name in FAR or args.far]
    groups = [(group, is_far) for group, is_far in ((near, False), (far, True)) if group]
    repetitions = range(args.first, min(3, args.first + args.times))
    run = lambda group, is_far: run_cases(group, repetitions, is_far, args.references)
    return sum(run(group, is_far) for group, is_far in groups) > 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    sys.exit(main())

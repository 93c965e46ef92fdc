"""Measures and breaks real jobs at two sites of a test bed that are 150 ms apart.

    python tests/sites_acceptance.py                           everything: about two hours
    python tests/sites_acceptance.py --only=table --rates=100  one row of the table
    python tests/sites_acceptance.py --only=cut_5 --times=1    one fault, once

`table` compares the seconds of a run with those of the same run without an exchange, counts bytes,
and prints `jaxtrain plan`'s model beside the measurement. `computing` is the share of the time in
which training did not wait for the exchange; other work of the machine hardly changes it. A fault
strikes a run at three places; the run must end with the bits of one without a fault, except in
`left_out...`, where the first site goes on. Needs root. Prints a JSON object for each case; exits
nonzero if a check is false.
"""

import argparse
import functools
import json
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bed as beds  # noqa: E402
import sites_faults  # noqa: E402
from launch_scene import passes  # noqa: E402
from sites_bed import HOSTS, ONE_WAY_MS, SITES, SitesScene  # noqa: E402

from jaxtrain.planning.sites_model import (  # noqa: E402
    Schedule,
    blocked_s,
    nominal_link,
    visible_s,
    waiting_share,
)
from launch.host.exit_codes import STOPPED  # noqa: E402

PERIOD, STEPS = 30, 150
FIRST, LAST = PERIOD, STEPS - PERIOD  # steps between which the seconds are taken
TABLE = {"steps": STEPS, "save_every": STEPS, "data__seq_len": 128, "data__batch": 8}
MOST_WIRE = 1.1  # bytes on the wire over payload


def seconds(scene: SitesScene, name: str) -> float:
    """Returns the seconds from FIRST to LAST at the slower site."""
    found = [scene.times(name, site) for site in SITES]
    return max(times[LAST] - times[FIRST] for times in found)


def measure_run(scene: SitesScene, name: str, **values) -> float:
    launched = scene.launch(name, **TABLE | values)
    if launched.wait(sites_faults.LIMIT_S):
        raise AssertionError(launched.output()[-3000:])
    return seconds(scene, name)


def measure_rate(scene: SitesScene, rate: int, alone_s: float) -> dict:
    """Measures a run that waits for its exchanges, and one that hides them, at one rate.

    Args:
        alone_s: seconds without an exchange.
    """
    scene.set_link(rate)
    step_s = alone_s / (LAST - FIRST)
    row: dict = {"case": "table", "mbit": rate, "step_s": round(step_s, 4)}
    link = nominal_link(rate, 2 * ONE_WAY_MS)
    for mode, delay in (("blocking", 0), ("hidden", PERIOD - 1)):
        name, before = f"table{rate}-{mode}", scene.sent_bytes()
        spent_s = measure_run(scene, name, sites__period=PERIOD, sites__delay=delay)
        lines = scene.ledger(name, "new_york")
        payload = sum(line.payload_bytes[0] for line in lines)
        schedule = Schedule(PERIOD, delay, [1.0])
        code = payload / len(lines)
        predicted_s = blocked_s(code, schedule, link)
        if delay:
            predicted_s = visible_s(code, schedule, link, step_s)
        rounds = [line for line in lines if FIRST < line.applied_step <= LAST]
        waited_s = sum(line.waited_s for line in rounds)
        row[mode] = {
            "utilisation": round(alone_s / spent_s, 3),
            "computing": round(1 - waited_s / spent_s, 3),
            "planned": round(waiting_share([step_s], [PERIOD], predicted_s)[0], 3),
            "exchange_s": round(sum(line.seconds for line in rounds) / len(rounds), 2),
            "planned_exchange_s": round(blocked_s(code, schedule, link), 2),
            "code_mb": round(code / 1e6, 3),
            # What the link carried, from the launcher's check of it to the last acknowledgement.
            # The ledger's wire bytes lack what followed the last round's completion.
            "wire/payload": round((scene.sent_bytes() - before) / payload, 3),
        }
        row[f"wire of {mode} at most {MOST_WIRE}"] = row[mode]["wire/payload"] <= MOST_WIRE
    return row


def run_cases(scene: SitesScene, names: list[str], rates: list[int], times: int) -> int:
    """Runs cases and prints their results; returns how many failed."""
    failed = 0

    @functools.cache
    def reference(repetition: int) -> list:
        """Returns the bits of a run without a fault."""
        scene.set_link(sites_faults.MBIT)
        run = f"reference-{repetition}"
        launched = scene.launch(run, **sites_faults.RUN | sites_faults.HOW[repetition])
        assert launched.wait(sites_faults.LIMIT_S) == 0, launched.output()[-3000:]
        return sites_faults.bits_of(scene, run)

    @functools.cache
    def alone_s() -> float:
        """Returns the seconds of a run whose only exchange is after LAST."""
        return measure_run(scene, "table-alone", sites__period=STEPS)

    for name in names:
        repetitions = rates if name == "table" else range(times)
        for i in repetitions:
            start = time.monotonic()
            try:
                if name == "table":
                    result = measure_rate(scene, i, alone_s())
                else:
                    scene.set_link(sites_faults.MBIT)
                    result = {"case": name, "repetition": i}
                    result |= sites_faults.CASES[name](scene, reference, i)
            except Exception as error:
                result = {"case": name, "repetition": i, "ran": False, "error": str(error)[-2000:]}
            result["took_s"] = round(time.monotonic() - start)
            failed += not passes(result)
            print(json.dumps(result), flush=True)
    return failed


def main() -> int:
    cases = ["table", *sites_faults.CASES]
    listed = textwrap.fill(" ".join(cases), 96, break_on_hyphens=False)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nCases:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=cases, help="a case; default: all")
    parser.add_argument("--times", type=int, choices=(1, 2, 3), default=3, help="of each fault")
    parser.add_argument("--rates", type=int, nargs="+", default=[20, 100, 1000], help="in Mbit/s")
    args = parser.parse_args()
    if reason := beds.available(relayed=True):
        parser.error(reason)
    folder = Path(tempfile.mkdtemp(prefix="jaxtrain-sites-"))
    shared = folder / "shared"
    shared.mkdir()
    with beds.Bed(HOSTS, shared, relayed=True) as bed:
        scene = SitesScene(bed, folder, shared)
        failed = run_cases(scene, args.only or cases, args.rates, args.times)
    print(f"{failed} failed; the launchers' output is in {folder}", flush=True)
    return failed > 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    sys.exit(main())

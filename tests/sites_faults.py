"""Cases of tests/sites_acceptance.py: faults that strike a job at two sites."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from launch_faults import signal_supervisor
from sites_bed import LAYOUTS

PERIOD, STEPS = 10, 60
AT_ROUND = (1, 2, 4)  # applied when the fault strikes, by repetition
RUN = {"steps": STEPS, "save_every": PERIOD, "sites__period": PERIOD}
# What the sites exchange, by repetition. With int4 the error feedback must survive a fault, and
# with a delay the rounds that are under way; without grace they are used at fixed steps.
HOW = (
    {"sites__codec": "float32"},
    {"sites__codec": "int4"},
    {"sites__codec": "int4", "sites__delay": 5, "sites__grace": 0},
)
MBIT = 20.0
INSIDE = 60_000  # bytes of a code of 1.97 MB in float32 and 0.26 MB in int4
LOST_S = 20.0  # for the case that goes on without a site; both sites must start within it
LIMIT_S = 420


def wait_inside_a_fragment(scene, launched):
    """Waits until a part of a code is on its way."""
    start = scene.sent_bytes()
    scene.wait_for(launched, lambda: scene.sent_bytes() > start + INSIDE)


def cut(seconds, scene, launched, repetition):
    del repetition
    wait_inside_a_fragment(scene, launched)
    scene.cut()
    time.sleep(seconds)
    scene.heal()


def kill_rank(scene, launched, repetition):
    del launched
    scene.kill_trainer(("h1", "h0", "h1")[repetition])


def kill_supervisor(scene, launched, repetition):
    del launched
    signal_supervisor(scene, ("h1", "h0", "h1")[repetition])


def kill_site(scene, launched, repetition):
    """Switches all of a site off, and on again."""
    del launched
    host = ("h1", "h0", "h1")[repetition]
    scene.bed.kill(host)
    time.sleep(10)
    scene.bed.boot(host)
    scene.set_link(MBIT)


def kill_at(moments, scene, launched, repetition):
    """Kills a rank at a moment that tests/sites_faulty.py knows."""
    host = ("h1", "h0", "h1")[repetition]
    moment = moments[repetition % len(moments)]
    scene.bed.run(host, "bash", "-c", f"echo {moment} > /tmp/fault")
    hit = lambda: not scene.bed.run(host, "bash", "-c", "ls /tmp/fault 2>/dev/null || true")
    scene.wait_for(launched, hit)


def stay_away(scene, launched, repetition):
    """Keeps a site away for about as long as three rounds take, while the other waits."""
    del launched, repetition
    scene.cut()
    scene.kill_trainer("h1")
    time.sleep(25)
    scene.heal()


BITWISE = {
    "cut_5": partial(cut, 5),
    "cut_60": partial(cut, 60),
    "rank": kill_rank,
    "supervisor": kill_supervisor,
    "site": kill_site,
    "away": stay_away,
    "outer": partial(kill_at, ("outer", "recorded")),
    "save": partial(kill_at, ("save",)),
}


def run_with_fault(name, scene, reference, repetition) -> dict:
    """Strikes a run; returns whether it ended with the bits of one without a fault."""
    run, lost = f"{name}-{repetition}", scene.lost_packets()
    launched = scene.launch(run, **RUN | HOW[repetition])
    applied = lambda: len(scene.ledger(run, "new_york")) >= AT_ROUND[repetition]
    scene.wait_for(launched, applied)
    with ThreadPoolExecutor(1) as thread:
        striking = thread.submit(BITWISE[name], scene, launched, repetition)
        status = launched.wait(LIMIT_S)
        striking.result()
    output = launched.output()
    if name.startswith("cut"):
        struck = scene.lost_packets() > lost
    else:
        struck = bool(re.search("launch: (restart|attempt 2)", output))
    return {
        "struck": struck,
        "exit 0": status == 0,
        "same bits": status == 0 and bits_of(scene, run) == reference(repetition),
        "nothing said of another history": "differs from the one before" not in output,
    }


def bits_of(scene, run) -> list:
    return [scene.bits(run, site) for site in ("new_york", "asuncion")]


def resume_both(scene, reference, repetition) -> dict:
    """Kills both sites at once, and resumes them with one command."""
    run = f"both-{repetition}"
    launched = scene.launch(run, **RUN | HOW[repetition])
    applied = lambda: len(scene.ledger(run, "new_york")) >= AT_ROUND[repetition]
    scene.wait_for(launched, applied)
    job = scene.job(launched)
    stopped = scene.run(f"{run}-stop", "stop", job, "--now").wait(LIMIT_S)
    launched.wait(LIMIT_S)
    resumed = scene.run(f"{run}-resume", "resume", job)
    status = resumed.wait(LIMIT_S)
    same = status == 0 and bits_of(scene, run) == reference(repetition)
    return {"stopped": stopped == 0, "exit 0": status == 0, "same bits": same}


def leave_out(layout, scene, reference, repetition) -> dict:
    """Keeps the second site away for three rounds, while the first one goes on; then it returns.

    Afterwards the first site's trainer is killed: it must decide the same again.
    """
    del reference
    run = f"left_out-{layout}-{repetition}"
    options = {"steps": 2 * STEPS, "sites__on_loss": "fewer", "sites__lost_s": LOST_S}
    launched = scene.launch(run, layout, **RUN | HOW[0] | options)
    ledger = lambda site="new_york": scene.ledger(run, site)
    scene.wait_for(launched, lambda: len(ledger()) >= 1)
    scene.cut(layout)
    alone = lambda: [line for line in ledger() if line.participants == ("new_york",)]
    scene.wait_for(launched, lambda: len(alone()) >= 3)
    scene.heal(layout)
    scene.wait_for(launched, lambda: len(ledger()[-1].participants) == 2 and alone())
    scene.kill_trainer("h0")
    status = launched.wait(LIMIT_S)
    weights = [scene.weights(run, site) for site in ("new_york", "asuncion")]
    said = launched.output()
    return {
        "rounds without it": len(alone()),
        "exit 0": status == 0,
        "three rounds without it": len(alone()) >= 3,
        "same weights at both sites": weights[0] == weights[1],
        "both took part at the end": len(ledger()[-1].participants) == 2,
        "said that it goes on": "training goes on without it" in said,
        "said that it is back": "is back: it gets the weights" in said,
        "same history": "differs from the one before" not in said,
    }


CASES = {name: partial(run_with_fault, name) for name in BITWISE}
CASES |= {"both": resume_both}
CASES |= {f"left_out_{layout}": partial(leave_out, layout) for layout in LAYOUTS}

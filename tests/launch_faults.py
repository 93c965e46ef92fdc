"""Cases of tests/launch_acceptance.py: faults that strike a job, and how it must end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from launch_scene import ROOT, TRAINER

import runs
from launch.host.exit_codes import INTERRUPTED, PREEMPTED, REFUSED, STOPPED

AT_STEPS = (12, 25, 41)
RUNNING_S = 0.005  # of each 25 ms, a rank that is made slow
STATUS_AGE_S = 4.0  # what `status` shows may be so old
GONE_S = 40.0  # the lease of 30 s plus the time to stop


def cut_for(seconds):
    def strike(scene):
        scene.bed.cut("h2")
        time.sleep(seconds)
        scene.bed.heal("h2")

    return strike


def signal_supervisor(scene, host, number="KILL"):
    """Sends a signal to the worker that runs the job; its keeper lives on."""
    jobs = "/root/jaxtrain/jobs"
    newest = scene.bed.run(host, "ls", "-t", jobs).split()[0]
    pid = json.loads(scene.bed.run(host, "cat", f"{jobs}/{newest}/status.json"))["pid"]
    scene.bed.run(host, "kill", f"-{number}", pid)


def power_loss(scene):
    scene.bed.kill("h2")
    time.sleep(20)
    scene.bed.boot("h2")


def cause_fault(scene, host, fault):
    """Makes a rank of a host cause a fault, see tests/launch_faulty.py."""
    scene.bed.run(host, "bash", "-c", f"echo {fault} > /tmp/fault")
    scene.signal(host, TRAINER, "USR2")


def use_up_memory(scene):
    """Gives a rank a memory limit, and makes it allocate more."""
    group = Path("/sys/fs/cgroup/memory") / f"jaxtrain-{os.getpid()}"
    group.mkdir(exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(str(256 << 20))
    [inside] = scene.pids("h1", TRAINER)
    (group / "cgroup.procs").write_text(str(scene.bed.outside("h1", inside)))
    cause_fault(scene, "h1", "memory")


# {name: (what strikes the job, root cause that must be reported, seconds until it is noticed)}
FAULTS = {
    "kill": (lambda s: s.signal("h1", TRAINER, "KILL"), r"h1 rank 1 .*SIGKILL", 3),
    "coordinator": (lambda s: s.signal("h0", TRAINER, "KILL"), r"h0 rank 0 .*SIGKILL", 3),
    "supervisor": (lambda s: signal_supervisor(s, "h1"), r"h1: its supervisor was killed", 3),
    "sigstop": (lambda s: s.signal("h2", TRAINER, "STOP"), r"h2 rank 2 .*state T", 30),
    "flap": (cut_for(5), None, 0),
    "partition": (cut_for(25), r"h2: unreachable", 30),
    "stuck": (lambda s: cause_fault(s, "h1", "block"), r"h1 rank 1 .*stuck", 30),
    "memory": (use_up_memory, r"h1 rank 1 .*out of memory", 3),
    "power": (power_loss, r"h2: unreachable", 60),
}


def run_with_fault(scene, run, at_step, strike, cause, limit_s, *options, **values) -> dict:
    """Strikes a run; returns the reported cause, and whether it ended like one without a fault.

    Args:
        run: the name of the run.
        at_step: the run has logged it when the fault strikes.
        strike: causes the fault, given the scene.
        cause: pattern of the root cause that must be reported; None if nothing may be reported.
        limit_s: seconds until the fault must be noticed.
        options: further options of launch.run; `values` are flags of the trainer.
    """
    reference = scene.reference()
    launched = scene.launch(run, *options, **values)
    scene.wait_for(launched, run, at_step)
    struck_at, noticed_s = time.time(), None
    with ThreadPoolExecutor(1) as thread:
        striking = thread.submit(strike, scene)
        while launched.process.poll() is None:
            if noticed_s is None and re.search("launch: (noticed|ROOT)", launched.output()):
                noticed_s = round(time.time() - struck_at, 1)
            time.sleep(0.1)
        striking.result()
    output, code = launched.output(), launched.process.returncode
    named = re.findall(r"ROOT CAUSE (.*)", output)
    return {
        "at_step": at_step,
        "noticed_s": noticed_s,
        "named": named[:3],
        "exit 0": code == 0,
        "as expected": bool(re.search(rf"ROOT CAUSE .*({cause})", output)) if cause else not named,
        "in time": cause is None or (noticed_s is not None and noticed_s <= limit_s),
        "same bits": code == 0 and scene.bits(run) == reference,
        "nothing left": not scene.left(),
    }


def run_refused(scene, name, code, cause, **values) -> dict:
    """Runs a job that must end with this status and root cause, without a restart."""
    launched = scene.launch(name, **values)
    status = launched.wait()
    return {
        f"exit {code}": status == code,
        "named": bool(re.search(rf"ROOT CAUSE .*{cause}", launched.output(), re.DOTALL)),
        "nothing left": not scene.left(),
    }


def full_disk(scene, repetition) -> dict:
    """Stores the checkpoints on a disk that is too small for them."""
    size = f"size={(600, 900, 1200)[repetition]}k"
    small = f"/root/small{repetition}"
    scene.bed.run("h0", "mkdir", "-p", small)
    scene.bed.run("h0", "mount", "-t", "tmpfs", "-o", size, "tmpfs", small)
    values = dict(workdir=f"{small}/run", checkpoint__storage="host0")
    return run_refused(scene, f"full-disk-{repetition}", REFUSED, "No space left", **values)


def non_finite(scene, repetition) -> dict:
    """Makes the updates non-finite until the trainer gives up."""
    bad = (3, 5, 8)[repetition]
    values = dict(optim__learning_rate=1e308, optim__clip_norm=0.0, max_bad_steps=bad)
    return run_refused(
        scene, f"non-finite-{repetition}", REFUSED, "in a row may be skipped", **values
    )


def stopped(scene, repetition, phase) -> dict:
    """Stops a job while it sends code, compiles, trains or saves; no process may be left."""
    name = f"stop-{phase}-{repetition}"
    launched = scene.launch(name, steps=2000, save_every=1 if phase == "save" else 1000)
    if phase in ("train", "save"):
        scene.wait_for(launched, name, (5, 9, 14)[repetition])
    else:
        launched.wait_for_output({"ship": "preflight of", "compile": "launch: attempt 1"}[phase])
    launched.process.send_signal(signal.SIGINT)  # without a terminal, Ctrl-C is `stop`
    code = launched.wait()
    expected = {"compile": (STOPPED,), "ship": (STOPPED, INTERRUPTED, 1)}.get(phase, (PREEMPTED,))
    return {"code": code, "exit": code in expected, "nothing left": not scene.left()}


def operator_killed(scene, repetition) -> dict:
    """Kills an interactive job's operator; the job must end, as nobody renews its lease."""
    name = f"operator-{repetition}"
    launched = scene.launch(name, steps=5000)
    scene.wait_for(launched, name, (5, 9, 14)[repetition])
    launched.process.kill()
    launched.wait()
    killed = time.time()
    while scene.living() and time.time() - killed < 2 * GONE_S:
        time.sleep(0.5)
    gone_s = time.time() - killed
    return {"gone_s": round(gone_s), "gone": not scene.living() and gone_s < GONE_S}


def straggler(scene, repetition) -> dict:
    """Makes one of two ranks slow until it is named in the log and in `status`; then no longer.

    Each rank gets one core: on shared cores the noise would be too large to name a rank.
    """
    hosts, run = ("h0", "h1"), f"straggler-{repetition}"
    slow = hosts[(1, 0, 1)[repetition]]
    values = {"steps": 600, "save_every": 300, "measure.straggler_every": 5}
    values["measure.straggler_cost"] = 1.0  # or the timings would become rarer
    inventory = scene.bed.inventory(scene.folder / "two.toml", only=list(hosts))
    launched = scene.launch(run, hosts=inventory, **values)
    scene.wait_for(launched, run, 5)
    pid = 0
    for host, core in zip(hosts, sorted(os.sched_getaffinity(0)), strict=False):
        [inside] = scene.pids(host, TRAINER)
        scene.bed.run(host, "taskset", "-acp", core, inside)
        pid = scene.bed.outside(host, inside) if host == slow else pid
    scene.wait_for(launched, run, 150)
    named_early = re.findall("straggler: rank .*", launched.output())
    start, named = time.monotonic(), f"straggler: rank {slow[1]} on {slow}: a fixed"
    slow_down = partial(runs.slow_down, pid, running_s=RUNNING_S)
    slow_down(lambda: named in launched.output() or launched.process.poll() is not None)
    named_s = time.monotonic() - start
    slow_down(lambda: time.monotonic() > start + named_s + STATUS_AGE_S)
    status = scene.run(f"{run}-status", "status", launched.job)
    slow_down(lambda: status.process.poll() is not None)
    code, output = launched.wait(), launched.output()
    command = [sys.executable, "-m", "launch.summary", launched.job]
    summary = subprocess.run(command, env=scene.env, cwd=ROOT, capture_output=True, text=True)
    lines = re.findall("straggler: rank .*", output)
    return {
        "named_s": round(named_s, 1),
        "lines": lines[:3],
        "nobody before": not named_early,
        "nobody else": all(f" on {slow}: " in line for line in lines),
        "named": named in output,
        "ended": f"on {slow}: compute is like the other ranks' again" in output,
        "status": bool(re.search(f"(?m)^ *{slow} .*STRAGGLER in compute", status.output())),
        "summary": bool(re.search(f"stragglers.*{slow}", summary.stdout)),
        "exit 0": code == 0,
        "nothing left": not scene.left(),
    }


def strike_at_step(scene, repetition, name) -> dict:
    """Runs a row of FAULTS."""
    at_step = AT_STEPS[repetition]
    return run_with_fault(scene, f"{name}-{at_step}", at_step, *FAULTS[name])


CASES = {name: partial(strike_at_step, name=name) for name in FAULTS}
CASES |= {"full_disk": full_disk, "non_finite": non_finite}
CASES |= {"operator": operator_killed, "straggler": straggler}
CASES |= {f"stop-{p}": partial(stopped, phase=p) for p in ("ship", "compile", "train", "save")}

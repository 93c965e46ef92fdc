"""Cases of tests/launch_acceptance.py: two faults at once, or one at a moment that matters."""

import re
import signal
import time

from launch_faults import (
    AT_STEPS,
    cause_fault,
    cut_for,
    run_with_fault,
    signal_supervisor,
)
from launch_scene import TRAINER

from launch.host.exit_codes import PREEMPTED, REFUSED

CODE = "/root/jaxtrain/code"
SLOW_MBIT, FAST_MBIT = 4, 10_000


def resumed_like_undisturbed(scene, run, job) -> dict:
    """Resumes a job that has ended; returns whether it then ends like one without a fault."""
    resumed = scene.run(f"{run}-resumed", "resume", job)
    code = resumed.wait()
    return {
        "resumed": code == 0,
        "same bits": code == 0 and scene.bits(run) == scene.reference(),
        "nothing left": not scene.left(),
    }


def supervisor_and_rank(scene, repetition) -> dict:
    """Kills a supervisor and, within a second, a rank: on another host, the first, or the same."""
    one, other = (("h1", "h2"), ("h0", "h1"), ("h2", "h2"))[repetition]

    def strike(scene):
        signal_supervisor(scene, one)
        time.sleep(0.5)
        scene.signal(other, TRAINER, "KILL")

    cause = rf"{one}: its supervisor was killed|{other} rank \d .*SIGKILL"
    return run_with_fault(
        scene, f"supervisor-rank-{repetition}", AT_STEPS[repetition], strike, cause, 3
    )


def partition_while_restoring(scene, repetition) -> dict:
    """Kills a rank, and cuts h2's link for 25 s while h2 restores the checkpoint."""
    scene.bed.run("h2", "bash", "-c", "echo restore > /tmp/fault")

    def strike(scene):
        scene.signal("h1", TRAINER, "KILL")
        scene.newest.wait_for_output("launch: attempt 2")
        before = scene.newest.output().count("faulty: restoring")
        while scene.newest.output().count("faulty: restoring") == before:
            time.sleep(0.1)
        scene.bed.run("h2", "rm", "/tmp/fault")
        cut_for(25)(scene)

    run = f"partition-restore-{repetition}"
    return run_with_fault(scene, run, AT_STEPS[repetition], strike, "h2: unreachable", 3)


def full_disk_then_room(scene, repetition) -> dict:
    """Fills the shared disk; once there is room again, `resume` must finish.

    At first nothing more can be written. Then only a checkpoint is too large, so a save fails.
    """
    run = f"full-then-room-{repetition}"
    launched = scene.launch(run)
    scene.wait_for(launched, run, AT_STEPS[repetition])
    scene.disk.fill(leave=(0, 100_000, 300_000)[repetition])
    try:
        code = launched.wait()
    finally:
        scene.disk.free()
    output = launched.output()
    return {
        "named": re.findall("ROOT CAUSE (.*)", output)[:2],
        f"exit {REFUSED}": code == REFUSED,
        "as expected": bool(re.search("ROOT CAUSE .*No space left", output, re.DOTALL)),
        "nothing left at first": not scene.left(),
    } | resumed_like_undisturbed(scene, run, launched.job)


def reboot(scene, repetition) -> dict:
    """Reboots a host: its processes end, their connections are closed, and it is back in 20 s."""
    host = ("h1", "h0", "h2")[repetition]
    strike = lambda scene: scene.bed.reboot(host, 20.0)
    # What the others notice first depends on which connection they use first.
    cause = rf"{host}: (unreachable|its supervisor ended)"
    return run_with_fault(scene, f"reboot-{host}", AT_STEPS[repetition], strike, cause, 60)


def cut_while_sending(scene, repetition) -> dict:
    """Cuts a host off while it receives the code; it must be named, and the next start work."""
    run = f"cut-sending-{repetition}"
    reference = scene.reference()
    scene.bed.run("h2", "rm", "-rf", CODE)
    scene.bed.rate("h2", SLOW_MBIT)
    launched = scene.launch(run)
    launched.wait_for_output("launch: sending")
    time.sleep((0.2, 1.0, 2.0)[repetition])
    was_sending = "code is on every host" not in launched.output()
    scene.bed.cut("h2")
    start = time.monotonic()
    code = launched.wait()
    ended_s, output = time.monotonic() - start, launched.output()
    scene.bed.heal("h2")
    scene.bed.rate("h2", FAST_MBIT)
    result = {
        "ended_s": round(ended_s),
        "was sending": was_sending,
        "exit 1": code == 1,
        "h2 named": bool(
            re.search("error: h2: .*(connection broke|cannot be reached|no answer)", output)
        ),
        "said": output.splitlines()[-1][:200],
        "nothing left at first": not scene.left(90.0),
    }
    again = scene.launch(f"{run}-again", workdir=f"/mnt/shared/{run}")
    return result | {
        "exit 0 again": again.wait() == 0,
        "same bits": scene.bits(run) == reference,
        "nothing left": not scene.left(),
        "no draft left": scene.bed.run("h2", "ls", "-A", CODE).count("\n") == 1,
    }


def stopped_coordinator(scene, repetition) -> dict:
    """Stops the coordinator's rank by SIGSTOP for ever; then the first host's supervisor as well.

    If the supervisor's keeper is stopped as well, that host's ranks end too, but nothing there goes
    on: the operator sees it in `status`, and ends the job by `stop --now`.
    """
    both = repetition == 2

    def strike(scene):
        scene.signal("h0", TRAINER, "STOP")
        if both:
            signal_supervisor(scene, "h0", "STOP")

    cause = "h0: its supervisor was stopped by a signal" if both else "h0 rank 0 .*state T"
    run = f"stopped-coordinator-{repetition}"
    return run_with_fault(scene, run, AT_STEPS[repetition], strike, cause, 30)


def nan_on_one_host(scene, repetition) -> dict:
    """Makes one host's copy of the weights not finite: it must be named, and `resume` must finish.

    No step changes the weights afterwards and no checkpoint takes them, so the run can go on from
    its last checkpoint.
    """
    host, run = ("h1", "h2", "h0")[repetition], f"nan-{repetition}"
    launched = scene.launch(run)
    scene.wait_for(launched, run, AT_STEPS[repetition])
    cause_fault(scene, host, "nan")
    code, output = launched.wait(), launched.output()
    cause = rf"ROOT CAUSE {host} rank {host[1]} .*(\n.*){{1,3}}process {host[1]}: its .*not finite"
    return {
        "named": re.findall("ROOT CAUSE (.*)", output)[:2],
        f"exit {REFUSED}": code == REFUSED,
        "as expected": bool(re.search(cause, output)),
        "nothing left at first": not scene.left(),
    } | resumed_like_undisturbed(scene, run, launched.job)


def two_operators(scene, repetition) -> dict:
    """One operator detaches while another one stops the job: it must stop, after a save."""
    run = f"two-operators-{repetition}"
    first = scene.launch(run, terminal=True)
    scene.wait_for(first, run, AT_STEPS[repetition])
    first.process.send_signal(signal.SIGINT)
    first.wait_for_output("[d]etach")
    pause_s = (0.0, -0.5, 0.5)[repetition]  # how much later the job is stopped
    if pause_s < 0:
        second = scene.run(f"{run}-stop", "stop", first.job)
        time.sleep(-pause_s)
        first.type("d\n")
    else:
        first.type("d\n")
        time.sleep(pause_s)
        second = scene.run(f"{run}-stop", "stop", first.job)
    stopped, detached = second.wait(), first.wait()
    ended = scene.run(f"{run}-ended", "attach", first.job)
    return {
        "stopped": stopped == 0,
        "detached, or followed to its end": detached in (0, PREEMPTED),
        "detach": detached,
        f"exit {PREEMPTED}": ended.wait() == PREEMPTED,
        "nothing left at first": not scene.left(),
    } | resumed_like_undisturbed(scene, run, first.job)


def full_temporary_folder(scene, repetition) -> dict:
    """Fills /tmp of a host before the start, or before a rank there is killed."""
    host = ("h1", "h1", "h0")[repetition]

    def fill():
        scene.bed.run(host, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/tmp")
        scene.bed.run(host, "bash", "-c", "cat /dev/zero > /tmp/filler || true")

    def strike(scene):
        if repetition == 1:
            fill()
        scene.signal(host, TRAINER, "KILL")

    scene.copy_text("/root/text.txt")
    if repetition != 1:
        fill()
    try:
        cause = rf"{host} rank {host[1]} .*SIGKILL"
        run, at_step = f"full-tmp-{repetition}", AT_STEPS[repetition]
        values = {"compile_cache": "/root/xla", "data.text": "/root/text.txt"}
        return run_with_fault(scene, run, at_step, strike, cause, 3, **values)
    finally:
        scene.bed.run(host, "umount", "-l", "/tmp")


CASES = {
    "supervisor-rank": supervisor_and_rank,
    "partition-restore": partition_while_restoring,
    "full-then-room": full_disk_then_room,
    "reboot": reboot,
    "cut-sending": cut_while_sending,
    "stopped-coordinator": stopped_coordinator,
    "nan": nan_on_one_host,
    "two-operators": two_operators,
    "full-tmp": full_temporary_folder,
}

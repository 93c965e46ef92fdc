"""The launcher's promises on a bed of three hosts, with the real trainer: 2 minutes a fault.

    python tests/launch_acceptance.py                    all of it, as root: about an hour
    python tests/launch_acceptance.py kill flap --times=1

Each fault strikes a run of 60 steps, and the run must end with the named root cause and with the
bits of a run that nothing struck. Prints a row a fault; exits nonzero unless every one held.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bed as beds  # noqa: E402
import runs  # noqa: E402

from jaxtrain.scalars import read_metrics  # noqa: E402

TRAINER = "-m tests.launch_faulty"
SUPERVISOR = "launch.host.ops"


class Scene:
    """A bed with a text, and runs on it."""

    def __init__(self, bed, folder, shared):
        self.bed, self.folder, self.shared = bed, folder, shared
        self.text = runs.write_text(folder)
        self.hosts = bed.inventory(folder / "hosts.toml")

    def flags(self, name, **values):
        steps = dict(steps=60, save_every=10, sample__tokens=0, data__batch=6, mesh__replica=-1)
        exact = dict(mesh__fsdp=1, model__dtype="float64", optim__ns_dtype="float32")
        values = steps | exact | dict(compile_cache="/tmp/xla", data__text=self.text) | values
        flags = ["--config=configs/debug.py", f"--config.workdir=/mnt/shared/{name}"]
        return flags + [f"--config.{n.replace('__', '.')}={v}" for n, v in values.items()]

    def launch(self, name, *options, flags=(), **values):
        """A launcher on a new run."""
        env = os.environ | {"JAXTRAIN_JOBS": str(self.folder / "jobs"), "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-m", "launch.run", f"--hosts={self.hosts}"]
        argv += [f"--ssh_config={self.bed.ssh_config}", "--backoff_s=1"]
        argv += ["--module=tests.launch_faulty", *options, "--"]
        self.out = open(self.folder / f"{name}.out", "wb")
        self.process = subprocess.Popen(
            argv + self.flags(name, **values) + list(flags),
            cwd=ROOT,
            env=env,
            stdout=self.out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        return self.process

    def said(self, name) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def wait_for(self, name, step, limit_s=240):
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            path = self.shared / name / "metrics.jsonl"
            records = read_metrics(path) if path.exists() else []
            if records and records[-1]["step"] >= step:
                return time.time()
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached:\n{self.said(name)[-2000:]}")

    def pids(self, host, what) -> list[int]:
        return [p for p, line in self.bed.processes(host).items() if what in line]

    def signal(self, host, what, number):
        for pid in self.pids(host, what):
            self.bed.run(host, "kill", f"-{number}", pid)

    def bits(self, name) -> list:
        """What the last checkpoint's record says of every leaf: dtype, shape, digest."""
        steps = sorted(int(p.name) for p in (self.shared / name / "checkpoints").iterdir())
        record = self.shared / name / "checkpoints" / str(steps[-1]) / "record" / "metadata"
        return [steps[-1], json.loads(record.read_text())["leaves"]]

    def left(self) -> dict:
        found = {h: self.pids(h, TRAINER) + self.pids(h, SUPERVISOR) for h in self.bed.names}
        return {host: pids for host, pids in found.items() if pids}


def cut_for(seconds):
    def strike(scene):
        scene.bed.cut("h2")
        time.sleep(seconds)
        scene.bed.heal("h2")

    return strike


def kill_supervisor(scene):
    """The worker that runs the job, whose pid its status names; its keeper lives."""
    jobs = "/root/jaxtrain/jobs"
    newest = scene.bed.run("h1", "ls", "-t", jobs).split()[0]
    pid = json.loads(scene.bed.run("h1", "cat", f"{jobs}/{newest}/status.json"))["pid"]
    scene.bed.run("h1", "kill", "-KILL", pid)


def power_loss(scene):
    scene.bed.kill("h2")
    time.sleep(20)
    scene.bed.boot("h2")


def stick(scene):
    """The rank lives, its heartbeats go on, and it does nothing."""
    scene.bed.run("h1", "bash", "-c", "echo sleep > /tmp/fault")
    scene.signal("h1", TRAINER, "USR2")


def use_up_memory(scene):
    """A limit of its own for the rank, which then asks for more."""
    group = Path("/sys/fs/cgroup/memory") / f"jaxtrain-{os.getpid()}"
    group.mkdir(exist_ok=True)
    scene.bed.run("h1", "bash", "-c", "echo memory > /tmp/fault")
    (group / "memory.limit_in_bytes").write_text(str(256 << 20))
    [inside] = scene.pids("h1", TRAINER)
    (group / "cgroup.procs").write_text(str(scene.bed.outside("h1", inside)))
    scene.signal("h1", TRAINER, "USR2")


# name: (what strikes, root cause that must be named, seconds until it is noticed)
FAULTS = {
    "kill": (lambda s: s.signal("h1", TRAINER, "KILL"), r"h1 rank 1 .*SIGKILL", 3),
    "coordinator": (lambda s: s.signal("h0", TRAINER, "KILL"), r"h0 rank 0 .*SIGKILL", 3),
    "supervisor": (kill_supervisor, r"h1: its supervisor was killed", 3),
    "sigstop": (lambda s: s.signal("h2", TRAINER, "STOP"), r"h2 rank 2 .*state T", 30),
    "flap": (cut_for(5), None, 0),
    "partition": (cut_for(25), r"h2: unreachable", 30),
    "stuck": (stick, r"h1 rank 1 .*stuck", 30),
    "memory": (use_up_memory, r"h1 rank 1 .*out of memory", 3),
    "power": (power_loss, r"h2: unreachable", 60),
}


def strike(scene, name, at_step, reference):
    """One row: what was named, how soon, and whether the end is the reference's."""
    what, cause, limit_s = FAULTS[name]
    run = f"{name}-{at_step}"
    process = scene.launch(run)
    scene.wait_for(run, at_step)
    struck = time.time()
    noticed = None
    striking = threading.Thread(target=what, args=(scene,))
    striking.start()
    while process.poll() is None:
        if noticed is None and "launch: noticed" in scene.said(run):
            noticed = time.time() - struck
        time.sleep(0.1)
    striking.join()
    said = scene.said(run)
    named = re.findall(r"ROOT CAUSE (.*)", said)
    held = {
        "exit 0": process.returncode == 0,
        "named": bool(re.search(rf"ROOT CAUSE .*{cause}", said)) if cause else not named,
        "in time": cause is None or (noticed is not None and noticed <= limit_s),
        "same bits": process.returncode == 0 and scene.bits(run) == reference,
        "nothing left": not scene.left(),
    }
    return {"noticed_s": noticed and round(noticed, 1), "named": named[:2]} | held


def check(scene, name, code, cause, *options, flags=(), **values) -> dict:
    """A run that must end with this status and root cause, without a restart."""
    process = scene.launch(name, *options, flags=flags, **values)
    process.wait()
    said = scene.said(name)
    held = {
        f"exit {code}": process.returncode == code,
        "named": bool(re.search(rf"ROOT CAUSE .*{cause}", said, re.DOTALL)),
        "nothing left": not scene.left(),
    }
    return {"fault": name} | held


def full_disk(scene) -> dict:
    scene.bed.run("h0", "mkdir", "-p", "/root/small")
    scene.bed.run("h0", "mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", "/root/small")
    flags = ["--config.workdir=/root/small/run", "--config.checkpoint.storage=host0"]
    return check(scene, "full disk", 78, "No space left", flags=flags)


def non_finite(scene) -> dict:
    values = dict(optim__learning_rate=1e308, optim__clip_norm=0.0, max_bad_steps=3)
    return check(scene, "non-finite", 78, "may be skipped", **values)


def stopped(scene, phase) -> dict:
    """`stop` while it ships, compiles, trains or saves: nothing is left on any host."""
    name = f"stop-{phase}"
    process = scene.launch(name, steps=2000, save_every=1 if phase == "save" else 1000)
    if phase in ("train", "save"):
        scene.wait_for(name, 5)
    else:
        waited = {"ship": "preflight of", "compile": "launch: attempt 1"}[phase]
        while waited not in scene.said(name):
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # no terminal to ask: Ctrl-C is stop
    code = process.wait()
    expected = {"train": (75,), "save": (75,), "compile": (143,), "ship": (143, 130, 1)}[phase]
    return {"fault": name, "code": code, "exit": code in expected, "nothing left": not scene.left()}


def operator_killed(scene) -> dict:
    """An interactive job is gone soon after its operator, for want of a lease."""
    process = scene.launch("operator", steps=5000)
    scene.wait_for("operator", 5)
    process.kill()
    process.wait()
    killed = time.time()
    while scene.left() and time.time() - killed < 120:
        time.sleep(0.5)
    return {
        "fault": "operator killed",
        "gone_s": round(time.time() - killed),
        "gone": not scene.left(),
    }


WHOLE_RUNS = {
    "full_disk": full_disk,
    "non_finite": non_finite,
    "operator": operator_killed,
} | {f"stop-{p}": partial(stopped, phase=p) for p in ("ship", "compile", "train", "save")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "faults", nargs="*", metavar="FAULT", help=", ".join([*FAULTS, *WHOLE_RUNS])
    )
    parser.add_argument("--times", type=int, default=3, help="times each, at different steps")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxtrain-acceptance-"))
    shared = folder / "shared"
    shared.mkdir()
    with beds.Bed(3, shared) as bed:
        scene = Scene(bed, folder, shared)
        process = scene.launch("whole")
        assert process.wait() == 0, scene.said("whole")
        reference, failed = scene.bits("whole"), 0
        print(json.dumps({"fault": "none", "nothing left": not scene.left()}), flush=True)
        for name in args.faults or [*FAULTS, *WHOLE_RUNS]:
            if name in WHOLE_RUNS:
                row = WHOLE_RUNS[name](scene)
                failed += not all(value for value in row.values() if isinstance(value, bool))
                print(json.dumps(row), flush=True)
                continue
            for at_step in (12, 25, 41)[: args.times]:
                row = {"fault": name, "at_step": at_step}
                row |= strike(scene, name, at_step, reference)
                failed += not all(value for value in row.values() if isinstance(value, bool))
                print(json.dumps(row), flush=True)
    print(f"{failed} failed; logs: {folder}")
    return failed > 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())

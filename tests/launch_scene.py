"""Starts real training runs on a test bed, for tests/launch_acceptance.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import git_trees
import xla_flags

import runs
from jaxtrain.metrics.jsonl import read_metrics

ROOT = Path(__file__).parent.parent
TRAINER = "-m tests.launch_faulty"
SUPERVISOR = "b64decode"  # in the command line of every request and supervisor, see SshClient
WATCHER = "def wait_for_silence"  # launch/host/watch.py runs as `python -c SOURCE`
LEFT_S = 10.0  # time for the last processes to end, after the launcher has
# In double precision, so that two runs can be compared to the last bit.
FLAGS = {
    "steps": 60,
    "save_every": 10,
    "sample.tokens": 0,
    "data.batch": 6,
    "mesh.replica": -1,
    "mesh.fsdp": 1,
    "model.dtype": "float64",
    "optim.ns_dtype": "float32",
    "compile_cache": "/tmp/xla",
}


class Launched:
    """A running launch.run with a terminal as its input, whose output goes to a file.

    Without `terminal`, it has no input, as in a script.
    """

    def __init__(self, argv, out: Path, env, terminal=False):
        self.out = out
        self._keys, stdin = os.openpty() if terminal else (-1, os.open(os.devnull, os.O_RDONLY))
        with open(out, "wb") as file, open(stdin, "rb") as stdin:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=env, stdout=file, stderr=file, stdin=stdin
            )

    def type(self, keys: str):
        """Types at the terminal."""
        os.write(self._keys, keys.encode())

    def output(self) -> str:
        return self.out.read_text(errors="replace")

    def wait(self, limit_s=600) -> int:
        return self.process.wait(limit_s)

    def wait_for_output(self, text, limit_s=120):
        deadline = time.monotonic() + limit_s
        while text not in self.output():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()
            time.sleep(0.05)

    @property
    def job(self) -> str:
        return git_trees.job_id(self.output())


class Scene:
    """Starts named runs on a bed. Their folders are in the hosts' /mnt/shared, here `shared`.

    Args:
        disk: the SmallDisk that is shared.
        references: a JSON file that keeps the results of undisturbed runs, or None.

    Attributes:
        newest: the launcher that was started last.
    """

    def __init__(self, bed, folder, disk, references=None):
        self.bed, self.folder, self.disk, self.shared = bed, folder, disk, disk.path
        self.text = runs.write_text(folder)
        self.hosts = bed.inventory(folder / "hosts.toml")
        self.env = os.environ | {"JAXTRAIN_JOBS": str(folder / "jobs"), "PYTHONPATH": str(ROOT)}
        self.env["XLA_FLAGS"] = xla_flags.QUICK  # most of a short run is compilation
        self.env["XDG_RUNTIME_DIR"] = str(bed.folder)
        self._stored = references
        known = references.read_text() if references and references.exists() else "{}"
        self._references: dict = json.loads(known)
        self.newest: Launched | None = None

    def flags(self, name, **values) -> list[str]:
        """Returns flags of the trainer; `__` in a name stands for a dot."""
        values = FLAGS | {key.replace("__", "."): value for key, value in values.items()}
        values = {"workdir": f"/mnt/shared/{name}", "data.text": self.text} | values
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        return ["--config=configs/debug.py", *flags]

    def run(self, name, *argv, terminal=False, **env) -> Launched:
        """Starts launch.run with these arguments and the output file NAME.out."""
        argv = [sys.executable, "-m", "launch.run", *map(str, argv)]
        self.newest = Launched(argv, self.folder / f"{name}.out", self.env | env, terminal)
        return self.newest

    def launch(self, name, *options, hosts=None, terminal=False, **values) -> Launched:
        """Starts launch.run for a new training run."""
        common = [f"--hosts={hosts or self.hosts}", f"--ssh_config={self.bed.ssh_config}"]
        common += ["--backoff_s=1", "--module=tests.launch_faulty", "--env=XLA_FLAGS"]
        argv = [*common, *options, "--", *self.flags(name, **values)]
        return self.run(name, *argv, terminal=terminal)

    def reference(self, **values) -> list:
        """Returns bits() of a run with these values and without a fault, which is started once."""
        key = "reference-" + "-".join(f"{name}{value}" for name, value in sorted(values.items()))
        if key not in self._references:
            launched = self.launch(key, **values)
            assert launched.wait() == 0, launched.output()
            assert not self.left(), self.left()
            self._references[key] = self.bits(key)
            if self._stored:
                self._stored.write_text(json.dumps(self._references))
        return self._references[key]

    def copy_text(self, path, times=1):
        """Writes the text, repeated, to a file on every host, outside of /tmp."""
        copies = f"for i in $(seq {times}); do cat {self.text}; done > {path}"
        for host in self.bed.names:
            self.bed.run(host, "bash", "-c", copies)

    def wait_for(self, launched, name, step, limit_s=240):
        """Waits until the run has logged the step."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            path = self.shared / name / "metrics.jsonl"
            records = read_metrics(path) if path.exists() else []
            if records and records[-1]["step"] >= step:
                return
            if launched.process.poll():
                break
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached:\n{launched.output()[-2000:]}")

    def pids(self, host, part) -> list[int]:
        """Returns the processes on a host whose command line contains `part`."""
        return [p for p, line in self.bed.processes(host).items() if part in line]

    def signal(self, host, part, number):
        for pid in self.pids(host, part):
            self.bed.run(host, "kill", f"-{number}", pid)

    def bits(self, name) -> list:
        """Returns the last checkpoint's step and its record of every leaf: dtype, shape, digest."""
        steps = sorted(int(p.name) for p in (self.shared / name / "checkpoints").iterdir())
        record = self.shared / name / "checkpoints" / str(steps[-1]) / "record" / "metadata"
        return [steps[-1], json.loads(record.read_text())["leaves"]]

    def living(self) -> dict:
        """Returns {host: pids} of the trainers, supervisors, watchers and requests that run."""
        parts = (TRAINER, "-m jaxtrain.train", SUPERVISOR, WATCHER)
        pids_on = {h: [p for part in parts for p in self.pids(h, part)] for h in self.bed.names}
        return {host: pids for host, pids in pids_on.items() if pids}

    def left(self, limit_s=LEFT_S) -> dict:
        """Returns living() once it is empty, or after limit_s."""
        deadline = time.monotonic() + limit_s
        while (living := self.living()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return living

    def same_logs(self, job) -> bool:
        """Returns whether each log copied here equals, byte for byte, what the host wrote."""
        for host in self.bed.names:
            command = self.bed.inside(host, "bash", "-c", f"cat /root/jaxtrain/jobs/{job}/log/*")
            written = subprocess.run(command, check=True, capture_output=True).stdout
            if (self.folder / "jobs" / job / f"{host}.log").read_bytes() != written:
                return False
        return True


def passes(result: dict) -> bool:
    """Returns whether every check (boolean value) of a result is true."""
    return all(value for value in result.values() if isinstance(value, bool))

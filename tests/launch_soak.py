"""Soaks the launcher and the trainer: a long job on a test bed of two hosts that must not grow.

    python tests/launch_soak.py                              20,000 steps: 15 to 60 minutes
    python tests/launch_soak.py --steps=3000 --leak=memory   a rank leaks, so this must fail

The job saves and evaluates every 500 steps, its logs are rotated, and one rank is killed after a
third of the steps, so that all restart. Meanwhile these are sampled:

- of every process (keepers, supervisors, watchers, ranks, those that serve the operator's requests
  on a host, and the operator's `attach`): memory (RSS, anonymous, PSS), descriptors and threads
- of the job's folders and the run directory: files and bytes
- the time of `status` and of the page

tests/soak_trends.py defines what counts as growth. Prints one JSON object, of which `problems` must
be empty. Needs root.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bed as beds  # noqa: E402
import soak_trends  # noqa: E402
from launch_scene import Scene  # noqa: E402
from launch_soaked import LEAKS, MEMORY  # noqa: E402
from small_disk import small_disk  # noqa: E402

from launch.arguments import Parser, positive  # noqa: E402
from launch.host import log  # noqa: E402
from launch.host.files import read_json  # noqa: E402
from launch.host.log import SEGMENTS  # noqa: E402
from launch.job import Job  # noqa: E402
from launch.operate import connect, statuses  # noqa: E402
from launch.pull import RunCopy  # noqa: E402
from launch.report.page import page  # noqa: E402
from launch.report.run_folder import NoRun, read_run  # noqa: E402
from launch.ssh import HostError  # noqa: E402

T = TypeVar("T")
STEPS, EVERY = 20_000, 500
SAMPLE_S, OPERATOR_S = 3.0, 20.0  # between samples; between timings of the operator's commands
LOG_MIB, DISK_MIB = 2, 512
# For `status`, and for the processor time of the page. The lowest tenth of the timings must be
# below it: other programs on the machine make the others longer.
LIMIT_S, TRIES = 1.0, 3
# What is known to grow in a rank, see "Soak" in docs/several_hosts.md: Python's blocks, by some at
# each save, and resident memory that was freed, by 5,128 KiB at some of the timings for stragglers.
SAVE_BLOCKS, FREED_BYTES = 600, 3 * (5128 << 10)
RUN_BYTES_PER_STEP = 4096  # metrics are written for ever, but not more of them for each step
MODULE = "tests.launch_soaked"
ROLES = [f"h{i} {role}" for i in (0, 1) for role in ("keeper", "supervisor", "rank", "request")]
ROLES += ["h0 watcher", "h1 watcher", "operator's attach", "operator"]
ONE_THREAD = ("XLA_FLAGS=--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS=1")


def measure_process(pid: int) -> dict[str, float] | None:
    """Returns a process's memory, descriptors and threads; None if it has ended. See proc(5)."""
    folder = Path("/proc") / str(pid)
    try:
        memory = dict(line.split(":") for line in _lines(folder / "smaps_rollup")[1:])
        threads = next(x for x in _lines(folder / "status") if x.startswith("Threads:"))
        return {
            "rss_bytes": int(memory["Rss"].split()[0]) * 1024,
            "pss_bytes": int(memory["Pss"].split()[0]) * 1024,
            "anonymous_bytes": int(memory["Anonymous"].split()[0]) * 1024,
            "descriptors": len(os.listdir(folder / "fd")),
            "threads": int(threads.split()[1]),
        }
    except (OSError, KeyError, StopIteration):
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def measure_folder(folder: Path) -> dict[str, int]:
    """Returns the number of files in a folder and its subfolders, and their bytes."""
    files = size = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                files, size = files + 1, size + path.stat().st_size
        except OSError:  # deleted meanwhile
            continue
    return {"files": files, "bytes": size}


def best_time(function: Callable[[], T]) -> tuple[float, T]:
    """Returns the seconds of the fastest of several calls, as others use the machine; a value."""
    tries = []
    for _ in range(TRIES):
        start = time.monotonic()
        value = function()
        tries.append((time.monotonic() - start, value))
    return min(tries, key=lambda pair: pair[0])


class Soak:
    """A job on two hosts, and the samples of it.

    Attributes:
        samples: {what was sampled: its samples}.
        problems: what is wrong, in words.
    """

    def __init__(self, scene: Scene, steps: int, leak: str):
        self.scene, self.steps, self.samples, self.problems = scene, steps, {}, []
        self._names: dict[int, str] = {}  # of the processes that were sampled
        self.killed_at = self.step = 0
        self._run = scene.shared / "soak"
        flags = scene.flags("soak", steps=steps, save_every=EVERY, eval_every=EVERY)
        flags += ["--config.model.dtype=float32", "--config.data.batch=8"]
        options = [f"--hosts={scene.hosts}", f"--ssh_config={scene.bed.ssh_config}"]
        options += ["--detach", f"--module={MODULE}", f"--log_mib={LOG_MIB}"]
        options += [f"--env={text}" for text in (*ONE_THREAD, f"SOAK_LEAK={leak}")]
        started = scene.run("start", *options, "--", *flags)
        assert started.wait() == 0, started.output()
        self.job = Job(started.job)
        self.operator = scene.run("attach", "attach", self.job.id)
        self._client, self._copy = connect(self.job), RunCopy(self.job.id)
        self.started_at = time.monotonic()

    def folder_on(self, host: str) -> Path:
        """Returns the job's folder on a host, as this process can read it."""
        first = self.scene.bed.inside(host)[2]
        return Path(f"/proc/{first}/root/root/jaxtrain/jobs/{self.job.id}")

    def run(self) -> None:
        """Samples until the job has ended."""
        sampled_at = operated_at = 0.0
        while self.operator.process.poll() is None:
            now = time.monotonic()
            if now - sampled_at < SAMPLE_S:
                time.sleep(0.1)
                continue
            sampled_at = now
            self._sample(now)
            if now - operated_at > OPERATOR_S:
                operated_at = now
                self._operate(now)
            if not self.killed_at and self.step > self.steps / 3:
                self.killed_at = self.step
                self.scene.signal("h1", MODULE, "KILL")

    def _add(self, name: str, now: float, sample: dict | None) -> None:
        if sample:
            self.samples.setdefault(name, []).append({"time_s": now - self.started_at} | sample)

    def _sample(self, now: float) -> None:
        for pid, role in self._processes().items():
            name = self._names.setdefault(pid, f"{role}, pid {pid}")
            sample = measure_process(pid)
            if sample and role.endswith("rank"):  # {} until the rank has stored its first
                sample |= read_json(self.folder_on(role.split()[0]) / MEMORY)
            self._add(name, now, sample)
        for host in self.scene.bed.names:
            self._add(f"{host} job folder", now, measure_folder(self.folder_on(host)))
        self._add("operator's job folder", now, measure_folder(self.job.folder))
        self._add("run directory", now, measure_folder(self._run))

    def _processes(self) -> dict[int, str]:
        """Returns {pid in this namespace: role} of the job's processes."""
        roles = {self.operator.process.pid: "operator's attach"}
        namespaces = {os.readlink(f"/proc/{self._first(h)}/ns/pid"): h for h in self._hosts()}
        found = {}  # {(host, pid there): (pid here, parent here, command)}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                host = namespaces.get(os.readlink(path / "ns" / "pid"))
                if host:
                    status = dict(line.split(":\t") for line in _lines(path / "status"))
                    command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    inner = int(status["NSpid"].split()[-1])
                    found[host, inner] = (int(path.name), int(status["PPid"]), command)
            except (OSError, ValueError, KeyError):
                continue
        for host in self._hosts():
            worker = found.get((host, read_json(self.folder_on(host) / "status.json").get("pid")))
            if not worker:
                continue
            for (where, _), (pid, parent, command) in found.items():
                if where != host or not command:
                    continue
                if pid == worker[0]:
                    roles[pid] = f"{host} supervisor"
                elif pid == worker[1]:
                    roles[pid] = f"{host} keeper"
                elif parent == worker[0]:
                    roles[pid] = f"{host} {'rank' if MODULE in command else 'watcher'}"
                elif "b64decode" in command and " -c " in command:
                    roles[pid] = f"{host} request"
        return roles

    def _hosts(self) -> list[str]:
        return self.scene.bed.names

    def _first(self, host: str) -> str:
        return self.scene.bed.inside(host)[2]

    def _operate(self, now: float) -> None:
        """Times what the operator's commands do, without the start of their Python."""
        status_s, answers = best_time(lambda: statuses(self._client, self.job))
        for host, answer in answers.items():
            if isinstance(answer, HostError) or not (answer["alive"] or answer.get("outcome")):
                self.problems.append(f"{host.name}: no status at step {self.step}: {answer}")
        start = time.monotonic()
        folder = self._copy.fetch()
        fetch_s = time.monotonic() - start
        try:
            self.step = read_run(folder).step
        except NoRun:
            return
        cpu_s = time.process_time()
        page_s, html = best_time(lambda: page([read_run(folder)]))
        cpu_s = (time.process_time() - cpu_s) / TRIES
        sample = {"status_s": status_s, "fetch_s": fetch_s, "page_s": page_s, "page_cpu_s": cpu_s}
        self._add("operator", now, sample | {"page_bytes": len(html)})
        print(f"step {self.step}: {json.dumps(self.samples['operator'][-1])}", file=sys.stderr)

    def result(self) -> dict:
        """Returns the figures of all that was sampled long enough, and what is wrong."""
        saves = self.steps / EVERY / 2  # of the second half, at most
        known = {"python_blocks": SAVE_BLOCKS * saves}
        known |= dict.fromkeys(("rss_bytes", "anonymous_bytes"), FREED_BYTES)
        figures, leaks = soak_trends.judge(self.samples, ROLES, known)
        problems = self.problems + leaks + self._limits_exceeded(figures)
        output, code = self.operator.output(), self.operator.wait()
        if code or "exit 0 after 2 attempts" not in output:
            problems.append(f"exit {code}, where 0 after 2 attempts is expected: {output[-500:]}")
        trainers = [pid for host in self._hosts() for pid in self.scene.pids(host, MODULE)]
        if left := (self.scene.left() or trainers):
            problems.append(f"left running: {left}")
        return {
            "problems": problems,
            "steps": self.step,
            "killed_at_step": self.killed_at,
            "took_s": round(time.monotonic() - self.started_at),
            "load": os.getloadavg()[2],  # of the last 15 minutes
            "cores": os.cpu_count(),
            "run_bytes_per_step": self._metrics_bytes() / self.steps,
            "figures": figures,
        }

    def _metrics_bytes(self) -> int:
        """Returns the size of the files of the run that grow with every step."""
        checkpoints = measure_folder(self._run / "checkpoints")
        return measure_folder(self._run)["bytes"] - checkpoints["bytes"]

    def _limits_exceeded(self, figures: dict) -> list[str]:
        """Returns what is wrong with the sizes of logs and metrics, and with the timings."""
        limit, found = LOG_MIB << 20, []
        for host in self._hosts():
            logs = measure_folder(self.folder_on(host) / "log")
            if not 0 < logs["bytes"] <= limit + limit // SEGMENTS:
                found.append(f"{host}: its log has {logs}, where {limit} bytes is the limit")
            if log.starts(self.folder_on(host) / "log")[0] == 0:
                found.append(f"{host}: its log was never rotated")
            copies = [p.stat().st_size for p in self.job.folder.glob(f"{host}.log*")]
            if sum(copies) > limit + 1024 or len(copies) < 3:  # log, log.1 and log.at
                found.append(
                    f"{host}: the copy of its log has {copies} bytes, the limit is {limit}"
                )
        if self._metrics_bytes() > RUN_BYTES_PER_STEP * self.steps:
            found.append(f"the run directory has {self._metrics_bytes()} bytes of metrics")
        for name in ("status_s", "page_cpu_s"):
            timed = figures.get("operator", {}).get(name, {"lowest_tenth": LIMIT_S})
            if timed["lowest_tenth"] >= LIMIT_S:
                found.append(f"{name} must be below {LIMIT_S}; got {timed}")
        return found


def main() -> int:
    parser = Parser("python tests/launch_soak.py", __doc__)
    parser.add_argument("--steps", type=positive(int), default=STEPS, help="[%(default)s]")
    parser.add_argument("--leak", choices=LEAKS, default="", help="what a rank leaks")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxtrain-soak-"))
    with small_disk(folder / "shared", DISK_MIB) as disk, beds.Bed(2, disk.path) as bed:
        scene = Scene(bed, folder, disk)
        os.environ.update(scene.env)
        soak = Soak(scene, args.steps, args.leak)
        soak.run()
        result = soak.result()
    (folder / "samples.json").write_text(json.dumps(soak.samples))
    print(json.dumps(result))
    print(f"all samples and the launcher's output are in {folder}", file=sys.stderr)
    return bool(result.get("problems"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())

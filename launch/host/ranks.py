"""Starts the processes of an attempt on this host, logs their output and ends them."""

import collections
import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.host import processes
from launch.host.exit_codes import CANNOT_START, KILLED
from launch.host.interfaces import interface_of, interface_variables
from launch.host.log import LineSplitter, Log, own_lines
from launch.host.watcher import Watcher

MARGIN_S = 10.0  # a supervisor's longest turn: it may wait for a connection, or for a kill
TAIL_LINES = 60
DECISIVE = ("Error", "error:", "FATAL", "Fatal", "No space left", "RESOURCE_EXHAUSTED", "signal")
DECISIVE_LINES = 5


class RankProcess:
    """One process of the job: its heartbeat, its exit status and its last lines of output.

    Args:
        heartbeat: the file that the program replaces to show its progress.
        prefix: put before each line of its output.
        has_heartbeat: the program is known to write a heartbeat, so its age counts from the start.
    """

    def __init__(
        self,
        rank: int,
        process: subprocess.Popen,
        heartbeat: Path,
        prefix: bytes,
        has_heartbeat: bool = False,
    ):
        self.rank, self.process, self._heartbeat = rank, process, heartbeat
        self.code: int | None = None
        self._beats: int | None = None
        self._beat_at = time.monotonic() if has_heartbeat else None  # when a beat was new
        self._stopped_at: float | None = None
        self._lines = LineSplitter(prefix)
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)

    def split_output(self, data: bytes) -> bytes:
        """Takes output (b"": its end); returns the lines that this completes."""
        lines = self._lines.feed(data) if data else self._lines.flush()
        self._tail.extend(line.decode(errors="replace") for line in lines.splitlines())
        return lines

    def _read_heartbeat(self) -> dict[str, Any]:
        """Returns {"beats", "step", "phase", "step_s", ...}; {} if there is none yet."""
        try:
            return json.loads(self._heartbeat.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def report(self, now: float) -> dict[str, Any]:
        """Returns this process's part of the host's report.

        Args:
            now: seconds of the monotonic clock, which unlike the time of day never jumps.
        """
        beat, stat = self._read_heartbeat(), processes.read_stat(self.process.pid)
        if beat.get("beats", self._beats) != self._beats:
            self._beats, self._beat_at = beat["beats"], now
        is_stopped = self.code is None and stat is not None and stat.state in "Tt"
        self._stopped_at = (self._stopped_at or now) if is_stopped else None
        return {
            "rank": self.rank,
            "pid": self.process.pid,
            "stopped_s": now - self._stopped_at if self._stopped_at else 0.0,
            "code": self.code,
            "beats": beat.get("beats"),
            "step": beat.get("step"),
            "phase": beat.get("phase", "start"),
            "step_s": beat.get("step_s", 0.0),
            "ratios": beat.get("ratios", {}),
            "slow": beat.get("slow", []),
            "sites": beat.get("sites", ""),
            "age_s": None if self._beat_at is None else round(now - self._beat_at, 1),
            "lines": [] if self.code in (None, 0) else decisive_lines(self._tail),
        }


def decisive_lines(tail: Iterable[str]) -> list[str]:
    """Returns the lines that name an error; if none does, the last ones."""
    lines = [line.strip()[:300] for line in tail if line.strip()]
    errors = [line for line in lines if any(word in line for word in DECISIVE)]
    return (errors or lines)[-DECISIVE_LINES:]


class LocalRanks:
    """The processes of the current attempt on this host; none before the first attempt.

    Args:
        job: the job's specification, see launch.job.Job.request.
        folder: the job's folder on this host.
        log: this host's log of the job.
        silent_s: seconds without a call of `show_life` after which the processes are killed.
    """

    def __init__(self, job: Mapping[str, Any], folder: Path, log: Log, silent_s: float = 30.0):
        self.job, self.folder, self.log, self._silent_s = job, folder, log, silent_s
        self.attempt, self.ranks = 0, []
        self._watcher = Watcher(silent_s, lambda text: log.write(own_lines(text)))
        self._sent_signals: set[int] = set()
        self._selector = selectors.DefaultSelector()

    def start(self, attempt: int, world: Mapping[str, Any]) -> None:
        """Starts this host's processes of an attempt.

        Args:
            world: {"members": indices of the hosts that take part, "coordinator": address:port}.
        """
        self.attempt, self.ranks, self._sent_signals = attempt, [], set()
        mark = f"{self.job['id']}/{attempt}/{os.getpid()}"
        self._watcher.start(f"{processes.ATTEMPT_MARK}={mark}")
        per_host, position = self.job["ranks_per_host"], world["members"].index(self.job["me"])
        for local in range(per_host):
            rank = position * per_host + local
            heartbeat = self.folder / f"beat.{local}"
            heartbeat.unlink(missing_ok=True)
            env = self._environment(world, rank, local, heartbeat)
            env[processes.ATTEMPT_MARK] = mark
            prefix = b"" if per_host == 1 else b"[%d] " % rank
            try:
                process = subprocess.Popen(
                    self.job["argv"],
                    cwd=self.job["cwd"],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # signals to the supervisor's group must not reach it
                    preexec_fn=processes.die_with_parent,  # no orphan outlives the supervisor
                )
            except OSError as error:
                self.log.write(own_lines(f"cannot start: {error}"))
                failing = f"raise SystemExit({CANNOT_START})"
                process = subprocess.Popen([sys.executable, "-c", failing])
            has_heartbeat = self.job.get("beats", False)
            rank_process = RankProcess(rank, process, heartbeat, prefix, has_heartbeat)
            self.ranks.append(rank_process)
            if process.stdout:
                os.set_blocking(process.stdout.fileno(), False)
                self._selector.register(process.stdout, selectors.EVENT_READ, rank_process)

    def show_life(self) -> None:
        """Shows the watcher that this process runs."""
        self._watcher.show_life()

    def all_killed(self) -> bool:
        """Returns whether SIGKILL has ended every process."""
        return bool(self.ranks) and all(rank.code == KILLED for rank in self.ranks)

    def _device_variables(self, env: Mapping[str, str], local: int) -> dict[str, str]:
        """Returns the variables that choose a process's GPUs.

        JAX falls back to the CPU without an error if CUDA fails, unless its platforms are named.
        It computes on the first platform; host callbacks need the second.
        """
        if not self.job["gpus"]:
            return {}
        per_host, variables = self.job["ranks_per_host"], {}
        if "JAX_PLATFORMS" not in env:
            variables["JAX_PLATFORMS"] = "cuda,cpu"
            if "CUDA_VISIBLE_DEVICES" not in env:  # else the user has chosen among the GPUs
                variables["JAXTRAIN_LOCAL_DEVICES"] = str(self.job["gpus"] // per_host)
        if per_host > 1:
            variables["JAX_LOCAL_DEVICE_IDS"] = str(local)
        return variables

    def _network_variables(self) -> dict[str, str]:
        """Returns the defaults that bind NCCL and the byte counters to the training interface.

        Without other hosts there is no training network, so there are none.
        """
        hosts, me = self.job["hosts"], self.job["me"]
        return interface_variables(interface_of(hosts[me]["address"])) if len(hosts) > 1 else {}

    def _environment(self, world, rank: int, local: int, heartbeat: Path) -> dict[str, str]:
        per_host = self.job["ranks_per_host"]
        env = self._network_variables() | os.environ | self.job["env"]
        env |= self._device_variables(env, local)
        return env | {
            processes.JOB_MARK: self.job["id"],
            "JAXTRAIN_BEAT": str(heartbeat),
            # JAX's processes send heartbeats at half of this interval. So one that a signal stops
            # for silent_s, right before its next heartbeat, is not yet taken for dead.
            "JAXTRAIN_HEARTBEAT_S": str(math.ceil(2 * self._silent_s)),
            "JAXTRAIN_PLANNED_PROCESSES": str(len(self.job["hosts"]) * per_host),
            "JAX_COORDINATOR_ADDRESS": world["coordinator"],
            "JAX_NUM_PROCESSES": str(len(world["members"]) * per_host),
            "JAX_PROCESS_ID": str(rank),
            "PYTHONUNBUFFERED": "1",
        }

    def poll(self, wait_s: float) -> None:
        """Moves output to the log for at most wait_s, then records which processes have ended."""
        if self._selector.get_map():
            for key, _ in self._selector.select(wait_s):
                self._drain(key.fileobj, key.data)
        else:
            time.sleep(wait_s)
        self._record_exits(processes.reap())  # adopted orphans too, or they would stay zombies

    def _record_exits(self, exits: Mapping[int, int]) -> None:
        for rank in self.ranks:
            if rank.code is None and rank.process.pid in exits:
                rank.code = rank.process.returncode = exits[rank.process.pid]
                if rank.process.stdout:
                    self._drain(rank.process.stdout, rank)

    def _drain(self, pipe, rank: RankProcess) -> None:
        """Logs the output that is waiting in a pipe, and closes the pipe at its end."""
        while True:
            try:
                data = os.read(pipe.fileno(), 1 << 16)
            except (BlockingIOError, ValueError):  # empty, or closed already
                return
            self.log.write(rank.split_output(data))
            if not data:
                self._selector.unregister(pipe)
                pipe.close()
                return

    def signal_once(self, number: int) -> None:
        """Sends a signal to each process, at most once per attempt."""
        if number not in self._sent_signals:
            self._sent_signals.add(number)
            for rank in self.ranks:
                if rank.code is None:
                    processes.send_signal(rank.process.pid, number)

    def living(self) -> list[int]:
        """Returns this process's living descendants or, without any, those with the job's mark."""
        below = processes.descendants(os.getpid())
        below = [pid for pid in below if pid != self._watcher.pid]
        return below or processes.marked(self.job["id"])

    def kill(self) -> list[int]:
        """Kills every process of the job; returns those that cannot be killed."""
        left = processes.kill_all(self.living, self._record_exits)
        if not left:
            self._watcher.end()
        return left

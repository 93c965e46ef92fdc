"""The processes of one attempt on this host: started, read, watched and ended."""

import collections
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path

from launch.host import processes as tree
from launch.host.interfaces import holder
from launch.host.log import Lines

TAIL_LINES = 60
DECISIVE = ("Error", "error:", "FATAL", "Fatal", "No space left", "RESOURCE_EXHAUSTED", "signal")
DECISIVE_LINES = 5


class Rank:
    """One process: its output goes to the log line by line, its last lines are kept.

    Args:
        beats: the program is known to beat, so its start counts as the first one.
    """

    def __init__(self, rank: int, process, beat: Path, prefix: bytes, beats=False):
        self.rank, self.process, self.beat = rank, process, beat
        self._began_at = time.time() if beats else None
        self.code = None
        self.ended_at = None
        self._stopped_at = None
        self._lines = Lines(prefix)
        self.tail = collections.deque(maxlen=TAIL_LINES)

    def take(self, data: bytes) -> bytes:
        whole = self._lines.feed(data) if data else self._lines.flush()
        self.tail.extend(line.decode(errors="replace") for line in whole.splitlines())
        return whole

    def read_beat(self) -> dict:
        """What the program last said of itself: {"beats", "step", "phase", "time", "step_s"}."""
        try:
            return json.loads(self.beat.read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # none yet, or between two writes
            return {}

    def report(self, now: float) -> dict:
        beat, stat = self.read_beat(), tree.read_stat(self.process.pid)
        alive_at = beat.get("time", self._began_at)
        stopped = self.code is None and stat is not None and stat.state in "Tt"
        self._stopped_at = (self._stopped_at or now) if stopped else None
        return {
            "rank": self.rank,
            "pid": self.process.pid,
            "stopped_s": now - self._stopped_at if stopped else 0.0,
            "code": self.code,
            "ended_at": self.ended_at,
            "beats": beat.get("beats"),
            "step": beat.get("step"),
            "phase": beat.get("phase", "start"),
            "step_s": beat.get("step_s", 0.0),
            "age_s": None if alive_at is None else round(now - alive_at, 1),
            "lines": [] if self.code in (None, 0) else decisive(self.tail),
        }


def decisive(tail) -> list[str]:
    """The lines of an output that say why it ended; its last ones where none says so."""
    lines = [line.strip()[:300] for line in tail if line.strip()]
    telling = [line for line in lines if any(word in line for word in DECISIVE)]
    return (telling or lines)[-DECISIVE_LINES:]


class Ranks:
    """The attempt under way on this host, or none.

    Args:
        job: the job's specification; folder: its folder on this host; log: of this host.
    """

    def __init__(self, job: dict, folder: Path, log):
        self.job, self.folder, self.log = job, folder, log
        self.attempt, self.ranks, self._sent = 0, [], set()
        self._selector = selectors.DefaultSelector()

    def start(self, attempt: int, world: dict) -> None:
        """Starts this host's processes of an attempt. A command that cannot start has code 127."""
        self.attempt, self.ranks, self._sent = attempt, [], set()
        per_host, place = self.job["ranks_per_host"], world["members"].index(self.job["me"])
        for local in range(per_host):
            rank = place * per_host + local
            beat = self.folder / f"beat.{local}"
            beat.unlink(missing_ok=True)
            env = self._environment(world, rank, local, len(world["members"]) * per_host, beat)
            prefix = b"" if per_host == 1 else b"[%d] " % rank
            try:
                process = subprocess.Popen(
                    self.job["argv"],
                    cwd=self.job["cwd"],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=tree.die_with_parent,
                )
            except OSError as error:
                self.log.write(b"launch: cannot start: %s\n" % str(error).encode())
                process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(127)"])
            made = Rank(rank, process, beat, prefix, self.job.get("beats", False))
            self.ranks.append(made)
            if process.stdout:
                os.set_blocking(process.stdout.fileno(), False)
                self._selector.register(process.stdout, selectors.EVENT_READ, made)

    def _devices(self, env: dict, local: int) -> dict:
        """Which GPUs a process takes, and that it takes no CPU in their place.

        JAX falls back to the CPU where CUDA fails, unless its platforms are named. The first is
        the one that it computes on; host callbacks want the second.
        """
        if not self.job["gpus"]:
            return {}
        per_host, devices = self.job["ranks_per_host"], {}
        if "JAX_PLATFORMS" not in env:
            devices = {"JAX_PLATFORMS": "cuda,cpu"}
            if "CUDA_VISIBLE_DEVICES" not in env:  # else the user has chosen among them
                devices["JAXTRAIN_LOCAL_DEVICES"] = str(self.job["gpus"] // per_host)
        return devices | ({"JAX_LOCAL_DEVICE_IDS": str(local)} if per_host > 1 else {})

    def _network(self) -> dict:
        """What NCCL keeps to, and what is counted, where nothing else is said: the interface of
        the training address. A host alone has no training network."""
        hosts, me = self.job["hosts"], self.job["me"]
        name = holder(hosts[me]["address"]) if len(hosts) > 1 else ""
        return {"JAXTRAIN_INTERFACE": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}

    def _environment(self, world, rank, local, processes, beat) -> dict:
        env = self._network() | os.environ | self.job["env"]
        return (
            env
            | self._devices(env, local)
            | {
                tree.JOB_MARK: self.job["id"],
                "JAXTRAIN_BEAT": str(beat),
                "JAXTRAIN_PLANNED_PROCESSES": str(
                    len(self.job["hosts"]) * self.job["ranks_per_host"]
                ),
                "JAX_COORDINATOR_ADDRESS": world["coordinator"],
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(rank),
                "PYTHONUNBUFFERED": "1",
            }
        )

    def turn(self, wait_s: float) -> None:
        """Moves output to the log for at most wait_s, then notes who has ended."""
        if self._selector.get_map():
            for key, _ in self._selector.select(wait_s):
                self._drain(key.fileobj, key.data)
        else:
            time.sleep(wait_s)
        self._note(tree.reap())  # adopted orphans too, else they would stay as zombies

    def _note(self, ended: dict) -> None:
        for rank in self.ranks:
            if rank.code is None and rank.process.pid in ended:
                rank.code = rank.process.returncode = ended[rank.process.pid]
                rank.ended_at = time.time()
                if rank.process.stdout:
                    self._drain(rank.process.stdout, rank)

    def _drain(self, pipe, rank) -> None:
        while True:
            try:
                data = os.read(pipe.fileno(), 1 << 16)
            except (BlockingIOError, ValueError):
                return
            self.log.write(rank.take(data))
            if not data:
                self._selector.unregister(pipe)
                pipe.close()
                return

    def signal_once(self, number: int) -> None:
        """Sends a signal to each process of the attempt, the first time that it is asked."""
        if number not in self._sent:
            self._sent.add(number)
            for rank in self.ranks:
                if rank.code is None:
                    tree.send(rank.process.pid, number)

    def over(self) -> bool:
        return all(rank.code is not None for rank in self.ranks)

    def left(self) -> list[int]:
        """Processes of this job that live: this one's descendants, and any with its mark."""
        return tree.descendants(os.getpid()) or tree.marked(self.job["id"])

    def end(self) -> list[int]:
        """Kills all that lives of the job; returns what would not die."""
        return tree.end_all(self.left, self._note)

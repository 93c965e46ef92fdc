"""Copies a job's run directory to this machine, each time only what is new."""

import base64
import os
import time
from pathlib import Path
from typing import Any

from launch.host.files import read_json, write_json
from launch.host.run_files import CLOCK, NAME, PROCESSES, WORKDIR, flag_value
from launch.inventory import Host
from launch.job import Job, read_jobs
from launch.ssh import HostError, SshClient
from launch.terminal import note

POSITIONS = ".copied.json"  # {host: what read_changes calls `have`}
# The most that a host may have sent: 4,096 processes, and some 10 million steps.
MOST_FILES, MOST_BYTES = 4_100, 8 << 30


class RunCopy:
    """The copy of a job's run directory, in the folder `run` of the job's record.

    That of a site's job is in `run/SITE`, so that reports call it by the site.

    Args:
        job_id: the job.
        workdir: the run directory on the hosts; "" takes the one that the trainer named at the
            start, or that of the job's flags.

    Attributes:
        job_ended: the job had ended before the last fetch, so the files are complete.

    Raises:
        ValueError: there is no such job, or nothing names its run directory.
    """

    def __init__(self, job_id: str, workdir: str = ""):
        self.job = Job(job_id)
        folders = self.job.record.get("run_directories", {})
        named = flag_value(self.job.record["argv"], WORKDIR)
        self.workdirs = {h: workdir or folders.get(h.name, named) for h in self.job.hosts}
        if not all(self.workdirs.values()):
            raise ValueError(
                f"job {job_id} must name its run directory, but its flags have no {WORKDIR} and it "
                "ended before the trainer named one. Set --workdir of launch.summary."
            )
        self.client = SshClient(self.job.hosts, self.job.ssh_config)
        self.folder = self.job.folder / "run" / self.job.record.get("site", "")
        self.job_ended = False
        (self.folder / PROCESSES).mkdir(parents=True, exist_ok=True)

    def fetch(self) -> Path:
        """Fetches what is new from every host, and returns the copy's folder.

        The first host sends the whole run; the others send only their own hosts/<process>.jsonl.
        If the hosts share the directory, the first one sends everything, so that two transfers
        never write the same file.

        Raises:
            HostError: the first host does not answer.
        """
        positions = read_json(self.folder / POSITIONS)
        first, *others = self.job.hosts

        def fetch_from(skip):
            return lambda host: self._fetch_from(host, positions.setdefault(host.name, {}), skip)

        answers = self.client.map(fetch_from({}), [first])
        sent_by_first = {name: inode for name, (inode, *_) in positions[first.name].items()}
        answers |= self.client.map(fetch_from(sent_by_first), others)
        write_json(self.folder / POSITIONS, positions)
        if isinstance(error := answers[first], HostError):
            raise error
        for answer in answers.values():
            if isinstance(answer, HostError):
                note(f"{answer} Its files here are those of the last successful copy.")
        return self.folder

    def _fetch_from(self, host: Host, positions: dict, skip: dict) -> None:
        is_first, more, received = host == self.job.hosts[0], True, 0
        while more:
            request = {"op": "pull", "job": self.job.id, "folder": self.workdirs[host]}
            request |= {"have": positions, "skip": skip}
            answer = self.client.call(host, request)
            _check_answer(host, answer)
            more = answer["more"]
            if is_first:
                self.job_ended = answer["over"]
                write_json(self.folder / CLOCK, {"lead_s": answer["time"] - time.time()})
            for name, part in answer["files"].items():
                if not NAME.fullmatch(name):  # a host must not write outside the copy
                    raise HostError(f"{host.name}: sent a file that is not of a run: {name!r}.")
                data = base64.b64decode(part["base64"])
                received += len(data)
                self._check(host, positions, name, part["at"], data)
                if is_first or name.startswith(f"{PROCESSES}/"):
                    write_at(self.folder / name, part["at"], data)
                positions[name] = [part["inode"], part["at"] + len(data), part["tail"]]
            if more and not any(part["base64"] for part in answer["files"].values()):
                raise HostError(f"{host.name}: announced more of the run and sent nothing.")
            if received > MOST_BYTES:  # a host could replace a file again and again
                raise HostError(f"{host.name}: sent more than {MOST_BYTES:,} bytes at once.")

    def _check(self, host: Host, positions: dict, name: str, at: int, data: bytes) -> None:
        """Raises HostError if a part of a file has a hole before it, or is one too many."""
        held = positions.get(name, [0, 0, 0])[1]
        if not 0 <= at <= held:
            raise HostError(f"{host.name}: sent byte {at} of {name} after byte {held}.")
        sizes = {key: size for key, (_, size, _) in positions.items()} | {name: at + len(data)}
        if len(sizes) > MOST_FILES or sum(sizes.values()) > MOST_BYTES:
            raise HostError(
                f"{host.name}: a run must have at most {MOST_FILES:,} files and {MOST_BYTES:,} "
                f"bytes; got {len(sizes):,} and {sum(sizes.values()):,}. Copy it by hand."
            )


Source = Path | RunCopy  # a run directory, or the copy of a job's


def find_sources(name: str, workdir: str = "") -> list[Source]:
    """Returns the run directory with this name, or the copy of the run of the job with this name.

    The name of a job at several sites stands for the run of each.

    Raises:
        ValueError: there is neither.
    """
    if not name.strip():
        raise ValueError(f"a run must be named by its folder or job; got {name!r}.")
    if os.sep in name or Path(name).exists():
        return [Path(name)]
    try:
        return [RunCopy(job.id, workdir) for job in read_jobs(name)]
    except ValueError as error:
        raise ValueError(f"no folder is called {name!r}, so it must be a job. {error}") from None


def fetch(source: Source) -> Path:
    """Returns a run directory on this machine, with all that a job has written so far.

    Raises:
        HostError: the job's first host does not answer.
    """
    return source.fetch() if isinstance(source, RunCopy) else source


def _check_answer(host: Host, answer: Any) -> None:
    """Raises HostError if an answer is not what launch.host.run_files.read_changes returns."""
    kinds = {"inode": int, "at": int, "base64": str, "tail": int}
    try:
        parts = answer["files"].values()
        valid = {type(answer["more"]), type(answer["over"])} == {bool}
        valid &= type(answer["time"]) is float and 0 <= answer["time"] < 1e12
        valid &= all(type(part[key]) is kind for part in parts for key, kind in kinds.items())
        for part in parts:
            base64.b64decode(part["base64"], validate=True)
    except (AttributeError, KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise HostError(f"{host.name}: sent changes of the run that have no meaning.")


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Writes bytes at an offset and cuts the file after them, as the rest is an older file's."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        file.seek(offset)
        file.write(data)
        file.truncate()

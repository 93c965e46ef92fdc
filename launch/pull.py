"""A job's run directory copied here, each time from where the copy ends."""

import base64
import os
import re
from pathlib import Path

from launch.follow import note
from launch.host.files import read_json, write_json
from launch.host.run_copy import WORKDIR, flag
from launch.job import Job
from launch.ssh import Fleet, HostError

HELD = ".held.json"  # host -> file -> [inode there, bytes here]


class Pull:
    """The copy, `jobs_folder()/ID/run`.

    Args:
        name: the job's id.
        workdir: the run directory on the hosts; "" is what the job's flags say.

    Attributes:
        over: the first host has said that the job has ended, before it gave what there was.

    Raises:
        ValueError: no such job, or its flags do not name the run directory.
    """

    def __init__(self, name: str, workdir: str = ""):
        self.job = Job(name)
        self.workdir = workdir or flag(self.job.record["argv"], WORKDIR)
        if not self.workdir:
            raise ValueError(
                f"job {name} must say where its run directory is; its flags have no "
                "--config.workdir. Set --workdir."
            )
        self.fleet = Fleet(self.job.hosts, self.job.ssh_config)
        self.folder, self.over = self.job.folder / "run", False
        (self.folder / "hosts").mkdir(parents=True, exist_ok=True)

    def fetch(self) -> Path:
        """Takes what is new from every host, and returns the copy's folder.

        The first host's files are the run's; of the others only their own hosts/<process>.jsonl.
        In a folder that hosts share the first gives them all: two would write over each other.

        Raises:
            HostError: the first host does not answer.
        """
        held = read_json(self.folder / HELD)
        take = lambda skip: lambda host: self._take(host, held.setdefault(host.name, {}), skip)
        answers = self.fleet.everywhere(take({}), self.job.hosts[:1])
        first = answers[self.job.hosts[0]]
        given = {name: inode for name, (inode, _) in held[self.job.hosts[0].name].items()}
        answers |= self.fleet.everywhere(take(given), self.job.hosts[1:])
        write_json(self.folder / HELD, held)
        if isinstance(first, HostError):
            raise first
        for answer in answers.values():
            if isinstance(answer, HostError):
                note(f"{answer} What is shown of it is what came before.")
        return self.folder

    def _take(self, host, held, skip):
        is_first, more = host == self.job.hosts[0], True
        while more:
            request = {"op": "pull", "job": self.job.id, "folder": self.workdir}
            request |= {"have": held, "skip": skip}
            answer = self.fleet.call(host, request)
            more = answer["more"]
            self.over = answer["over"] if is_first else self.over
            for name, part in answer["files"].items():
                if not re.fullmatch(r"(hosts/)?[\w.-]+\.jsonl?", name):
                    raise HostError(f"{host.name}: it sent a file that no run has: {name!r}.")
                data = base64.b64decode(part["base64"])
                if is_first or name.startswith("hosts/"):
                    put(self.folder / name, part["at"], data)
                held[name] = [part["inode"], part["at"] + len(data)]


def put(path: Path, at: int, data: bytes) -> None:
    """Writes bytes at an offset; what followed them is of an older file."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        file.seek(at)
        file.write(data)
        file.truncate()

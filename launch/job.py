"""The operator's record of a job: its command, its hosts and its logs so far."""

import contextlib
import dataclasses
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.host.files import read_json, write_json
from launch.host.interfaces import interface_variables
from launch.host.restart_policy import Policy
from launch.inventory import Host, Inventory
from launch.log_copy import locked
from launch.terminal import note

PYTHON = "{python}"  # in argv: stands for each host's interpreter
TRAINER = "jaxtrain.train"  # the program whose flags name data and which writes a heartbeat
JOB_ID = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of new_id() or of a site, ID.SITE
PORTS = range(20_000, 30_000)  # below the ports that Linux gives to outgoing connections


def jobs_folder() -> Path:
    """Returns the folder of all records: JAXTRAIN_JOBS, or ~/.jaxtrain/jobs."""
    folder = Path(os.environ.get("JAXTRAIN_JOBS") or Path.home() / ".jaxtrain" / "jobs")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(f"JAXTRAIN_JOBS must be a folder for jobs; got {error}.") from None
    return folder


def new_id() -> str:
    return time.strftime("%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)


class Job:
    """One job's record: the folder ID in jobs_folder(), with job.json and a log per host.

    Raises:
        ValueError: this machine has no such job.
    """

    def __init__(self, job_id: str):
        self.id, self.folder = job_id, jobs_folder() / job_id
        path = self.folder / "job.json"
        try:
            self.record = read_json(path)
        except OSError:  # a file in place of the folder, or a name that is too long
            self.record = {}
        except ValueError as error:
            raise ValueError(f"{path} must be a job's record; got: {error}.") from None
        if not self.record:
            known = sorted(path.name for path in jobs_folder().iterdir())[-8:]
            raise ValueError(f"JOB must be one of this machine's jobs, {known}; got {job_id!r}.")
        try:
            self.hosts = tuple(Host(**host) for host in self.record["hosts"])
            self.policy = Policy(**self.record["policy"])
            self.ssh_config: str = self.record["ssh_config"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be a record of this version; got {type(error).__name__}: {error}. "
                "Use the version of the launcher that wrote it."
            ) from None

    @classmethod
    def create(
        cls,
        hosts: Iterable[Host],
        policy: Policy,
        ssh_config: str,
        job_id: str = "",
        **record: Any,
    ) -> "Job":
        """Creates a record, and a secret token that the job's supervisors share.

        Args:
            job_id: "" takes a new one.
        """
        job_id = job_id or new_id()
        folder = jobs_folder() / job_id
        folder.mkdir(mode=0o700)
        record |= {
            "hosts": [dataclasses.asdict(host) for host in hosts],
            "policy": dataclasses.asdict(policy),
            "ssh_config": str(Path(ssh_config).absolute()) if ssh_config else "",
            "token": secrets.token_hex(32),
            "port": secrets.choice(PORTS),
        }
        write_json(folder / "job.json", record)
        return cls(job_id)

    @property
    def inventory(self) -> Inventory:
        ranks = "gpu" if self.record["ranks_per_host"] > 1 else "host"
        return Inventory(self.hosts, ranks)

    def change(self, **values: Any) -> None:
        """Changes the record, in memory and on disk, and keeps what other terminals changed."""
        path = self.folder / "job.json"
        with open(self.folder / "job.lock", "ab") as file, locked(file):
            self.record |= read_json(path) | values
            write_json(path, self.record)

    def stop_reason(self) -> str:
        """Returns why the operator stopped the job, also from another terminal; "" if not."""
        return read_json(self.folder / "job.json").get("stopped", "")

    def log(self, host: Host) -> Path:
        return self.folder / f"{host.name}.log"

    def request(self, host: Host) -> dict[str, Any]:
        """Returns the request that starts this job's supervisor on a host."""
        record = self.record
        python = record.get("pythons", {}).get(host.name, host.python)
        code, user_path = record["folders"][host.name], record["env"].get("PYTHONPATH")
        path = f"{code}:{user_path}" if user_path else code  # the job's code takes precedence
        spec = {
            "id": self.id,
            "me": self.hosts.index(host),
            "hosts": [{"name": h.name, "address": h.address} for h in self.hosts],
            "ranks_per_host": record["ranks_per_host"],
            "gpus": host.gpus,
            "port": record["port"],
            "token": record["token"],
            "policy": record["policy"],
            "argv": [python if part == PYTHON else part for part in record["argv"]],
            # If the inventory names no interface, the host looks up that of its address.
            "env": interface_variables(host.interface) | record["env"] | {"PYTHONPATH": path},
            "cwd": code,
            "beats": TRAINER in record["argv"][:3],
            "run_directory": record.get("run_directories", {}).get(host.name, ""),
            "resumes": record.get("resumes", ""),
        }
        if "sites" in record:
            spec |= {"sites": record["sites"], "site": record["site"]}
        scope = host.name in record.get("scopes", ())
        return {"op": "start", "job": self.id, "spec": spec, "scope": scope}


def sites_of(name: str) -> dict[str, str]:
    """Returns {site: its newest job} of a job at several sites; {} if the name is not of one."""
    try:
        record: Any = read_json(jobs_folder() / name / "job.json")
    except (OSError, ValueError):  # Job says what is wrong
        return {}
    jobs = record.get("jobs") if isinstance(record, dict) else None
    return jobs if isinstance(jobs, dict) else {}


def read_jobs(name: str, starting: bool = False, exact: bool = False) -> list[Job]:
    """Returns the job of this name; if the name stands for a job at several sites, that of each.

    A site's job is the newest that has begun: one whose start failed, or is not done yet, does not
    hide the job that runs. The name of a job that was continued stands for the newest one.

    Args:
        starting: also return newer jobs that have not begun; another terminal may start them yet.
        exact: return the job with this id, also if it was continued.

    Raises:
        ValueError: this machine has no such job.
    """
    if newest := sites_of(name):
        return [job for job_id in newest.values() for job in _current(job_id, starting)]
    job = Job(name)
    site, parent = job.record.get("site", ""), job.record.get("parent", "")
    was_current = job.record.get("begun") or job.record.get("continued_as")
    if exact or not was_current or not (job_id := sites_of(parent).get(site)):
        return [job]
    jobs = _current(job_id, starting, oldest=name)
    if jobs[-1].id != name:
        note(f"{name} was continued as {jobs[-1].id}, to which this command applies")
    return jobs


def note_continuation(name: str, jobs: Sequence[Job]) -> None:
    """Prints which jobs continue these, if they have begun and have another name."""
    for later in {later for job in jobs if (later := job.record.get("continued_as"))}:
        with contextlib.suppress(ValueError):  # its record was deleted
            if any(job.record.get("begun") for job in read_jobs(later)):
                note(f"{name} was continued as {later}, to which this command does not apply")


def _current(job_id: str, starting: bool, oldest: str = "") -> list[Job]:
    """Returns a site's current job; if `starting`, after the newer ones that may begin yet.

    Args:
        job_id: the newest job of the site.
        oldest: no job before this one is returned.
    """
    job, newer = Job(job_id), []
    with contextlib.suppress(ValueError):  # an older record was deleted
        while not job.record.get("begun") and job.id != oldest and "replaces" in job.record:
            replaced = Job(job.record["replaces"])
            if not job.record.get("outcome"):  # its start has not failed
                newer.append(job)
            job = replaced
    return [*newer, job] if starting else [job]


def name_of(jobs: Sequence[Job]) -> str:
    """Returns the name that `read_jobs` takes for these jobs."""
    return jobs[0].id if len(jobs) == 1 else jobs[0].record["parent"]


def write_parent(job_id: str, jobs: Mapping[str, str]) -> None:
    """Records which jobs {site: job} the name of a job at several sites stands for."""
    folder = jobs_folder() / job_id
    folder.mkdir(mode=0o700, exist_ok=True)
    write_json(folder / "job.json", {"jobs": dict(jobs)})


def replace_in_parent(job: Job) -> None:
    """Records a new job as the current one of its site, see `read_jobs`.

    The former one is not always the job that it resumes: another terminal may have resumed it too.
    """
    parent, site = job.record["parent"], job.record["site"]
    with open(jobs_folder() / parent / "job.lock", "ab") as file, locked(file):
        jobs = sites_of(parent)
        if site in jobs:
            job.change(replaces=jobs[site])
        write_parent(parent, jobs | {site: job.id})

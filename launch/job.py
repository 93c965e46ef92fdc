"""A job as the operator's machine knows it: what was started where, and its logs so far."""

import dataclasses
import os
import secrets
import time
from pathlib import Path

from launch.host.files import read_json, write_json
from launch.host.restart_policy import Policy
from launch.inventory import Host

PYTHON = "{python}"  # in an argv: the host's own
TRAINER = "jaxtrain.train"  # the program whose flags name data, and which beats
PORTS = range(20_000, 30_000)  # below Linux's range of ports given to clients


def jobs_folder() -> Path:
    """Of this user alone; JAXTRAIN_JOBS names another."""
    folder = Path(os.environ.get("JAXTRAIN_JOBS") or Path.home() / ".jaxtrain" / "jobs")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


class Job:
    """One job's record, `jobs_folder()/ID`: job.json, HOST.log."""

    def __init__(self, name: str):
        self.id, self.folder = name, jobs_folder() / name
        self.record = read_json(self.folder / "job.json")
        if not self.record:
            known = sorted(path.name for path in jobs_folder().iterdir())[-8:]
            raise ValueError(f"JOB must be one of this machine's jobs, {known}; got {name!r}.")
        self.hosts = tuple(Host(**host) for host in self.record["hosts"])
        self.policy = Policy(**self.record["policy"])
        self.ssh_config = self.record["ssh_config"]

    @classmethod
    def create(cls, hosts, policy: Policy, ssh_config: str, **record) -> "Job":
        """A new job, with an id of its own and a secret that its supervisors share."""
        name = time.strftime("%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)
        folder = jobs_folder() / name
        folder.mkdir(mode=0o700)
        record |= {
            "hosts": [dataclasses.asdict(host) for host in hosts],
            "policy": dataclasses.asdict(policy),
            "ssh_config": str(Path(ssh_config).absolute()) if ssh_config else "",
            "token": secrets.token_hex(32),
            "port": secrets.choice(PORTS),
        }
        write_json(folder / "job.json", record)
        return cls(name)

    def change(self, **values) -> None:
        self.record |= values
        write_json(self.folder / "job.json", self.record)

    def log(self, host: Host) -> Path:
        return self.folder / f"{host.name}.log"

    def request(self, host: Host) -> dict:
        """What starts this job's supervisor on a host."""
        record = self.record
        python = record.get("pythons", {}).get(host.name, host.python)
        folder, wanted = record["folders"][host.name], record["env"].get("PYTHONPATH")
        path = f"{folder}:{wanted}" if wanted else folder  # the job's code comes first
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
            "env": network_of(host) | record["env"] | {"PYTHONPATH": path},
            "cwd": folder,
            "beats": TRAINER in record["argv"][:3],
        }
        scope = host.name in record.get("scopes", ())
        return {"op": "start", "job": self.id, "spec": spec, "scope": scope}


def network_of(host: Host) -> dict:
    """A stated interface: what is counted, and what NCCL keeps to. Else the host finds its own."""
    if not host.interface:
        return {}
    return {"JAXTRAIN_INTERFACE": host.interface, "NCCL_SOCKET_IFNAME": f"={host.interface}"}

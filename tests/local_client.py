"""An SshClient whose hosts are this machine: `sh` replaces `ssh`, everything else is real."""

import time

from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import Job
from launch.ssh import SshClient


class LocalClient(SshClient):
    """Runs a host's command on this machine. A subclass can replace it by another `command`."""

    command = 'eval "$2"'  # sh's $0, $1 and $2 are "--", the host's name and the command

    def ssh_command(self, host, shared=True):
        return ["sh", "-c", self.command]


def begin_job(tmp_path, monkeypatch):
    """Returns the record of a job that has begun, on one host that nothing has been sent to."""
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    job = Job.create([Host("a", "127.0.0.1")], Policy(), "", folders={})
    job.change(begun=time.time())
    return job

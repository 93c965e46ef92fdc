"""SLURM on a bed of hosts: munge and slurmd on each, slurmctld on the first. As root, on Debian.

python tests/slurm_bed.py 3 -- COMMAND     runs COMMAND on h0, the first of 3 nodes
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bed as beds

TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
# slurmd 22.05 starts only where something is mounted on /sys/fs/cgroup, whatever the plugins; and
# looking for the version itself, it takes a machine that has both versions for an error.
START = r"""
set -e
name=$1 conf=$2
mkdir -p /etc/slurm /run/munge /var/spool/slurmd /var/spool/slurmctld
cp "$conf/slurm.conf" "$conf/cgroup.conf" /etc/slurm/
install -m 600 "$conf/munge.key" /run/munge.key
mount -t tmpfs tmpfs /sys/fs/cgroup
munged --force --key-file=/run/munge.key --pid-file=/run/munge.pid --log-file=/run/munge.log \
    --seed-file=/run/munge.seed --socket=/run/munge/munge.socket.2
[ "$name" = h0 ] && slurmctld
slurmd -N "$name"
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n"
SETTINGS = """\
ClusterName=bed
SlurmctldHost=h0({first})
SlurmUser=root
SlurmctldLogFile=/run/slurmctld.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdLogFile=/run/slurmd.log
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/var/spool/slurmd
StateSaveLocation=/var/spool/slurmctld
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
{nodes}
PartitionName=bed Nodes={names} Default=YES State=UP
"""
UP_S = 30.0
GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")


def available() -> str:
    """ "" where SLURM can run on a bed, else the reason why not."""
    for tool in TOOLS:
        if shutil.which(tool) is None and not Path("/usr/sbin", tool).exists():
            return f"SLURM on a bed of hosts needs {tool}"
    return beds.available()


class SlurmBed(beds.Bed):
    """A bed whose hosts are the nodes of one SLURM cluster, all of them idle."""

    def __enter__(self):
        super().__enter__()
        try:
            self._write_slurm()
            for name in self.names:
                self.run(name, "bash", "-c", START, "start", name, self.folder / "slurm")
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _write_slurm(self):
        folder = self.folder / "slurm"
        folder.mkdir()
        nodes = [f"NodeName={n} NodeAddr={a} CPUs=4 State=UNKNOWN" for n, a in self.address.items()]
        first, names = self.address["h0"], ",".join(self.names)
        settings = SETTINGS.format(first=first, nodes="\n".join(nodes), names=names)
        (folder / "slurm.conf").write_text(settings)
        (folder / "cgroup.conf").write_text(CGROUP)
        (folder / "munge.key").write_bytes(self.tag.encode() * 32)

    def _wait(self):
        deadline, said = time.monotonic() + UP_S, ""
        while time.monotonic() < deadline:
            try:
                said = self.run("h0", "sinfo", "-h", "-o", "%n %T", "-N")
            except subprocess.CalledProcessError as error:
                said = error.stderr
            if said.split()[1::2] == ["idle"] * len(self.names):
                return
            time.sleep(0.1)
        logs = self.run("h0", "bash", "-c", "tail -n 20 /run/*.log")
        raise RuntimeError(f"SLURM is not up after {UP_S:.0f} s: {said}\n{logs}")

    def end_of(self, job, limit_s) -> str:
        """The state that a job ends in. `sbatch --wait` looks after 2, 8, 18, 32 s and so on."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            found = re.search(r"JobState=(\w+)", self.run("h0", "scontrol", "show", "job", job))[1]
            if found not in GOING:
                return found
            time.sleep(0.1)
        raise RuntimeError(f"job {job} has not ended after {limit_s:.0f} s")


def main() -> int:
    at = sys.argv.index("--")
    with SlurmBed(int(sys.argv[1]), os.environ.get("BED_SHARED")) as bed:
        env = os.environ | {"BED_SSH_CONFIG": str(bed.ssh_config)}
        return subprocess.run(bed.inside("h0", *sys.argv[at + 1 :]), env=env).returncode


if __name__ == "__main__":
    sys.exit(main())

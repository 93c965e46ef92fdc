"""Starts jobs at two sites of a test bed, for tests/sites_acceptance.py."""

import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import xla_flags
from launch_scene import ROOT, Launched

import runs
from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.sites.ledger import Round, read_ledger

SITES = ("new_york", "asuncion")
HOSTS = 3
# Which hosts a site has; the name says which site has two.
LAYOUTS = {
    "one_each": (["h0"], ["h1"]),
    "two_first": (["h0", "h2"], ["h1"]),
    "two_second": (["h0"], ["h1", "h2"]),
}
ONE_WAY_MS = 75.0
TRAINER = "-m tests.sites_faulty"
MODEL = {"L": 2, "D": 128, "H": 2, "G": 2, "K": 64, "F": 384}
FLAGS = {
    **{f"model.{name}": size for name, size in MODEL.items()},
    "data.batch": 4,
    "mesh.replica": -1,
    "mesh.fsdp": 1,
    "data.seq_len": 64,
    "sample.tokens": 0,
    "compile_cache": "/tmp/xla",
    "log_every": 1,
}


class SitesScene:
    """Starts named jobs. Run directories are in the hosts' /mnt/shared, which is `shared` here.

    Args:
        bed: a relayed Bed of two hosts.
        folder: for inventories, logs and run directories.
        shared: what the hosts see as /mnt/shared.
    """

    def __init__(self, bed, folder: Path, shared: Path):
        self.bed, self.folder, self.shared = bed, folder, shared
        self.text = runs.write_text(folder)
        self.inventories = {}
        for layout, hosts_of in LAYOUTS.items():
            files = [
                bed.inventory(folder / f"{site}-{layout}.toml", only=hosts, site=site)
                for site, hosts in zip(SITES, hosts_of, strict=True)
            ]
            self.inventories[layout] = ",".join(map(str, files))
        self.env = os.environ | {"JAXTRAIN_JOBS": str(folder / "jobs"), "PYTHONPATH": str(ROOT)}
        self.env["XLA_FLAGS"] = f"{xla_flags.QUICK} --xla_cpu_multi_thread_eigen=false"
        self.env["XDG_RUNTIME_DIR"] = str(bed.folder)
        for host in bed.names:
            bed.run(host, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=bbr")

    def set_link(self, mbit: float) -> None:
        """Sets what is between h1, of the second site, and h0, of the first one."""
        self.bed.link("h0", "h1", delay_ms=ONE_WAY_MS, rate_mbit=mbit)

    def cut(self, layout: str = "one_each") -> None:
        """Cuts all links between the sites."""
        self._set_up(layout, False)

    def heal(self, layout: str = "one_each") -> None:
        self._set_up(layout, True)

    def _set_up(self, layout: str, up: bool) -> None:
        first, second = LAYOUTS[layout]
        for a, b in itertools.product(first, second):
            self.bed.link(a, b, up=up)

    def run(self, name: str, *argv: object) -> Launched:
        """Starts launch.run with these arguments; its output is in NAME.out."""
        command = [sys.executable, "-m", "launch.run", *map(str, argv)]
        return Launched(command, self.folder / f"{name}.out", self.env)

    def launch(self, name: str, layout: str = "one_each", **values: object) -> Launched:
        """Starts a job at both sites; `__` in the name of a flag stands for a dot."""
        flags = FLAGS | {key.replace("__", "."): value for key, value in values.items()}
        where = [f"--for={s}:--config.workdir=/mnt/shared/{name}-{s}" for s in SITES]
        common = [
            f"--sites={self.inventories[layout]}",
            f"--ssh_config={self.bed.ssh_config}",
            "--backoff_s=1",
        ]
        common += ["--module=tests.sites_faulty", "--env=XLA_FLAGS", *where]
        flags = [f"--config.{key}={value}" for key, value in flags.items()]
        text = f"--config.data.text={self.text}"
        return self.run(name, *common, "--", "--config=configs/debug.py", text, *flags)

    def workdir(self, name: str, site: str) -> Path:
        return self.shared / f"{name}-{site}"

    def ledger(self, name: str, site: str) -> list[Round]:
        return read_ledger(self.workdir(name, site) / "sites.jsonl")

    def times(self, name: str, site: str) -> dict[int, float]:
        """Returns {step: UTC seconds when it was logged}."""
        path = self.workdir(name, site) / "metrics.jsonl"
        records = read_metrics(path) if path.exists() else []
        return {r["step"]: r["time"] for r in records if "train/loss_nats" in r}

    def wait_for(self, launched: Launched, what, limit_s: float = 300) -> None:
        """Waits until what() is true while the launcher runs."""
        deadline_s = time.monotonic() + limit_s
        while not what():
            if time.monotonic() > deadline_s or launched.process.poll() is not None:
                raise AssertionError(f"it was not reached:\n{launched.output()[-3000:]}")
            time.sleep(0.05)

    def bits(self, name: str, site: str) -> list:
        """Returns the last checkpoint's step and its record of every leaf: dtype, shape, digest."""
        folder = self.workdir(name, site) / "checkpoints"
        step = max(int(path.name) for path in folder.iterdir())
        record = json.loads((folder / str(step) / "record" / "metadata").read_text())
        return [step, record["leaves"]]

    def weights(self, name: str, site: str) -> list:
        """Returns those of bits() that must be equal at all sites: parameters and outer state."""
        step, leaves = self.bits(name, site)
        shared = ("params", "sites.reference", "sites.momentum")
        return [step, {path: leaf for path, leaf in leaves.items() if path.startswith(shared)}]

    def pids(self, host: str, part: str) -> list[int]:
        return [pid for pid, line in self.bed.processes(host).items() if part in line]

    def kill_trainer(self, host: str) -> None:
        pids = self.pids(host, TRAINER)
        assert pids, f"no trainer runs on {host}"
        for pid in pids:
            self.bed.run(host, "kill", "-KILL", pid)

    def sent_bytes(self) -> int:
        """Returns what the link has carried from the first site to the second."""
        return self.bed.traffic()["h0 > h1"]["bytes"]

    def lost_packets(self) -> int:
        """Returns how many packets between the first two hosts were lost because of a cut."""
        traffic = self.bed.traffic()
        return traffic["h0 > h1"]["lost"] + traffic["h1 > h0"]["lost"]

    def job(self, launched: Launched) -> str:
        match = re.search(r"job (\S+): stands for", launched.output())
        assert match, launched.output()
        return match[1]

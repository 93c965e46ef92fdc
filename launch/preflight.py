"""Everything that can be known to go wrong, looked at on all hosts at once before a job starts."""

import json
import secrets
import statistics
import time
from typing import NamedTuple

from launch.fleet import Fleet, HostError
from launch.host import logout

SKEW_S = 1.0
DISK_BYTES, MEMORY_BYTES, SHM_BYTES, OPEN_FILES = 10 << 30, 2 << 30, 64 << 20, 1024
SLOW_WINDOW = 0.5  # share of a link's bytes in flight that one default TCP stream must hold
NETWORK_FILES = ("nfs", "nfs4", "cifs", "lustre", "fuse.sshfs", "ceph", "gpfs", "beegfs")
CLOCK_ROUNDS = 3
LOGOUT = {
    logout.LINGER: "systemd would end the job at logout (KillUserProcesses=yes): run `loginctl "
    "enable-linger` there once",
    logout.ENDS: "systemd would end the job at logout (KillUserProcesses=yes), and there is no "
    "systemd-run to keep it: ask for KillExcludeUsers= with this user",
}


class Finding(NamedTuple):
    host: str
    check: str
    value: str
    problem: str = ""  # what to do; "" where all is well
    fatal: bool = True


def preflight(fleet: Fleet, port: int, shared="", burst_s=0.3, build=False) -> list[Finding]:
    """Looks at every host and at the network between them.

    Args:
        port: that the supervisors will meet on, on the first host.
        shared: folder that all hosts must see as one; "" where none need be.
        burst_s: seconds of traffic for each pair of hosts.
        build: packages will be built on the hosts: those that are there now do not matter.
    """
    nonce, first = secrets.token_hex(8), fleet.hosts[0]

    def look(host):
        own = {"port": port, "nonce": nonce} if host == first else {"port": 0, "nonce": ""}
        return _facts(fleet, host, own | {"shared": shared})

    facts = fleet.everywhere(look)
    findings = [Finding(h.name, "reach", "", str(f)) for h, f in facts.items() if _failed(f)]
    reached = {host: found for host, found in facts.items() if not _failed(found)}
    for found in reached.values() if build else ():
        found["versions"] = {"jax": "to be built"}
    for host, found in reached.items():
        findings += judge(host, found, port)
    findings += agreement(reached)
    if len(reached) == len(fleet.hosts) and not any(f.problem and f.fatal for f in findings):
        findings += network(fleet, nonce, shared, burst_s)
    return findings


def _failed(found) -> bool:
    return isinstance(found, HostError)


def _facts(fleet, host, request) -> dict:
    """Facts of one host, with its clock's lead over this one's: of the quickest of three rounds."""
    process = fleet.open(host, {"op": "facts", "address": host.address} | request)
    line = process.stdout.readline()
    if not line:
        process.wait()
        return fleet.answer(host, [], process.stderr.read(), process.returncode)
    found, rounds = fleet.answer(host, [line], b"", 0), []
    for _ in range(CLOCK_ROUNDS):
        sent = time.time()
        process.stdin.write(b"t\n")
        process.stdin.flush()
        there = json.loads(process.stdout.readline())["ok"]["time"]
        back = time.time()
        rounds.append((back - sent, there - (sent + back) / 2))
    process.communicate()
    found["rtt_s"], found["skew_s"] = min(rounds)
    return found


def judge(host, found: dict, port: int) -> list[Finding]:
    """Findings of one host's facts."""
    make = lambda check, value, problem="", fatal=True: Finding(
        host.name, check, value, problem, fatal
    )
    gib = lambda count: f"{count / 2**30:.0f} GiB"
    skew, chips = abs(found["skew_s"]), [gpu["name"] for gpu in found["gpus"]]
    named = all(host.chip.lower() in name.lower().replace(" ", "") for name in chips)
    soft, hard = found["open_files"]
    return [
        make("reach", f"{found['rtt_s'] * 1e3:.0f} ms"),
        make("clock", f"{found['skew_s'] * 1e3:+.0f} ms", "set its clock (NTP)" * (skew > SKEW_S)),
        make(
            "python",
            found["python"],
            "" if "jax" in found["versions"] else f"install the project for {found['executable']}",
        ),
        make(
            "gpus",
            f"{len(chips)} {chips[0] if chips else ''}".strip(),
            ""
            if len(chips) == host.gpus and (not host.chip or named)
            else f"the inventory says {host.gpus} {host.chip}: correct it or the host",
        ),
        make("disk", gib(found["disk_free_bytes"]), _short(found["disk_free_bytes"], DISK_BYTES)),
        make(
            "filesystem",
            found["local_disk"],
            "workdir must be on a local disk" * (found["local_disk"] in NETWORK_FILES),
        ),
        make("memory", gib(found["memory_bytes"]), _short(found["memory_bytes"], MEMORY_BYTES)),
        make("shm", gib(found["shm_bytes"]), _short(found["shm_bytes"], SHM_BYTES), False),
        make("files", str(soft), f"raise ulimit -n (hard {hard})" * (soft < OPEN_FILES), False),
        make(
            "proxies",
            " ".join(found["proxies"]) or "none",
            "unset them for the job: gRPC would hang" * bool(found["proxies"]),
        ),
        make(
            "address",
            host.address,
            "" if found["has_address"] else "no such address on it: correct the inventory",
        ),
        make("port", str(port), "" if found["port_free"] else "in use: start again for another"),
        make("tcp", found["sysctls"]["congestion"]),
        make("logout", found["logout"], LOGOUT.get(found["logout"], "")),
        make("shared", "", found["nonce_error"]),
    ]


def _short(found: int, least: int) -> str:
    return f"at least {least / 2**30:.3g} GiB is needed" if found < least else ""


def agreement(facts: dict) -> list[Finding]:
    """What must be the same everywhere: Python's minor version, packages, driver."""
    rows = {}
    for host, found in facts.items():
        row = dict(found["versions"])
        if "python" in found:
            row["python"] = found["python"].rpartition(".")[0]
            row["driver"] = found["gpus"][0]["driver"] if found["gpus"] else "none"
        rows[host.name] = row
    findings = []
    for name in sorted({name for row in rows.values() for name in row}):
        values = {host: row.get(name, "absent") for host, row in rows.items()}
        if len(set(values.values())) > 1:
            text = ", ".join(f"{host} {value}" for host, value in values.items())
            findings.append(Finding("all", name, text, "install the same everywhere"))
    return findings


def network(fleet, nonce, shared, burst_s) -> list[Finding]:
    """Round trips and throughput of every pair, and who reads the shared folder's nonce."""
    findings, mesh = [], Mesh(fleet, nonce, shared)
    try:
        for host, saw in mesh.saw_nonce.items():
            if saw is False:
                problem = "the hosts do not share it: --config.checkpoint.storage=host0"
                findings.append(Finding(host.name, "shared", shared, problem))
        for pair in mesh.measure(streams=1, seconds=burst_s, pings=5):
            if "error" in pair:
                problem = f"{pair['error']}: open the training network between them"
                findings.append(Finding(pair["from"], f"to {pair['to']}", "", problem))
                continue
            rtt = statistics.median(pair["rtt_s"]) * 1e3
            rate = f", {pair['bytes_per_s'] * 8e-6:,.0f} Mbit/s" if burst_s else ""
            findings.append(Finding(pair["from"], f"to {pair['to']}", f"{rtt:.2f} ms{rate}"))
    finally:
        mesh.close()
    return findings


class Mesh:
    """A measuring process on every host, all listening."""

    def __init__(self, fleet, nonce="", shared=""):
        self.hosts, self.saw_nonce, self._ports = fleet.hosts, {}, {}
        request = {"op": "net", "token": secrets.token_hex(16), "nonce": nonce, "shared": shared}
        start = lambda host: fleet.open(host, request | {"address": host.address})
        self._processes = fleet.everywhere(start)
        for host, process in self._processes.items():
            line = process.stdout.readline()
            found = fleet.answer(host, [line] if line else [], b"no measuring process", 1)
            self._ports[host], self.saw_nonce[host] = found["ready"], found["saw_nonce"]

    def measure(self, streams, seconds, pings=20, both=False) -> list[dict]:
        """One dict a directed pair; pairs that share no host are measured at the same time."""
        found = []
        for pairs in rounds(len(self.hosts)):
            for i, j in pairs:
                peer = [self.hosts[j].address, self._ports[self.hosts[j]]]
                order = {"peer": peer, "streams": streams, "seconds": seconds, "pings": pings}
                order |= {"both": both, "interface": self.hosts[i].interface}
                process = self._processes[self.hosts[i]]
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
            for i, j in pairs:
                line = self._processes[self.hosts[i]].stdout.readline()
                names = {"from": self.hosts[i].name, "to": self.hosts[j].name}
                answer = json.loads(line)["ok"] if line else {"error": "it stopped answering"}
                found.append(names | {"streams": streams, "both": both} | answer)
        return found

    def close(self):
        for process in self._processes.values():
            process.stdin.close()
            process.kill()
            process.wait()


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All ordered pairs of `count` hosts, in rounds in which each sends once and receives once."""
    return [[(i, (i + step) % count) for i in range(count)] for step in range(1, count)]


def table(findings) -> str:
    """One line a check: its values by host, then the problems with what to do."""
    checks: dict = {}
    for finding in findings:
        checks.setdefault(finding.check, []).append(finding)
    lines = []
    for check, found in checks.items():
        values = sorted({f.value for f in found if f.value})
        bad = [f for f in found if f.problem]
        mark = "FAIL" if any(f.fatal for f in bad) else "warn" if bad else "ok"
        each = values[0] if len(values) == 1 else ", ".join(f"{f.host} {f.value}" for f in found)
        lines.append(f"{mark:4}  {check:12} {each if values else ''}".rstrip())
        lines += [f"      {f.host}: {f.problem}" for f in bad]
    return "\n".join(lines)

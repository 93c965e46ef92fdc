"""Everything that can be known to go wrong, looked at on all hosts at once before a job starts."""

import re
import secrets
import statistics
from typing import NamedTuple

from launch.host import logout
from launch.network import Mesh
from launch.ssh import Fleet, HostError

SKEW_S = 1.0
DISK_BYTES, MEMORY_BYTES, SHM_BYTES, OPEN_FILES = 10 << 30, 2 << 30, 64 << 20, 1024
SLOW_STREAM_BYTES_PER_S = 125e6  # a pair whose one TCP stream can do no more is warned of
BURST_TRIPS = 20  # round trips that a burst must last to have left TCP's slow start
NETWORK_FILES = ("nfs", "nfs4", "cifs", "lustre", "fuse.sshfs", "ceph", "gpfs", "beegfs")
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
        burst_s: seconds of traffic for each pair of hosts; none where that is too short to tell.
        build: packages will be built on the hosts: those that are there now do not matter.
    """
    nonce, first = secrets.token_hex(8), fleet.hosts[0]

    def look(host):
        own = {"port": port, "nonce": nonce} if host == first else {"port": 0, "nonce": ""}
        return {"op": "facts", "shared": shared} | own

    mesh = Mesh(fleet, look)  # one request a host: from afar, each costs several round trips
    try:
        answers = fleet.everywhere(mesh.look)
        lost = {host: said for host, said in answers.items() if isinstance(said, HostError)}
        findings = [Finding(host.name, "reach", "", str(error)) for host, error in lost.items()]
        facts = {host: found for host, found in answers.items() if host not in lost}
        for found in facts.values() if build else ():
            found |= {"versions": {"jax": "to be built"}, "to_build": True}
        for host, found in facts.items():
            findings += judge(host, found, port)
        findings += agreement(facts)
        if not any(finding.problem and finding.fatal for finding in findings):
            findings += network(mesh, nonce, shared, burst_s)
        return findings
    finally:
        mesh.close()


def judge(host, found: dict, port: int) -> list[Finding]:
    """Findings of one host's facts."""
    make = lambda check, value, problem="", fatal=True: Finding(
        host.name, check, value, problem, fatal
    )
    gib = lambda count: f"{count / 2**30:.0f} GiB"
    skew, chips = abs(found["skew_s"]), [gpu["name"] for gpu in found["gpus"]]
    plugin = "" if found.get("to_build") else lacks_plugin(host, found["versions"])
    named = all(is_chip(name, host.chip) for name in chips)
    soft, hard = found["open_files"]
    return [
        make("reach", f"{found['rtt_s'] * 1e3:.0f} ms"),
        make("clock", f"{found['skew_s'] * 1e3:+.0f} ms", "set its clock (NTP)" * (skew > SKEW_S)),
        make(
            "python",
            found["python"],
            plugin
            if "jax" in found["versions"]
            else f"install the project for {found['executable']}",
        ),
        make(
            "gpus",
            f"{len(chips)} {chips[0] if chips else ''}".strip(),
            ""
            if len(chips) == host.gpus and (not host.chip or named)
            else found["gpus_error"]
            or f"the inventory says {host.gpus} {host.chip}: correct it or the host",
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
            "rsync",
            "there" if found["rsync"] else "absent",
            "install rsync: code comes by it" * (not found["rsync"]),
        ),
        *_judge_network(make, host, found, port),
        make("logout", found["logout"], LOGOUT.get(found["logout"], "")),
        make("shared", "", found["nonce_error"]),
    ]


def is_chip(name: str, chip: str) -> bool:
    """Whether whole words of a GPU's name are the chip: "a40" is no "RTX A4000"."""
    cut = lambda text: re.findall("[a-z0-9]+", text.lower())
    words, wanted = cut(name), "".join(cut(chip))
    ends = range(len(words) + 1)
    return any("".join(words[i:j]) == wanted for i in ends for j in ends)


def _judge_network(make, host, found: dict, port: int) -> list[Finding]:
    return [
        make(
            "address",
            host.address,
            "" if found["has_address"] else "no such address on it: correct the inventory",
        ),
        make("interface", host.interface or found["interface"], _misplaced(host, found)),
        make(
            "own name",
            found["own_address"] or "unknown",
            f"gloo (JAX on CPU) takes it, not {host.address}: correct /etc/hosts"
            * (host.gpus == 0 and found["own_address"] != host.address),
            False,
        ),
        make("port", str(port), "" if found["port_free"] else "in use: start again for another"),
        make("tcp", found["sysctls"]["congestion"]),
    ]


def _misplaced(host, found: dict) -> str:
    """What is wrong with the stated interface."""
    named, holds = host.interface, found["interface"]
    if named and named not in found["interfaces"]:
        return f"no such interface among {' '.join(found['interfaces'])}: correct the inventory"
    elsewhere = f"{host.address} is on {holds}, not on {named}: correct one of the two"
    return elsewhere * bool(named and holds and named != holds)


def lacks_plugin(host, versions) -> str:
    """What to do on a host with GPUs where JAX has no plugin for them; "" where all is well."""
    has = any(name.startswith("jax-cuda") and name.endswith("-plugin") for name in versions)
    text = "JAX has no CUDA plugin there: install jaxtrain[cuda], or build with --env_extras=cuda"
    return text * (host.gpus > 0 and not has)


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


def network(mesh, nonce, shared, burst_s) -> list[Finding]:
    """Round trips and throughput of every pair, and who reads the shared folder's nonce."""
    findings = []
    for host, saw in (mesh.read(shared, nonce) if shared else {}).items():
        if not saw.get("same"):
            apart = "the hosts do not share it: --config.checkpoint.storage=host0"
            problem = saw.get("error") or apart
            findings.append(Finding(host.name, "shared", shared, problem))
    for pair in mesh.measure(streams=1, seconds=burst_s, pings=3, least_trips=BURST_TRIPS):
        name, check = pair["from"], f"to {pair['to']}"
        if "error" in pair:
            problem = f"{pair['error']}: open the training network between them"
            findings.append(Finding(name, check, "", problem))
            continue
        rtt_s, most = statistics.median(pair["rtt_s"]), mesh.stream_bytes_per_s(pair)
        text = f"one stream at most {most * 8e-6:,.0f} Mbit/s by its TCP buffers"
        slow = f"{text}: raise net.ipv4.tcp_rmem and tcp_wmem" * (most < SLOW_STREAM_BYTES_PER_S)
        rate = f", {pair['bytes_per_s'] * 8e-6:,.0f} Mbit/s" if "bytes_per_s" in pair else ""
        findings.append(Finding(name, check, f"{rtt_s * 1e3:.2f} ms{rate}", slow, False))
    return findings


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

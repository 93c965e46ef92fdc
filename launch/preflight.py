"""Checks every host, and the network between them, for what could make a job fail."""

import collections
import re
import secrets
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launch.answers import COUNT, Range
from launch.host import logout
from launch.inventory import Host
from launch.network import FIRST, NetworkAgents
from launch.ssh import HostError, SshClient
from launch.terminal import visible

Facts = Mapping[str, Any]  # what launch.host.facts.gather_facts returns, and the clock
MAX_SKEW_S = 1.0  # a larger one misleads readers of logs; no decision depends on it
DISK_BYTES, MEMORY_BYTES, SHM_BYTES, OPEN_FILES = 10 << 30, 2 << 30, 64 << 20, 1024
SLOW_STREAM_BYTES_PER_S = 125e6  # warn if one TCP stream cannot be this fast
BURST_TRIPS = 20  # a burst of this many round trips gets past TCP's slow start
NETWORK_FILES = ("nfs", "nfs4", "cifs", "lustre", "fuse.sshfs", "ceph", "gpfs", "beegfs")
LOGOUT_PROBLEMS = {
    logout.LINGER: "systemd would end the job at logout (KillUserProcesses=yes): run `loginctl "
    "enable-linger` there once",
    logout.ENDS: "systemd would end the job at logout (KillUserProcesses=yes), and systemd-run is "
    "not installed: ask the administrator for KillExcludeUsers= with this user",
}

# {package: version}: the names become checks of the table of findings
VERSIONS = {re.compile("[A-Za-z0-9._-]{1,100}"): re.compile("[!-~]{1,100}")}
SIZES = re.compile("[0-9 ]{0,60}")  # in bytes, as sysctl prints them
FACTS = FIRST | {
    **dict.fromkeys(("own_address", "python", "executable", "local_disk", "logout"), str),
    **dict.fromkeys(("gpus_error", "interface", "nonce_error"), str),
    **dict.fromkeys(("cpus", "memory_bytes", "disk_free_bytes", "shm_bytes"), COUNT),
    "versions": VERSIONS,
    "gpus": [{"name": str, "driver": str, "memory_mib": COUNT}],
    "open_files": [Range(int, -1, 1 << 62), 2],  # -1: unlimited
    "proxies": [str],
    "interfaces": {str: [str]},
    "has_address": bool,
    "port_free": bool,
    "sysctls": {"congestion": str, "tcp_rmem": SIZES, "tcp_wmem": SIZES},
}


class Finding(NamedTuple):
    """The result of one check on one host."""

    host: str
    check: str
    value: str
    problem: str = ""  # what is wrong and what to do; "" if nothing is
    fatal: bool = True  # a problem aborts the launch

    @property
    def aborts(self) -> bool:
        return bool(self.problem) and self.fatal


def preflight(
    client: SshClient, port: int, shared: str = "", burst_s: float = 0.3, build: bool = False
) -> list[Finding]:
    """Checks every host and the network between them.

    Args:
        port: where the first host's supervisor will listen.
        shared: folder that all hosts must share; "" if they need not.
        burst_s: seconds of traffic for each pair of hosts. None is sent between hosts so far apart
            that it would not show the throughput, see BURST_TRIPS.
        build: packages will be built on the hosts, so the installed ones do not matter.
    """
    nonce, first = secrets.token_hex(8), client.hosts[0]

    def facts_request(host: Host) -> dict[str, Any]:
        values = {"port": port, "nonce": nonce} if host == first else {"port": 0, "nonce": ""}
        return {"op": "facts", "shared": shared} | values

    # One connection per host for everything: over a long link each one costs several round trips.
    with NetworkAgents(client, facts_request, FACTS) as agents:
        answers = client.map(agents.answer_with_clock)
        findings, facts_of = [], {}
        for host, answer in answers.items():
            if isinstance(answer, HostError):
                findings.append(Finding(host.name, "reach", "", str(answer)))
                continue
            if build:
                answer |= {"versions": {"jax": "to be built"}, "to_build": True}
            facts_of[host] = answer
        for host, facts in facts_of.items():
            findings += judge_host(host, facts, port)
        findings += differences(facts_of)
        if not any(finding.aborts for finding in findings):
            findings += judge_network(agents, nonce, shared, burst_s)
        return findings


def judge_host(host: Host, facts: Facts, port: int) -> list[Finding]:
    """Returns the findings about one host's facts."""
    findings = []

    def check(name: str, value: str, failed: bool = True, problem: str = "", fatal: bool = True):
        findings.append(Finding(host.name, name, value, problem if failed else "", fatal))

    def check_size(name: str, count: int, least: int, fatal: bool = True):
        problem = f"at least {least / 2**30:.3g} GiB is needed"
        check(name, f"{count / 2**30:.0f} GiB", count < least, problem, fatal)

    chips, skew_s = [gpu["name"] for gpu in facts["gpus"]], facts["skew_s"]
    soft, hard = facts["open_files"][:2]
    proxies, disk, own_address = facts["proxies"], facts["local_disk"], facts["own_address"]
    check("reach", f"{facts['rtt_s'] * 1e3:.0f} ms")
    skew = f"{skew_s * 1e3:+.0f} ms" if abs(skew_s) < 1 else f"{skew_s:+,.1f} s"
    set_it = "it differs from this machine's, so times in logs mislead: correct the wrong one (NTP)"
    check("clock", skew, abs(skew_s) > MAX_SKEW_S, set_it, fatal=False)
    check("python", facts["python"], problem=_python_problem(host, facts))
    gpus = f"{len(chips)} {chips[0]}" if chips else "0"
    check("gpus", gpus, problem=_gpu_problem(host, facts))
    check_size("disk", facts["disk_free_bytes"], DISK_BYTES)
    check("filesystem", disk, disk in NETWORK_FILES, "workdir must be on a local disk")
    check_size("memory", facts["memory_bytes"], MEMORY_BYTES)
    check_size("shm", facts["shm_bytes"], SHM_BYTES, fatal=False)
    raise_limit = f"raise ulimit -n (hard limit {hard})"
    check("files", str(soft), 0 <= soft < OPEN_FILES, raise_limit, fatal=False)
    check("proxies", " ".join(proxies) or "none", bool(proxies), "unset them: gRPC would hang")
    no_address = "the host does not have this address: correct the inventory"
    check("address", host.address, not facts["has_address"], no_address)
    interface = host.interface or facts["interface"]
    check("interface", interface, problem=_interface_problem(host, facts))
    gloo_elsewhere = host.gpus == 0 and own_address != host.address
    correct_name = f"gloo (JAX on CPU) would use it, not {host.address}: correct /etc/hosts"
    check("own name", own_address or "unknown", gloo_elsewhere, correct_name, fatal=False)
    check("port", str(port), not facts["port_free"], "in use: start again, which picks another")
    check("tcp", facts["sysctls"]["congestion"])
    check("logout", facts["logout"], problem=LOGOUT_PROBLEMS.get(facts["logout"], ""))
    check("shared", "", problem=facts["nonce_error"])
    return findings


def _python_problem(host: Host, facts: Facts) -> str:
    if "jax" not in facts["versions"]:
        return f"install the project for {facts['executable']}"
    return "" if facts.get("to_build") else plugin_problem(host, facts["versions"])


def plugin_problem(host: Host, versions: Mapping[str, str]) -> str:
    """Returns what to do if a host has GPUs and JAX no plugin for them; "" if all is well."""
    has_plugin = any(name.startswith("jax-cuda") and name.endswith("-plugin") for name in versions)
    if has_plugin or not host.gpus:
        return ""
    return "JAX has no CUDA plugin there: install jaxtrain[cuda], or build with --env_extras=cuda"


def _gpu_problem(host: Host, facts: Facts) -> str:
    names = [gpu["name"] for gpu in facts["gpus"]]
    if len(names) == host.gpus and all(not host.chip or is_chip(n, host.chip) for n in names):
        return ""
    expected = f"{host.gpus} {host.chip}".strip()
    return facts["gpus_error"] or f"the inventory says {expected}: correct it or the host"


def is_chip(name: str, chip: str) -> bool:
    """Returns whether whole words of a GPU's name spell the chip: "a40" is not in "RTX A4000"."""
    words_of = lambda text: re.findall("[a-z0-9]+", text.lower())
    words, wanted = words_of(name), "".join(words_of(chip))
    ends = range(len(words) + 1)
    return any("".join(words[i:j]) == wanted for i in ends for j in ends)


def _interface_problem(host: Host, facts: Facts) -> str:
    named, actual = host.interface, facts["interface"]
    if named and named not in facts["interfaces"]:
        return f"no such interface among {' '.join(facts['interfaces'])}: correct the inventory"
    if named and actual and named != actual:
        return f"{host.address} is on {actual}, not on {named}: correct one of the two"
    return ""


def differences(facts_of: Mapping[Host, Facts]) -> list[Finding]:
    """Returns a finding for each version (Python, package, driver) that differs between hosts.

    It names the hosts that differ from most.
    """
    versions_of = {}
    for host, facts in facts_of.items():
        versions = dict(facts["versions"])
        if "python" in facts:
            versions["python"] = facts["python"].rpartition(".")[0]  # the patch may differ
            versions["driver"] = facts["gpus"][0]["driver"] if facts["gpus"] else "none"
        versions_of[host.name] = versions
    findings = []
    for name in sorted({name for versions in versions_of.values() for name in versions}):
        by_host = {host: versions.get(name, "absent") for host, versions in versions_of.items()}
        [(usual, _), *others] = collections.Counter(by_host.values()).most_common()
        if others:
            text = ", ".join(f"{host} {version}" for host, version in by_host.items())
            odd = " ".join(host for host, version in by_host.items() if version != usual)
            findings.append(Finding(odd, name, text, "install the same on every host"))
    return findings


def judge_network(agents: NetworkAgents, nonce: str, shared: str, burst_s: float) -> list[Finding]:
    """Returns the findings about the shared folder and about every pair of hosts."""
    findings = []
    for host, answer in (agents.read_nonce(shared, nonce) if shared else {}).items():
        if answer.get("same") is not True:
            not_shared = "the hosts do not share it: set --config.checkpoint.storage=host0"
            problem = answer.get("error") or not_shared
            findings.append(Finding(host.name, "shared", shared, problem))
    for pair in agents.measure(streams=1, seconds=burst_s, pings=3, least_trips=BURST_TRIPS):
        name, check = pair["from"], f"to {pair['to']}"
        if "error" in pair:
            problem = f"{pair['error']}: open the training network between them"
            findings.append(Finding(name, check, "", problem))
            continue
        text = f"{statistics.median(pair['rtt_s']) * 1e3:.2f} ms"
        if "bytes_per_s" in pair:
            text += f", {pair['bytes_per_s'] * 8e-6:,.0f} Mbit/s"
        limit, problem = agents.stream_limit_bytes_per_s(pair), ""
        if limit < SLOW_STREAM_BYTES_PER_S:
            problem = f"TCP buffers limit one stream to {limit * 8e-6:,.0f} Mbit/s"
            problem += ": raise net.ipv4.tcp_rmem and tcp_wmem"
        findings.append(Finding(name, check, text, problem, fatal=False))
    return findings


def format_findings(findings: Sequence[Finding]) -> str:
    """Returns a table: a line per check with its value on each host, then its problems."""
    by_check: dict[str, list[Finding]] = {}
    for finding in findings:
        by_check.setdefault(finding.check, []).append(finding)
    lines = []
    for check, group in by_check.items():
        values = sorted({visible(finding.value) for finding in group if finding.value})
        text = ", ".join(f"{f.host} {visible(f.value)}" for f in group) if values else ""
        if len(values) == 1:
            text = values[0]
        problems = [finding for finding in group if finding.problem]
        mark = "FAIL" if any(f.aborts for f in problems) else "warn" if problems else "ok"
        lines.append(f"{mark:4}  {visible(check):12} {text}".rstrip())
        lines += [f"      {finding.host}: {visible(finding.problem)}" for finding in problems]
    return "\n".join(lines)

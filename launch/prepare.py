"""Between code that has arrived and a job that starts: packages built, data compared."""

import collections
import os
import sys
import time
from pathlib import Path

from launch.follow import note
from launch.job import TRAINER
from launch.preflight import Finding, agreement, lacks_plugin, table
from launch.ssh import HostError

BUILD_S = 1800.0  # for pip, on a slow line
GLANCE_S = 300.0


def read_env(pairs) -> dict:
    """{name: value} of --env's NAME=VALUE, or NAME, of this machine. Raises ValueError."""
    env = dict(pair.partition("=")[::2] for pair in pairs if "=" in pair)
    for name in (pair for pair in pairs if "=" not in pair):
        if name not in os.environ:
            raise ValueError(f"--env={name} must be set here, or be --env={name}=VALUE.")
        env[name] = os.environ[name]
    return env


def read_constraints(path: str) -> str:
    """The text of --env_build; "" where none is named. Raises ValueError."""
    try:
        return Path(path).read_text() + "\n" if path else ""
    except OSError as error:
        raise ValueError(f"--env_build must name a file of pip constraints: {error}.") from None


def show(findings) -> None:
    """Prints what was looked at. Raises HostError where it lets no job start."""
    print(table(findings), file=sys.stderr)
    if any(finding.problem and finding.fatal for finding in findings):
        raise HostError("preflight: nothing was started. What FAILs above says what to do.")


def prepare(fleet, job, code) -> None:
    """Packages and data, once the code is there."""
    record, clock = job.record, time.monotonic()
    if record.get("env_build"):
        try:
            pyproject = (code.root / "pyproject.toml").read_text()
        except OSError as error:
            raise ValueError(f"--env_build needs the code's pyproject.toml: {error}.") from None
        pythons = build_environments(fleet, record["env_build"], pyproject, record["env_extras"])
        job.change(pythons=pythons)
        note(f"packages are on every host, {time.monotonic() - clock:.1f} s")
    if record["argv"][2] == TRAINER:
        clock = time.monotonic()
        findings = compare_data(fleet, job)
        note(f"data was looked at on every host, {time.monotonic() - clock:.1f} s")
        show(findings)


def build_environments(fleet, constraints: str, pyproject: str, extras) -> dict:
    """{host name: its Python}, with the same versions of all packages everywhere.

    Args:
        constraints: pip's, as text; pyproject: of the code, as text; extras: names in it.

    Raises:
        HostError: pip failed on a host, with its last lines, versions differ, or a host with GPUs
            was built without JAX's plugin for them.
    """
    request = {"op": "build", "constraints": constraints, "pyproject": pyproject}
    request |= {"extras": list(extras)}
    built = fleet.ask(dict.fromkeys(fleet.hosts, request), BUILD_S)
    failed = [str(answer) for answer in built.values() if isinstance(answer, HostError)]
    if failed:
        raise HostError("\n".join(failed))
    bare = {host.name: lacks_plugin(host, found["versions"]) for host, found in built.items()}
    if any(bare.values()):
        raise HostError("\n".join(f"{name}: {why}" for name, why in bare.items() if why))
    alike = {host: {"versions": found["versions"]} for host, found in built.items()}
    differing = agreement(alike)
    if differing:
        rows = "; ".join(f"{finding.check}: {finding.value}" for finding in differing)
        raise HostError(f"the hosts built different packages ({rows}). Pin them in --env_build.")
    return {host.name: found["python"] for host, found in built.items()}


def compare_data(fleet, job) -> list[Finding]:
    """What each host's data is at a glance; a host that differs from most has a problem."""
    requests = {}
    for host in fleet.hosts:
        spec = job.request(host)["spec"]
        python, _, _, *flags = spec["argv"]
        own = {"python": python, "flags": flags, "env": spec["env"], "cwd": spec["cwd"]}
        requests[host] = {"op": "glance"} | own
    return judge_data(fleet.ask(requests, GLANCE_S))


def judge_data(found: dict) -> list[Finding]:
    """Findings of {host: its glance, or the HostError in its place}."""
    seen = {host: glance for host, glance in found.items() if not isinstance(glance, HostError)}
    prints = collections.Counter(glance["fingerprint"] for glance in seen.values())
    usual = prints.most_common(1)[0][0] if prints else ""  # of equal counts, the first host's
    findings = []
    for host, glance in found.items():
        if host not in seen:
            findings.append(Finding(host.name, "data", "none", str(glance)))
            continue
        value = f"{glance['files']} files, {glance['bytes']:,} bytes, {glance['fingerprint'][:12]}"
        others = " ".join(h.name for h, g in seen.items() if g["fingerprint"] == usual)
        problem = f"not the data of {others}: copy it from there" * (glance["fingerprint"] != usual)
        findings.append(Finding(host.name, "data", value, problem))
    return findings

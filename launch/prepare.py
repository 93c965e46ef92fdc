"""Prepares hosts that have the code for a job: builds packages and compares the data."""

import collections
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.answers import COUNT, Range, check
from launch.inventory import Host
from launch.job import JOB_ID, TRAINER, Job
from launch.preflight import VERSIONS, Finding, differences, format_findings, plugin_problem
from launch.ssh import HostError, SshClient, raise_errors
from launch.sync_code import Code
from launch.terminal import note, warn

BUILD_S = 1800.0  # enough for pip over a slow connection
DATA_S = 300.0
WORDS = re.compile("[ -_a-~]{0,100}")  # ASCII without `, which encloses a command
OWNER = {  # of a run directory; its job and pid become part of a command to copy
    "pid": Range(int, 1, 1 << 22),
    "host": WORDS,
    "start": WORDS,
    "job?": re.compile(f"(?:{JOB_ID.pattern})?"),
}
SUMMARY = {  # of a host's data, see jaxtrain/data/quick_fingerprint.py
    "files": COUNT,
    "bytes": COUNT,
    "fingerprint": str,
    "workdir": str,
}


def read_env(pairs: Iterable[str]) -> dict[str, str]:
    """Returns {name: value} for --env's NAME=VALUE, or NAME with this machine's value.

    Raises:
        ValueError: a NAME is empty, or has no value and is not set on this machine.
    """
    env = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name:
            raise ValueError(f"--env must be NAME or NAME=VALUE; got {pair!r}.")
        if not equals and name not in os.environ:
            raise ValueError(
                f"--env={name} must name a set variable. Set it, or write {name}=VALUE."
            )
        env[name] = value if equals else os.environ[name]
    return env


def read_constraints(path: str) -> str:
    """Returns the text of the file that --env_build names; "" without one.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return Path(path).read_text() + "\n" if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--env_build must name a file of pip constraints: {error}.") from None


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints the table of findings.

    Raises:
        HostError: one of them aborts the launch.
    """
    warn(format_findings(findings))
    if any(finding.aborts for finding in findings):
        raise HostError("preflight: nothing was started. Each FAIL above says what to do.")


def prepare(client: SshClient, job: Job, code: Code) -> dict[Host, Any]:
    """Builds the job's packages if --env_build was given, and compares the hosts' data.

    Returns:
        {host: the summary of its data}; {} for another program than the trainer.

    Raises:
        HostError: a host failed, or differs from the others.
        ValueError: the code has no pyproject.toml.
    """
    record, start = job.record, time.monotonic()
    if record.get("env_build"):
        try:
            pyproject = (code.root / "pyproject.toml").read_text()
        except OSError as error:
            raise ValueError(f"--env_build needs the code's pyproject.toml: {error}.") from None
        pythons = build_environments(client, record["env_build"], pyproject, record["env_extras"])
        job.change(pythons=pythons)
        note(f"packages are built on every host, {time.monotonic() - start:.1f} s")
    if record["argv"][2] != TRAINER:
        return {}
    start = time.monotonic()
    summaries = client.call_all(data_requests(client, job), DATA_S)
    for host, summary in summaries.items():
        try:
            _check_summary(host, summary)
        except HostError as error:
            summaries[host] = error
    findings = judge_data(summaries) + judge_directories(summaries)
    note(f"data compared on all hosts, {time.monotonic() - start:.1f} s")
    print_findings(findings)
    folders = {host.name: summary["workdir"] for host, summary in summaries.items()}
    job.change(run_directories=folders)
    return summaries


def _check_summary(host: Host, summary: Any) -> None:
    """Raises HostError if the summary is one, or does not have the shape of one."""
    if isinstance(summary, HostError):
        raise summary
    check(host, summary, SUMMARY)
    if summary.get("owner") != {}:
        check(host, summary, {"owner": OWNER})


def build_environments(
    client: SshClient, constraints: str, pyproject: str, extras: Iterable[str]
) -> dict[str, str]:
    """Builds the same packages on every host; returns {host name: its Python}.

    Args:
        constraints: the text of a file of pip constraints.
        pyproject: the text of the code's pyproject.toml.
        extras: names of its optional dependencies.

    Raises:
        HostError: pip failed on a host; versions differ; or a host with GPUs lacks JAX's plugin.
    """
    request = {"op": "build", "constraints": constraints, "pyproject": pyproject}
    request |= {"extras": list(extras)}
    built = client.call_all(dict.fromkeys(client.hosts, request), BUILD_S)
    raise_errors(built)
    for host, answer in built.items():
        check(host, answer, {"python": str, "versions": VERSIONS})
    problems = {host.name: plugin_problem(host, b["versions"]) for host, b in built.items()}
    if any(problems.values()):
        raise HostError("\n".join(f"{name}: {text}" for name, text in problems.items() if text))
    differing = differences({host: {"versions": b["versions"]} for host, b in built.items()})
    if differing:
        rows = "; ".join(f"{finding.check}: {finding.value}" for finding in differing)
        raise HostError(f"the hosts built different packages ({rows}). Pin them in --env_build.")
    return {host.name: b["python"] for host, b in built.items()}


def data_requests(client: SshClient, job: Job) -> dict[Host, dict[str, Any]]:
    """Returns {host: the request for a summary of its data}."""
    requests = {}
    for host in client.hosts:
        spec = job.request(host)["spec"]
        python, _, _, *flags = spec["argv"]  # python -m jaxtrain.train FLAGS
        request = {"op": "data", "python": python, "flags": flags}
        requests[host] = request | {"env": spec["env"], "cwd": spec["cwd"]}
    return requests


def judge_data(summaries: Mapping[Host, Any]) -> list[Finding]:
    """Returns a finding per host, with a problem if its data differs from that of most hosts.

    Args:
        summaries: {host: {"files", "bytes", "fingerprint", ...}, or the HostError in its place}.
    """
    fingerprints = {
        host: summary["fingerprint"]
        for host, summary in summaries.items()
        if not isinstance(summary, HostError)
    }
    # If two are equally frequent, most_common returns the one that comes first.
    usual = collections.Counter(fingerprints.values()).most_common(1)[0][0] if fingerprints else ""
    findings = []
    for host, summary in summaries.items():
        if isinstance(summary, HostError):
            findings.append(Finding(host.name, "data", "none", str(summary)))
            continue
        fingerprint = fingerprints[host]
        value = f"{summary['files']} files, {summary['bytes']:,} bytes, {fingerprint[:12]}"
        problem = ""
        if fingerprint != usual:
            others = " ".join(h.name for h, other in fingerprints.items() if other == usual)
            problem = f"differs from the data of {others}: copy it from there"
        findings.append(Finding(host.name, "data", value, problem))
    return findings


def judge_directories(summaries: Mapping[Host, Any]) -> list[Finding]:
    """Returns a finding per host, with a problem if another run writes to its run directory.

    Args:
        summaries: {host: {"workdir", "owner", ...}, or the HostError in its place}.
    """
    findings = []
    for host, summary in summaries.items():
        if isinstance(summary, HostError):
            continue  # judge_data reports it
        owner, problem = summary["owner"], ""
        if owner:
            job, pid = owner.get("job"), owner["pid"]
            run = f"{f'job {job}' if job else 'a run'} (pid {pid} on {owner['host']}"
            remedy = f"`python -m launch.run stop {job}`" if job else f"`kill {pid}` there"
            problem = f"{run} since {owner['start']}) writes to it: stop it with {remedy}, or set "
            problem += "another --workdir"
            if job:
                problem += "; if nothing of it runs there, another of its hosts may have the lock: "
                problem += f"if that host is down, remove .job from {summary['workdir']}"
        findings.append(Finding(host.name, "run directory", summary["workdir"], problem))
    return findings

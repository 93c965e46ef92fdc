"""Starts a job, or one at each of several sites; continues jobs that have ended."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.host.exit_codes import STOPPED
from launch.host.logout import SCOPE
from launch.host.restart_policy import Policy
from launch.inventory import Host, Inventory
from launch.job import Job, name_of, new_id, replace_in_parent, write_parent
from launch.operate import follow, refuse_while_alive
from launch.preflight import preflight
from launch.prepare import judge_data, prepare, print_findings
from launch.sites import build_sites_file, check_links, find_links
from launch.ssh import HostError, SshClient, raise_errors
from launch.stop import ask_to_stop, connect, uninterrupted
from launch.sync_code import Code, read_code, send_code
from launch.terminal import note

RESUMED = ("env", "env_build", "env_extras", "shared")  # fields that a resumed job copies
NEEDED = (*RESUMED, "argv", "ranks_per_host", "tree")  # fields without which a job cannot resume


def create(
    hosts: Iterable[Host], policy: Policy, ssh_config: str, code: Code, **record: Any
) -> Job:
    """Creates a job's record, including where its code comes from."""
    origin = {"commit": code.commit, "code": code.hash, "tree": str(code.root)}
    job = Job.create(hosts, policy, ssh_config, **record, **origin, folders={})
    (job.folder / "code.patch").write_text(code.patch)
    note(f"job {job.id}: {job.folder}")
    return job


def create_at_sites(
    sites: Mapping[str, Inventory],
    own: Mapping[str, Mapping[str, Any]],
    policy: Policy,
    ssh_config: str,
    code: Code,
    **record: Any,
) -> list[Job]:
    """Creates the record of a job at several sites, and of its job at each.

    Args:
        own: {site: what only its job's record has}, at least the program's `argv`.
    """
    parent, jobs = new_id(), []
    record |= {"parent": parent, "sites": build_sites_file(parent, sites)}
    for site, inventory in sites.items():
        here = {"site": site, "ranks_per_host": inventory.ranks_per_host, **own[site]}
        here["job_id"] = f"{parent}.{site}"
        jobs.append(create(inventory.hosts, policy, ssh_config, code, **record | here))
    write_parent(parent, {job.record["site"]: job.id for job in jobs})
    note(f"job {parent}: stands for {' and '.join(job.id for job in jobs)}")
    return jobs


class StoppedError(Exception):
    """The operator stopped the job, from another terminal, before it ran."""


def begin(jobs: Sequence[Job], code: Code, as_json: bool, detach: bool, raw: bool = False) -> int:
    """Checks the hosts, sends the code, starts created jobs, and follows them unless detached.

    Several jobs are those of one job's sites: each step is done at all sites before the next one,
    and if one fails, nothing is left running at any site.
    """
    clients = [(connect(job), job) for job in jobs]
    try:
        _make_ready(clients, code)
        _start_supervisors(clients)
    except BaseException as error:  # also an interrupt or SIGTERM
        why = str(error) if isinstance(error, Exception) else "interrupted"
        for job in jobs:
            if not job.record.get("outcome"):  # else `_undo` has recorded more
                job.change(outcome={"code": STOPPED, "why": why})
        if not isinstance(error, StoppedError):
            raise
        note(why)
        return STOPPED
    if detach:
        command = f"python -m launch.run attach {name_of(jobs)}"
        note(f"the job runs without this machine; to follow it: {command}")
        return 0
    return follow(jobs, as_json, raw=raw)


def _make_ready(clients: Sequence[tuple[SshClient, Job]], code: Code) -> None:
    """Checks the hosts of jobs, sends the code, builds its packages and compares the data."""
    jobs = [job for _, job in clients]
    changes = ", with uncommitted changes (code.patch)" if code.patch else ""
    note(f"code {code.hash}, {len(code.files)} files of commit {code.commit[:12]}{changes}")
    for client, job in clients:
        _check_hosts(client, job)
    if len(jobs) > 1:
        _check_between_sites(jobs)
    for client, job in clients:
        _refuse_stopped(jobs)
        start_s = time.monotonic()
        folders = send_code(client, code)
        job.change(folders={host.name: folder for host, folder in folders.items()})
        note(f"code is on every host{_at(job)}, {time.monotonic() - start_s:.1f} s")
    summaries = {}
    for client, job in clients:
        _refuse_stopped(jobs)
        summaries |= prepare(client, job, code)
    differing = judge_data(summaries)
    if any(finding.aborts for finding in differing):  # between sites; within one, `prepare` raises
        print_findings(differing)


def _refuse_stopped(jobs: Sequence[Job]) -> None:
    """Raises StoppedError if another terminal has stopped one of the jobs."""
    for job in jobs:
        if reason := job.stop_reason():
            raise StoppedError(f"job {job.id} was stopped before it ran: {reason}")


def _at(job: Job) -> str:
    return f" at {job.record['site']}" if "site" in job.record else ""


def _check_hosts(client: SshClient, job: Job) -> None:
    """Prints the preflight of a job's hosts; raises HostError if a check failed."""
    start_s = time.monotonic()
    build = bool(job.record.get("env_build"))
    findings = preflight(client, job.record["port"], job.record["shared"], build=build)
    note(f"preflight of {len(job.hosts)} hosts{_at(job)}, {time.monotonic() - start_s:.1f} s")
    print_findings(findings)
    scopes = [f.host for f in findings if (f.check, f.value) == ("logout", SCOPE)]
    job.change(scopes=scopes)


def _check_between_sites(jobs: Sequence[Job]) -> None:
    """Prints whether the processes of different sites can connect; raises HostError if not."""
    start_s = time.monotonic()
    client = SshClient([host for job in jobs for host in job.hosts], jobs[0].ssh_config)
    hosts_of = {job.record["site"]: job.hosts for job in jobs}
    findings = check_links(client, find_links(jobs[0].record["sites"], hosts_of))
    note(f"{len(findings)} links between sites, {time.monotonic() - start_s:.1f} s")
    print_findings(findings)


def _start_supervisors(clients: Sequence[tuple[SshClient, Job]]) -> None:
    """Starts the supervisors on all hosts, or leaves none running."""
    jobs = [job for _, job in clients]
    _refuse_stopped(jobs)
    for job in jobs:
        job.change(begun=time.time())
    try:
        for client, job in clients:
            _start_supervisors_of(client, job)
        # `stop` records first and then asks the hosts, so either it finds the job there, or the
        # record is found here.
        _refuse_stopped(jobs)
    except BaseException as error:  # also an interrupt or SIGTERM
        why = "not all hosts started" + (f": {error}" if isinstance(error, HostError) else "")
        why = str(error) if isinstance(error, StoppedError) else why
        with uninterrupted():
            _undo(jobs, why)
        raise


def _undo(jobs: Sequence[Job], why: str) -> None:
    """Kills what was started of jobs that did not start everywhere; prints what may be left."""
    for job in jobs:
        # Without an outcome `attach` could start it again.
        job.change(begun=None, outcome={"code": STOPPED, "why": why})
    for job in jobs:
        try:
            left = ask_to_stop(job, why, kill=True)[1]
        except HostError as error:
            left = [f"{error} `python -m launch.run stop {job.id} --now` kills what has started."]
        for problem in left:
            note(problem)


def _start_supervisors_of(client: SshClient, job: Job) -> None:
    # Where two operators start at once, both ask the same host first, so that one of them wins.
    first, *others = sorted(job.hosts, key=lambda host: host.address)
    for hosts in ([first], others):
        raise_errors(client.map(lambda host: client.call(host, job.request(host)), hosts))


def resume(jobs: Sequence[Job], as_json: bool, raw: bool = False) -> int:
    """Starts new jobs with the same hosts, program and flags, and the tree's current code.

    One site's job continues among those of the other sites, with their key and addresses.

    Raises:
        ValueError: an old job was recorded by an earlier version.
        HostError: processes of an old job are alive, or a host does not answer.
    """
    for job in jobs:
        if missing := [name for name in NEEDED if name not in job.record]:
            raise ValueError(
                f"job {job.id} must have a record of this version to be resumed; it lacks "
                f"{', '.join(missing)}. Start a new job with the same --config.workdir: it "
                "continues from the checkpoint."
            )
        refuse_while_alive(job)
    old = jobs[0]
    code = read_code(old.record["tree"])
    record = {name: old.record[name] for name in RESUMED}
    if len(jobs) > 1:
        sites = {job.record["site"]: job.inventory for job in jobs}
        own = {j.record["site"]: {"argv": j.record["argv"], "resumes": j.id} for j in jobs}
        new = create_at_sites(sites, own, old.policy, old.ssh_config, code, **record)
    else:
        record |= {"argv": old.record["argv"], "ranks_per_host": old.record["ranks_per_host"]}
        if site := old.record.get("site"):
            record |= {name: old.record[name] for name in ("site", "sites", "parent")}
            record |= {"job_id": f"{new_id()}.{site}"}
        new = [create(old.hosts, old.policy, old.ssh_config, code, **record, resumes=old.id)]
        if site:
            replace_in_parent(new[0])
    for job in jobs:
        job.change(continued_as=name_of(new))
    note(f"job {name_of(new)} continues {name_of(jobs)}")
    return begin(new, code, as_json, old.policy.lease_s == 0, raw)

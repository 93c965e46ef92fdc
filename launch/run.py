"""Starts, follows, stops and resumes a training job on several hosts over SSH.

    python -m launch.run --hosts=hosts.toml -- quickstart
    python -m launch.run --hosts=hosts.toml --detach -- gpt_124m --checkpoint.storage=host0
    python -m launch.run status

Commands for a job that was started:
  attach JOB      follows its log from where this machine's copy ends
  status [JOB]    prints its state on every host; without JOB: all jobs of this machine
  logs JOB        follows its log from the beginning; changes nothing
  stop JOB        saves and stops; with --now it does not save
  resume JOB      starts the same command as a new job, from the last checkpoint, with the current
                  code; the job must have ended

Arguments after `--` go to the program (jaxtrain.train). The exit status is the job's: 0 done, 75
stopped after a save, 143 stopped with nothing to save, otherwise that of the root cause. The hosts
need sshd and Python 3.11 with the project's dependencies; this machine needs Python, git and ssh.
For hosts.toml see launch/inventory.py.
"""

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from launch.arguments import Parser
from launch.host.exit_codes import INTERRUPTED, STOPPED
from launch.host.logout import SCOPE
from launch.host.restart_policy import Policy
from launch.inventory import Host, read_inventory
from launch.job import PYTHON, TRAINER, Job
from launch.operate import (
    connect,
    follow,
    list_jobs,
    refuse_while_alive,
    status,
    stop,
    stop_request,
)
from launch.preflight import preflight
from launch.prepare import prepare, print_findings, read_constraints, read_env
from launch.ssh import HostError, raise_errors
from launch.sync_code import Code, read_code, send_code
from launch.terminal import note, warn

VERBS = ("attach", "status", "logs", "stop", "resume")
LEASE_S = 30.0
POLICY_HELP = {
    "restarts": "attempts after the first, before the job gives up",
    "backoff_s": "seconds before the first restart; doubles each time",
    "on_loss": "if a host stays away: wait for it, go on with fewer, or stop",
    "wait_s": "seconds to wait for hosts that are away",
    "stall_s": "seconds without a step until a rank counts as stuck (at least 5 usual steps)",
    "start_s": "seconds from a rank's start to its first step",
    "lost_s": "seconds of silence until a host counts as lost",
    "stopped_s": "seconds that a rank may be stopped by a signal (a debugger, a frozen container)",
    "grace_s": "seconds from a request to stop until the ranks are killed; a save must fit in",
    "log_mib": "MiB of log, the newest, that each host keeps, and this machine of each host",
}
ENV_HELP = "a variable of the program; NAME passes this machine's value without showing it in ps"
RAW_HELP = "print the output's control characters as they are: the hosts can steer the terminal"
BUILD_HELP = "file of pip constraints: build the Python packages on the hosts, once, and use them"


def parse(
    argv: list[str], prog: str = "python -m launch.run"
) -> tuple[argparse.Namespace, list[str]]:
    """Returns (arguments, the program's flags after `--`)."""
    ours, flags = argv, []
    if "--" in argv:
        separator = argv.index("--")
        ours, flags = argv[:separator], argv[separator + 1 :]
    parser = Parser(prog, (__doc__ or "").replace("python -m launch.run", prog))
    parser.add_argument("--json", action="store_true", help="print the log as JSON lines")
    parser.add_argument("--raw", action="store_true", help=RAW_HELP)
    if ours and ours[0] in VERBS:
        parser.add_argument("verb", choices=VERBS)
        parser.add_argument("job", nargs="?" if ours[0] == "status" else None, metavar="JOB")
        if ours[0] == "stop":
            parser.add_argument("--now", action="store_true", help="kill without a save")
        args = parser.parse_args(ours)
        if flags:
            parser.error(
                f"{args.verb} takes no flags of the program; got {flags}. To change flags, start a "
                "new job with the same --config.workdir: it continues from the checkpoint."
            )
        return args, flags
    parser.set_defaults(verb="start")
    parser.add_argument("--hosts", required=True, metavar="FILE", help="the inventory, TOML")
    parser.add_argument("--ssh_config", default="", metavar="FILE", help="file for `ssh -F`")
    parser.add_argument("--code", default=".", metavar="DIR", help="git working tree to send")
    parser.add_argument("--module", default=TRAINER, help="the program: what Python runs with -m")
    parser.add_argument("--detach", action="store_true", help="return once the job runs")
    parser.add_argument("--shared", default="", metavar="DIR", help="folder that all hosts share")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help=ENV_HELP)
    parser.add_argument("--env_build", default="", metavar="FILE", help=BUILD_HELP)
    parser.add_argument(
        "--env_extras", default="", metavar="A,B", help="extras of pyproject.toml to build"
    )
    for field in dataclasses.fields(Policy):
        if field.name in POLICY_HELP:
            parser.add_argument(
                f"--{field.name}",
                type=_at_least_0(type(field.default)),
                default=field.default,
                choices=("wait", "fewer", "stop") if field.name == "on_loss" else None,
                help=f"{POLICY_HELP[field.name]} [{field.default}]",
            )
    return parser.parse_args(ours), flags


def _at_least_0(kind: type) -> Callable[[str], Any]:
    """Returns the `type` of a policy's flag; a number must be 0 or more."""

    def parse_number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not value >= 0:  # also if it is NaN
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} of at least 0; got {text}")
        return value

    return str if kind is str else parse_number


def start(args: argparse.Namespace, flags: list[str]) -> tuple[Job, int]:
    """Starts and follows a new job; returns the job and its exit status."""
    inventory, code = read_inventory(args.hosts), read_code(args.code)
    env = read_env(args.env)
    values = {name: getattr(args, name) for name in POLICY_HELP}
    job = create(
        inventory.hosts,
        Policy(**values, lease_s=0.0 if args.detach else LEASE_S),
        args.ssh_config,
        code,
        ranks_per_host=inventory.ranks_per_host,
        argv=[PYTHON, "-m", args.module, *flags],
        env=env,
        env_build=read_constraints(args.env_build),
        env_extras=[extra for extra in args.env_extras.split(",") if extra],
        shared=args.shared,
    )
    return job, begin(job, code, args.json, args.detach, args.raw)


def create(
    hosts: Iterable[Host], policy: Policy, ssh_config: str, code: Code, **record: Any
) -> Job:
    """Creates a job's record, including where its code comes from."""
    origin = {"commit": code.commit, "code": code.hash, "tree": str(code.root)}
    job = Job.create(hosts, policy, ssh_config, **record, **origin, folders={})
    (job.folder / "code.patch").write_text(code.patch)
    dirty = ", with uncommitted changes (code.patch)" if code.patch else ""
    note(f"job {job.id}: {job.folder}")
    note(f"code {code.hash}, {len(code.files)} files of commit {code.commit[:12]}{dirty}")
    return job


def begin(job: Job, code: Code, as_json: bool, detach: bool, raw: bool = False) -> int:
    """Checks the hosts, sends the code, starts a created job, and follows it unless detached."""
    client = connect(job)
    start_s = time.monotonic()
    build = bool(job.record.get("env_build"))
    findings = preflight(client, job.record["port"], job.record["shared"], build=build)
    note(f"preflight of {len(job.hosts)} hosts, {time.monotonic() - start_s:.1f} s")
    print_findings(findings)
    scopes = [f.host for f in findings if (f.check, f.value) == ("logout", SCOPE)]
    job.change(scopes=scopes)
    start_s = time.monotonic()
    folders = send_code(client, code)
    job.change(folders={host.name: folder for host, folder in folders.items()})
    note(f"code is on every host, {time.monotonic() - start_s:.1f} s")
    prepare(client, job, code)
    job.change(begun=time.time())
    try:
        # Where two operators start at once, both ask the same host first, so that one of them wins.
        first, *others = sorted(job.hosts, key=lambda host: host.address)
        for hosts in ([first], others):
            raise_errors(client.map(lambda host: client.call(host, job.request(host)), hosts))
    except BaseException as error:  # also an interrupt or SIGTERM
        why = "not all hosts started" + (f": {error}" if isinstance(error, HostError) else "")
        job.change(outcome={"code": STOPPED, "why": why})  # else `attach` could start it again
        client.map(lambda host: client.call(host, stop_request(job, why, kill=True), 30))
        raise
    if detach:
        note(
            f"the job runs without this machine; to follow it: python -m launch.run attach {job.id}"
        )
        return 0
    return follow(job, as_json, raw=raw)


def resume(job: Job, as_json: bool, raw: bool = False) -> int:
    """Starts a new job with the same hosts, program and flags, and the tree's current code.

    Raises:
        HostError: processes of the old job are alive, or a host does not answer.
    """
    refuse_while_alive(job)
    names = ("ranks_per_host", "argv", "env", "env_build", "env_extras", "shared")
    record = {name: job.record[name] for name in names}
    code = read_code(job.record["tree"])
    new = create(job.hosts, job.policy, job.ssh_config, code, **record, resumes=job.id)
    note(f"job {new.id} continues {job.id}")
    return begin(new, code, as_json, job.policy.lease_s == 0, raw)


def main(argv: list[str] | None = None, prog: str = "python -m launch.run") -> int:
    """Runs the command; returns its exit status."""
    args, flags = parse(sys.argv[1:] if argv is None else argv, prog)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    try:
        if args.verb == "start":
            return start(args, flags)[1]
        if args.job is None:
            return list_jobs()
        job = Job(args.job)
        verbs = {
            "attach": lambda: follow(job, args.json, raw=args.raw),
            "logs": lambda: follow(job, args.json, read_only=True, raw=args.raw),
            "status": lambda: status(job, args.json),
            "stop": lambda: stop(job, args.now),
            "resume": lambda: resume(job, args.json, args.raw),
        }
        return verbs[args.verb]()
    except (ValueError, HostError, OSError) as error:  # OSError: such as a full disk here
        warn(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        note("interrupted before the job was running")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

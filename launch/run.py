"""Starts, follows, stops and resumes a training job on several hosts over SSH.

    python -m launch.run --hosts=hosts.toml -- quickstart
    python -m launch.run --hosts=hosts.toml --detach -- gpt_124m --checkpoint.storage=host0
    python -m launch.run --sites=new_york.toml,asuncion.toml -- gpt_124m --sites.period=30
    python -m launch.run status

Commands for a job that was started:
  attach JOB      follows its log from where this machine's copy ends
  status [JOB]    prints its state on every host; without JOB: all jobs of this machine
  logs JOB        follows its log from the beginning; changes nothing
  stop JOB        saves and stops; with --now it does not save
  resume JOB      starts the same command as a new job, from the last checkpoint, with the current
                  code; the job must have ended

With --sites, a job JOB.SITE starts at each site, and JOB stands for all of them in every command.
JOB.SITE means the site's current job, also after a resume. `logs --exact JOB.SITE` shows the log of
the first one.
--for sets a flag of the program at one site.

--env=JAXTRAIN_NOTIFY_URL passes on the address of a webhook. It then receives an alert when a rank
is stuck, and when the job restarts, fails or is done.

Arguments after `--` go to the program (jaxtrain.train). The exit status is the job's: 0 done, 75
stopped after a save, 143 stopped without one, otherwise that of the root cause. The hosts need
sshd and Python 3.11 with the project's dependencies; this machine needs Python, git and ssh.
For hosts.toml see launch/inventory.py.
"""

import argparse
import dataclasses
import signal
import sys

from launch.arguments import Parser, bounded
from launch.host.exit_codes import INTERRUPTED, STOPPED
from launch.host.restart_policy import Policy
from launch.host.webhook import VARIABLE, parse_address
from launch.inventory import read_inventory
from launch.job import PYTHON, TRAINER, Job, note_continuation, read_jobs
from launch.operate import follow, list_jobs, status
from launch.prepare import read_constraints, read_env
from launch.sites import read_sites, split_flags
from launch.ssh import HostError
from launch.start import begin, create, create_at_sites, resume
from launch.stop import stop
from launch.sync_code import read_code
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
INTERRUPTION = {  # what Ctrl-C means, by verb; `follow` handles it once the job runs
    "start": "interrupted before the job was running",
    "resume": "interrupted before the new job was running",
    "stop": "interrupted: some hosts may not have been asked to stop. Run it again",
}
YEAR_S = 31_536_000.0
POLICY_RANGES = {  # of the numbers; otherwise from 0 to YEAR_S
    "restarts": (0, 1_000_000),
    "wait_s": (1.0, YEAR_S),
    "stall_s": (1.0, YEAR_S),
    "start_s": (1.0, YEAR_S),
    "lost_s": (2.0, 3600.0),  # hosts report every 0.5 s
    "log_mib": (2, 1 << 20),
}
ENV_HELP = "a variable of the program; NAME passes this machine's value without showing it in ps"
RAW_HELP = "print the output's control characters as they are: the hosts can steer the terminal"
EXACT_HELP = "the log of JOB itself, also if a resume has continued it at its site"
SITES_HELP = "the inventories of several sites; a separate job runs at each"
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
        if ours[0] == "logs":
            parser.add_argument("--exact", action="store_true", help=EXACT_HELP)
        args = parser.parse_args(ours)
        if flags:
            parser.error(
                f"{args.verb} takes no flags of the program; got {flags}. To change flags, start a "
                "new job with the same --config.workdir: it continues from the checkpoint."
            )
        return args, flags
    parser.set_defaults(verb="start")
    parser.add_argument("--hosts", default="", metavar="FILE", help="the inventory, TOML")
    parser.add_argument("--sites", default="", metavar="A,B", help=SITES_HELP)
    parser.add_argument(
        "--for",
        dest="for_site",
        action="append",
        default=[],
        metavar="SITE:FLAG",
        help="a flag of the program at one site, as asuncion:--data.batch=64; may be repeated",
    )
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
            bounds = POLICY_RANGES.get(field.name, (0, YEAR_S))
            parser.add_argument(
                f"--{field.name}",
                type=str if field.name == "on_loss" else bounded(type(field.default), *bounds),
                default=field.default,
                choices=("wait", "fewer", "stop") if field.name == "on_loss" else None,
                help=f"{POLICY_HELP[field.name]} [{field.default}]",
            )
    args = parser.parse_args(ours)
    if bool(args.hosts) == bool(args.sites):
        parser.error("--hosts or --sites must be given" + (", and not both" if args.hosts else ""))
    if args.for_site and not args.sites:
        parser.error(f"--for needs --sites; got --for={args.for_site[0]}")
    if args.sites and args.on_loss == "fewer":
        parser.error(
            "--on_loss must be wait or stop with --sites, because other sites expect all processes "
            "of a site; got fewer. To go on without a whole site, set --sites.on_loss after --"
        )
    return args, flags


def start(args: argparse.Namespace, flags: list[str]) -> tuple[list[Job], int]:
    """Starts and follows a new job, or one at each site; returns them and the exit status."""
    code, env = read_code(args.code), read_env(args.env)
    if url := env.get(VARIABLE):
        parse_address(url, f"--env={VARIABLE}")
    values = {name: getattr(args, name) for name in POLICY_HELP}
    policy = Policy(**values, lease_s=0.0 if args.detach else LEASE_S)
    record = {
        "env": env,
        "env_build": read_constraints(args.env_build),
        "env_extras": [extra for extra in args.env_extras.split(",") if extra],
        "shared": args.shared,
    }
    program = [PYTHON, "-m", args.module]
    if args.sites:
        sites = read_sites(args.sites)
        flags_of = split_flags(flags, args.for_site, sites)
        own = {site: {"argv": program + own_flags} for site, own_flags in flags_of.items()}
        jobs = create_at_sites(sites, own, policy, args.ssh_config, code, **record)
    else:
        hosts = read_inventory(args.hosts)
        record |= {"ranks_per_host": hosts.ranks_per_host, "argv": program + flags}
        jobs = [create(hosts.hosts, policy, args.ssh_config, code, **record)]
    return jobs, begin(jobs, code, args.json, args.detach, args.raw)


def main(argv: list[str] | None = None, prog: str = "python -m launch.run") -> int:
    """Runs the command; returns its exit status."""
    args, flags = parse(sys.argv[1:] if argv is None else argv, prog)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    try:
        if args.verb == "start":
            return start(args, flags)[1]
        if args.job is None:
            return list_jobs()
        exact = args.verb == "logs" and args.exact
        jobs = read_jobs(args.job, starting=args.verb == "stop", exact=exact)
        if not exact:
            note_continuation(args.job, jobs)
            if args.verb == "logs" and len(jobs) == 1 and jobs[0].id != args.job:
                note(f"`launch.run logs --exact {args.job}` shows the log of {args.job} itself")
        verbs = {
            "attach": lambda: follow(jobs, args.json, raw=args.raw),
            "logs": lambda: follow(jobs, args.json, read_only=True, raw=args.raw),
            "status": lambda: status(jobs, args.json),
            "stop": lambda: stop(jobs, args.now),
            "resume": lambda: resume(jobs, args.json, args.raw),
        }
        return verbs[args.verb]()
    except (ValueError, HostError, OSError) as error:  # OSError: such as a full disk here
        warn(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        note(INTERRUPTION.get(args.verb, "interrupted"))
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

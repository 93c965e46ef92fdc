"""Starts a training job on several hosts over SSH, and looks after it.

    python -m launch.run --hosts=hosts.toml -- quickstart
    python -m launch.run --hosts=hosts.toml --detach -- gpt_124m --checkpoint.storage=host0
    python -m launch.run status

A job that is on record:
  attach JOB      goes on with its log, no line lost or doubled
  status [JOB]    what it does, on every host; without JOB: all jobs
  logs JOB        the whole log, and what is new; read-only
  stop JOB        saves and stops; --now does not save
  resume JOB      starts the same command as a new job, from the last checkpoint, with the current
                  code; the job must have ended

What follows `--` is a command line of the program (jaxtrain.train). The job's exit status is this
command's: 0 done, 75 stopped after a save, 143 stopped with nothing to save, else the root cause's.
The hosts need Python 3.11 with the project's dependencies and sshd; this machine needs Python, git,
ssh and rsync. hosts.toml: see launch/inventory.py.
"""

import dataclasses
import signal
import sys
import time

from launch.arguments import Parser
from launch.follow import note
from launch.host.exit_codes import STOPPED
from launch.host.logout import SCOPE
from launch.host.restart_policy import Policy
from launch.inventory import read_inventory
from launch.job import PYTHON, TRAINER, Job
from launch.operate import ask_stop, follow, list_jobs, refuse_while_alive, status, stop
from launch.preflight import preflight
from launch.prepare import prepare, read_constraints, read_env, show
from launch.ssh import Fleet, HostError
from launch.sync_code import read_code, ship

VERBS = ("attach", "status", "logs", "stop", "resume")
LEASE_S = 30.0
POLICY_HELP = {
    "restarts": "attempts after the first, before the job gives up",
    "backoff_s": "seconds before the first restart; doubles each time",
    "on_loss": "a host that stays away: wait for it, go on with fewer, or stop",
    "wait_s": "seconds to wait for hosts that are away",
    "stall_s": "seconds without a step until a rank counts as stuck (at least 5 usual steps)",
    "start_s": "seconds from a rank's start to its first step",
    "lost_s": "seconds of silence until a host counts as lost",
    "grace_s": "seconds between being asked to stop and being killed: a save must fit",
}


ENV_HELP = "for the program; NAME alone takes this machine's value: for secrets, which ps shows"


def parse(argv, prog="python -m launch.run"):
    """(arguments, the program's flags after `--`)."""
    ours, flags = argv, []
    if "--" in argv:
        at = argv.index("--")
        ours, flags = argv[:at], argv[at + 1 :]
    parser = Parser(prog, __doc__.replace("python -m launch.run", prog))
    parser.add_argument("--json", action="store_true", help="the log as JSON lines")
    if ours and ours[0] in VERBS:
        parser.add_argument("verb", choices=VERBS)
        parser.add_argument("job", nargs="?" if ours[0] == "status" else None, metavar="JOB")
        if ours[0] == "stop":
            parser.add_argument("--now", action="store_true", help="kill, do not save")
        args = parser.parse_args(ours)
        if flags:
            parser.error(
                f"{args.verb} takes no flags of the program; got {flags}. A new job with other "
                "flags and the same --config.workdir goes on from its checkpoint."
            )
        return args, flags
    parser.set_defaults(verb="start")
    parser.add_argument("--hosts", required=True, metavar="FILE", help="the inventory, TOML")
    parser.add_argument("--ssh_config", default="", metavar="FILE", help="for ssh -F")
    parser.add_argument("--code", default=".", metavar="DIR", help="git working tree to send")
    parser.add_argument("--module", default=TRAINER, help="what Python runs with -m")
    parser.add_argument("--detach", action="store_true", help="return once it runs")
    parser.add_argument(
        "--shared", default="", metavar="DIR", help="folder that all hosts must see as one"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help=ENV_HELP)
    build = "pip constraints: build Python packages on the hosts once, and use those"
    parser.add_argument("--env_build", default="", metavar="FILE", help=build)
    parser.add_argument("--env_extras", default="", metavar="A,B", help="of pyproject.toml, too")
    for field in dataclasses.fields(Policy):
        if field.name in POLICY_HELP:
            choices = ("wait", "fewer", "stop") if field.name == "on_loss" else None
            text = f"{POLICY_HELP[field.name]} [{field.default}]"
            parser.add_argument(
                f"--{field.name}",
                type=type(field.default),
                default=field.default,
                choices=choices,
                help=text,
            )
    return parser.parse_args(ours), flags


def start(args, flags) -> tuple[Job, int]:
    """Looks, sends, starts and follows a new job; the job and its exit status."""
    inventory, code = read_inventory(args.hosts), read_code(args.code)
    env = read_env(args.env)
    values = {name: getattr(args, name) for name in POLICY_HELP}
    policy = Policy(**values, lease_s=0.0 if args.detach else LEASE_S)
    job = create(
        inventory.hosts,
        policy,
        args.ssh_config,
        code,
        ranks_per_host=inventory.ranks_per_host,
        argv=[PYTHON, "-m", args.module, *flags],
        env=env,
        env_build=read_constraints(args.env_build),
        env_extras=[extra for extra in args.env_extras.split(",") if extra],
        shared=args.shared,
    )
    return job, begin(job, code, args.json, args.detach)


def create(hosts, policy, ssh_config, code, **record) -> Job:
    """A new job's record, with what its code is and where it came from."""
    of_code = {"commit": code.commit, "code": code.hash, "tree": str(code.root)}
    job = Job.create(hosts, policy, ssh_config, **record, **of_code, folders={})
    (job.folder / "code.patch").write_text(code.patch)
    dirty = ", with changes of its own: code.patch" if code.patch else ""
    note(f"job {job.id}: {job.folder}")
    note(f"code {code.hash}, {len(code.files)} files of commit {code.commit[:12]}{dirty}")
    return job


def begin(job, code, as_json, detach) -> int:
    """Preflight, ship and start of a job that is on record; then its log."""
    fleet = Fleet(job.hosts, job.ssh_config)
    clock = time.monotonic()
    build = bool(job.record.get("env_build"))
    findings = preflight(fleet, job.record["port"], job.record["shared"], build=build)
    note(f"preflight of {len(job.hosts)} hosts, {time.monotonic() - clock:.1f} s")
    show(findings)
    scopes = [f.host for f in findings if (f.check, f.value) == ("logout", SCOPE)]
    job.change(scopes=scopes)
    clock = time.monotonic()
    folders = ship(fleet, code)
    job.change(folders={host.name: folder for host, folder in folders.items()})
    note(f"code is on every host, {time.monotonic() - clock:.1f} s")
    prepare(fleet, job, code)
    job.change(begun=time.time())
    try:
        answers = fleet.everywhere(lambda host: fleet.call(host, job.request(host)))
        failed = [str(answer) for answer in answers.values() if isinstance(answer, HostError)]
        if failed:
            raise HostError("\n".join(failed))
    except BaseException:  # an interrupt, and SIGTERM, too
        why = "not all hosts started"
        job.change(outcome={"code": STOPPED, "why": why})  # so that nothing starts it again
        fleet.everywhere(lambda host: ask_stop(fleet, job, host, why, True))
        raise
    if detach:
        note(f"it runs by itself: python -m launch.run attach {job.id}")
        return 0
    return follow(job, as_json)


def resume(job, as_json) -> int:
    """A new job of the same hosts, program and flags, with its working tree's code of now.

    Raises:
        HostError: something of the job lives, or a host does not say.
    """
    refuse_while_alive(job)
    record = job.record
    names = ("ranks_per_host", "argv", "env", "env_build", "env_extras", "shared")
    kept = {key: record[key] for key in names}
    code = read_code(record["tree"])
    new = create(job.hosts, job.policy, job.ssh_config, code, **kept)
    note(f"job {new.id} goes on with {job.id}")
    return begin(new, code, as_json, job.policy.lease_s == 0)


def main(argv=None, prog="python -m launch.run") -> int:
    args, flags = parse(sys.argv[1:] if argv is None else argv, prog)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.verb == "start":
            return start(args, flags)[1]
        if args.job is None:
            return list_jobs()
        job = Job(args.job)
        verbs = {
            "attach": lambda: follow(job, args.json),
            "logs": lambda: follow(job, args.json, whole=True),
            "status": lambda: status(job, args.json),
            "stop": lambda: stop(job, args.now),
            "resume": lambda: resume(job, args.json),
        }
        return verbs[args.verb]()
    except (ValueError, HostError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        note("interrupted before the job ran")
        return 130


if __name__ == "__main__":
    sys.exit(main())

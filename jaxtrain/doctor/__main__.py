"""Looks at this machine and says whether it can train, with the command that fixes each problem.

    jaxtrain doctor
    jaxtrain doctor --workdir=/scratch/run
    jaxtrain doctor --json

It trains nothing and changes nothing. JAX is started in a process of its own, so that a broken
driver cannot hang the screen. Exit status: 1 where a line says PROBLEM, else 0.
"""

import importlib.util
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.config.shell_commands import python_program
from jaxtrain.doctor import devices, gpu, host, versions
from jaxtrain.doctor.check import OK, PROBLEM, WARNING, Check, guarded
from pallas_kernels.arguments import Parser

DEVICES_S = 60.0  # eight cards whose driver sleeps take 20 s
MARKS = {OK: "ok", WARNING: "warning", PROBLEM: "PROBLEM"}


def installed(package: str) -> str | None:
    """Returns a package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requires(package: str) -> list[str]:
    """Returns what a package requires; nothing where it is not installed."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def examine(workdir: Path, seconds: float) -> list[Check]:
    """Returns all that was found, in the order of the screen."""
    asked = devices.Asked()  # meanwhile the rest is looked at
    pip = f"{python_program()} -m pip" if importlib.util.find_spec("pip") else "uv pip"
    try:
        gpus = gpu.look()
    except Exception as error:
        gpus = gpu.Gpus(gpu.has_gpu(), "", (), f"the driver cannot be asked: {error}")
    has_gpu = gpus.found

    def driver():
        if not (gpus.found or gpus.driver):
            return []
        return versions.check_driver(gpus.driver, gpus.capability, installed, pip)

    probes = [
        ("python", lambda: versions.check_python(sys.version_info[:3], _python())),
        ("packages", lambda: versions.check_packages(requires("jaxtrain"), installed, pip)),
        ("jax", lambda: versions.check_jax(installed, requires("jax"), pip)),
        ("plugin", lambda: versions.check_plugin(installed, has_gpu, gpus.driver, pip)),
        ("driver", driver),
        ("cards", lambda: gpu.check_cards(gpus, gpu.in_slots())),
        ("memory share", host.check_share),
        ("memory", host.check_memory),
        ("disk", lambda: host.check_disk(workdir)),
        ("compile cache", _cache),
        ("tokenizers", lambda: host.check_tokenizers(installed)),
        ("extras", lambda: host.check_extras(installed)),
        ("data", host.check_data),
        ("launch tools", host.check_tools),
        ("clock", host.check_clock),
    ]
    found = {name: guarded(name, probe) for name, probe in probes}
    of_jax = guarded("devices", lambda: devices.check_devices(*asked.answer(seconds), has_gpu))
    order = list(found)
    at = order.index("memory share")
    checks = [check for name in order[:at] for check in found[name]]
    return [*checks, *of_jax, *(check for name in order[at:] for check in found[name])]


def _cache() -> Check:
    from jaxtrain.config.train_config import TrainConfig  # here: what it needs may be missing

    return host.check_cache(TrainConfig().compile_cache)


def _python() -> str:
    return f"{platform.python_version()}, {platform.system()} {platform.machine()}"


def screen(checks: list[Check], prog: str) -> str:
    """Returns the checks as a table, each fix below its line, and a verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{MARKS[check.state]:<8} {check.name:<{width}}  {check.value}")
        if check.fix:
            lines.append(f"{'':<8} {'':<{width}}  $ {rewrite_commands(check.fix, prog)}")
    problems = sum(check.state == PROBLEM for check in checks)
    warnings = sum(check.state == WARNING for check in checks)
    noted = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
    if problems:
        verdict = f"{problems} problem{'s' * (problems != 1)}{noted}: run the commands after $."
    else:
        start = rewrite_commands("jaxtrain train quickstart", prog)
        verdict = f"This machine can train{noted}. Start with: {start}"
    return "\n".join([*lines, "", verdict])


def parse(argv=None, prog="python -m jaxtrain.doctor"):
    parser = Parser(prog, rewrite_commands(__doc__, prog))
    parser.add_argument("--workdir", type=Path, default=Path("runs"), help="of runs; %(default)s")
    parser.add_argument("--json", action="store_true", help="the checks as JSON, for scripts")
    parser.add_argument(
        "--seconds", type=float, default=DEVICES_S, help="for JAX to find devices; %(default)s"
    )
    return parser.parse_args(argv)


def main(argv=None, prog="python -m jaxtrain.doctor") -> int:
    args = parse(argv, prog)
    checks = examine(args.workdir, args.seconds)
    problems = any(check.state == PROBLEM for check in checks)
    if args.json:
        print(json.dumps({"ok": not problems, "checks": [check._asdict() for check in checks]}))
    else:
        print(screen(checks, prog))
    return int(problems)


if __name__ == "__main__":
    sys.exit(main())

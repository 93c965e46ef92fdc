"""Checks whether this machine can train, and prints the command that fixes each problem.

    jaxtrain doctor
    jaxtrain doctor --workdir=/scratch/run
    jaxtrain doctor --json

It changes nothing on this machine. JAX starts in a separate process, so that a broken driver cannot
hang the report. The exit status is 1 if there is a PROBLEM, else 0.
"""

import argparse
import importlib.util
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.config.shell_commands import python_program
from jaxtrain.doctor import devices, gpu, host, versions
from jaxtrain.doctor.check import OK, PROBLEM, WARNING, Check, run_check
from pallas_kernels.arguments import Parser

DEVICES_S = 60.0  # JAX takes 20 s to find eight GPUs that the driver must first initialise
MARKS = {OK: "ok", WARNING: "warning", PROBLEM: "PROBLEM"}


def installed(package: str) -> str | None:
    """Returns a package's version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requires(package: str) -> list[str]:
    """Returns a package's requirements; none if it is not installed."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def run_checks(workdir: Path, seconds: float) -> list[Check]:
    """Runs all checks and returns their results in the order in which they are printed.

    Args:
        workdir: the folder that runs will be written to.
        seconds: how long JAX may take to find devices.
    """
    devices_process = devices.DevicesProcess()  # runs in parallel with the other checks
    pip = f"{python_program()} -m pip" if importlib.util.find_spec("pip") else "uv pip"
    try:
        gpus = gpu.find_gpus()
    except Exception as error:
        gpus = gpu.Gpus(gpu.has_gpu(), "", (), f"the driver cannot be queried: {error}")

    def check_driver() -> Check | list[Check]:
        if not (gpus.found or gpus.driver):
            return []
        return versions.check_driver(gpus.driver, gpus.capability, installed, pip)

    python = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    before_devices = [
        ("python", lambda: versions.check_python(sys.version_info[:3], python)),
        ("packages", lambda: versions.check_packages(requires("jaxtrain"), installed, pip)),
        ("jax", lambda: versions.check_jax(installed, requires("jax"), pip)),
        ("plugin", lambda: versions.check_plugin(installed, gpus.found, gpus.driver, pip)),
        ("driver", check_driver),
        ("cards", lambda: gpu.check_cards(gpus, gpu.count_pci_gpus())),
    ]
    after_devices = [
        ("memory share", host.check_memory_fraction),
        ("memory", host.check_memory),
        ("disk", lambda: host.check_disk(workdir)),
        ("compile cache", _check_cache),
        ("tokenizers", lambda: host.check_tokenizers(installed)),
        ("extras", lambda: host.check_extras(installed)),
        ("data", host.check_data),
        ("launch tools", host.check_tools),
        ("clock", host.check_clock),
    ]
    first = [check for name, function in before_devices for check in run_check(name, function)]
    last = [check for name, function in after_devices for check in run_check(name, function)]
    check_devices = lambda: devices.check_devices(*devices_process.wait(seconds), gpus.found)
    return [*first, *run_check("devices", check_devices), *last]


def _check_cache() -> Check:
    from jaxtrain.config.train_config import TrainConfig  # needs packages that may be missing

    return host.check_cache(TrainConfig().compile_cache)


def format_checks(checks: list[Check], prog: str) -> str:
    """Returns the checks as a table, with each fix below its line, and a verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{MARKS[check.state]:<8} {check.name:<{width}}  {check.value}")
        if check.fix:
            lines.append(f"{'':<8} {'':<{width}}  $ {rewrite_commands(check.fix, prog)}")
    problems = sum(check.state == PROBLEM for check in checks)
    warnings = sum(check.state == WARNING for check in checks)
    count = lambda number, noun: f"{number} {noun}" if number == 1 else f"{number} {noun}s"
    noted = f" ({count(warnings, 'warning')})" if warnings else ""
    if problems:
        verdict = f"{count(problems, 'problem')}{noted}: run the commands after $."
    else:
        start = rewrite_commands("jaxtrain train quickstart", prog)
        verdict = f"This machine can train{noted}. Start with: {start}"
    return "\n".join([*lines, "", verdict])


def parse(
    argv: list[str] | None = None, prog: str = "python -m jaxtrain.doctor"
) -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(prog, rewrite_commands(__doc__, prog))
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs"), help="folder for runs (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON, for scripts")
    parser.add_argument(
        "--seconds",
        type=float,
        default=DEVICES_S,
        help="time limit for JAX to find devices (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, prog: str = "python -m jaxtrain.doctor") -> int:
    """Prints the checks and returns the exit status."""
    args = parse(argv, prog)
    checks = run_checks(args.workdir, args.seconds)
    problems = any(check.state == PROBLEM for check in checks)
    if args.json:
        print(json.dumps({"ok": not problems, "checks": [check._asdict() for check in checks]}))
    else:
        print(format_checks(checks, prog))
    return int(problems)


if __name__ == "__main__":
    sys.exit(main())

"""Prints a template for another engine that starts the same training program as launch.run.

    python -m launch.template slurm > train.sh
    python -m launch.template torchrun > train.sh
    python -m launch.template --list

Each template begins with how to use it and what of it was tested. The training program reads the
environment variables that the engine or the template sets: jaxtrain/distributed/cluster.py.
"""

import sys
from importlib import resources

from launch.arguments import Parser

TEMPLATES = {
    "slurm": "slurm.sh",
    "openmpi": "openmpi.sh",
    "torchrun": "torchrun.sh",
    "jobset": "jobset.yaml",
    "skypilot": "skypilot.yaml",
    "ray": "ray_driver.py",
    "systemd": "systemd.service",
}


def read_template(engine: str) -> str:
    """Returns the text of an engine's template. Raises KeyError if there is none."""
    return (resources.files("launch") / "templates" / TEMPLATES[engine]).read_text()


def summary(engine: str) -> str:
    """Returns the first comment line of an engine's template, which describes it."""
    lines = read_template(engine).splitlines()
    return next(line for line in lines if line.startswith(("# ", '"""'))).strip('#" ')


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    listed = "\n".join(f"  {engine:10} {summary(engine)}" for engine in TEMPLATES)
    parser = Parser("python -m launch.template", f"{__doc__}\n{listed}")
    parser.add_argument("engine", choices=TEMPLATES, nargs="?", metavar="ENGINE")
    parser.add_argument("--list", action="store_true", help="list the engines and what each is for")
    args = parser.parse_args(argv)
    if args.list:
        print(listed)
    elif args.engine is None:
        parser.error(f"ENGINE must be one of {', '.join(TEMPLATES)}")
    else:
        print(read_template(args.engine), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

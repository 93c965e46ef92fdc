"""Prints a template for starting training with another engine instead of launch.run.

    python -m launch.template slurm > train.sh
    python -m launch.template torchrun > train.sh
    python -m launch.template --list

Each template begins with how to use it and with what of it has run or was checked. The program
finds its processes by the variables that the engine or the template sets
(jaxtrain/distributed/cluster.py).
"""

import sys
from collections.abc import Sequence
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
    """Returns a template's text. Raises KeyError if there is none."""
    return (resources.files("launch") / "templates" / TEMPLATES[engine]).read_text()


def first_line(engine: str) -> str:
    """Returns the first line of a template's comment, which says what it is for."""
    lines = read_template(engine).splitlines()
    return next(line for line in lines if line.startswith(("# ", '"""'))).strip('#" ')


def main(argv: Sequence[str] | None = None) -> int:
    listed = "\n".join(f"  {engine:10} {first_line(engine)}" for engine in TEMPLATES)
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

"""The `jaxtrain` command: lists the commands and starts one. It does not import JAX.

jaxtrain
jaxtrain train quickstart
jaxtrain help plan
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from jaxtrain.config.commands import BY_NAME, COMMANDS, GROUPS
from jaxtrain.errors import INTERRUPTED
from pallas_kernels.arguments import nearest_name, print_text

HELP = ("help", "-h", "--help")
USAGE = 2  # the exit status that argparse uses


def program() -> str:
    """Returns the command that the user typed to start this program, for messages."""
    typed = Path(sys.argv[0])
    if typed.name != "jaxtrain":
        return "python -m jaxtrain"
    on_path, path = shutil.which("jaxtrain"), typed.absolute()
    if on_path and os.path.abspath(on_path) == str(path):
        return "jaxtrain"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else typed)


def overview(prog: str) -> str:
    """Returns the text that lists all commands by group, one per line."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"jaxtrain {_version('jaxtrain')}: pretraining of language models in JAX", ""]
    lines += [f"usage:      {prog} COMMAND ...", f"try first:  {prog} train quickstart"]
    for group, title in GROUPS.items():
        lines += ["", title]
        lines += [f"  {c.name:<{width}}  {c.text}" for c in COMMANDS if c.group == group]
    return "\n".join([*lines, "", f"{prog} COMMAND --help shows examples and flags."])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Returns the commit of this code, as `0123456789ab`; "" if it is not a git checkout.

    Uncommitted changes are marked: `0123456789ab+changes`.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        argv = ["git", "-C", str(root), *arguments]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=5).stdout

    try:
        top, head = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if not os.path.samefile(
            top, root
        ):  # jaxtrain is installed inside another project's checkout
            return ""
        changes = "+changes" if git("status", "--porcelain", "-uno").strip() else ""
        return f"{head[:12]}{changes}"
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def version() -> str:
    """Returns a line with the versions of jaxtrain, its commit, JAX and Python."""
    head = commit()
    jaxtrain = f"jaxtrain {_version('jaxtrain')}" + (f", commit {head}" if head else "")
    return f"{jaxtrain}; jax {_version('jax')}; Python {platform.python_version()}"


def main(argv: list[str] | None = None) -> int | None:
    """Runs the command that the first argument names, and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = program()
    first = argv[0] if argv else "help"
    if first in HELP:
        if len(argv) < 2 or argv[1] in HELP:
            print_text(overview(prog))
            return 0
        argv = [argv[1], "--help"]
        first = argv[0]
    if first in ("--version", "-V", "version"):
        print_text(version())
        return 0
    if first not in BY_NAME:
        near = nearest_name(first, [*BY_NAME, "help"])
        hint = f" Did you mean {prog} {near}?" if near else ""
        print(f"error: unknown command {first}.{hint} {prog} lists all commands.", file=sys.stderr)
        return USAGE
    command = BY_NAME[first]
    try:
        module = importlib.import_module(command.module)
        if hasattr(module, "__path__"):  # a package; `python -m` runs its __main__
            module = importlib.import_module(f"{command.module}.__main__")
    except KeyboardInterrupt:  # imports take seconds
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    # A module with several commands, such as jaxtrain.interop, appends the command's name itself.
    prog = prog if command.words else f"{prog} {first}"
    return getattr(module, command.function)([*command.words, *argv[1:]], prog=prog)

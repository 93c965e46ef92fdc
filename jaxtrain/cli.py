"""The `jaxtrain` command: lists the commands and starts one. It imports no JAX itself.

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
USAGE = 2  # exit status, as argparse's


def program() -> str:
    """Returns the words with which the user started this program."""
    typed = Path(sys.argv[0])
    if typed.name != "jaxtrain":
        return "python -m jaxtrain"
    found, whole = shutil.which("jaxtrain"), typed.absolute()
    if found and os.path.abspath(found) == str(whole):
        return "jaxtrain"
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else typed)


def overview(prog: str) -> str:
    """Returns the commands by group, a line each."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"jaxtrain {_version('jaxtrain')}: training of language models in JAX", ""]
    lines += [f"usage: {prog} COMMAND ...", f"start: {prog} train quickstart"]
    for group, title in GROUPS.items():
        lines += ["", title]
        lines += [f"  {c.name:<{width}}  {c.text}" for c in COMMANDS if c.group == group]
    return "\n".join([*lines, "", f"{prog} COMMAND --help shows its flags, examples first."])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Returns the commit of this code, with `+changes`; "" where it is not a git checkout."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    run = {"capture_output": True, "text": True, "timeout": 5}
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel", "HEAD"], check=True, **run)
        folder, found = top.stdout.split("\n")[:2]
        if not os.path.samefile(folder, root):  # installed below another project's checkout
            return ""
        state = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, **run)
        return found[:12] + "+changes" * bool(state.stdout.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def version() -> str:
    """Returns one line: jaxtrain's version and commit, JAX's, Python's."""
    about = f", commit {found}" if (found := commit()) else ""
    jax, python = _version("jax"), platform.python_version()
    return f"jaxtrain {_version('jaxtrain')}{about}; jax {jax}; Python {python}"


def main(argv=None) -> int | None:
    """Starts the command that the first argument names; the exit status."""
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
        print(f"error: no command {first}.{hint} {prog} lists all.", file=sys.stderr)
        return USAGE
    command = BY_NAME[first]
    try:
        module = importlib.import_module(command.module)
        if hasattr(module, "__path__"):  # a package: what `python -m` runs of it
            module = importlib.import_module(f"{command.module}.__main__")
    except KeyboardInterrupt:  # imports take seconds
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    # A command with words of its own, as `interop export`, puts its name behind prog itself.
    prog = prog if command.words else f"{prog} {first}"
    return getattr(module, command.function)([*command.words, *argv[1:]], prog=prog)

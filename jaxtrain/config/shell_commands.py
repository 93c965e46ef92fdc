"""How the user's shell starts our commands, so that every command we print works when pasted."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def jaxtrain_program() -> str:
    """Returns the words that start a command: `jaxtrain`, its path, or `PYTHON -m jaxtrain`.

    The short form needs the `jaxtrain` on PATH to be the one installed beside this interpreter;
    otherwise it could be absent, or belong to another environment.
    """
    installed = Path(sys.executable).with_name("jaxtrain")
    on_path = shutil.which("jaxtrain")
    if on_path and installed.exists() and os.path.samefile(on_path, installed):
        return "jaxtrain"
    if os.access(installed, os.X_OK):
        return _from_here(installed)
    return f"{python_program()} -m jaxtrain"


def shell_command(name: str, *arguments: str) -> str:
    """Returns a command of ours as one line for the user's shell, its arguments quoted.

    Args:
        name: a command of `jaxtrain`, such as "evaluate".
        arguments: flags and words, unquoted.
    """
    return " ".join([jaxtrain_program(), name, *map(shlex.quote, arguments)])


def current_command() -> str:
    """Returns the command line that started this process, as one line for the user's shell."""
    words = sys.orig_argv[1:]
    if words and Path(words[0]).name == "jaxtrain":  # the installed script
        return shell_command(*words[1:])
    return f"{python_program()} {shlex.join(words)}"


def current_command_with(*arguments: str) -> str:
    """Returns the command that started this process with more arguments, as one line."""
    return f"{current_command()} {shlex.join(arguments)}"


def python_program() -> str:
    """Returns the shortest name of this interpreter that works in the current folder, quoted."""
    on_path = shutil.which("python")
    # Not samefile: a virtual environment's python is a link to the system's.
    if on_path and os.path.abspath(on_path) == os.path.abspath(sys.executable):
        return "python"
    return _from_here(Path(sys.executable))


def _from_here(path: Path) -> str:
    """Returns the path as the current folder's shell may take it, relative where it is below."""
    here = Path.cwd()
    if path.is_relative_to(here) and here != Path(here.anchor):
        below = str(path.relative_to(here))
        return shlex.quote(below if os.sep in below else os.path.join(os.curdir, below))
    return shlex.quote(str(path))

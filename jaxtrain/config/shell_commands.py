"""Builds commands to print, which work when the user pastes them into a shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def jaxtrain_program() -> str:
    """Returns how to start jaxtrain from a shell: `jaxtrain`, its path, or `PYTHON -m jaxtrain`.

    It returns `jaxtrain` only if the one on PATH was installed with this interpreter; otherwise
    that one belongs to another environment.
    """
    installed = Path(sys.executable).with_name("jaxtrain")
    on_path = shutil.which("jaxtrain")
    if on_path and installed.exists() and os.path.samefile(on_path, installed):
        return "jaxtrain"
    if os.access(installed, os.X_OK):
        return _from_current_folder(installed)
    return f"{python_program()} -m jaxtrain"


def shell_command(name: str, *arguments: str) -> str:
    """Returns a command as one line for the shell.

    Args:
        name: the command's name, such as "evaluate".
        arguments: flags and words, not yet quoted.
    """
    return " ".join([jaxtrain_program(), name, *map(shlex.quote, arguments)])


def current_command(*arguments: str) -> str:
    """Returns the command that started this process, with arguments added, as one line."""
    words = [*sys.orig_argv[1:], *arguments]
    if words and Path(words[0]).name == "jaxtrain":  # the installed script
        return shell_command(*words[1:])
    return f"{python_program()} {shlex.join(words)}"


def python_program() -> str:
    """Returns the shortest name of this interpreter that works in the current folder, quoted."""
    on_path = shutil.which("python")
    # Not samefile: a virtual environment's python is a link to the system's.
    if on_path and os.path.abspath(on_path) == os.path.abspath(sys.executable):
        return "python"
    return _from_current_folder(Path(sys.executable))


def _from_current_folder(path: Path) -> str:
    """Returns the quoted path, relative if it is below the current folder."""
    folder = Path.cwd()
    if path.is_relative_to(folder) and folder != Path(folder.anchor):
        relative = str(path.relative_to(folder))
        # Without a separator the shell would look for the name on PATH.
        return shlex.quote(relative if os.sep in relative else os.path.join(os.curdir, relative))
    return shlex.quote(str(path))

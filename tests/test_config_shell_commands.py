"""Commands that we print must work when they are pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from jaxtrain.config.shell_commands import jaxtrain_program, shell_command

ROOT = Path(__file__).parent.parent
# The module alone: the package imports jax, which the linked interpreter does not have.
PROGRAM = f"""
import runpy
path = {str(ROOT / "jaxtrain" / "config" / "shell_commands.py")!r}
print(runpy.run_path(path)["jaxtrain_program"]())
"""


def _environment(folder):
    """A virtual environment's `bin` with a link to this interpreter; returns its python."""
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    (folder / "jaxtrain").write_text("#!/bin/sh\n")
    (folder / "jaxtrain").chmod(0o755)
    return folder / "python"


def _asked(python, path, cwd):
    env = os.environ | {"PATH": str(path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([python, "-c", PROGRAM], env=env, cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_short_name_is_printed_where_it_is_on_the_path(tmp_path):
    python = _environment(tmp_path / "venv" / "bin")
    assert _asked(python, python.parent, tmp_path) == "jaxtrain"


def test_the_command_of_an_environment_that_is_not_active_is_named_by_its_path(tmp_path):
    python = _environment(tmp_path / "venv" / "bin")
    other = _environment(tmp_path / "other" / "bin")
    assert _asked(python, other.parent, tmp_path) == "venv/bin/jaxtrain"
    assert _asked(python, "/nowhere", Path("/")) == str(python.with_name("jaxtrain"))


def test_arguments_with_spaces_are_quoted():
    words = shlex.split(shell_command("evaluate", "--run=my run"))
    assert words[-2:] == ["evaluate", "--run=my run"]
    assert words[:-2] == shlex.split(jaxtrain_program())


def test_the_typed_command_is_printed_so_that_it_can_be_pasted(tmp_path):
    program = tmp_path / "a b.py"
    program.write_text(PROGRAM.replace('"invocation"', '"typed"'))
    words = [str(program), "--config.workdir=runs/it's ü", "-v"]
    run = lambda command, **how: (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, **how).stdout
    )
    typed = run([sys.executable, *words])
    assert run(typed.strip(), shell=True) == typed and "it'\"'\"'s" in typed

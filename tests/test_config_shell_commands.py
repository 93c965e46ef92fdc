"""Commands that are printed for the user work when they are pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from jaxtrain.config.shell_commands import jaxtrain_program, shell_command

ROOT = Path(__file__).parent.parent
# Runs the file, not the package, whose imports the linked interpreter cannot resolve.
PROGRAM = f"""
import runpy
path = {str(ROOT / "jaxtrain" / "config" / "shell_commands.py")!r}
print(runpy.run_path(path)["jaxtrain_program"]())
"""


def make_environment(folder):
    """Makes the `bin` of a virtual environment, whose python is this one; returns its path."""
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    (folder / "jaxtrain").write_text("#!/bin/sh\n")
    (folder / "jaxtrain").chmod(0o755)
    return folder / "python"


def printed_program(python, path, cwd):
    env = os.environ | {"PATH": str(path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", PROGRAM], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_short_name_is_printed_if_it_is_on_the_path(tmp_path):
    python = make_environment(tmp_path / "venv" / "bin")
    assert printed_program(python, python.parent, tmp_path) == "jaxtrain"


def test_in_an_environment_that_is_not_active_the_program_is_printed_as_a_path(tmp_path):
    python = make_environment(tmp_path / "venv" / "bin")
    other = make_environment(tmp_path / "other" / "bin")
    assert printed_program(python, other.parent, tmp_path) == "venv/bin/jaxtrain"
    assert printed_program(python, "/nowhere", Path("/")) == str(python.with_name("jaxtrain"))


def test_arguments_with_spaces_are_quoted():
    words = shlex.split(shell_command("evaluate", "--run=my run"))
    assert words[-2:] == ["evaluate", "--run=my run"]
    assert words[:-2] == shlex.split(jaxtrain_program())


def test_the_command_that_started_the_process_can_be_pasted(tmp_path):
    program = tmp_path / "a b.py"
    program.write_text(PROGRAM.replace('"jaxtrain_program"', '"current_command"'))
    words = [str(program), "--config.workdir=runs/it's ü", "-v"]

    def output_of(command, **options):
        options |= {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        return subprocess.run(command, **options).stdout

    printed = output_of([sys.executable, *words])
    assert output_of(printed.strip(), shell=True) == printed and "it'\"'\"'s" in printed

"""Commands that we print must work when they are pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.invocation import again, command, invocation

ROOT = Path(__file__).parent.parent
# The module alone: the package imports jax, which the linked interpreter does not have.
PROGRAM = f"""
import runpy
print(runpy.run_path({str(ROOT / "jaxtrain" / "invocation.py")!r})["invocation"]())
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


def test_an_environment_that_is_not_active_is_named_by_its_python(tmp_path):
    python = _environment(tmp_path / "venv" / "bin")
    other = _environment(tmp_path / "other" / "bin")
    assert _asked(python, other.parent, tmp_path) == "./venv/bin/python -m jaxtrain"
    assert _asked(python, "/nowhere", Path("/")) == f"{python} -m jaxtrain"


def test_arguments_with_spaces_are_quoted():
    words = shlex.split(command("evaluate", "--run=my run"))
    assert words[-2:] == ["evaluate", "--run=my run"]
    assert words[:-2] == shlex.split(invocation())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/x/jaxtrain/train.py", "--config=a b"], ["train", "--config=a b", "--steps=3"]),
        (["/x/bin/jaxtrain", "train", "debug"], ["train", "debug", "--steps=3"]),
        (["/x/jaxtrain/__main__.py", "train", "debug"], ["train", "debug", "--steps=3"]),
    ],
)
def test_the_command_that_started_us_is_repeated_with_more_flags(argv, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert shlex.split(again("--steps=3")) == [*shlex.split(invocation()), *words]


def test_a_command_of_someone_elses_program_is_not_repeated(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/bin/pytest", "-q"])
    assert again("--a=b c") == "the same command with '--a=b c'"

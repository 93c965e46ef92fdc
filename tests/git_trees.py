"""A git working tree with a program, as launch.run sends one."""

import subprocess
from pathlib import Path


def commit_program(folder: Path, source: str) -> None:
    """Writes program.py into the folder, which need not exist, and commits all that is in it."""
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(source)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for argv in (["init", "-q"], ["add", "."], ["commit", "-qm", "program"]):
        subprocess.run([*git, *argv], check=True)

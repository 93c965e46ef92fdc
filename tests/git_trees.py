"""A git working tree with a small program, as launch.run sends one to the hosts."""

import re
import subprocess
from pathlib import Path

# The beginning of a program that writes heartbeats and handles SIGTERM as the trainer does.
HEARTBEAT = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
def make_step(step, step_s):
    time.sleep(step_s)
    beat = {"beats": step, "step": step, "phase": "train", "step_s": step_s}
    with open(os.environ["JAXTRAIN_BEAT"] + ".new", "w") as file:
        json.dump(beat, file)
    os.replace(os.environ["JAXTRAIN_BEAT"] + ".new", os.environ["JAXTRAIN_BEAT"])
    print(f"rank {os.environ['JAX_PROCESS_ID']} step {step}")
"""


def commit_program(folder: Path, source: str) -> None:
    """Writes program.py into the folder, which need not exist, and commits all that is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.py").write_text(source)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for argv in (["init", "-q"], ["add", "."], ["commit", "-qm", "program"]):
        subprocess.run([*git, *argv], check=True)


def job_id(output: str) -> str:
    """Returns the id of the job that launch.run prints."""
    match = re.search(r"job (\d{4}-\d{6}-\w{4}):", output)
    assert match, output
    return match[1]

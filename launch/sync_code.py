"""The working tree's code, sent to every host into a folder that its content names."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

from launch.host.hashing import hash_files
from launch.ssh import Fleet, HostError


class Code(NamedTuple):
    root: Path
    files: list[str]  # tracked and new ones, relative to root
    hash: str
    commit: str
    patch: str  # what differs from the commit; "" where nothing does


def read_code(folder) -> Code:
    """The git working tree that holds `folder`.

    Raises:
        ValueError: there is none.
    """
    git = lambda *argv: (
        subprocess.run(["git", "-C", str(folder), *argv], capture_output=True, check=True).stdout
    )
    try:
        root = Path(git("rev-parse", "--show-toplevel").decode().strip())
        commit = git("rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            f"--code must be inside a git working tree with a commit; got {folder}."
        ) from None
    listed = git("-C", str(root), "ls-files", "-coz", "--exclude-standard")
    names = sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})
    files = [n for n in names if (root / n).is_symlink() or (root / n).is_file()]
    patch = git("-C", str(root), "diff", "HEAD", "--binary").decode(errors="replace")
    new = os.fsdecode(git("-C", str(root), "ls-files", "-o", "--exclude-standard"))
    patch += "".join(f"new file: {name}\n" for name in new.splitlines())
    return Code(root, files, hash_files(root, files), commit, patch)


def ship(fleet: Fleet, code: Code) -> dict:
    """Sends the code to the hosts that lack it; returns {host: its folder there}.

    Raises:
        HostError: a host could not take it.
    """
    request = {"op": "land", "hash": code.hash, "files": code.files, "by": os.urandom(4).hex()}

    def send(host):
        answer = fleet.call(host, request)
        if answer["missing"]:
            _rsync(fleet, host, code, answer["folder"])
            answer = fleet.call(host, request)
        return answer["folder"]

    folders = fleet.everywhere(send)
    failed = [str(found) for found in folders.values() if isinstance(found, HostError)]
    if failed:
        raise HostError("\n".join(failed))
    return folders


def place(host, path: str) -> str:
    """A host's path as rsync reads it: an IPv6 address stands in brackets, for its colons."""
    user, at, name = host.target.rpartition("@")
    return f"{user}{at}[{name}]:{path}" if ":" in name else f"{host.target}:{path}"


def _rsync(fleet, host, code, folder):
    target = place(host, f"{folder}/")
    argv = ["rsync", "-lptz", "--from0", "--files-from=-", "-s", "-e", shlex.join(fleet.ssh(host))]
    names = b"\0".join(os.fsencode(name) for name in code.files)
    try:
        done = subprocess.run([*argv, f"{code.root}/", target], input=names, capture_output=True)
    except FileNotFoundError:
        raise HostError("rsync is not on this machine. Install it.") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise HostError(f"{host.name}: rsync ended with {done.returncode}: {said}")

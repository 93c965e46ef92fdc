"""Sends the working tree's code to every host, into a folder named by the code's hash."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

from launch.host.hashing import hash_files
from launch.inventory import Host
from launch.ssh import HostError, SshClient, raise_errors


class Code(NamedTuple):
    """A git working tree as it is now."""

    root: Path
    files: list[str]  # tracked and new files, relative to root
    hash: str
    commit: str
    patch: str  # how the tree differs from the commit; "" if it does not


def read_code(folder: str | Path) -> Code:
    """Returns the git working tree that contains a folder.

    Raises:
        ValueError: the folder is in no working tree, or in one without a commit.
    """

    def git(folder: str | Path, *argv: str) -> bytes:
        command = ["git", "-C", str(folder), *argv]
        return subprocess.run(command, capture_output=True, check=True).stdout

    try:
        root = Path(git(folder, "rev-parse", "--show-toplevel").decode().strip())
        commit = git(folder, "rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            f"--code must be inside a git working tree with a commit; got {folder}."
        ) from None
    listed = git(root, "ls-files", "-coz", "--exclude-standard")
    names = sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})
    files = [n for n in names if (root / n).is_symlink() or (root / n).is_file()]
    patch = git(root, "diff", "HEAD", "--binary").decode(errors="replace")
    new = os.fsdecode(git(root, "ls-files", "-o", "--exclude-standard"))
    patch += "".join(f"new file: {name}\n" for name in new.splitlines())
    return Code(root, files, hash_files(root, files), commit, patch)


def send_code(client: SshClient, code: Code) -> dict[Host, str]:
    """Sends the code to the hosts that lack it; returns {host: its folder there}.

    Raises:
        HostError: a host could not receive it.
    """
    request = {"op": "land", "hash": code.hash, "files": code.files, "by": os.urandom(4).hex()}

    def send_to(host: Host) -> str:
        answer = client.call(host, request)
        if answer["missing"]:
            _rsync(client, host, code, answer["folder"])
            answer = client.call(host, request)  # checks the hash and renames the folder
        return answer["folder"]

    folders = client.map(send_to)
    raise_errors(folders)
    return {host: str(folder) for host, folder in folders.items()}


def rsync_path(host: Host, path: str) -> str:
    """Returns a host's path as rsync reads it, with an IPv6 address in brackets."""
    user, at, name = host.target.rpartition("@")
    return f"{user}{at}[{name}]:{path}" if ":" in name else f"{host.target}:{path}"


def _rsync(client: SshClient, host: Host, code: Code, folder: str) -> None:
    ssh = shlex.join(client.ssh_command(host))
    argv = ["rsync", "-lptz", "--from0", "--files-from=-", "-s", "-e", ssh]
    argv += [f"{code.root}/", rsync_path(host, f"{folder}/")]
    names = b"\0".join(os.fsencode(name) for name in code.files)
    try:
        done = subprocess.run(argv, input=names, capture_output=True)
    except FileNotFoundError:
        raise HostError("rsync is not installed on this machine. Install it.") from None
    if done.returncode:
        output = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise HostError(f"{host.name}: rsync ended with {done.returncode}: {output}")

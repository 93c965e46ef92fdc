"""Sends the working tree's code to every host, into a folder named by the code's hash."""

import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

from launch.host.hashing import hash_files
from launch.host_process import SEND_S
from launch.inventory import Host
from launch.ssh import HostError, SshClient, raise_errors
from launch.terminal import note

CHUNK_BYTES = 1 << 18


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
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").partition("\n")[0]
        raise ValueError(
            f"--code must be inside a git working tree with a commit; got {folder}: "
            f"{said or error}."
        ) from None
    listed = git(root, "ls-files", "-coz", "--exclude-standard")
    names = sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})
    files = [n for n in names if (root / n).is_symlink() or (root / n).is_file()]
    plain = ("--no-color", "--no-ext-diff", "--no-textconv")  # else it could not be applied
    patch = git(root, "diff", "HEAD", "--binary", *plain).decode(errors="replace")
    new = git(root, "ls-files", "-o", "--exclude-standard").decode(errors="replace")
    patch += "".join(f"new file: {name}\n" for name in new.splitlines())
    return Code(root, files, hash_files(root, files), commit, patch)


def send_code(client: SshClient, code: Code) -> dict[Host, str]:
    """Sends the code to the hosts that lack it; returns {host: its folder there}.

    Raises:
        HostError: a host could not receive it.
    """
    code_name = {"hash": code.hash, "by": os.urandom(4).hex()}
    request = code_name | {"op": "land", "files": code.files}
    answers: dict[Host, Any] = client.map(lambda host: client.call(host, request))
    raise_errors(answers)
    for host, answer in answers.items():
        if not isinstance(answer, dict) or not answer.keys() >= {"missing", "folder"}:
            raise HostError(f"{host.name}: its answer about the code has no meaning.")
    missing = [host for host, answer in answers.items() if answer["missing"]]
    if missing:
        with tempfile.NamedTemporaryFile(suffix=".tar.gz") as archive:
            _pack(code, archive)
            size = Path(archive.name).stat().st_size / 1e6
            note(f"sending {size:.1f} MB of code to {' '.join(host.name for host in missing)}")

            def send_to(host: Host) -> Any:
                _send(client, host, code_name, archive.name)
                return client.call(host, request)  # checks the hash and renames the folder

            answers |= client.map(send_to, missing)
            raise_errors(answers)
    folders = {host: answer["folder"] for host, answer in answers.items()}
    return {host: str(folder) for host, folder in folders.items()}


def _pack(code: Code, archive: IO[bytes]) -> None:
    """Writes the files as a compressed tar archive."""
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=6) as tar:
        for name in code.files:
            tar.add(code.root / name, arcname=name, recursive=False)
    archive.flush()


def _send(client: SshClient, host: Host, request: dict[str, Any], archive: str) -> None:
    """Sends the archive as the standard input of a request."""
    with client.start(host, request | {"op": "receive"}) as process, open(archive, "rb") as file:
        while (data := file.read(CHUNK_BYTES)) and process.send(data, SEND_S):
            pass
        process.end_input()
        client.read_answer(host, process, SEND_S)

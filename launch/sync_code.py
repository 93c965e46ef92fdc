"""Sends the working tree's code to every host, into a folder named by the code's hash."""

import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

from launch.answers import check
from launch.host.hashing import hash_files
from launch.host_process import SEND_S
from launch.inventory import Host
from launch.ssh import SshClient, raise_errors
from launch.terminal import note

CHUNK_BYTES = 1 << 18
LANDED = {"missing": bool, "folder": str}  # what a host answers to `land`


class Code(NamedTuple):
    """A git working tree as it is now."""

    root: Path
    files: list[str]  # tracked and new files, relative to root
    hash: str
    commit: str
    patch: str  # how the tree differs from the commit; "" if it does not


def read_code(folder: str | Path) -> Code:
    """Returns the git working tree that contains a folder, with the repositories inside of it.

    Raises:
        ValueError: the folder is in no working tree, or in one without a commit; or git refuses to
            read a repository inside of it.
    """
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel").decode().strip())
        commit = _git(folder, "rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"--code must be inside a git working tree with a commit; got {folder}: "
            f"{_reason(error)}."
        ) from None
    files, nested, empty = _list_files(root)
    for name in empty:
        note(f"{name} is a submodule without files: `git submodule update --init` fetches them")
    if nested:
        note(f"also sends the git repositories {', '.join(nested)}")
    patch = "".join(_read_patch(root, name) for name in ("", *nested))
    return Code(root, sorted(files), hash_files(root, sorted(files)), commit, patch)


def _git(folder: str | Path, *argv: str) -> bytes:
    command = ["git", "-C", str(folder), *argv]
    return subprocess.run(command, capture_output=True, check=True).stdout


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", b"").decode(errors="replace").partition("\n")[0]
    return said or str(error)


def _list_files(root: Path, prefix: str = "") -> tuple[list[str], list[str], list[str]]:
    """Returns (tracked and new files, repositories, submodules without files), relative to root.

    To git, a repository inside another one is a single entry: a submodule, or a new folder.

    Args:
        prefix: the repository to list, which ends with a slash; "" for the one at root.
    """
    try:
        listed = _git(root / prefix, "ls-files", "-coz", "--exclude-standard")
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"--code has a repository in {prefix} that git cannot read: {_reason(error)}. Repair "
            "it, or add it to .gitignore."
        ) from None
    files, nested, empty = [], [], []
    for entry in sorted({os.fsdecode(name) for name in listed.split(b"\0") if name}):
        name = prefix + entry.rstrip("/")
        path = root / name
        if path.is_symlink() or path.is_file():
            files.append(name)
        elif (path / ".git").exists():
            inner = _list_files(root, f"{name}/")
            files, nested, empty = files + inner[0], [*nested, name, *inner[1]], empty + inner[2]
        elif path.is_dir():
            empty.append(name)
    return files, nested, empty


def _read_patch(root: Path, name: str) -> str:
    """Returns how a repository differs from its commit; for one inside of root, also the commit."""
    folder, prefix = root / name, f"{name}/" if name else ""
    plain = ("--no-color", "--no-ext-diff", "--no-textconv")  # else it could not be applied
    places = (f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}", "--ignore-submodules=dirty")
    try:
        text = f"repository {name}: commit {_git(folder, 'rev-parse', 'HEAD').decode()}"
        patch = _git(folder, "diff", "HEAD", "--binary", *plain, *places).decode(errors="replace")
    except subprocess.CalledProcessError:
        text, patch = f"repository {name}: no commit\n", ""
    new = _git(folder, "ls-files", "-o", "--exclude-standard").decode(errors="replace")
    patch += "".join(f"new file: {prefix}{line}\n" for line in new.splitlines())
    return (text if name else "") + patch


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
        check(host, answer, LANDED)
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
    return {host: check(host, answer, LANDED)["folder"] for host, answer in answers.items()}


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

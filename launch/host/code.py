"""Receives code into a folder named by its hash, under the launcher's folder on this host."""

import contextlib
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from launch.host.added_modules import find_added_modules
from launch.host.hashing import hash_files

Request = dict[str, Any]
STALE_S = 86_400.0  # incompletely received code is deleted at this age


def root_of(request: Request) -> Path:
    """Returns the launcher's folder on this host. Only this user can read it."""
    root = Path(os.path.expanduser(request["workdir"])).absolute()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def _draft_of(request: Request) -> Path:
    """Returns the folder in which the code of one operator's request arrives."""
    return root_of(request) / "code" / f".{request['hash']}.{request['by']}"


def land(request: Request) -> dict[str, Any]:
    """Moves received code to the folder named by its hash; `missing` asks for it to be sent."""
    folder = root_of(request) / "code" / request["hash"]
    draft = _draft_of(request)
    if folder.exists():
        shutil.rmtree(draft, ignore_errors=True)
        _check_code(folder, request, "It was edited on this host. Remove it there, and start again")
        if added := find_added_modules(folder, request["files"]):
            problem = f"{', '.join(added[:4])} was added to the code in {folder}"
            remedy = (
                "Python would import it: remove it there, and start again. If the program writes "
                "it, let it write into one of its packages, or outside of the code"
            )
            raise RuntimeError(f"{problem}. {remedy}")
        os.utime(folder)
        return {"missing": False, "folder": str(folder)}
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    missing = not draft.exists()
    if missing:
        draft.mkdir(mode=0o700)
    _delete_stale_drafts(draft)
    if missing:
        return {"missing": True, "folder": str(draft)}
    _check_code(draft, request, "A file was edited while it was sent. Start again")
    runs = root_of(request) / "runs"  # a relative --config.workdir must outlive this code
    runs.mkdir(exist_ok=True)
    if not (draft / "runs").exists():
        os.symlink(runs, draft / "runs")
    try:
        os.rename(draft, folder)
    except OSError:
        if not folder.exists():
            raise
        return land(request)  # another operator has sent the same code meanwhile
    return {"missing": False, "folder": str(folder)}


def _delete_stale_drafts(draft: Path) -> None:
    """Deletes drafts that are STALE_S older than this one, by the clock of their file system."""
    os.utime(draft)  # sets its ctime to now
    for path in set(draft.parent.glob(".*")) - {draft}:
        with contextlib.suppress(FileNotFoundError):  # another request has just renamed it
            # Not its mtime, which unpacking may have set.
            if draft.stat().st_ctime - path.stat().st_ctime > STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def _check_code(folder: Path, request: Request, reason: str) -> None:
    try:
        found = hash_files(folder, request["files"])
    except FileNotFoundError as error:
        found = f"nothing, as {error.filename} is missing"
    if found != request["hash"]:
        problem = f"the code in {folder} hashes to {found}, not to {request['hash']}"
        raise RuntimeError(f"{problem}. {reason}")


def receive(request: Request) -> dict:
    """Unpacks the code that follows the request, a tar archive, into the folder for it.

    If the archive ends early, because the connection broke, it deletes that folder.
    """
    draft = _draft_of(request)
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|gz") as tar:
            if hasattr(tarfile, "tar_filter"):  # Python 3.11.4
                tar.extractall(draft, filter="tar")  # refuses paths outside of the folder
            else:
                tar.extractall(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return {}

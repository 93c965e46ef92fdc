"""What a host needs besides the code: Python packages built from constraints, and the data."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

SAID_LINES = 6  # of pip's, where it fails
BUILT = "built.json"  # in an environment: what it was made of


def environment_key(constraints: str, pyproject: str, extras, version=sys.version) -> str:
    """The name of an environment: 16 hex digits of all that decides what is in it."""
    parts = json.dumps([constraints, pyproject, sorted(extras), version])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def build_environment(root: Path, request: dict) -> dict:
    """Python with the project's dependencies, of request's constraints: made once, then reused.

    The project itself is not in it: its code is sent for each job. Packages come from where this
    host's pip is configured to take them.

    Returns:
        {"python", "versions": {package: version}, "made_s"}.

    Raises:
        RuntimeError: pip failed; with its last lines.
        ValueError: pyproject.toml has no such extra.
    """
    key = environment_key(request["constraints"], request["pyproject"], request["extras"])
    folder, began = root / "envs" / key, time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job may be building the same
        if not folder.exists():
            for stale in folder.parent.glob(f".{key}.*"):  # of a build that was cut off
                shutil.rmtree(stale)
            draft = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
            try:
                _build(draft, request)
                os.rename(draft, folder)  # whole or not there; only `python -m` is used of it
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    os.utime(folder)
    versions = json.loads((folder / BUILT).read_text())
    made_s = round(time.monotonic() - began, 1)
    return {"python": str(folder / "bin" / "python"), "versions": versions, "made_s": made_s}


def requirements(project: dict, extras) -> list[str]:
    """What pyproject.toml's [project] asks for, with extras; an extra may be made of others.

    Raises:
        ValueError: it has no such extra.
    """
    known, name = project.get("optional-dependencies", {}), project["name"]
    wanted, open_, seen = list(project.get("dependencies", [])), list(extras), set()
    while open_:
        extra = open_.pop()
        if extra not in known:
            raise ValueError(f"--env_extras must be of {sorted(known)}; got {extra!r}.")
        for package in () if extra in seen else known[extra]:
            if package.startswith(f"{name}["):  # NAME[one,other]
                open_ += package[len(name) + 1 : package.index("]")].split(",")
            else:
                wanted.append(package)
        seen.add(extra)
    return wanted


def _build(draft: Path, request: dict) -> None:
    packages = requirements(tomllib.loads(request["pyproject"])["project"], request["extras"])
    _run([sys.executable, "-m", "venv", "--without-pip", draft])  # this Python's pip serves
    wanted = draft / "constraints.txt"
    wanted.write_text(request["constraints"])
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    pip += ["--python", draft / "bin" / "python"]
    _run([*pip, "install", "-q", "-c", wanted, *packages])
    listed = json.loads(_run([*pip, "list", "--format=json"]))
    versions = {package["name"].lower(): package["version"] for package in listed}
    (draft / BUILT).write_text(json.dumps(versions))


def _run(argv) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-SAID_LINES:]
        why = f"`python -m {argv[2]}` ended with {done.returncode}:"
        raise RuntimeError("\n    ".join([why, *said]))
    return done.stdout


def glance(request: dict) -> dict:
    """What the shipped code says of this host's data; see jaxtrain/data/quick_fingerprint.py.

    Raises:
        RuntimeError: it found none, or could not be run.
    """
    argv = [
        os.path.expanduser(request["python"]),
        "-m",
        "jaxtrain.data.quick_fingerprint",
        *request["flags"],
    ]
    env = os.environ | request["env"] | {"PYTHONPATH": request["cwd"]}
    done = subprocess.run(
        argv, cwd=request["cwd"], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"looking at the data: {' '.join(lines[-2:]) or 'nothing said'}")
    return json.loads(lines[-1])

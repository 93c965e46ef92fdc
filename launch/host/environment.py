"""Builds the Python packages that a job needs on a host, and summarises the host's data."""

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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PIP_LINES = 6  # how much of pip's output an error shows
BUILT = "built.json"  # a file in each environment: {package: version}


def environment_key(
    constraints: str, pyproject: str, extras: Iterable[str], version: str = sys.version
) -> str:
    """Returns an environment's name: a hash (16 hex digits) of all that decides its content."""
    parts = json.dumps([constraints, pyproject, sorted(extras), version])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def build_environment(root: Path, request: Mapping) -> dict[str, Any]:
    """Builds a Python environment with the project's dependencies, or reuses an identical one.

    It does not contain the project's own code, which is sent for each job. Packages come from the
    index that this host's pip is configured for.

    Args:
        request: contains constraints (for pip) and pyproject, as text, and extras, a list of names.

    Returns:
        {"python": its interpreter, "versions": {package: version}, "made_s": seconds}

    Raises:
        RuntimeError: pip failed; the error ends with its last lines.
        ValueError: pyproject.toml has no such extra.
    """
    key = environment_key(request["constraints"], request["pyproject"], request["extras"])
    folder, start = root / "envs" / key, time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job may be building the same environment
        if not folder.exists():
            for stale in folder.parent.glob(f".{key}.*"):  # left by an interrupted build
                shutil.rmtree(stale)
            draft = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
            try:
                _build(draft, request)
                # A venv's scripts contain its old path, but `python -m` does not use them.
                os.rename(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    os.utime(folder)
    versions = json.loads((folder / BUILT).read_text())
    made_s = round(time.monotonic() - start, 1)
    return {"python": str(folder / "bin" / "python"), "versions": versions, "made_s": made_s}


def requirements(project: Mapping, extras: Iterable[str]) -> list[str]:
    """Returns the dependencies of pyproject.toml's [project] and of extras, nested ones included.

    Raises:
        ValueError: there is no such extra.
    """
    known, name = project.get("optional-dependencies", {}), project["name"]
    wanted, pending, seen = list(project.get("dependencies", [])), list(extras), set()
    while pending:
        extra = pending.pop()
        if extra not in known:
            raise ValueError(f"--env_extras must be among {sorted(known)}; got {extra!r}.")
        if extra in seen:
            continue
        seen.add(extra)
        for package in known[extra]:
            if package.startswith(f"{name}["):  # NAME[extra,extra] stands for those extras
                pending += package[len(name) + 1 : package.index("]")].split(",")
            else:
                wanted.append(package)
    return wanted


def _build(draft: Path, request: Mapping) -> None:
    packages = requirements(tomllib.loads(request["pyproject"])["project"], request["extras"])
    _run_python(["-m", "venv", "--without-pip", str(draft)])  # the host's own pip installs into it
    constraints = draft / "constraints.txt"
    constraints.write_text(request["constraints"])
    pip = ["-m", "pip", "--disable-pip-version-check", "--python", str(draft / "bin" / "python")]
    _run_python([*pip, "install", "-q", "-c", str(constraints), *packages])
    listed = json.loads(_run_python([*pip, "list", "--format=json"]))
    versions = {package["name"].lower(): package["version"] for package in listed}
    (draft / BUILT).write_text(json.dumps(versions))


def _run_python(args: list[str]) -> str:
    argv = [sys.executable, *args]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        output = (done.stdout + done.stderr).strip().splitlines()[-PIP_LINES:]
        problem = f"`python -m {args[1]}` ended with {done.returncode}:"
        raise RuntimeError("\n    ".join([problem, *output]))
    return done.stdout


def summarize_data(request: Mapping) -> dict[str, Any]:
    """Runs the job's own code to summarise this host's data; returns the summary.

    Raises:
        RuntimeError: the code found no data, or could not be run.
    """
    python, module = os.path.expanduser(request["python"]), "jaxtrain.data.quick_fingerprint"
    argv = [python, "-m", module, *request["flags"]]
    env = os.environ | request["env"] | {"PYTHONPATH": request["cwd"]}
    done = subprocess.run(
        argv, cwd=request["cwd"], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"reading the data: {' '.join(lines[-2:]) or 'no output'}")
    return json.loads(lines[-1])

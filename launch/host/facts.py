"""Gathers the facts about this host that preflight judges on the operator's machine."""

import contextlib
import os
import platform
import queue
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from launch.host.interfaces import addresses, bind_tcp, interface_of
from launch.host.logout import check_logout

T = TypeVar("T")
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml_dtypes",
    "tensorstore",
    "scipy",
    "ml-collections",
    "absl-py",
    "pyarrow",
    "safetensors",
)
SYSCTLS = {
    "congestion": "net/ipv4/tcp_congestion_control",
    "tcp_rmem": "net/ipv4/tcp_rmem",
    "tcp_wmem": "net/ipv4/tcp_wmem",
}
PATIENCE_S = 20.0  # for calls that may hang in the kernel: a driver, a network file system
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def gather_facts(root: Path, request: Mapping) -> dict[str, Any]:
    """Returns this host's facts, as JSON values.

    Args:
        root: the launcher's folder on this host.
        request: contains `address` and `port`; for the first host also `nonce`, which it must
            write, and `shared`, the folder to write it to.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gpus, gpus_error = _gpus()
    address, port = request["address"], request["port"]
    return {
        "host": socket.gethostname(),
        "own_address": _resolve(socket.gethostname()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": _versions(),
        "gpus": gpus,
        "gpus_error": gpus_error,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": _available_memory(),
        "disk_free_bytes": shutil.disk_usage(root).free,
        "shm_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0,
        "open_files": [soft, hard],
        "proxies": sorted(n for n in os.environ if n.lower() in PROXIES),
        "local_disk": _file_system(root),
        "logout": check_logout(),
        "interfaces": addresses(),
        "interface": interface_of(address),
        "has_address": _can_bind(address, 0),
        "port_free": port == 0 or _can_bind(address, port),
        "sysctls": {name: _sysctl(path) for name, path in SYSCTLS.items()},
        "nonce_error": _write_nonce(request),
    }


def with_timeout(function: Callable[..., T], *args: Any) -> T:
    """Returns the function's value, or raises what it raises.

    Raises:
        TimeoutError: it took longer than PATIENCE_S. Its thread is abandoned: a process that hangs
            in a driver or on a network file system often cannot even be killed.
    """
    results: queue.Queue = queue.Queue()

    def call_function():
        try:
            results.put((function(*args), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=call_function, daemon=True).start()
    try:
        value, error = results.get(timeout=PATIENCE_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {PATIENCE_S:.0f} s") from None
    if error:
        raise error
    return value


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _gpus() -> tuple[list[dict], str]:
    """Asks nvidia-smi; returns (GPUs, error). Without nvidia-smi both are empty."""
    fields = "name,driver_version,memory.total,uuid"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        done = with_timeout(lambda: subprocess.run(command, **options))
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"nvidia-smi: {error}"
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return [], f"nvidia-smi ended with {done.returncode}: {' '.join(lines[:2])}"
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [{"name": r[0], "driver": r[1], "memory_mib": int(float(r[2]))} for r in rows], ""


def _available_memory() -> int:
    """Returns the bytes that a new program can allocate. Source: /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _file_system(folder: Path) -> str:
    """Returns the type of a folder's file system: that of the longest mount point above it."""
    longest, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount_point, this_kind = line.split()[:3]
        is_above = f"{folder}/".startswith(mount_point.rstrip("/") + "/")
        if is_above and len(mount_point) >= len(longest):
            longest, kind = mount_point, this_kind
    return kind


def _resolve(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def _can_bind(address: str, port: int) -> bool:
    """Returns whether a server could listen there; port 0 asks only about the address."""
    try:
        bind_tcp(address, port).close()
    except OSError:
        return False
    return True


def _sysctl(path: str) -> str:
    try:
        return " ".join(Path("/proc/sys", path).read_text().split())
    except OSError:
        return ""


def nonce_path(request: Mapping) -> Path:
    """Returns the file that shows whether hosts share a folder: one writes it, all read it."""
    return Path(os.path.expanduser(request["folder"])) / f".shared-{request['nonce']}"


def _write_nonce(request: Mapping) -> str:
    """Writes the nonce that all hosts must read in the shared folder; returns the error or ""."""
    if not (request.get("nonce") and request.get("shared")):
        return ""
    path = nonce_path({"folder": request["shared"], "nonce": request["nonce"]})

    def write_nonce():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(request["nonce"])

    try:
        with_timeout(write_nonce)
    except OSError as error:
        return f"{path.parent}: {error}"
    return ""

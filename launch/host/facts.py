"""What a host is, for the preflight table: read here, judged on the operator's machine."""

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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.host import interfaces as nics
from launch.host import logout

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
)
SYSCTLS = {
    "congestion": "net/ipv4/tcp_congestion_control",
    "tcp_rmem": "net/ipv4/tcp_rmem",
    "tcp_wmem": "net/ipv4/tcp_wmem",
}
PATIENCE_S = 20.0  # with what may hang in the kernel: a driver, a network file system
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def gather_facts(root: Path, request: dict) -> dict:
    """Facts as JSON. `request` holds address, port and, for the shared folder, nonce and shared."""
    nofile = resource.getrlimit(resource.RLIMIT_NOFILE)
    gpus, gpus_error = _gpus()
    return {
        "host": socket.gethostname(),
        "own_address": _resolve(socket.gethostname()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": _versions(),
        "gpus": gpus,
        "gpus_error": gpus_error,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory(),
        "disk_free_bytes": shutil.disk_usage(root).free,
        "shm_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0,
        "open_files": [nofile[0], nofile[1]],
        "proxies": sorted(n for n in os.environ if n.lower() in PROXIES),
        "local_disk": _local(root),
        "logout": logout.look(),
        "rsync": shutil.which("rsync") is not None,
        "interfaces": nics.addresses(),
        "interface": nics.holder(request["address"]),
        "has_address": _has_address(request["address"]),
        "port_free": request["port"] == 0 or _port_free(request["address"], request["port"]),
        "sysctls": {name: _sysctl(path) for name, path in SYSCTLS.items()},
        "nonce_error": _write_nonce(request),
    }


def _versions() -> dict:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def in_time(function, *args):
    """The function's value, or what it raises.

    Raises:
        TimeoutError: it hangs. It is left behind, not waited for: what sits in a driver or on a
            network file system that is away may not even be killed.
    """
    ended: queue.Queue = queue.Queue()

    def run():
        try:
            ended.put((function(*args), None))
        except Exception as error:
            ended.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = ended.get(timeout=PATIENCE_S)
    except queue.Empty:
        raise TimeoutError(f"no end within {PATIENCE_S:.0f} s") from None
    if error:
        raise error
    return value


def _gpus() -> tuple[list[dict], str]:
    """(GPUs, what is wrong), by nvidia-smi; none and "" where there is no nvidia-smi."""
    fields = "name,driver_version,memory.total,uuid"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        said = in_time(lambda: subprocess.run(command, **options))
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"nvidia-smi: {error}"
    if said.returncode:
        lines = (said.stdout + said.stderr).strip().splitlines()
        return [], f"nvidia-smi ended with {said.returncode}: {' '.join(lines[:2])}"
    rows = [line.split(", ") for line in said.stdout.strip().splitlines()]
    return [{"name": r[0], "driver": r[1], "memory_mib": int(float(r[2]))} for r in rows], ""


def _memory() -> int:
    """Bytes that a new program may take. Source: /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _local(root: Path) -> str:
    """The file system's type: status and locks want a local disk."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, found = line.split()[:3]
        if (str(root) + "/").startswith(where.rstrip("/") + "/") and len(where) >= len(best):
            best, kind = where, found
    return kind


def _resolve(name: str) -> str:
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return ""


def _has_address(address: str) -> bool:
    return _port_free(address, 0)


def _port_free(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _sysctl(path: str) -> str:
    try:
        return " ".join(Path("/proc/sys", path).read_text().split())
    except OSError:
        return ""


def _write_nonce(request: dict) -> str:
    """The first host writes the nonce that all must read in the folder for checkpoints."""
    if not (request.get("nonce") and request.get("shared")):
        return ""
    folder = Path(os.path.expanduser(request["shared"]))

    def write():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".shared-{request['nonce']}").write_text(request["nonce"])

    try:
        in_time(write)
    except OSError as error:
        return f"{folder}: {error}"
    return ""

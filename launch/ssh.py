"""Sends requests to hosts through the system's `ssh`, over one shared connection per host."""

import base64
import concurrent.futures
import glob
import hashlib
import json
import os
import secrets
import shlex
import stat
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from launch.host.files import write_text
from launch.host_process import HostError, HostProcess
from launch.inventory import Host
from launch.terminal import indented, visible

T = TypeVar("T")
# Options of every connection, including those that ProxyJump makes.
OPTIONS = {
    "BatchMode": "yes",  # a password prompt would hang the job; keys and agents still work
    "StrictHostKeyChecking": "yes",
    "ForwardAgent": "no",
    "ClearAllForwardings": "yes",  # the user's configuration must not open ports
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ConnectTimeout": "15",
    "ForwardX11": "no",
    "RemoteCommand": "none",  # with one, such as tmux, ssh refuses to run our command
    "RequestTTY": "no",  # a terminal would change the bytes of an answer
}
# ControlMaster: the first connection to a host stays open for 5 minutes, and later requests reuse
# it. That saves a handshake of several round trips each.
SHARED = {"ControlMaster": "auto", "ControlPersist": "300"}
USER_CONFIGS = ("~/.ssh/config", "/etc/ssh/ssh_config")  # what ssh reads without -F
SOCKET_BYTES = 104  # the longest path of a Unix socket on macOS; Linux allows 108
NAME_DIGITS = 8  # of the hash of a host's name in the name of its socket
# "/", that hash, "%C" as ssh expands it, and the suffix while it creates the socket
HASH_BYTES = 1 + NAME_DIGITS + 40 + 17
SCOPE = "systemd-run --user --scope --quiet --collect -- "  # see launch/host/logout.py
CONFIG_LOCK = threading.Lock()  # one thread per host wants to write the same file
HOST_CODE = Path(__file__).parent / "host"


def control_path(target: str, limit: int = SOCKET_BYTES) -> str:
    """Returns ssh's ControlPath for a host, in a folder that only this user can enter.

    ssh's %C is a hash of the address, port and user. If two names led to one address, the second
    would use the first one's connection, and ssh would not check that the host has the second
    one's key. So names share no connection.

    It is "none", and connections are not shared, if every possible path is too long or if this is
    Windows, whose OpenSSH has no shared connections.
    """
    if os.name == "nt":
        return "none"
    for parent in _runtime_folders():
        folder = Path(parent, f"jaxtrain-{os.getuid()}")
        if len(os.fsencode(folder)) + HASH_BYTES < limit:
            digits = hashlib.sha256(target.encode()).hexdigest()[:NAME_DIGITS]
            return f"{_create_private_folder(folder)}/{digits}%C"
    return "none"


def config_file(user_config: str = "") -> str:
    """Writes a file for `ssh -F`: OPTIONS, then the user's own configuration; returns its path.

    ssh takes the first value that it finds for an option, so OPTIONS cannot be overridden. They
    must be in a file: the connections that ProxyJump makes ignore options on the command line.
    Source: ssh_config(5).

    Args:
        user_config: replaces the configuration files that ssh reads by default.

    Raises:
        HostError: there is no such file, which ssh's Include would ignore.
    """
    if user_config and not os.path.exists(user_config):
        raise HostError(f"--ssh_config must name a file; got {user_config}.")
    names = USER_CONFIGS
    if user_config:
        names = [f'"{glob.escape(os.path.abspath(user_config))}"']  # Include expands patterns
    lines = [f"{name} {value}" for name, value in OPTIONS.items()]
    text = "\n".join([*lines, *(f"Include {name}" for name in names), ""])
    if os.name == "nt":
        folder = Path(tempfile.gettempdir())  # private on Windows
    else:
        folder = _create_private_folder(Path(_runtime_folders()[0], f"jaxtrain-{os.getuid()}"))
    path = folder / f"ssh_config.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with CONFIG_LOCK:
        if not path.exists():  # a logout, or a job that cleans /tmp, may have deleted it
            write_text(path, text, 0o600)
    return str(path)


def _runtime_folders() -> list[str]:
    """Returns existing folders for files that need to last only as long as a login."""
    names = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")
    return [name for name in names if name and os.path.isdir(name)]


def _create_private_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise HostError(f"{folder} must be your own folder, with mode 700. Remove it.")
    return folder


def host_modules() -> dict[str, str]:
    """Returns {module name: source} of all modules that a host runs."""
    modules = {"launch": ""}
    for path in sorted(HOST_CODE.glob("*.py")):
        name = "launch.host" if path.stem == "__init__" else f"launch.host.{path.stem}"
        modules[name] = path.read_text()
    return modules


class SshClient:
    """Sends requests to hosts and returns their answers, see launch/host/requests.py.

    Args:
        hosts: the hosts that `map` calls by default.
        ssh_config: a file for `ssh -F`; "" reads the user's own configuration.
    """

    def __init__(self, hosts: Iterable[Host], ssh_config: str = ""):
        self.hosts = tuple(hosts)
        self._ssh_config = ssh_config
        self._modules = host_modules()
        source = base64.b64encode((HOST_CODE / "boot.py").read_bytes()).decode()
        # In base64 no shell finds anything to expand: csh refuses a newline between quotes.
        self._boot = f'exec(__import__("base64").b64decode("{source}"))'

    def ssh_command(self, host: Host, shared: bool = True) -> list[str]:
        """Returns the ssh command line up to the host's name, which is not included."""
        argv = ["ssh", "-F", config_file(self._ssh_config)]
        for name, value in SHARED.items():
            argv += ["-o", f"{name}={value}"]
        argv += ["-o", f"ControlPath={control_path(host.target) if shared else 'none'}"]
        argv += ["-l", host.user] if host.user else []
        return argv + (["-p", str(host.port)] if host.port else [])

    def start(self, host: Host, request: Mapping[str, Any]) -> HostProcess:
        """Starts a request on a host. Standard input stays open for what the request reads."""
        python = shlex.quote(host.python)
        if host.python.startswith("~/"):
            python = f'"$HOME"/{shlex.quote(host.python[2:])}'
        scope = SCOPE if request.get("scope") else ""
        command = f"exec {scope}{python} -I -c {shlex.quote(self._boot)}"
        request, mark = {**request, "workdir": host.workdir}, f"answer {secrets.token_hex(8)}"
        sent = {"modules": self._modules, "request": request, "mark": mark}
        data = zlib.compress(json.dumps(sent).encode(), 9)  # saves round trips in TCP's slow start
        argv = [*self.ssh_command(host), "--", host.target, command]
        try:
            return HostProcess(argv, b"%d\n" % len(data) + data, mark.encode())
        except OSError as error:
            problem = f"{argv[0]} cannot be run here: {error.strerror}. Install OpenSSH's client."
            raise HostError(f"{host.name}: {problem}") from None

    def call(self, host: Host, request: Mapping[str, Any], timeout_s: float = 60.0) -> Any:
        """Returns the answer to one request.

        Raises:
            HostError: the host is unreachable, or answers with an error.
        """
        with self.start(host, request) as process:
            process.end_input()
            return self.read_answer(host, process, timeout_s)

    def read_answer(self, host: Host, process: HostProcess, timeout_s: float | None = None) -> Any:
        """Returns the value of a request's next answer.

        Raises:
            HostError: there is none within the time, or it reports an error.
        """
        try:
            line = process.readline(timeout_s)
        except TimeoutError:
            problem = f"no answer within {timeout_s:.0f} s. Log in and see what hangs there."
            raise HostError(f"{host.name}: {problem}") from None
        if not line:
            raise process.explain(host)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"ok", "error"}:
            got = visible(repr(line[:80]))
            raise HostError(f"{host.name}: its answer must be a JSON object; got {got}.")
        if "error" in answer:
            raise HostError(f"{host.name}: {indented(str(answer['error']))}")
        return answer["ok"]

    def map(
        self, function: Callable[[Host], T], hosts: Iterable[Host] | None = None
    ) -> dict[Host, T | HostError]:
        """Calls a function for all hosts at once; returns {host: its value or its HostError}."""
        hosts = self.hosts if hosts is None else tuple(hosts)

        def call_or_error(host: Host) -> T | HostError:
            try:
                return function(host)
            except HostError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(max(1, len(hosts))) as pool:
            return dict(zip(hosts, pool.map(call_or_error, hosts), strict=True))

    def call_all(
        self, requests: Mapping[Host, Mapping[str, Any]], timeout_s: float
    ) -> dict[Host, Any]:
        """Sends long requests, {host: request}; returns {host: its answer or its HostError}.

        Standard input stays open until the answer comes, so that a host ends its work if this
        machine goes away.
        """
        processes: dict[Host, HostProcess] = {}
        answers = {}
        timer = threading.Timer(timeout_s, lambda: [p.expire() for p in processes.values()])
        timer.daemon = True
        try:
            for host, request in requests.items():
                processes[host] = self.start(host, request)
            timer.start()
            for host, process in processes.items():
                try:
                    answers[host] = self.read_answer(host, process, timeout_s)
                except HostError as error:
                    answers[host] = error
        finally:
            timer.cancel()
            for process in processes.values():
                process.kill()
                process.close()
        return answers


def errors_in(answers: Mapping[Host, Any]) -> list[str]:
    """Returns the texts of the HostErrors among the answers of several hosts."""
    return [str(answer) for answer in answers.values() if isinstance(answer, HostError)]


def raise_errors(answers: Mapping[Host, Any]) -> None:
    """Raises a HostError with one line per host that failed, if any did."""
    if errors := errors_in(answers):
        raise HostError("\n".join(errors))

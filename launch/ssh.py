"""The hosts over SSH: the system's `ssh` in subprocesses, one shared connection per host."""

import concurrent.futures
import glob
import hashlib
import json
import os
import shlex
import stat
import subprocess
import tempfile
import threading
import zlib
from pathlib import Path

from launch.host.files import write_text
from launch.inventory import Host

OPTIONS = {  # of every connection, those to ProxyJump's hosts among them
    "BatchMode": "yes",  # a question would hang a job; keys and agents answer
    "StrictHostKeyChecking": "yes",  # whatever the user's configuration says
    "ForwardAgent": "no",
    "ClearAllForwardings": "yes",  # no port is opened but the launcher's own
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ConnectTimeout": "15",
    "ForwardX11": "no",
}
SHARED = {"ControlMaster": "auto", "ControlPersist": "300"}  # of those to the hosts themselves
CONFIGS = ("~/.ssh/config", "/etc/ssh/ssh_config")  # that ssh reads by itself
SOCKET_BYTES = 104
HASH_BYTES = 1 + 40 + 17  # "/%C" as ssh writes it, and its suffix
SCOPE = "systemd-run --user --scope --quiet --collect -- "  # see launch/host/logout.py
WRITING = threading.Lock()  # a thread for each host wants the one file of options
HOST_CODE = Path(__file__).parent / "host"


class HostError(Exception):
    """A host could not be reached, or could not do what it was asked. Its text says what to do."""


def control_path(limit=SOCKET_BYTES) -> str:
    """ControlPath: a socket in a folder of this user alone; "none" where there can be none.

    A socket's path is short, 104 bytes with macOS, and ssh adds 17 to it while it is made. OpenSSH
    for Windows has no shared connections.
    """
    if os.name == "nt":
        return "none"
    for parent in _parents():
        folder = Path(parent, f"jaxtrain-{os.getuid()}")
        if len(os.fsencode(folder)) + HASH_BYTES < limit:
            return f"{_own_folder(folder)}/%C"
    return "none"


def config_file(given="") -> str:
    """For `ssh -F`: OPTIONS, then what ssh would have read, or `given` in place of that.

    The first value of an option is the one in force. Options on a command line do not reach the
    connections that ProxyJump makes; those take the file. Source: ssh_config(5).

    Raises:
        HostError: there is no file `given`; Include would say nothing of that.
    """
    if given and not os.path.exists(given):
        raise HostError(f"--ssh_config must name a file; got {given}.")
    names = [f'"{glob.escape(os.path.abspath(given))}"'] if given else CONFIGS
    lines = [f"{name} {value}" for name, value in OPTIONS.items()]
    text = "\n".join([*lines, *(f"Include {name}" for name in names), ""])
    if os.name == "nt":
        folder = Path(tempfile.gettempdir())  # of this user alone, there
    else:
        folder = _own_folder(Path(_parents()[0], f"jaxtrain-{os.getuid()}"))
    path = folder / f"ssh_config.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with WRITING:
        if not path.exists():  # a logout or a cleaner of /tmp may have taken it
            write_text(path, text, 0o600)
    return str(path)


def _parents() -> list[str]:
    """Folders that there are for what lasts as long as a login."""
    names = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")
    return [name for name in names if name and os.path.isdir(name)]


def _own_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise HostError(f"{folder} must be a folder of yours alone (mode 700). Remove it.")
    return folder


def sources() -> dict:
    """{module name: source} of all that a host runs."""
    found = {"launch": ""}
    for path in sorted(HOST_CODE.glob("*.py")):
        name = "launch.host" if path.stem == "__init__" else f"launch.host.{path.stem}"
        found[name] = path.read_text()
    return found


class Fleet:
    """Requests to hosts.

    Args:
        ssh_config: a file for `ssh -F`; "" leaves the user's own.
    """

    def __init__(self, hosts, ssh_config=""):
        self.hosts: tuple[Host, ...] = tuple(hosts)
        self._ssh_config = ssh_config
        self._modules = sources()
        self._boot = (HOST_CODE / "boot.py").read_text()

    def ssh(self, host: Host, shared=True) -> list[str]:
        """The ssh command up to its target's name."""
        argv = ["ssh", "-F", config_file(self._ssh_config)]
        for name, value in SHARED.items():
            argv += ["-o", f"{name}={value}"]
        argv += ["-o", f"ControlPath={control_path() if shared else 'none'}"]
        argv += ["-l", host.user] if host.user else []
        return argv + (["-p", str(host.port)] if host.port else [])

    def open(self, host: Host, request: dict) -> subprocess.Popen:
        """Starts a request on a host; standard input stays open for what it may take."""
        python = shlex.quote(host.python)
        if host.python.startswith("~/"):
            python = f'"$HOME"/{shlex.quote(host.python[2:])}'
        scope = SCOPE if request.get("scope") else ""
        command = f"exec {scope}{python} -I -c {shlex.quote(self._boot)}"
        request = request | {"workdir": host.workdir}
        sent = json.dumps({"modules": self._modules, "request": request}).encode()
        sent = zlib.compress(sent, 9)  # a third of it: round trips of a connection's slow start
        argv = [*self.ssh(host), "--", host.target, command]
        pipe = subprocess.PIPE
        process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            process.stdin.write(b"%d\n" % len(sent) + sent)
            process.stdin.flush()
        except BrokenPipeError:  # ssh has failed; its standard error says why
            pass
        return process

    def call(self, host: Host, request: dict, timeout_s: float = 60.0) -> dict:
        """The answer to one request.

        Raises:
            HostError: the host is unreachable, or answers with an error.
        """
        process = self.open(host, request)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise HostError(f"{host.name}: no answer within {timeout_s:.0f} s.") from None
        except (BrokenPipeError, ValueError):
            out, err = b"", process.stderr.read()
            process.wait()
        return self.answer(host, out.strip().splitlines()[-1:], err, process.returncode)

    def answer(self, host: Host, lines, err: bytes, code) -> dict:
        """What the last line that a host printed holds. Raises HostError."""
        try:
            answer = json.loads(lines[0])
        except (IndexError, json.JSONDecodeError):
            said = " ".join(err.decode(errors="replace").split())[-400:]
            raise HostError(
                f"{host.name}: `ssh {host.target}` ended with {code}: {said or 'nothing said'}. "
                f"Try it by hand, and see that {host.python} is Python 3.11 or newer there."
            ) from None
        if "error" in answer:
            raise HostError(f"{host.name}: {answer['error']}")
        return answer["ok"]

    def everywhere(self, function, hosts=None) -> dict:
        """{host: function(host) or the HostError that it raised}, all at once."""
        hosts = self.hosts if hosts is None else hosts

        def guarded(host):
            try:
                return function(host)
            except HostError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(max(1, len(hosts))) as pool:
            return dict(zip(hosts, pool.map(guarded, hosts), strict=True))

    def call_everywhere(self, request: dict, timeout_s: float = 60.0, hosts=None) -> dict:
        """{host: answer}, of all hosts or none.

        Raises:
            HostError: at least one host failed; names each.
        """
        answers = self.everywhere(lambda host: self.call(host, request, timeout_s), hosts)
        failed = [str(answer) for answer in answers.values() if isinstance(answer, HostError)]
        if failed:
            raise HostError("\n".join(failed))
        return answers

    def ask(self, requests: dict, timeout_s: float) -> dict:
        """{host: answer or the HostError in its place} of long requests, {host: request}.

        Standard input stays open meanwhile, so that a host ends its work if this end goes away.
        """
        processes, answers = {}, {}
        too_long = threading.Timer(timeout_s, lambda: [p.kill() for p in processes.values()])
        too_long.daemon = True
        try:
            for host, request in requests.items():
                processes[host] = self.open(host, request)
            too_long.start()
            for host, process in processes.items():
                line = process.stdout.readline()
                said = b"" if line else process.stderr.read()
                try:
                    answers[host] = self.answer(host, [line] if line else [], said, process.poll())
                except HostError as error:
                    answers[host] = error
        finally:
            too_long.cancel()
            for process in processes.values():
                process.kill()
                process.wait()
        return answers

"""Runs programs in forks of one process, which has imported JAX for all of them.

JAX has not been started in that process, so a fork may set XLA_FLAGS and compile for any device.
A command that trains saves 3 CPU seconds of imports.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_S = 300

SERVER = """
import importlib, io, json, os, signal, sys, traceback

folders = {}  # of the forks that run


def store_statuses(*_):
    while folders:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # a signal during this call ran the function in between
            return
        if not pid:
            return
        path = folders.pop(pid) + "/status"
        with open(path + ".part", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))
        os.rename(path + ".part", path)


def open_output(name, folder):
    output = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, {"stdout": 1, "stderr": 2}[name])
    os.close(output)


def run(program, argv, folder, env):
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    open_output("stdout", folder)
    open_output("stderr", folder)
    sys.argv, sys.orig_argv = ["-c", *argv], [sys.executable, *argv]
    exec(program, {"__name__": "__main__"})


for module in sys.argv[2:]:
    importlib.import_module(module)
signal.signal(signal.SIGCHLD, store_statuses)
for line in sys.stdin:
    request = json.loads(line)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            signal.alarm(int(sys.argv[1]))
            run(**request)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    folders[child] = request["folder"]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    print(child, flush=True)
"""


class Fork:
    """A running program, with the methods of subprocess.Popen that tests use.

    Attributes:
        pid: of the fork.
        returncode: exit status, or the negative signal that ended the fork: -SIGALRM after
            LIMIT_S; None until `poll` or `communicate` has seen the end.
    """

    def __init__(self, pid: int, folder: Path):
        self.pid, self.returncode, self._folder = pid, None, folder

    def poll(self) -> int | None:
        """Returns the exit status, None while the program runs."""
        status = self._folder / "status"
        if self.returncode is None and status.exists():
            self.returncode = int(status.read_text())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = LIMIT_S + 10) -> tuple[str, str]:
        """Waits for the end; returns what was written to stdout and stderr."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            time.sleep(0.01)
        out, err = [(self._folder / name).read_text() for name in ("stdout", "stderr")]
        shutil.rmtree(self._folder)
        return out, err


class ForkServer:
    """A process that imports modules once and executes each program in a fork of itself.

    Args:
        modules: names of the modules to import.
        env: the server's environment.
    """

    def __init__(self, *modules: str, env: dict[str, str]):
        # JAX warns of forks, because of its threads. Before it is started it has none.
        argv = [sys.executable, "-W", "ignore", "-c", SERVER, str(LIMIT_S), *modules]
        pipe = subprocess.PIPE
        self._env = env
        self._server = subprocess.Popen(argv, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server, by closing its input."""
        self._server.communicate()

    def start(self, program: str, *arguments: str, env: dict[str, str] | None = None) -> Fork:
        """Starts a Python program as __main__, in a fork with the server's environment or `env`."""
        folder = Path(tempfile.mkdtemp(prefix="jaxtrain-fork-"))
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        env = self._env if env is None else env
        request = {"program": program, "argv": arguments, "folder": str(folder), "env": env}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Fork(int(self._server.stdout.readline()), folder)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Executes a Python program as __main__, and waits for its end."""
        fork = self.start(program, *arguments)
        out, err = fork.communicate()
        return subprocess.CompletedProcess(program, fork.returncode, out, err)

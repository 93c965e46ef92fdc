"""Runs programs in forks of one process, which has imported JAX for all of them.

JAX has not been started in that process, so a fork may set XLA_FLAGS and compile for any device.
"""

import json
import subprocess
import sys
from pathlib import Path

LIMIT_S = 300

SERVER = """
import importlib, json, os, signal, sys, traceback

for module in sys.argv[2:]:
    importlib.import_module(module)
for line in sys.stdin:
    program, arguments, folder = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(int(sys.argv[1]))
            for stream in (sys.stdout, sys.stderr):
                name = stream.name.strip("<>")
                os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
            sys.argv[1:] = arguments
            exec(program, {"__name__": "__main__"})
            status = 0
        except SystemExit as stop:
            status = int(bool(stop.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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
        self._server = subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=env, text=True)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_) -> None:
        self._server.communicate()  # closes its input, which ends it

    def run(self, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Executes a Python program as __main__; its output is first written to `folder`.

        The exit status is 0 or 1, or the negative signal that ended the fork: -SIGALRM after
        LIMIT_S.
        """
        self._server.stdin.write(json.dumps([program, arguments, str(folder)]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        output = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(program, status, *output)

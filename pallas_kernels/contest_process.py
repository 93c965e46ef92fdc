"""Starts the child process of a contest of bench, and reads its result."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pallas_kernels.child_process import ChildProcess, last_lines
from pallas_kernels.contest_child import ContestJob
from pallas_kernels.result_files import read_object

COMMAND = sys.executable, "-m", "pallas_kernels.contest_child"
# A child's settings. PyTorch needs memory too, so JAX must not take all of it. XLA's own CUDA
# graphs are off: kernels inside them could run at the same time, and the times would mean nothing.
CHILD_ENV = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}
CHILD_FLAGS = "--xla_gpu_enable_command_buffer="


class Child:
    """A contest's child process: started early, it imports and then waits for `run`.

    Args:
        cache: folder for compiled programs. A contest that is tuned after it was measured, or
            continued by another call, finds its programs there.
    """

    def __init__(self, job: ContestJob, folder: Path, cache: Path):
        self.job, self._folder = job, Path(tempfile.mkdtemp(dir=folder))
        self.was_killed = False  # because its time was up
        (self._folder / "job.json").write_text(json.dumps(vars(job)))
        flags = f"{os.environ.get('XLA_FLAGS', '')} {'' if job.tiny else CHILD_FLAGS}"
        env = CHILD_ENV | {"JAX_COMPILATION_CACHE_DIR": str(cache)} | os.environ
        env |= {"XLA_FLAGS": flags.strip()}
        argv = [*COMMAND, *(str(self._folder / name) for name in ("job.json", "result.json"))]
        with open(self._folder / "output.txt", "wb") as output:
            self.process = ChildProcess(argv, output, env)

    def run(self, limit_s: float) -> dict[str, Any]:
        """Lets the child do its job. Returns its result, with "error" if it did not finish."""
        self.process.send_line(str(limit_s))
        status = self.process.wait(limit_s)
        path, result, error = self._folder / "result.json", {}, ""
        try:
            result = read_object(path)
        except (OSError, ValueError) as failure:
            error = f"no result: {failure}"
        self.was_killed = status is None
        if status is None:
            error = f"killed after {limit_s:.0f} s"
        elif status:
            error = f"exit status {status}: {last_lines(self._folder / 'output.txt', 400)}"
        return result | ({"error": error} if error else {})

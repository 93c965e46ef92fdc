"""A trace of some steps of a run, for XProf and `python -m jaxtrain.profile`."""

from contextlib import nullcontext
from pathlib import Path

import jax

WARM_UP = 5  # steps before the first that is traced
FOLDER = "profile"
MARK = "jaxtrain:"  # before the names of what the host does in a step


class Tracer:
    """Traces `steps` steps of one process, after warm-up where the run is long enough.

    Args:
        workdir: of the run; the trace goes to workdir/profile/PROCESS.
        first: last step before this process's; last: of the run.
        steps: to trace; 0 is none.
    """

    def __init__(self, workdir, first: int, last: int, steps: int):
        self.folder = Path(workdir) / FOLDER / str(jax.process_index())
        self._begin = max(min(first + WARM_UP, last - steps), first) + 1
        self._end = min(self._begin + steps, last + 1)
        self.is_on = False

    def switches_before(self, step: int) -> bool:
        """Whether it is to be switched, on or off, before this step."""
        return self._begin < self._end and step == (self._end if self.is_on else self._begin)

    def switch(self) -> None:
        """Starts or ends the trace; the device is idle."""
        if self.is_on:
            jax.profiler.stop_trace()
        else:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the steps down that are looked at
            jax.profiler.start_trace(self.folder, profiler_options=options)
        self.is_on = not self.is_on

    def annotate_step(self, step: int):
        """A context: what the host does to start a step and to wait for the one before."""
        return jax.profiler.StepTraceAnnotation(f"{MARK}step", step_num=step) if self.is_on else _NO

    def annotate(self, name: str):
        """A context: a named part of it."""
        return jax.profiler.TraceAnnotation(f"{MARK}{name}") if self.is_on else _NO


_NO = nullcontext()

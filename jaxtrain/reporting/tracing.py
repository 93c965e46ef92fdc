"""Traces some steps of a run, for XProf and `python -m jaxtrain.profile`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import jax

WARM_UP = 5  # steps before the first traced one, if the run is long enough
FOLDER = "profile"
MARK = "jaxtrain:"  # prefix of the loop's own annotations
_NO_ANNOTATION = nullcontext()


class Tracer:
    """Traces `steps` steps of this process, after a warm-up if the run is long enough.

    Args:
        workdir: folder of the run; the trace goes to workdir/profile/PROCESS.
        resume_step: step from which this process resumes.
        last: last step of the run.
        steps: number of steps to trace; 0 traces none.
    """

    def __init__(self, workdir: str | Path, resume_step: int, last: int, steps: int):
        self.folder = Path(workdir) / FOLDER / str(jax.process_index())
        self._begin = max(min(resume_step + WARM_UP, last - steps), resume_step) + 1
        self._end = min(self._begin + steps, last + 1)
        self.is_on = False

    def switches_before(self, step: int) -> bool:
        """Returns whether switch() is to be called before this step."""
        return self._begin < self._end and step == (self._end if self.is_on else self._begin)

    def switch(self) -> None:
        """Starts or ends the trace; the device must be idle."""
        if self.is_on:
            jax.profiler.stop_trace()
        else:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing Python calls would slow the traced steps down
            jax.profiler.start_trace(self.folder, profiler_options=options)
        self.is_on = not self.is_on

    def annotate_step(self, step: int) -> AbstractContextManager:
        """Marks the block in which the host starts a step and waits for the previous one."""
        if not self.is_on:
            return _NO_ANNOTATION
        return jax.profiler.StepTraceAnnotation(f"{MARK}step", step_num=step)

    def annotate(self, name: str) -> AbstractContextManager:
        """Marks a named part of a step."""
        return jax.profiler.TraceAnnotation(f"{MARK}{name}") if self.is_on else _NO_ANNOTATION

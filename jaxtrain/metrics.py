"""The step clock: how long steps take, what else the time went to, tokens per second."""

import time
from array import array
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

OVERLAPPED = ("data",)  # the host waits, but the device is at work on the step before


@dataclass
class _Span:
    started_s: float
    step_times_s: array = field(default_factory=lambda: array("d"))
    host_s: Counter = field(default_factory=Counter)  # cause -> seconds


class StepClock:
    """Measures steps from arrival to arrival of their results, on the host alone.

    Args:
        tokens_per_step: tokens that one step trains on, over all hosts.
        now: monotonic clock, s.
    """

    def __init__(self, tokens_per_step: int, now=time.perf_counter):
        self.tokens_per_step = tokens_per_step
        self._now = now
        self._window = self._run = None
        self._paused_s = 0.0  # since the last tick
        self._cause = None

    def start(self) -> None:
        """Starts the first step's time: call it when all is compiled and the device is idle."""
        self._last_tick_s = self._now()
        self._run = _Span(self._last_tick_s)
        self._window = _Span(self._last_tick_s)

    def tick(self) -> None:
        """Ends a step's time: its results have arrived on the host."""
        assert self._run, "start() comes before tick()"
        assert self._cause is None, f"tick() inside pause({self._cause!r}) would split it"
        now_s = self._now()
        step_time_s = now_s - self._last_tick_s - self._paused_s
        for span in (self._window, self._run):
            span.step_times_s.append(step_time_s)
        self._last_tick_s, self._paused_s = now_s, 0.0

    @contextmanager
    def pause(self, cause: str):
        """Attributes the block's time to `cause`; such blocks do not nest.

        The time is taken out of the step's, so the device must be idle when the block starts:
        wait for the step in flight and tick first, or its time is lost to the pause. A wait for
        "data" alone stays in the step's time: it runs beside the step before, and what of it
        delays the next one is time that the next one took.
        """
        assert self._run, "start() comes before pause()"
        assert self._cause is None, f"pause({cause!r}) inside pause({self._cause!r})"
        started_s, self._cause = self._now(), cause
        try:
            yield
        finally:
            elapsed_s, self._cause = self._now() - started_s, None
            for span in (self._window, self._run):
                span.host_s[cause] += elapsed_s
            if cause not in OVERLAPPED:
                self._paused_s += elapsed_s

    def summary(self) -> dict[str, float]:
        """Figures since the last summary, by metric name; a window without a step has no times.

        `perf/step_time_s` is the median. `perf/tokens_per_s` is over the steps' time,
        `perf/tokens_per_s_actual` over all of it. `data/wait_s` is the host's mean wait a step,
        and `perf/pause_CAUSE_s` the window's sum.
        """
        figures = self._figures(self._window)
        self._window = _Span(self._now())
        return figures

    def total(self) -> dict[str, float]:
        """Figures since start(): summary's, and p99, steps, tokens, wall seconds and goodput.

        `perf/goodput` is the share of the wall time that steps took; the rest went to pauses.
        """
        span = self._run
        wall_s = self._now() - span.started_s
        steps = len(span.step_times_s)
        figures = {"perf/steps": steps, "perf/tokens": steps * self.tokens_per_step}
        figures |= {"perf/wall_s": wall_s} | self._figures(span)
        if steps:
            figures["perf/step_time_p99_s"] = float(np.percentile(span.step_times_s, 99))
            figures["perf/goodput"] = sum(span.step_times_s) / wall_s
        return figures

    def _figures(self, span: _Span) -> dict[str, float]:
        times_s = np.array(span.step_times_s)
        pauses = {k: s for k, s in sorted(span.host_s.items()) if k not in OVERLAPPED}
        figures = {f"perf/pause_{cause}_s": seconds for cause, seconds in pauses.items()}
        if not times_s.size:
            return figures
        p50_s, p95_s, max_s = np.percentile(times_s, [50, 95, 100])
        tokens = times_s.size * self.tokens_per_step
        return {
            "perf/step_time_s": float(p50_s),
            "perf/step_time_p95_s": float(p95_s),
            "perf/step_time_max_s": float(max_s),
            "perf/tokens_per_s": tokens / float(times_s.sum()),
            "perf/tokens_per_s_actual": tokens / (self._now() - span.started_s),
            "data/wait_s": span.host_s["data"] / times_s.size,
        } | figures

"""The step clock: how long steps take, what else the time went to, tokens per second."""

import statistics
import time
from array import array
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

OVERLAPPED = ("data",)  # the host waits, but the device is at work on the step before
OF_STEPS = (  # figures of step times alone
    "perf/step_time_s",
    "perf/step_time_p95_s",
    "perf/step_time_p99_s",
    "perf/step_time_max_s",
    "perf/tokens_per_s",
    "perf/tokens_per_s_per_device",
)
FED_STEPS = 64  # that say what a step takes whose batch came in time


@dataclass
class _Span:
    started_s: float
    step_times_s: array = field(default_factory=lambda: array("d"))
    host_s: Counter = field(default_factory=Counter)  # cause -> seconds
    lost_s: Counter = field(default_factory=Counter)  # cause -> seconds inside of steps


class StepTimer:
    """Measures steps from arrival to arrival of their results, on the host alone.

    Args:
        tokens_per_step: tokens that one step trains on, over all hosts.
        devices: of all hosts.
        now: monotonic clock, s.
    """

    def __init__(self, tokens_per_step: int, devices: int = 1, now=time.perf_counter):
        self.tokens_per_step, self.devices = tokens_per_step, devices
        self._now = now
        self._window = self._run = None
        self._before_s = {}
        self._paused_s = self._starved_s = self._waited_s = 0.0  # since the last tick
        self._data_lost_s = 0.0
        self._fed_s = deque(maxlen=FED_STEPS)
        self._cause = None

    def start(self, before_s=None) -> None:
        """Starts the first step's time: call it when all is compiled and the device is idle.

        Args:
            before_s: {cause: seconds} that the run took until now; they count as lost.
        """
        self._before_s = dict(before_s or {})
        self._last_tick_s = self._now()
        self._run = _Span(self._last_tick_s)
        self._window = _Span(self._last_tick_s)

    def tick(self, skipped: bool = False) -> float:
        """Ends a step's time: its results have arrived on the host. Returns it, s.

        Args:
            skipped: the step changed nothing.
        """
        assert self._run, "start() comes before tick()"
        assert self._cause is None, f"tick() inside pause({self._cause!r}) would split it"
        now_s = self._now()
        step_time_s = now_s - self._last_tick_s - self._paused_s
        data_s = self._lost_to_data_s(step_time_s)
        for span in (self._window, self._run):
            span.step_times_s.append(step_time_s)
            span.lost_s["data"] += data_s
            if skipped:
                span.lost_s["skipped"] += step_time_s - data_s
        self._last_tick_s = now_s
        self._paused_s = self._starved_s = self._waited_s = self._data_lost_s = 0.0
        return step_time_s

    def _lost_to_data_s(self, step_time_s: float) -> float:
        """Seconds of a step in which the device had no batch.

        When the device ran dry is not known, only that it had: so what such a step takes more than
        those that were fed, and no more than the wait.
        """
        if not self._starved_s:
            self._fed_s.append(step_time_s - self._data_lost_s)
            return min(self._data_lost_s, step_time_s)
        times_s = self._fed_s or self._run.step_times_s
        usual_s = statistics.median(times_s) if times_s else step_time_s
        excess_s = max(step_time_s - self._data_lost_s - usual_s, 0.0)
        return min(self._data_lost_s + min(self._starved_s, excess_s), step_time_s)

    def starved(self, throughout: bool) -> None:
        """The device had nothing to do when the last wait for data ended, or all through it."""
        if throughout:
            self._data_lost_s += self._waited_s
        else:
            self._starved_s += self._waited_s

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
            if cause in OVERLAPPED:
                self._waited_s = elapsed_s
            else:
                self._paused_s += elapsed_s

    @property
    def waited_s(self) -> float:
        """The last wait for data since the last tick."""
        return self._waited_s

    @property
    def steps_s(self) -> float:
        """Time of the run's steps so far."""
        return sum(self._run.step_times_s)

    def usual_s(self) -> float:
        """Median step time of the run so far."""
        return statistics.median(self._run.step_times_s)

    def summary(self) -> dict[str, float]:
        """Figures since the last summary, by metric name; a window without a step has no times.

        `perf/step_time_s` is the median. `perf/tokens_per_s` is over the steps' time,
        `perf/tokens_per_s_actual` over all of it. `data/wait_s` is the host's mean wait a step,
        `perf/pause_CAUSE_s` the window's sum, and `perf/goodput` the share of its time in steps
        that were made, without those parts in which the device had no batch.
        """
        now_s = self._last_tick_s + self._paused_s  # else a part of the step under way is in it
        figures = self._figures(self._window, now_s)
        self._window = _Span(now_s)
        return figures

    def total(self) -> dict[str, float]:
        """Figures since start(): summary's, and steps, tokens and wall seconds.

        `perf/wall_s` and `perf/goodput` count what was before start(): goodput is the share of the
        wall time that is not in lost_s().
        """
        span = self._run
        steps = len(span.step_times_s)
        figures = {"perf/steps": steps, "perf/tokens": steps * self.tokens_per_step}
        figures |= self._figures(span, self._now()) | {"perf/wall_s": self._wall_s()}
        if steps:
            figures["perf/goodput"] = self._good_s(span) / figures["perf/wall_s"]
        return figures

    def lost_s(self, wall_s: float) -> dict[str, float]:
        """{cause: seconds} of the run that moved no loss, and `other` for what has no name.

        With `perf/goodput` x `perf/wall_s` they add up to the wall time.

        Args:
            wall_s: total()'s `perf/wall_s`.
        """
        span = self._run
        pauses = {k: s for k, s in span.host_s.items() if k not in OVERLAPPED}
        lost = Counter(self._before_s) + Counter(pauses) + span.lost_s
        other_s = wall_s - sum(lost.values()) - self._good_s(span)
        return dict(sorted(lost.items())) | {"other": max(other_s, 0.0)}

    def _wall_s(self) -> float:
        return self._now() - self._run.started_s + sum(self._before_s.values())

    def _good_s(self, span: _Span) -> float:
        return sum(span.step_times_s) - sum(span.lost_s.values())

    def _figures(self, span: _Span, now_s: float) -> dict[str, float]:
        times_s = np.array(span.step_times_s)
        pauses = {k: s for k, s in sorted(span.host_s.items()) if k not in OVERLAPPED}
        figures = {f"perf/pause_{cause}_s": seconds for cause, seconds in pauses.items()}
        if not times_s.size:
            return figures
        tokens, all_s = times_s.size * self.tokens_per_step, now_s - span.started_s
        return (
            step_time_metrics(times_s, self.tokens_per_step, self.devices)
            | {
                "perf/tokens_per_s_actual": tokens / all_s,
                "perf/goodput": self._good_s(span) / all_s,
                "data/wait_s": span.host_s["data"] / times_s.size,
            }
            | figures
        )


def step_time_metrics(times_s, tokens_per_step: int, devices: int) -> dict[str, float]:
    """Returns the percentiles of step times and the tokens that their sum gives a second.

    Args:
        times_s: at least one.
    """
    tokens_per_s = tokens_per_step / np.mean(times_s)
    rates = tokens_per_s, tokens_per_s / devices
    values = *np.percentile(times_s, [50, 95, 99, 100]), *rates
    return dict(zip(OF_STEPS, map(float, values), strict=True))

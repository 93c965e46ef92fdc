"""Measures on the host how long steps take, and where the time between them goes.

A step lasts from the arrival of the previous step's results to the arrival of its own. Nothing is
timed on the device, so measuring adds no synchronisation.
"""

import statistics
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

OVERLAPPED = ("data",)  # pauses of the host during which the device still runs the previous step
STEP_TIME_METRICS = (  # the keys of step_time_metrics(), in order
    "perf/step_time_s",
    "perf/step_time_p95_s",
    "perf/step_time_p99_s",
    "perf/step_time_max_s",
    "perf/tokens_per_s",
    "perf/tokens_per_s_per_device",
)
LATE = ("data", "host")  # why a host may start a step late: its batch, or its other work
FED_STEPS = 64  # the usual step time is the median of this many steps whose batch was ready


@dataclass
class _Span:
    """Times since `started_s`, of the run or of the window between two summaries."""

    started_s: float
    tokens: int = 0  # of its steps
    step_times_s: array = field(default_factory=lambda: array("d"))
    pauses_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lost_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # in steps


class StepTimer:
    """Measures steps from arrival to arrival of their results, on the host.

    Args:
        tokens_per_step: tokens that one step trains on, over all hosts, until change_step().
        devices: devices of all hosts.
        now: monotonic clock, s.

    Attributes:
        waited_s: seconds of the newest wait for data; 0 if there was none since the last tick.
    """

    def __init__(
        self,
        tokens_per_step: int,
        devices: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.tokens_per_step, self.devices = tokens_per_step, devices
        self._now = now
        self._started = False
        self._window = self._run = _Span(0.0)
        self._before_s = {}
        self._last_tick_s = 0.0
        self._paused_s = self._starved_s = self.waited_s = 0.0  # since the last tick
        self._data_lost_s = 0.0
        self._fed_s = deque(maxlen=FED_STEPS)  # times of steps whose batch was ready in time
        self._first_usual = 0  # number of steps before the newest change_step()
        self._cause = None  # of the pause that is running
        self._late_s = dict.fromkeys(LATE, 0.0)  # since the last late_shares()
        self._timed_s = 0.0  # in steps, since the last late_shares()

    def start(self, before_s: Mapping[str, float] | None = None) -> None:
        """Starts timing the first step; call it when all is compiled and the device is idle.

        Args:
            before_s: {cause: seconds} that the run has taken so far; they count as lost.
        """
        self._before_s = dict(before_s or {})
        self._last_tick_s, self._started = self._now(), True
        self._run = _Span(self._last_tick_s)
        self._window = _Span(self._last_tick_s)

    def change_step(self, tokens_per_step: int) -> None:
        """Sets the tokens of later steps, whose times are not compared with earlier ones."""
        self.tokens_per_step = tokens_per_step
        self._fed_s.clear()
        self._first_usual = len(self._run.step_times_s)

    def tick(self, skipped: bool = False) -> float:
        """Ends a step, whose results have just arrived on the host; returns its seconds.

        Args:
            skipped: the step did not change the weights; its time counts as lost.
        """
        assert self._started, "start() comes before tick()"
        assert self._cause is None, f"tick() inside pause({self._cause!r}) would split it"
        now_s = self._now()
        step_time_s = now_s - self._last_tick_s - self._paused_s
        data_s = self._lost_to_data_s(step_time_s)
        for span in (self._window, self._run):
            span.step_times_s.append(step_time_s)
            span.tokens += self.tokens_per_step
            span.lost_s["data"] += data_s
            if skipped:
                span.lost_s["skipped"] += step_time_s - data_s
        self._timed_s += step_time_s
        self._last_tick_s = now_s
        self._paused_s = self._starved_s = self.waited_s = self._data_lost_s = 0.0
        return step_time_s

    def _lost_to_data_s(self, step_time_s: float) -> float:
        """Returns the seconds of a step in which the device had no batch.

        The host sees that the device has run out of work, but not since when. The loss is therefore
        estimated as the excess over the usual time of a step whose batch was ready, and at most the
        wait for data.
        """
        if not self._starved_s:
            self._fed_s.append(step_time_s - self._data_lost_s)
            return min(self._data_lost_s, step_time_s)
        times_s = self._fed_s or self._run.step_times_s
        usual_s = statistics.median(times_s) if times_s else step_time_s
        excess_s = max(step_time_s - self._data_lost_s - usual_s, 0.0)
        return min(self._data_lost_s + min(self._starved_s, excess_s), step_time_s)

    def starved(self, throughout: bool) -> None:
        """Records that the device was idle at the end of the last wait for data.

        Args:
            throughout: the device was idle during all of the wait, not only during a part of it.
        """
        own_s = self._now() - self._last_tick_s - self._paused_s  # of the host, since the last tick
        self._late_s["data"] += self.waited_s
        self._late_s["host"] += max(own_s - self.waited_s, 0.0)
        if throughout:
            self._data_lost_s += self.waited_s
        else:
            self._starved_s += self.waited_s

    def late_shares(self) -> dict[str, float]:
        """Returns {"data", "host": share of the time in steps} since the last call, or the start.

        It counts what the host did between the results of one step and the start of the next, if
        the device had run out of work by that start: the wait for the batch, and the rest, such as
        logging. It is an upper limit of the time that the device was idle.
        """
        shares = {
            name: s / self._timed_s if self._timed_s else 0.0 for name, s in self._late_s.items()
        }
        self._late_s, self._timed_s = dict.fromkeys(LATE, 0.0), 0.0
        return shares

    @contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Attributes the block's time to `cause`; such blocks do not nest.

        The time is subtracted from the step's, so the device must be idle when the block starts:
        wait for the step in flight and call tick() first, or that step's time counts as a pause. A
        wait for "data" is not subtracted: during it the device runs the previous step, and a delay
        of the next step belongs to that step's time.
        """
        assert self._started, "start() comes before pause()"
        assert self._cause is None, f"pause({cause!r}) inside pause({self._cause!r})"
        started_s, self._cause = self._now(), cause
        try:
            yield
        finally:
            elapsed_s, self._cause = self._now() - started_s, None
            for span in (self._window, self._run):
                span.pauses_s[cause] += elapsed_s
            if cause in OVERLAPPED:
                self.waited_s = elapsed_s
            else:
                self._paused_s += elapsed_s

    @property
    def steps_s(self) -> float:
        """Total time of the run's steps so far."""
        return sum(self._run.step_times_s)

    def usual_s(self) -> float:
        """Returns the median time of the run's steps so far, of those of the present size."""
        times_s = self._run.step_times_s
        return statistics.median(times_s[self._first_usual :] or times_s)

    def summary(self) -> dict[str, float]:
        """Returns the metrics since the last summary; step times only if a step has ended.

        `perf/step_time_s` is the median. `perf/tokens_per_s` divides by the time in steps,
        `perf/tokens_per_s_actual` by the whole time. `data/wait_s` is the host's mean wait in a
        step, `perf/pause_CAUSE_s` a sum, and `perf/goodput` the share of the time in steps that
        changed the weights, without the parts in which the device had no batch.
        """
        # The window ends here, not now: now would include a part of the step that is running.
        now_s = self._last_tick_s + self._paused_s
        metrics = self._metrics(self._window, now_s)
        self._window = _Span(now_s)
        return metrics

    def total(self) -> dict[str, float]:
        """Returns the metrics since start(): those of a summary, steps, tokens and wall seconds.

        `perf/wall_s` and `perf/goodput` include the time before start(): goodput is the share of
        the wall time that is not in lost_s().
        """
        span = self._run
        steps = len(span.step_times_s)
        metrics = {"perf/steps": steps, "perf/tokens": span.tokens}
        metrics |= self._metrics(span, self._now()) | {"perf/wall_s": self._wall_s()}
        if steps:
            metrics["perf/goodput"] = self._good_s(span) / metrics["perf/wall_s"]
        return metrics

    def lost_s(self, wall_s: float) -> dict[str, float]:
        """Returns {cause: seconds} in which the run did not train, and `other` for the rest.

        Together with `perf/goodput` x `perf/wall_s` they add up to the wall time.

        Args:
            wall_s: `perf/wall_s` of total().
        """
        span = self._run
        lost = defaultdict(float)
        for causes_s in (self._before_s, _without_overlapped(span.pauses_s), span.lost_s):
            for cause, seconds in causes_s.items():
                lost[cause] += seconds
        other_s = wall_s - sum(lost.values()) - self._good_s(span)
        named = {cause: seconds for cause, seconds in sorted(lost.items()) if seconds > 0}
        return named | {"other": max(other_s, 0.0)}

    def _wall_s(self) -> float:
        return self._now() - self._run.started_s + sum(self._before_s.values())

    def _good_s(self, span: _Span) -> float:
        return sum(span.step_times_s) - sum(span.lost_s.values())

    def _metrics(self, span: _Span, now_s: float) -> dict[str, float]:
        times_s = np.array(span.step_times_s)
        pauses_s = _without_overlapped(span.pauses_s)
        metrics = {f"perf/pause_{cause}_s": pauses_s[cause] for cause in sorted(pauses_s)}
        if not times_s.size:
            return metrics
        all_s = now_s - span.started_s
        return (
            step_time_metrics(times_s, span.tokens / times_s.size, self.devices)
            | {
                "perf/tokens_per_s_actual": span.tokens / all_s,
                "perf/goodput": self._good_s(span) / all_s,
                "data/wait_s": span.pauses_s["data"] / times_s.size,
            }
            | metrics
        )


def _without_overlapped(pauses_s: Mapping[str, float]) -> dict[str, float]:
    return {cause: s for cause, s in pauses_s.items() if cause not in OVERLAPPED}


def step_time_metrics(
    times_s: Sequence[float] | np.ndarray, tokens_per_step: float, devices: int
) -> dict[str, float]:
    """Returns the percentiles of step times, and tokens/s over their sum.

    Args:
        times_s: seconds of at least one step.
        tokens_per_step: their mean.
    """
    tokens_per_s = tokens_per_step / np.mean(times_s)
    values = *np.percentile(times_s, [50, 95, 99, 100]), tokens_per_s, tokens_per_s / devices
    return dict(zip(STEP_TIME_METRICS, map(float, values), strict=True))

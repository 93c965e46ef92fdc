"""What one process measures of a run beside its losses, under the names that all reports use."""

import os
from contextlib import contextmanager

import jax
from absl import logging

from jaxtrain.file_errors import keep_first_error
from jaxtrain.metrics.mfu import StepWork, memory_metrics
from jaxtrain.metrics.network import INTERFACE, NetworkCounters
from jaxtrain.metrics.step_log import StepLog, read_step_times
from jaxtrain.metrics.step_timer import OF_STEPS, OVERLAPPED, StepTimer, step_time_metrics

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event, s
MOST_READ_S = 100e-6  # that a look at the wire may take after every step
FLUSH_S = 1.0  # lines of steps wait so long for company


class Collector:
    """Clock, step log, utilisation, memory and wire of one process, as a context manager.

    Args:
        work: of a step; chip: that utilisation is measured by, or None.
        log: of this process's steps.
        wire: counters of this host, or None.
        is_saving: () -> whether a checkpoint is being written in the background.
    """

    def __init__(self, work: StepWork, chip, log: StepLog, wire: NetworkCounters | None, is_saving):
        self.timer = StepTimer(work.tokens, work.devices)
        self.work, self.chip, self.log, self.wire = work, chip, log, wire
        self._is_saving, self._compiled_s = is_saving, 0.0
        self._just_ended = {"start": None}  # pauses since the last tick, in order
        self._meter = _Meter(wire) if wire else None
        self._each_step = wire is not None and wire.read_s <= MOST_READ_S

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, kind, error, traceback):
        jax.monitoring.unregister_event_duration_listener(self._hear)
        if self.wire:
            self.wire.close()
        with keep_first_error(error):
            self.log.close()

    def _hear(self, event: str, duration_s: float, **kwargs):
        if event == COMPILED:
            self._compiled_s += duration_s

    def start(self, before_s: dict) -> None:
        """As StepTimer.start()."""
        self._compiled_s = 0.0
        self.timer.start(before_s)
        if self._meter:
            self._meter.skip()

    @contextmanager
    def pause(self, cause: str):
        """As StepTimer.pause(); what the wire carries meanwhile is no step's."""
        if cause in OVERLAPPED:
            with self.timer.pause(cause):
                yield
            return
        if self._meter:
            self._meter.read()
        if cause == "save":
            self.log.flush()  # a run that goes on from this save finds its steps before it
        with self.timer.pause(cause):
            yield
        self._compiled_s = 0.0
        self._just_ended[cause] = None
        if self._meter:
            self._meter.skip()

    def tick(self, step: int, skipped: bool) -> None:
        """A step's results have arrived."""
        wait_s = self.timer.waited_s
        step_time_s = self.timer.tick(skipped)
        wire = self._meter.tick(self._each_step) if self._meter else None
        beside = [*self._just_ended]
        if "save" not in beside and self._is_saving():
            beside.append("save")
        causes_s = {"compile": self._compiled_s}
        self.log.add(step, step_time_s, wait_s, wire, beside, causes_s)
        self._just_ended, self._compiled_s = {}, 0.0

    def summary(self) -> dict[str, float]:
        """Figures since the last summary, by metric name."""
        if self._meter and not self._each_step:
            self._meter.read()
        self.log.flush(FLUSH_S)
        wire = self._meter.window() if self._meter else None
        return self._with_rates(self.timer.summary(), wire)

    def total(self) -> dict:
        """Figures of the run, `lost_s` {cause: s} and `outliers` {cause: steps}.

        Step times and tokens/s are of all the run's steps, those of earlier starts too, but the
        first of each start: the same that launch.summary shows.
        """
        self.log.flush()
        wire = self._meter.total() if self._meter else None
        figures = self._with_rates(self._of_all_steps(self.timer.total()), wire)
        lost_s = self.timer.lost_s(figures["perf/wall_s"])
        return figures | {"lost_s": lost_s, "outliers": dict(self.log.outliers)}

    def _of_all_steps(self, figures) -> dict[str, float]:
        """Replaces the clock's figures of steps by those of the step log."""
        try:
            times_s = read_step_times(self.log.path)
        except (OSError, ValueError) as error:
            logging.warning("step times are of this start alone: %s", error)
            return figures
        if times_s:
            return figures | step_time_metrics(times_s, self.work.tokens, self.work.devices)
        return {name: value for name, value in figures.items() if name not in OF_STEPS}

    def _with_rates(self, figures, wire) -> dict:
        if "perf/tokens_per_s" not in figures:
            return figures
        step_time_s = self.work.tokens / figures["perf/tokens_per_s"]  # the mean
        figures = figures | self.work.utilisation(self.chip, step_time_s) | memory_metrics()
        figures |= self.work.collective_metrics()
        return figures | self._wire_figures(wire, step_time_s) if wire else figures

    def _wire_figures(self, wire, step_time_s) -> dict[str, float]:
        """Bytes a step of this host; payload that it had to send, and what came on top."""
        sent, received = wire
        figures = {
            "comm/wire_bytes": sent + received,
            "comm/wire_sent_bytes": sent,
            "comm/wire_received_bytes": received,
        }
        if not self.work.sent_bytes:
            return figures
        return figures | {
            "comm/effective_bytes_per_s": self.work.sent_bytes / step_time_s,
            "comm/overhead": sent / self.work.sent_bytes - 1,
        }

    def describe(self) -> str:
        """What is read of the network, for the start of a run."""
        if not self.wire:
            return "no wire is read: all processes are on one host"
        when = "after each step" if self._each_step else "at logged steps"
        return f"{' '.join(self.wire.names)}, read {when} ({self.wire.read_s * 1e6:.0f} us)"


class _Meter:
    """Bytes that went over the wire in steps, and not in pauses between them."""

    def __init__(self, wire: NetworkCounters):
        self._wire = wire
        self._at = wire.read()
        self._step = [0, 0]
        self._window, self._run = [0, 0, 0], [0, 0, 0]  # sent, received, steps

    def skip(self) -> None:
        """What was sent since the last look is no step's."""
        self._at = self._wire.read()

    def read(self) -> None:
        """What was sent since the last look is the step's under way."""
        at = self._wire.read()
        for i in (0, 1):
            self._step[i] += at[i] - self._at[i]
            self._window[i] += at[i] - self._at[i]
            self._run[i] += at[i] - self._at[i]
        self._at = at

    def tick(self, look: bool) -> tuple[int, int] | None:
        """Ends a step; its bytes, where the counters are read."""
        if look:
            self.read()
        self._window[2] += 1
        self._run[2] += 1
        step, self._step = tuple(self._step), [0, 0]
        return step if look else None

    def window(self) -> tuple[float, float] | None:
        """(sent, received) bytes a step since the last call."""
        span, self._window = self._window, [0, 0, 0]
        return _mean(span)

    def total(self) -> tuple[float, float] | None:
        return _mean(self._run)


def _mean(span):
    sent, received, steps = span
    return (sent / steps, received / steps) if steps else None


def open_network_counters(hosts: list[str]) -> NetworkCounters | None:
    """The counters of the training network; None where all processes are on one host.

    Raises:
        ValueError: the environment names an interface that is not there.
    """
    interface = os.environ.get(INTERFACE, "")
    if not interface and len(set(hosts)) == 1:
        return None
    return NetworkCounters(interface)

"""Combines the measurements of one process into named metrics, which all reports use.

The loop reports steps and pauses to a Collector. It forwards them to the step timer, the network
counters and the step log, and returns metrics that the run logger writes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from absl import logging

from jaxtrain.config.run_sections import MeasureConfig
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.file_errors import keep_first_error
from jaxtrain.metrics.mfu import StepWork, memory_metrics
from jaxtrain.metrics.network import NetworkCounters, StepBytes
from jaxtrain.metrics.rank_watch import RankWatch
from jaxtrain.metrics.step_log import NEW_SIZE, StepLog, read_step_times
from jaxtrain.metrics.step_timer import OVERLAPPED, STEP_TIME_METRICS, StepTimer, step_time_metrics
from pallas_kernels.chip import Chip

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's monitoring event, s
FLUSH_S = 1.0  # age at which buffered lines of the step log are written


class Collector:
    """Measures step times, utilisation, memory and network bytes of one process.

    A context manager: it closes the step log and the network counters.

    Args:
        work: what one step computes and moves.
        chip: its peaks define utilisation; None reports no utilisation.
        log: step log of this process.
        counters: network counters of this host; None reports no network bytes.
        is_saving: returns whether a checkpoint is being written in the background.
        tokens_of: returns the tokens of a step, counted from 1; None if all have work.tokens.

    Attributes:
        ranks: compares the processes, see watch_ranks(); None if it is off.
    """

    def __init__(
        self,
        work: StepWork,
        chip: Chip | None,
        log: StepLog,
        counters: NetworkCounters | None,
        is_saving: Callable[[], bool],
        tokens_of: Callable[[int], int] | None = None,
    ):
        self.timer = StepTimer(work.tokens, work.devices)
        self.work, self.chip, self.log, self.counters = work, chip, log, counters
        self._is_saving, self._compile_s = is_saving, 0.0
        self._has_sizes = False  # whether steps have differed in size
        self._tokens_of = tokens_of or (lambda step: self.work.tokens)
        self.ranks: RankWatch | None = None
        self._just_ended = ["start"]  # pauses since the last step ended, in order
        self._step_bytes = StepBytes(counters) if counters else None

    def __enter__(self) -> "Collector":
        jax.monitoring.register_event_duration_secs_listener(self._add_compile_time)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        jax.monitoring.unregister_event_duration_listener(self._add_compile_time)
        if self.counters:
            self.counters.close()
        with keep_first_error(error):
            self.log.close()

    def _add_compile_time(self, event: str, duration_secs: float, **kwargs) -> None:
        if event == COMPILED:
            self._compile_s += duration_secs

    def start(self, before_s: dict[str, float]) -> None:
        """Starts the first step; see StepTimer.start()."""
        self._compile_s = 0.0
        self.timer.start(before_s)
        if self._step_bytes:
            self._step_bytes.exclude()

    def use(self, work: StepWork) -> None:
        """Sets what the next step to end computes, in a run whose steps differ in size.

        Call summary() first, so that no window has steps of two sizes.
        """
        if work is self.work:
            return
        beat.scale_steps(work.tokens / self.work.tokens)
        self.work, self._has_sizes = work, True
        self.timer.change_step(work.tokens)
        self.log.forget_times()
        self._just_ended.append(NEW_SIZE)

    def watch_ranks(self, cfg: MeasureConfig, hosts: list[str], first: int) -> None:
        """Starts to compare the processes, if there are several; see RankWatch."""
        if cfg.straggler_every and len(hosts) > 1:
            self.ranks = RankWatch(cfg, hosts, self.timer, first)

    def is_probe_due(self, step: int) -> bool:
        """Returns whether to compare the processes after this step."""
        return self.ranks is not None and self.ranks.is_due(step)

    def probe_ranks(self, step: int) -> tuple[list[str], dict[str, list[float]]]:
        """Compares the processes, while no step is in flight.

        Returns:
            sentences to print, and RankWatch.ratios.
        """
        assert self.ranks
        with self.pause("probe"):
            sentences = self.ranks.probe(step)
        rank = jax.process_index()
        ratios = {kind: ratios[rank] for kind, ratios in self.ranks.ratios.items()}
        slow = self.ranks.slow_kinds(rank)
        beat.describe_rank(ratios, slow)
        event = {f"rank/{kind}_ratio": ratio for kind, ratio in ratios.items()}
        self.log.add_event(step, "probe", event | {"slow": slow})
        return sentences, self.ranks.ratios

    @contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Attributes the block's time to `cause`; see StepTimer.pause().

        Network bytes during the pause are excluded, unless the device keeps working.
        """
        if cause in OVERLAPPED:
            with self.timer.pause(cause):
                yield
            return
        if self._step_bytes:
            self._step_bytes.include()
        if cause == "save":
            self.log.flush()  # a run that resumes from this save finds its steps in the log
        with self.timer.pause(cause):
            yield
        self._compile_s = 0.0
        if cause not in self._just_ended:
            self._just_ended.append(cause)
        if self._step_bytes:
            self._step_bytes.exclude()

    def tick(self, step: int, skipped: bool) -> None:
        """Records that a step's results have arrived on the host."""
        wait_s = self.timer.waited_s
        step_time_s = self.timer.tick(skipped)
        wire_bytes = self._step_bytes.end_step() if self._step_bytes else None
        activities = self._just_ended
        if "save" not in activities and self._is_saving():
            activities.append("save")
        causes_s = {"compile": self._compile_s}
        self.log.add(step, step_time_s, wait_s, wire_bytes, activities, causes_s)
        self._just_ended, self._compile_s = [], 0.0

    def summary(self) -> dict[str, float]:
        """Returns the metrics since the last summary, by name."""
        wire_bytes = self._step_bytes.window_mean() if self._step_bytes else None
        self.log.flush(FLUSH_S)
        return self._add_rates(self.timer.summary(), wire_bytes)

    def total(self) -> dict:
        """Returns the run's metrics, `lost_s` {cause: s} and `outliers` {cause: steps}.

        `stragglers` are RankWatch.found, with several processes. Step times and tokens/s cover all
        steps of the run, including those before a resume, without the first step after each start.
        launch.summary shows the same numbers.
        """
        self.log.flush()
        wire_bytes = self._step_bytes.run_mean() if self._step_bytes else None
        metrics = self._add_rates(self._with_all_step_times(self.timer.total()), wire_bytes)
        if self._has_sizes:  # the payload of a step is known by size, the bytes only on average
            for name in ("comm/effective_bytes_per_s", "comm/overhead"):
                metrics.pop(name, None)
        lost_s = self.timer.lost_s(metrics["perf/wall_s"])
        found = {"stragglers": self.ranks.found} if self.ranks else {}
        return metrics | {"lost_s": lost_s, "outliers": dict(self.log.outliers)} | found

    def _with_all_step_times(self, metrics: dict[str, float]) -> dict[str, float]:
        """Replaces the timer's step times, which begin at this start, by those of the step log."""
        try:
            times_s = read_step_times(self.log.path)
        except (OSError, ValueError) as error:
            logging.warning("Step times cover only the steps since this start: %s", error)
            return metrics
        if times_s:
            tokens = sum(map(self._tokens_of, times_s)) / len(times_s)
            return metrics | step_time_metrics([*times_s.values()], tokens, self.work.devices)
        return {name: value for name, value in metrics.items() if name not in STEP_TIME_METRICS}

    def _add_rates(self, metrics: dict, wire_bytes: tuple[float, float] | None) -> dict:
        """Adds utilisation and network metrics, which need the mean step time, and memory."""
        if "perf/tokens_per_s" not in metrics:
            return metrics
        step_time_s = self.work.tokens / metrics["perf/tokens_per_s"]
        metrics = metrics | self.work.utilisation(self.chip, step_time_s) | memory_metrics()
        metrics |= self.work.collective_metrics()
        return metrics | self._network_metrics(wire_bytes, step_time_s) if wire_bytes else metrics

    def _network_metrics(
        self, wire_bytes: tuple[float, float], step_time_s: float
    ) -> dict[str, float]:
        """Returns this host's bytes on the network for each step, and the effective bandwidth.

        Effective bandwidth is the payload that the host must send (StepWork.sent_bytes, from the
        compiled program) over the mean step time, computation included. It excludes headers and
        retransmissions, which are the overhead, and pauses, in which no step runs.
        """
        sent, received = wire_bytes
        metrics = {
            "comm/wire_bytes": sent + received,
            "comm/wire_sent_bytes": sent,
            "comm/wire_received_bytes": received,
        }
        if not self.work.sent_bytes:
            return metrics
        return metrics | {
            "comm/effective_bytes_per_s": self.work.sent_bytes / step_time_s,
            "comm/overhead": sent / self.work.sent_bytes - 1,
        }

    def describe(self) -> str:
        """Returns a line on which network counters are read, and when."""
        if not self.counters or not self._step_bytes:
            return "network bytes are not measured: all processes are on one host"
        when = "after each step" if self._step_bytes.reads_each_step else "at logged steps"
        names, read_us = " ".join(self.counters.names), 1e6 * self.counters.read_s
        return f"network bytes of {names}, read {when} (a read takes {read_us:.0f} us)"

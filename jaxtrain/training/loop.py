"""The training loop: batch, step, log, evaluate, save."""

import contextlib
import functools
import signal
from collections.abc import Iterator
from typing import Any

import jax

import jaxtrain.config.train_config as config_lib
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.data.loader import Batches
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.preemption import StopListener
from jaxtrain.metrics.collector import Collector
from jaxtrain.reporting.run_logger import RunLogger
from jaxtrain.reporting.terminal import describe_time_left
from jaxtrain.reporting.tracing import Tracer
from jaxtrain.sites.outer_state import add_outer_state
from jaxtrain.sites.rounds import Rounds
from jaxtrain.training.evaluation import Evaluator, token_limit, warn_of_noise
from jaxtrain.training.finite import is_sound, name_spoiled_processes
from jaxtrain.training.phases import AFTER_STEPS, measure_phases, show_phases
from jaxtrain.training.programs import Programs, size_metrics
from jaxtrain.training.run import Run
from jaxtrain.training.source_losses import SourceLosses
from jaxtrain.training.step import TrainState

IN_STEP = "saving after this step, then stopping"
UNSOUND = "its loss, gradient or update is not finite"
IN_EVALUATION = "leaving the evaluation, saving, then stopping"


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    alert_event = "diverged"


class Loop:
    """The loop over a run's steps, and its state between them.

    JAX dispatches asynchronously, so the loop starts step n+1 before it reads the scalars of step
    n: the device computes while the host waits, logs and fetches the next batch.

    Args:
        run: from build_run.
        state: TrainState to continue from. The first step donates it.
        programs: from compile_programs.
        batches: training batches, positioned at the state's step.
        evaluator: what the weights are evaluated on.
        collector: the entered Collector of this process.
        rounds: exchange with other sites, with its state restored; None trains on this site only.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        programs: Programs,
        batches: Batches,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        logger: RunLogger,
        collector: Collector,
        rounds: Rounds | None = None,
    ):
        self.cfg, self.run = run.cfg, run
        self.state, self.programs = state, programs
        self.batches, self.evaluator = batches, evaluator
        self.checkpoints, self.logger, self.collector = checkpoints, logger, collector
        self.rounds = rounds
        self.stop = StopListener()
        self.first = self.saved_step = int(state.step)
        self.tracer = Tracer(self.cfg.workdir, self.first, self.cfg.steps, self.cfg.profile.steps)
        self._source_losses = SourceLosses(self.cfg.data.source_names)
        self._warned_of_noise = self._showed_time_left = False
        # Step, its scalars on the device, and number of batches read up to it, which is smaller
        # than the step in a branch with other data.
        self._in_flight: tuple[int, dict[str, Any], int] | None = None
        self._scalars: dict[str, jax.Array] = {}  # of the last step that was collected

    def run_to_end(self, stop: StopListener) -> signal.Signals | None:
        """Trains to cfg.steps or until a signal; returns that signal, or None at the end.

        Args:
            stop: the entered StopListener of this process.
        """
        cfg, stopped_by, self.stop = self.cfg, None, stop
        stop.defer_signals(IN_STEP)
        if self._evaluation_is_due(self.first):
            # An earlier start may have ended between this step's save and its evaluation.
            if not broadcast_from_process_0(lambda: self.logger.evaluated_step == self.first):
                self.evaluate(self.first)
        if stop.signal:
            return stop.signal
        step = self._exchange(self.first)  # what an earlier start was waiting for when it ended
        while step < cfg.steps:
            step += 1
            if self.tracer.switches_before(step):
                self._toggle_trace()
            with self.tracer.annotate_step(step):
                batch = self._train_step(step)
            if cfg.measure.phases and step == min(self.first + AFTER_STEPS, cfg.steps):
                self._measure_phases(step, batch)
            step = self._exchange(step)
            if self.collector.is_probe_due(step):
                self._probe_ranks(step)
            stopped_by = stop.agreed_signal()
            if stopped_by or step % cfg.save_every == 0 or step == cfg.steps:
                self._save(step)
            if not stopped_by and self._evaluation_is_due(step):
                self.evaluate(step)
                if stopped_by := stop.signal:  # it may have come between two evaluation batches
                    self._save(step)
            if stopped_by:
                break
        if self.tracer.is_on:
            self._toggle_trace()
        return stopped_by

    def _exchange(self, step: int) -> int:
        """Exchanges with other sites; returns the step, a later one if they had gone on."""
        if self.rounds is None:
            return step
        stopped = lambda: beat("sites") or self.stop.agreed_signal()
        pause = functools.partial(self._pause, "sites")
        self.state, new_step = self.rounds.after_step(self.state, step, stopped, pause)
        for metrics in self.rounds.log.take_metrics():
            self.logger.write(new_step, metrics)
        if new_step != step:
            self.batches.restore(self.batches.state() | {"step": new_step})
        if self.rounds.took_over:  # even at the same step, which the run cannot reach again alone
            self._save(new_step)
        return new_step

    @contextlib.contextmanager
    def _pause(self, cause: str) -> Iterator[None]:
        """Waits for the step in flight, then attributes the block's time to a cause."""
        self._collect_step()
        with self.collector.pause(cause), self.tracer.annotate("pause"):
            yield

    def _evaluation_is_due(self, step: int) -> bool:
        """Returns whether to evaluate after a step; finish_run does so after the last one."""
        every, first = self.cfg.eval_every, max(1, self.cfg.eval_from)
        return bool(every) and step % every == 0 and first <= step < self.cfg.steps

    def _train_step(self, step: int) -> dict[str, jax.Array]:
        """Starts a step, then collects the one before it; returns the step's batch."""
        beat("train", step)
        with self.collector.pause("data"), self.tracer.annotate("data"):
            batch = next(self.batches)
        # If the previous step is done by now, the device has been waiting for this batch.
        if self._in_flight is None or self._in_flight[1]["train/bad_steps"].is_ready():
            self.collector.timer.starved(throughout=self._in_flight is None)
        program = self.programs.at(step)
        if program.diagnosis and step % self.cfg.diagnose_every == 0:
            self._diagnose(step, batch)
        # A NumPy argument or a float() in here would copy between host and device at every step.
        # The guard turns such an implicit transfer into an error.
        with jax.transfer_guard("disallow"), self.tracer.annotate("dispatch"):
            # The old state's buffers are donated: the new state overwrites them in place.
            self.state, scalars = program.step(self.state, batch, program.rates)
        beat("train", step)  # a second beat, so that a stall in data loading is detectable
        self._collect_step()
        self._in_flight = step, scalars, self.batches.step
        return batch

    def _collect_step(self) -> None:
        """Waits for the step in flight, if any, and logs it.

        Raises:
            Diverged: as many steps in a row as cfg.max_bad_steps were skipped.
        """
        if self._in_flight is None:
            return
        (step, scalars, batches), self._in_flight = self._in_flight, None
        self._source_losses.take_from(scalars)
        self._scalars, program = scalars, self.programs.at(step)
        self.collector.use(program.work)
        with self.tracer.annotate("wait"):
            bad_steps = int(jax.device_get(scalars["train/bad_steps"]))
        self.collector.tick(step, skipped=bad_steps > 0)
        self._show_time_left(step)
        self.logger.advance(step)
        is_last = step == self.cfg.steps or self.programs.is_last_of_size(step)
        if step % self.cfg.log_every == 0 or is_last or bad_steps:
            metrics = {name: float(x) for name, x in jax.device_get(scalars).items()}
            metrics |= self.batches.source_metrics(batches) | self.collector.summary()
            metrics |= size_metrics(self.cfg, step) | self._source_losses.means()
            self.logger.write(step, metrics)
        if bad_steps:
            self.logger.note(f"step {step} skipped: its loss or its gradient is not finite")
        if bad_steps >= self.cfg.max_bad_steps:
            remedy = "Lower --optim.learning_rate or raise --max_bad_steps."
            raise Diverged(
                f"fewer than {self.cfg.max_bad_steps} steps in a row may be skipped; got "
                f"{bad_steps} by step {step}, {self._newest_checkpoint()}. "
                f"{name_spoiled_processes(self.state) or remedy}"
            )

    def _show_time_left(self, step: int) -> None:
        """Prints once, from the first timed steps, how long the remaining ones will take."""
        timed_steps = step - self.first
        is_early = timed_steps < 3 or timed_steps < 6 and self.collector.timer.steps_s < 10
        if self._showed_time_left or is_early:
            return
        self._showed_time_left, step_s = True, self.collector.timer.usual_s()
        step_s *= self.programs.growth(step, self.cfg.steps)
        if text := describe_time_left(self.cfg.steps - step, step_s):
            self.logger.print_header([("time", text)])

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Logs held-out losses and scores of the current weights; returns None if a signal came.

        A signal ends it after the current batch: the grace period that a scheduler grants after
        SIGTERM may be shorter than an evaluation.
        """
        self._collect_step()
        beat("eval")
        self.stop.defer_signals(IN_EVALUATION)
        with self._pause("eval"):
            stopped = lambda: beat("eval") or self.stop.agreed_signal()
            metrics = self.evaluator.evaluate(self.state, stopped, token_limit(self.cfg))
        self.stop.defer_signals(IN_STEP)
        if metrics is None:
            self.logger.note(
                f"the evaluation of step {step} was interrupted; a resumed run repeats it"
            )
            return None
        self.logger.write(step, metrics)
        if (warning := warn_of_noise(metrics)) and not self._warned_of_noise:
            self.logger.note(warning)
            self._warned_of_noise = True
        return metrics

    def _save(self, step: int) -> None:
        """Starts to write a checkpoint, unless the step is stored already or not finite."""
        self._collect_step()
        if step == self.saved_step:
            return
        beat("save")
        is_last = step == self.cfg.steps
        reason = "" if is_sound(self._scalars, self.state, is_last) else UNSOUND
        if self.rounds and is_last and self.rounds.finished_step != step:
            reason = "its exchange with the other sites is not finished"
        if reason:
            self.logger.note(f"step {step} is not saved: {reason}; {self._newest_checkpoint()}")
            return
        with self._pause("save"):
            state, meta = self.state, {"data": self.batches.state()}
            meta["config"] = config_lib.flatten(self.cfg)
            if self.rounds:
                stored = broadcast_from_process_0(self.checkpoints.steps)
                args = state, step, stored, self.cfg.keep_last
                state, meta["sites"] = add_outer_state(self.rounds, *args)
            self.checkpoints.save(step, state, meta)
        self.saved_step = step

    def _newest_checkpoint(self) -> str:
        known = f"the newest checkpoint is step {self.saved_step}"
        return known if self.saved_step else "no checkpoint is saved"

    def _diagnose(self, step: int, batch: dict[str, jax.Array]) -> None:
        """Logs what the optimizer is about to do. The time counts as a pause, not as a step."""
        program = self.programs.at(step)
        assert program.diagnosis is not None
        with self._pause("diagnosis"):
            metrics = jax.device_get(program.diagnosis(self.state, batch, program.rates))
        self.logger.write(step, {name: float(x) for name, x in metrics.items()})

    def _measure_phases(self, step: int, batch: dict[str, jax.Array]) -> None:
        """Times the parts of a step separately, logs and prints them."""
        self._collect_step()
        beat("compile")
        with self._pause("phases"):
            step_s = self.collector.timer.usual_s()
            program = self.programs.at(step)
            figures = measure_phases(program.run, self.state, batch, program.rates, step_s)
        self.logger.write(step, figures)
        self.logger.print_header(show_phases(figures))

    def _probe_ranks(self, step: int) -> None:
        """Compares the processes; prints which have become stragglers, or are none any more."""
        self._collect_step()
        beat("compile")  # the first probe compiles its program
        self.logger.write_ranks(*self.collector.probe_ranks(step))

    def _toggle_trace(self) -> None:
        """Starts or stops the profiler while no step is in flight."""
        self._collect_step()
        beat("save")
        with self.collector.pause("profile"):  # no annotation: the tracer may be off
            self.tracer.switch()
        if not self.tracer.is_on:
            self.logger.note(f"trace made; to read it: jaxtrain profile {self.tracer.folder}")

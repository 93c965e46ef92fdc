"""The training loop: what happens in a step, and between steps."""

import math
from functools import cached_property

import jax
import jax.numpy as jnp

import jaxtrain.config.train_config as config_lib
from jaxtrain.data.loader import build_eval_batches
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.distributed.heartbeat import beat
from jaxtrain.distributed.preemption import StopListener
from jaxtrain.reporting.progress_text import format_duration, format_seconds
from jaxtrain.reporting.tracing import Tracer
from jaxtrain.training.evaluation import (
    build_byte_counter,
    build_eval_step,
    evaluate,
    warn_of_noise,
)
from jaxtrain.training.phases import AFTER_STEPS, measure_phases, show_phases

IN_STEP = "saving after this step, then stopping"
IN_EVALUATION = "leaving the evaluation, saving, then stopping"


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Loop:
    """One run under way. The device is always a step ahead of what the host has read.

    Args:
        run: from build_run.
        state: TrainState to go on from; donated to the steps.
        step: compiled step(state, batch, rates).
        diagnosis: likewise, of what `diagnose` gives; None where the run asks for none.
        batches: training batches, at the state's step.
        held_out: corpus to evaluate on.
        measure: Collector of this process, started.
    """

    def __init__(
        self, run, state, step, diagnosis, batches, held_out, checkpoints, report, measure
    ):
        self.cfg, self.run = run.cfg, run
        self.state, self.step, self.diagnosis = state, step, diagnosis
        self.batches, self.held_out = batches, held_out
        self.checkpoints, self.report, self.measure = checkpoints, report, measure
        self.stop = StopListener()
        self.eval_step = build_eval_step(run)
        self.rates = run.rates()
        self.first = int(state.step)
        self.saved_step, cfg = self.first, run.cfg
        self.tracer = Tracer(cfg.workdir, self.first, cfg.steps, cfg.profile.steps)
        self._warned = False  # of few held-out tokens
        self._told_time = False  # how long the steps will take
        self._in_flight = None  # (step, scalars), the scalars still on the device
        self._scalars = {}  # of the last step that has arrived

    def run_to_end(self, stop):
        """Trains to cfg.steps, or until a signal asks to stop; returns that signal or None.

        Args:
            stop: the entered StopListener of this process.
        """
        cfg, told, self.stop = self.cfg, None, stop
        stop.defer_signals(IN_STEP)
        if self._evaluates_after(self.first):
            seen = self.report.evaluated_step == self.first  # else the run ended right after a save
            if not broadcast_from_process_0(lambda: seen):
                self.evaluate(self.first)
        if stop.signal:
            return stop.signal
        for step in range(self.first + 1, cfg.steps + 1):
            if self.tracer.switches_before(step):
                self._switch_trace()
            with self.tracer.annotate_step(step):
                batch = self._advance(step)
            if cfg.measure.phases and step == min(self.first + AFTER_STEPS, cfg.steps):
                self._measure_phases(step, batch)
            told = stop.agreed_signal()
            if told or step % cfg.save_every == 0 or step == cfg.steps:
                self._save(step)
            if not told and self._evaluates_after(step):
                self.evaluate(step)
                told = stop.signal  # served between two batches
                if told:
                    self._save(step)
            if told:
                break
        if self.tracer.is_on:
            self._switch_trace()
        return told

    def _evaluates_after(self, step) -> bool:
        """Whether an evaluation is due that is not the last, which `finish` makes."""
        every = self.cfg.eval_every
        return bool(every) and step % every == 0 and 0 < step < self.cfg.steps

    def _switch_trace(self):
        self._arrive()
        beat("save")
        with self.measure.pause("profile"):
            self.tracer.switch()
        if not self.tracer.is_on:
            self.report.note(f"trace in {self.tracer.folder}: python -m jaxtrain.profile tells it")

    def _advance(self, step):
        """Starts a step, then waits for the one before it; returns the step's batch."""
        beat("train", step)
        with self.measure.pause("data"), self.tracer.annotate("data"):
            batch = next(self.batches)
        if self._in_flight is None or self._in_flight[1]["train/bad_steps"].is_ready():
            self.measure.timer.starved(throughout=self._in_flight is None)
        if self.diagnosis and step % self.cfg.diagnose_every == 0:
            self._diagnose(step, batch)
        with jax.transfer_guard("disallow"), self.tracer.annotate("dispatch"):
            # A hidden copy would stall every step.
            self.state, scalars = self.step(self.state, batch, self.rates)
        beat("train", step)  # another one: who is stuck in its data has not made it
        self._arrive()
        self._in_flight = step, scalars
        return batch

    def _measure_phases(self, step, batch):
        """Logs and shows what the parts of a step take alone."""
        self._arrive()
        beat("compile")
        with self.measure.pause("phases"):
            whole_s = self.measure.timer.usual_s()
            figures = measure_phases(self.run, self.state, batch, self.rates, whole_s)
        self.report.write(step, figures)
        for line in show_phases(figures):
            self.report.note(line)

    def _diagnose(self, step, batch):
        """Logs what the optimizer is about to do; its time is no step's."""
        self._arrive()
        with self.measure.pause("diagnosis"), self.tracer.annotate("pause"):
            metrics = jax.device_get(self.diagnosis(self.state, batch, self.rates))
        self.report.write(step, {name: float(x) for name, x in metrics.items()})

    def _arrive(self):
        """Waits for the step in flight, logs it, and stops a run that has diverged."""
        if self._in_flight is None:
            return
        (step, scalars), self._in_flight = self._in_flight, None
        self._scalars = scalars
        with self.tracer.annotate("wait"):
            bad_steps = int(jax.device_get(scalars["train/bad_steps"]))
        self.measure.tick(step, skipped=bad_steps > 0)
        self._tell_time(step)
        self.report.advance(step)
        if step % self.cfg.log_every == 0 or step == self.cfg.steps or bad_steps:
            metrics = {name: float(x) for name, x in jax.device_get(scalars).items()}
            self.report.write(step, metrics | self.measure.summary())
        if bad_steps:
            self.report.note(f"step {step} skipped: its loss or its gradient is not finite")
        if bad_steps >= self.cfg.max_bad_steps:
            raise Diverged(
                f"at most {self.cfg.max_bad_steps} steps in a row may be skipped; got {bad_steps} "
                f"by step {step} (checkpoint: step {self.saved_step}). Lower "
                "--optim.learning_rate or raise --max_bad_steps."
            )

    def _tell_time(self, step):
        """Prints once, from the first timed steps, how long all of them will take."""
        made = step - self.first
        if self._told_time or made < 3 or made < 6 and self.measure.timer.steps_s < 10:
            return
        self._told_time, step_s = True, self.measure.timer.usual_s()
        left, left_s = self.cfg.steps - step, step_s * (self.cfg.steps - step)
        if left_s >= 10:
            text = f"about {format_duration(left_s)} for {left:,} more steps"
            text += f" of {format_seconds(step_s)}"
            self.report.print_header([("time", f"{text}, without evaluations and saves")])

    def evaluate(self, step) -> dict | None:
        """Logs the held-out loss of the current weights as this step's; None where a signal came.

        An evaluation may take longer than a scheduler waits after SIGTERM, so a signal is served
        between its batches.
        """
        self._arrive()
        beat("eval")
        self.stop.defer_signals(IN_EVALUATION)
        with self.measure.pause("eval"), self.tracer.annotate("pause"):
            batches = build_eval_batches(self.cfg.data, self.held_out, self.run.mesh)
            counter, most = self._count_bytes, self._eval_tokens()
            asked = self.stop.agreed_signal
            metrics = evaluate(self.eval_step, self.state, batches, counter, most, asked)
        self.stop.defer_signals(IN_STEP)
        if metrics is None:
            self.report.note(f"the evaluation of step {step} was left; a resumed run makes it")
            return None
        self.report.write(step, metrics)
        if (warning := warn_of_noise(metrics)) and not self._warned:
            self.report.note(warning)
            self._warned = True
        return metrics

    @cached_property
    def _count_bytes(self):
        return build_byte_counter(self.held_out, self.run.mesh)

    def _eval_tokens(self) -> int:
        """At most what the run trains on: one step of a large model is not followed by hours."""
        cfg = self.cfg
        return min(cfg.eval_tokens, cfg.steps * cfg.data.batch * cfg.data.seq_len)

    def _save(self, step):
        self._arrive()
        if step == self.saved_step:
            return
        beat("save")
        if not self._is_sound(step):
            self.report.note(
                f"step {step} is not saved: its loss, gradient or update is not finite; the newest "
                f"checkpoint is step {self.saved_step}"
            )
            return
        with self.measure.pause("save"), self.tracer.annotate("pause"):
            meta = {"data": self.batches.state(), "config": config_lib.flatten(self.cfg)}
            self.checkpoints.save(step, self.state, meta)
        self.saved_step = step

    def _is_sound(self, step) -> bool:
        """Whether the last step's figures are finite; at the run's end, whether the state is.

        A skipped step changes nothing, but what the one before it made may be why it was skipped,
        and each save of that takes the place of an older, good one.
        """
        figures = jax.device_get(self._scalars)
        if not figures["train/bad_steps"] and all(map(math.isfinite, figures.values())):
            return True
        return step == self.cfg.steps and bool(jax.device_get(all_finite(self.state)))


@jax.jit
def all_finite(tree):
    """bool []: no floating-point number in the tree is infinite or not a number."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(x).all() for x in leaves]).all()

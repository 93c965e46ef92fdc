import re
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from configs import debug
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config.train_config import freeze
from jaxtrain.distributed.preemption import StopListener
from jaxtrain.metrics.collector import Collector
from jaxtrain.metrics.mfu import StepWork
from jaxtrain.metrics.step_log import StepLog
from jaxtrain.reporting.run_logger import EVAL_LOSS, RunLogger
from jaxtrain.training.loop import Loop
from jaxtrain.training.programs import Program, Programs
from jaxtrain.training.run import build_run
from jaxtrain.training.step import TrainState

GOOD, SKIPPED, HUGE = (0, 0.1), (1, 0.0), (0, float("inf"))  # bad_steps, update_rms


class Steps:
    """Stands for both the batches and the compiled step; step n returns figures[n - 1]."""

    def __init__(self, figures, w):
        self.figures, self.w, self.step = figures, w, 0

    def __next__(self):
        self.step += 1
        return {}

    def state(self):
        return {"step": self.step}

    def source_metrics(self, batches):
        return {}

    def __call__(self, state, batch, rates):
        bad_steps, rms = self.figures[self.step - 1]
        scalars = {"train/bad_steps": bad_steps, "optim/matrices/update_rms": rms}
        with jax.transfer_guard("allow"):
            new = state._replace(step=jnp.int32(self.step), params={"w": jnp.full(4, self.w)})
            return new, jax.tree.map(jnp.asarray, scalars)


class Slow(Steps):
    """Steps of 50 ms; SIGTERM arrives in the eighth."""

    def __call__(self, state, batch, rates):
        time.sleep(0.05)
        if self.step == 8:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)
        return super().__call__(state, batch, rates)


class Watched(Loop):
    """Records which steps were stored at each evaluation."""

    evaluated = ()

    def evaluate(self, step):
        self._collect_step()
        self.evaluated += ((step, self.checkpoints.steps()),)


def run_loop(workdir, figures, first=0, w=1.0, build=Steps, quiet=True, **values):
    """Returns (Loop that has ended, steps of its checkpoints)."""
    config = debug.get_config()
    config.update({"workdir": str(workdir), "steps": first + len(figures), "save_every": 1})
    config.update(keep_last=9, **values)
    config.checkpoint.storage = "host0"  # saved when save() returns
    run = build_run(freeze(config), jax.devices()[:1])
    steps = build([GOOD] * first + figures, w)
    steps.step = first
    state = TrainState(jnp.int32(first), {"w": jnp.ones(4)}, (), jnp.int32(0), jnp.int32(0))
    work = StepWork(256, 4, 1.0, 1.0, 1.0, None, None, (), 1, "float32")
    with (
        Checkpoints(workdir / "checkpoints", 9, storage="host0") as checkpoints,
        RunLogger(workdir, run.cfg.steps, first, quiet=quiet) as report,
        StopListener() as stop,
        Collector(work, None, StepLog(workdir, 0, first), None, checkpoints.is_saving) as measure,
    ):
        programs = Programs(
            run.cfg.data.sizes, {run.cfg.data.batch: Program(run, steps, None, {}, work)}
        )
        loop = Watched(run, state, programs, steps, None, checkpoints, report, measure)
        measure.start({})
        loop.run_to_end(stop)
        return loop, checkpoints.steps()


def test_a_step_is_saved_before_it_is_evaluated(tmp_path):
    loop, _ = run_loop(tmp_path, [GOOD] * 5, eval_every=2)
    assert loop.evaluated == ((2, [1, 2]), (4, [1, 2, 3, 4]))


@pytest.mark.parametrize("seen", [False, True])
def test_an_evaluation_that_a_stopped_run_missed_is_done_by_the_next_start(tmp_path, seen):
    with RunLogger(tmp_path, 4, quiet=True) as report:
        report.write(2, {EVAL_LOSS: 1.0} if seen else {"train/loss_nats": 1.0})
    loop, _ = run_loop(tmp_path, [GOOD], first=2, eval_every=2)
    assert [step for step, _ in loop.evaluated] == ([] if seen else [2])


def test_a_step_with_non_finite_scalars_is_not_saved(tmp_path):
    figures = [GOOD, HUGE, SKIPPED, GOOD, SKIPPED, GOOD]
    assert run_loop(tmp_path, figures)[1] == [1, 4, 6]


@pytest.mark.parametrize(("w", "saved"), [(1.0, [1, 2]), (float("nan"), [1])])
def test_a_run_that_ends_on_a_skipped_step_is_saved_if_its_state_is_finite(tmp_path, w, saved):
    assert run_loop(tmp_path, [GOOD, SKIPPED], w=w)[1] == saved


def test_the_time_left_is_printed_once_after_the_first_steps(tmp_path, capsys):
    run_loop(tmp_path, [GOOD] * 1_006, build=Slow, quiet=False, save_every=5_000, log_every=5_000)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time")]
    found = re.fullmatch(r"time +about (\d):(\d\d) for 1,000 more steps of (5\d\.\d) ms, .*", line)
    minutes, seconds, step_ms = map(float, found.groups())
    assert 60 * minutes + seconds == pytest.approx(step_ms, abs=0.6)


def test_a_run_of_seconds_does_not_print_its_time_left(tmp_path, capsys):
    run_loop(tmp_path, [GOOD] * 30, quiet=False, save_every=50, log_every=50)
    assert "about" not in capsys.readouterr().out

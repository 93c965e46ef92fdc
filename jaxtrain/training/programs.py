"""The compiled programs of a run: one for each number of sequences that its steps have.

All are compiled before the first step. They differ only in the number of microbatches, each of
data.batch / accumulation sequences, so that all need the same memory.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from jaxtrain.config.batch_schedule import BatchSchedule
from jaxtrain.config.train_config import DataConfig, TrainConfig
from jaxtrain.metrics.mfu import StepWork, build_work
from jaxtrain.optim.batch_scaling import rate_factor
from jaxtrain.optim.build import peak_rates
from jaxtrain.training.diagnostic_step import compile_diagnosis
from jaxtrain.training.run import Run, compile_step
from jaxtrain.training.step import place_rates


class Program(NamedTuple):
    """What runs the steps of one size."""

    run: Run  # with a config of this batch and accumulation, and without a schedule
    step: Callable  # a Step
    diagnosis: Callable | None  # a Step; None if the config asks for none
    rates: dict[str, jax.Array]  # peak learning rates, scaled for this size
    work: StepWork


class Programs:
    """Finds the program of a step.

    Args:
        sizes: sequences of each step.
        by_size: the program for each of them that the run still needs.

    Attributes:
        steps_compile_s: seconds that compiling the steps took.
        compile_s: the same, with the diagnoses.
    """

    def __init__(
        self,
        sizes: BatchSchedule,
        by_size: Mapping[int, Program],
        steps_compile_s: float = 0.0,
        diagnoses_compile_s: float = 0.0,
    ):
        self._sizes, self._by_size = sizes, by_size
        self.steps_compile_s = steps_compile_s
        self.compile_s = steps_compile_s + diagnoses_compile_s

    def at(self, step: int) -> Program:
        """Returns the program of a step, counted from 1."""
        return self._by_size[self._sizes.sequences(step - 1)]

    def is_last_of_size(self, step: int) -> bool:
        """Returns whether the step after this one, counted from 1, has another size."""
        return self._sizes.sequences(step - 1) != self._sizes.sequences(step)

    def growth(self, step: int, end: int) -> float:
        """Returns the mean size of the steps step+1..end over that of `step`; 1 at the end."""
        before = self._sizes.sequences_before
        mean = (before(end) - before(step)) / max(end - step, 1)
        return mean / self._sizes.sequences(step - 1) if end > step else 1.0


def size_metrics(cfg: TrainConfig, step: int) -> dict[str, float]:
    """Returns the metrics that only a run with data.batch_schedule has.

    These are the sequences of a step, counted from 1, the tokens of all steps up to it, and the
    factor of its rates.
    """
    if not cfg.data.batch_schedule:
        return {}
    sequences = cfg.data.sizes.sequences(step - 1)
    return {
        "train/sequences": sequences,
        "train/tokens": cfg.data.tokens_before(step),
        "optim/batch_factor": rate_factor(cfg.optim.batch_scaling, sequences, cfg.data.batch),
    }


def size_config(cfg: TrainConfig, sequences: int) -> TrainConfig:
    """Returns the config of steps of one size: with microbatches as large as the config's."""
    if not cfg.data.batch_schedule:
        return cfg
    data = dataclasses.replace(cfg.data, batch=sequences, batch_schedule="")
    return dataclasses.replace(cfg, data=data, accumulation=sequences // cfg.microbatch)


def scaled_rates(cfg: TrainConfig, run: Run, sequences: int) -> dict[str, jax.Array]:
    """Returns the peak learning rates of steps of one size, on the mesh."""
    factor = rate_factor(cfg.optim.batch_scaling, sequences, cfg.data.batch)
    rates = peak_rates(cfg.optim, run.model.axes)
    return place_rates({name: factor * rate for name, rate in rates.items()}, run.mesh)


def compile_programs(
    run: Run, first: int, hosts: Sequence[str] | None, note: Callable[[str], None]
) -> Programs:
    """Compiles the programs of the steps after `first`, in their order.

    Args:
        first: steps that the run has made.
        hosts: name of each process's host, for the bytes between them; None: all differ.
        note: prints a line.
    """
    sizes, by_size = run.cfg.data.sizes, {}
    steps_s = diagnoses_s = 0.0
    for phase in sizes.between(first, run.cfg.steps):
        size = phase.sequences
        if size in by_size:
            continue
        sized = run._replace(cfg=size_config(run.cfg, size))
        step = compile_step(sized)
        text = "" if sizes.is_constant else f" for {size} sequences"
        note(f"compiled in {step.compile_s:.1f} s{text}")
        diagnosis = compile_diagnosis(sized) if run.cfg.diagnose_every else None
        if diagnosis:
            note(f"diagnosis compiled in {diagnosis.compile_s:.1f} s{text}")
            diagnoses_s += diagnosis.compile_s
        steps_s += step.compile_s
        work = build_work(sized.cfg, run.parameters, run.mesh, step.compiled, hosts)
        rates = scaled_rates(run.cfg, run, size)
        by_size[size] = Program(sized, step, diagnosis, rates, work)
    return Programs(sizes, by_size, steps_s, diagnoses_s)


def batch_phases(data: DataConfig) -> dict[str, list[dict[str, int]]]:
    """Returns the entry of config.json on steps of different sizes; {} without a schedule.

    "step" is the first step of a size, counted from 1.
    """
    if not data.batch_schedule:
        return {}
    return {
        "batch_phases": [
            {"step": p.first + 1, "sequences": p.sequences, "tokens": p.sequences * data.seq_len}
            for p in data.sizes.phases
        ]
    }


def schedule_lines(cfg: TrainConfig, first: int = 0) -> Iterator[tuple[str, str]]:
    """Yields the phases of data.batch_schedule, as (name, value) pairs; nothing without one.

    Args:
        first: steps that the run has made.
    """
    if not cfg.data.batch_schedule:
        return
    sizes, phases = cfg.data.sizes, cfg.data.sizes.phases
    for phase, after in zip(phases, (*phases[1:], None), strict=True):
        parts = phase.sequences // cfg.microbatch
        factor = rate_factor(cfg.optim.batch_scaling, phase.sequences, cfg.data.batch)
        end = after.first if after else cfg.steps
        tokens = sizes.sequences_before(phase.first) * cfg.data.seq_len
        text = (
            f"from step {phase.first + 1:,}, after {tokens:,} tokens: {phase.sequences} sequences "
            f"in {parts} x {cfg.microbatch}, rates x {factor:.4g}"
        )
        if phase.first >= cfg.steps:
            text += f"; not reached in {cfg.steps:,} steps"
        elif end <= first:
            text += "; over"
        yield "batch", text

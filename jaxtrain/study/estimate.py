"""Says before a study starts how many runs it makes and how long they take."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.interop.initial_state import initial_state
from jaxtrain.reporting.terminal import format_duration, format_seconds
from jaxtrain.study.plan import StudyPlan, Trial
from jaxtrain.training.batch_arrays import abstract_batch
from jaxtrain.training.run import build_run, compile_step

PILOT_STEPS = 8


def _sample_trial(plan: StudyPlan, cell: str, contender: str) -> Trial:
    return plan.trial(cell, contender, plan.declared_settings(contender)[0], plan.study.tuning_seed)


def describe_study(plan: StudyPlan) -> list[str]:
    """Returns lines on what the study will do."""
    study, cells = plan.study, plan.cells.values()
    count, pairs = len(study.contenders), len(study.contenders) * len(study.seeds)
    lines = [
        f"contenders  {', '.join(study.contenders)}; baseline {study.baseline}",
        f"runs        {'at most ' if study.search == 'coordinates' else ''}{plan.runs}; every "
        f"contender has the same tuning budget; seeds {', '.join(map(str, study.seeds))}",
    ]
    for cell in cells:
        cfg = _sample_trial(plan, cell.name, study.baseline).config
        tokens = cfg.data.tokens_before(cfg.steps)
        tuning = plan.budget(cell.name) * count
        start = f", starting from {cell.starts_from}" if cell.starts_from and tuning else ""
        start = start if study.search == "coordinates" else ""
        parameters = cell.parameters
        lines.append(
            f"  {cell.name:<10}{parameters:,} parameters, {tokens:,} tokens in {cfg.steps:,} "
            f"steps; {tuning} tuning runs{start}, {pairs} paired runs"
        )
    return [*lines, f"folder      {study.workdir}"]


def estimate_time(plan: StudyPlan, devices: Sequence[Any] | None = None) -> list[str]:
    """Returns lines on how long the study takes here, from a few steps of each size's baseline."""
    step_s: dict[str, float] = {}  # by group
    compile_s, total_s = 0.0, 0.0
    lines = [""]
    for cell in plan.cells.values():
        trial = _sample_trial(plan, cell.name, plan.study.baseline)
        if cell.group not in step_s:
            step_s[cell.group], compile_s = _time_steps(trial, devices)
        seconds = trial.config.steps * step_s[cell.group]
        runs = (plan.budget(cell.name) + len(plan.study.seeds)) * len(plan.study.contenders)
        total_s += runs * seconds
        lines.append(
            f"  {cell.name:<10}{runs} runs of {format_duration(seconds)} "
            f"({format_seconds(step_s[cell.group])} a step): {format_duration(runs * seconds)}"
        )
    lines[0] = (
        f"time        at most {format_duration(total_s)} of steps in this process alone, measured "
        f"with {plan.study.baseline}"
    )
    return [
        *lines,
        "  Not included: start and evaluation of each run, and compilation, which takes "
        f"{format_seconds(compile_s)} unless the cache has the program.",
        "  Other processes may run the same command at the same time, also on other hosts that "
        "share the folder; no run is trained twice.",
    ]


def _time_steps(trial: Trial, devices: Sequence[Any] | None) -> tuple[float, float]:
    """Returns the median time of a run's step and the time of its compilation, in seconds."""
    run = build_run(trial.config, devices)
    step = compile_step(run)
    (state, _), rates = initial_state(run), run.rates()
    shapes = abstract_batch(run.cfg.data, run.mesh)
    random = np.random.default_rng(0)
    batch = jax.tree.map(
        lambda x: jax.device_put(random.integers(2, size=x.shape).astype(x.dtype), x.sharding),
        shapes,
    )
    times_s = []
    for _ in range(PILOT_STEPS):
        start_s = time.perf_counter()
        state, scalars = step(state, batch, rates)
        jax.block_until_ready(scalars)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:]), step.compile_s

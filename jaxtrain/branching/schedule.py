"""The steps and the schedule of a branch."""

import dataclasses

from jaxtrain.config.train_config import OptimConfig, TrainConfig, describe_changes, flatten
from jaxtrain.optim.schedule import build_schedule

FIELDS = ("steps", "optim.schedule", "optim.total_steps", "optim.decay_fraction")
PEAK = 1 - 1e-6  # share of the peak rate from which a step counts as being at the peak


def count_decay_steps(at: int, decay: float, decay_steps: int) -> int:
    """Returns how many steps a branch decays for; 0 if it was not asked to decay.

    Args:
        at: step of the trunk's checkpoint.
        decay: --decay, the steps as a share of `at`; 0 if not given.
        decay_steps: --decay_steps; 0 if not given.

    Raises:
        ValueError: both are given, or one is out of range.
    """
    if decay and decay_steps:
        raise ValueError(
            f"a branch decays over --decay or over --decay_steps; got decay={decay:g} and "
            f"decay_steps={decay_steps}. Set one of them."
        )
    if not 0 <= decay < float("inf"):
        raise ValueError(
            f"decay must be a positive share of the steps before the branch; got {decay:g}. Set "
            "--decay, such as --decay=0.1."
        )
    if decay_steps < 0:
        raise ValueError(f"decay_steps must be at least 1; got {decay_steps}. Set --decay_steps.")
    steps = decay_steps or round(decay * at)
    if decay and not steps:
        raise ValueError(
            f"decay must leave at least one step; got {decay:g} of --at={at}. Set --decay or "
            "--decay_steps."
        )
    return steps


def set_decay(cfg: TrainConfig, trunk: TrainConfig, at: int, steps: int) -> TrainConfig:
    """Returns the config with `steps` more steps, over which the rate falls linearly.

    It falls from the peak rate to optim.final_scale of it.

    Args:
        cfg: the trunk's config, and what the user changed in it.
        trunk: the trunk's config.

    Raises:
        ValueError: the rate at the branch is not the peak rate, or the user has set the steps or
            the schedule too.
    """
    changes = [c for c in describe_changes(flatten(trunk), cfg) if c.split()[0] in FIELDS]
    if changes:
        raise ValueError(
            f"--decay sets steps and schedule of a branch; got {'; '.join(changes)}. Leave out "
            "--decay, or these flags."
        )
    share = float(build_schedule(trunk.optim)(at))
    if share < PEAK:
        raise ValueError(
            f"a decay must begin at the peak rate; at step {at} the rate of the run is {share:.3g} "
            f"of it (optim.schedule={trunk.optim.schedule}). Set --at to a step after its warm-up "
            "and before its own decay, or leave out --decay and set the schedule by flags."
        )
    last = at + steps
    optim = dataclasses.replace(
        cfg.optim, schedule="wsd", total_steps=last, decay_fraction=steps / last
    )
    return dataclasses.replace(cfg, steps=last, optim=optim)


def count_from_zero(cfg: TrainConfig, at: int) -> TrainConfig:
    """Returns the config of a branch that counts its steps from 0, as its optimizer is new.

    Raises:
        ValueError: its schedule would end before its first step.
    """
    total = cfg.optim.total_steps - at
    if total < 1:
        raise ValueError(
            f"optim.total_steps must be above --at={at}; got {cfg.optim.total_steps}. Set "
            "--optim.total_steps or --steps."
        )
    optim: OptimConfig = dataclasses.replace(cfg.optim, total_steps=total)
    if optim.schedule == "wsd":  # the decay keeps its length in steps
        decay_steps = round(optim.decay_fraction * cfg.optim.total_steps)
        share = min(decay_steps / total, 1.0)
        optim = dataclasses.replace(optim, decay_fraction=share)
    data = cfg.data
    if data.batch_schedule:  # the sizes of its steps stay as they are
        text = data.sizes.from_step(at).write(data.seq_len)
        data = dataclasses.replace(data, batch_schedule=text)
    return dataclasses.replace(cfg, steps=cfg.steps - at, optim=optim, data=data)


def check_stage_ends(cfg: TrainConfig, trunk: TrainConfig, at: int) -> None:
    """Raises ValueError if another number of steps moves the end of a stage that was read.

    Args:
        cfg: the branch's config, whose steps count from the trunk's start.
        trunk: the trunk's config.
        at: step at which the branch begins.
    """
    if cfg.data.stages != trunk.data.stages:
        return
    for i, stage in enumerate(cfg.data.mixture_stages[:-1], start=1):
        if stage.share is None:
            continue
        was, now = (cfg.data.stage_end(stage, steps) for steps in (trunk.steps, cfg.steps))
        if was != now and min(was, now) < at:
            raise ValueError(
                f"a branch must keep the stages that were read; stage {i} of data.stages, until "
                f"{float(100 * stage.share):g}%, ends after step {was} of {trunk.steps}, and would "
                f"end after step {now} of {cfg.steps}. Set --data.stages with its end in tokens, "
                f"'until {trunk.data.tokens_before(was)}'."
            )

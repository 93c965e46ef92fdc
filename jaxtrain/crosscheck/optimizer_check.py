"""Compares a PyTorch optimizer with one of ours, on random tensors and on a small GPT."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxtrain.config.sections import DECAY_GROUPS
from jaxtrain.crosscheck import explanation, jax_train, sides
from jaxtrain.crosscheck.comparison import compare_traces
from jaxtrain.crosscheck.sides import print_now
from jaxtrain.crosscheck.trace import batches_of, read_trace
from jaxtrain.optim import select_option
from jaxtrain.optim.build import OPTIMIZERS


def build_config(theirs: str, arguments: str, ours: str) -> Any:
    """Returns the default config of `crosscheck optimizer`: a small GPT-2 with their settings.

    Raises:
        ValueError: their optimizer cannot be loaded, or ours does not exist.
    """
    sides.import_torch()
    from jaxtrain.crosscheck.their_optimizer import build_default_config, load_optimizer

    if not theirs or not ours:
        raise ValueError("`optimizer` needs --theirs=FILE.py:Class and --ours=NAME.")
    select_option(OPTIMIZERS, ours, "ours")
    return build_default_config(load_optimizer(theirs, arguments), ours)


def check_optimizer(
    config: Any, theirs: str, arguments: str, steps: int, precision: str, train_gpt: bool = True
) -> int:
    """Compares two optimizers and prints the report; returns the exit status.

    Args:
        config: of the GPT, with our optimizer.
        theirs: `FILE.py:Class` or `module:Class`.
        arguments: of its constructor.
        train_gpt: also trains the config's model with both, if they agree on random tensors.

    Raises:
        ValueError: their optimizer cannot be loaded or built.
    """
    sides.import_torch()
    from jaxtrain.crosscheck import torch_train
    from jaxtrain.crosscheck.tensor_check import compare_on_tensors
    from jaxtrain.crosscheck.their_optimizer import load_optimizer, settings_table

    cfg = sides.resolve_config(config, steps, precision)
    their = load_optimizer(theirs, arguments)
    print_now(settings_table(their, cfg.optim))
    # Theirs gets the tensors as one parameter group, so all of them decay in ours.
    plain = dataclasses.replace(
        cfg.optim,
        clip_norm=0.0,
        schedule="constant",
        warmup_steps=0,
        decay_groups=",".join(DECAY_GROUPS),
    )
    found = compare_on_tensors(plain, their, cfg.steps, cfg.model.dtype)
    print_now(f"\nrandom tensors, {cfg.steps} steps, constant rate, no clipping")
    print_now(explanation.explain(found))
    if found.divergence or not train_gpt:
        if train_gpt:
            print_now("\nThe GPT is not trained: a model would only hide where they differ.")
        return 1 if found.divergence else 0
    folder, start = Path(cfg.workdir), jax_train.build_start(cfg)
    print_now(
        f"\nGPT of {start.run.parameters:,} parameters, {cfg.steps} steps, schedule "
        f"{cfg.optim.schedule}, gradients clipped to {cfg.optim.clip_norm:g}"
    )
    paths = [folder / f"{name}.jsonl" for name in ("jaxtrain", their.name)]
    sides.record_side("jaxtrain", start, paths[0], keep_batches=True)
    batches = batches_of(read_trace(paths[0]))
    torch_train.record(cfg, cfg.steps, paths[1], start.weights, batches, their.build)
    return sides.report(compare_traces(*map(read_trace, paths)), folder / "optimizer.png")

"""Trains the two sides of a comparison, compares their traces and prints the report."""

import dataclasses
import functools
import importlib
import time
from pathlib import Path
from typing import Any

import jax

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.crosscheck import explanation, jax_train, llmc_state, loss_plot
from jaxtrain.crosscheck.comparison import Comparison, compare_bfloat16, compare_traces
from jaxtrain.crosscheck.jax_train import Start
from jaxtrain.crosscheck.tensor_names import style_of
from jaxtrain.crosscheck.trace import Trace, batches_of, read_trace
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.files import write_atomic
from jaxtrain.interop.hf import read_config
from jaxtrain.ops.precision import resolve_dtype

SIDES = ("jaxtrain", "pytorch")
print_now = functools.partial(print, flush=True)


def resolve_config(config: Any, steps: int, precision: str | None) -> TrainConfig:
    """Freezes a config with the flags' steps and precision; sets up JAX and the run's folder."""
    if steps:
        config.steps = steps
    if precision:
        config.model.dtype = precision
        if config.optim.ns_form != "torch":  # torch.optim.Muon's type does not follow the model's
            config.optim.ns_dtype = precision
    cfg = config_lib.freeze(config)
    if cfg.data.batch_schedule:
        cfg.data.fail("batch_schedule", "must be empty here: all steps must have the same size")
    start_runtime(cfg)
    cfg, _ = resolve_dtype(cfg, jax.devices()[0])
    Path(cfg.workdir).mkdir(parents=True, exist_ok=True)
    return cfg


def record_side(
    side: str,
    start: Start,
    path: str | Path,
    batches: Trace | None = None,
    style: str = "auto",
    keep_batches: bool = False,
    measure_rounding: bool = True,
) -> None:
    """Trains one side, writes its trace and prints how long that took.

    Args:
        batches: the trace whose batches to train on; None reads the config's data.
        style: of tensor_names.STYLES, or "auto": the style of `batches`, else "jaxtrain".
    """
    began, cfg = time.perf_counter(), start.run.cfg
    given = batches_of(batches) if batches else None
    if side == "jaxtrain":
        style = style_of(batches) if style == "auto" else style
        options = (style, given, keep_batches, measure_rounding, batches)
        jax_train.record(start, cfg.steps, path, *options)
    else:
        from jaxtrain.crosscheck import torch_data, torch_train

        if given is None:
            assert start.corpus is not None  # build_start has read it
            paths, data = [shard.path for shard in start.corpus.shards], cfg.data
            given = torch_data.shard_batches(paths, data.batch, data.seq_len, cfg.seed)
        torch_train.record(cfg, cfg.steps, path, start.weights, given)
    seconds = time.perf_counter() - began
    print_now(f"{side:10} {cfg.model.dtype}, {cfg.steps} steps in {seconds:.1f} s -> {path}")


def import_torch() -> None:
    """Raises ImportError, which names the extra, if torch is missing."""
    importlib.import_module("jaxtrain.crosscheck.torch_model")


def check_torch_side(cfg: TrainConfig, reads_data: bool = True) -> None:
    """Checks that the PyTorch side can train a config.

    Raises:
        ImportError: torch is missing.
        ValueError: torch.optim lacks the optimizer, or the PyTorch side cannot read the data.
    """
    import_torch()
    from jaxtrain.crosscheck.torch_train import check_optimizer

    check_optimizer(cfg.optim)
    if reads_data and (cfg.data.pack or cfg.data.document_mask):
        raise ValueError(
            "the PyTorch side cannot pack or mask documents; got data.pack or data.document_mask. "
            "Record the jaxtrain side with --keep_batches, then set --side=pytorch --batches=TRACE."
        )


def report(comparison: Comparison, png: str | Path) -> int:
    """Prints a comparison and plots its losses; returns the exit status."""
    print_now(explanation.steps_table(comparison))
    write_atomic(Path(png), loss_plot.plot_losses(comparison))
    print_now(f"Loss curves: {png}")
    print_now(explanation.explain(comparison))
    return 1 if comparison.divergence else 0


def report_bfloat16(truth: str | Path, first: str | Path, second: str | Path) -> int:
    """Prints the errors of two bfloat16 traces against a float32 trace; returns the exit status."""
    errors = compare_bfloat16(*map(read_trace, (truth, first, second)))
    text, passed = explanation.bfloat16_table(errors)
    print_now(text)
    return 0 if passed else 1


def run(config: Any, steps: int, precision: str | None, measure_rounding: bool = True) -> int:
    """Records both sides of a config and compares them; returns the exit status."""
    cfg = resolve_config(config, steps, precision)
    check_torch_side(cfg)
    folder, start = Path(cfg.workdir), jax_train.build_start(cfg)
    assert start.corpus is not None  # build_start has read it
    print_now(f"model      {start.run.parameters:,} parameters, {cfg.optim.name}, seed {cfg.seed}")
    print_now(f"data       {start.corpus.describe()}")
    for route in start.run.routes.values():
        print_now(f"route      {route}")
    paths = [folder / f"{side}_{cfg.model.dtype}.jsonl" for side in SIDES]
    for side, path in zip(SIDES, paths, strict=True):
        record_side(side, start, path, measure_rounding=measure_rounding)
    if cfg.model.dtype != "bfloat16":
        comparison = compare_traces(*map(read_trace, paths))
        return report(comparison, folder / f"compare_{cfg.model.dtype}.png")
    truth = folder / "pytorch_float32.jsonl"
    float32_cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dtype="float32"),
        optim=dataclasses.replace(cfg.optim, ns_dtype="float32"),
    )
    record_side("pytorch", start._replace(run=start.run._replace(cfg=float32_cfg)), truth)
    return report_bfloat16(truth, *paths)


def compare_llmc(weights: str | Path, state: str | Path, workdir: str | Path) -> int:
    """Compares our gradients with those of an llm.c debug state; returns the exit status."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    model = read_config(weights)
    llmc_state.write_trace(state, model, folder / "llmc.jsonl")
    theirs = read_trace(folder / "llmc.jsonl")
    tokens = next(batches_of(theirs))["tokens"]
    data = config_lib.DataConfig(batch=tokens.shape[0], seq_len=tokens.shape[1] - 1)
    # A debug state has gradients and no updates, so the optimizer is the one that compiles fastest.
    optim = config_lib.OptimConfig(name="adamw")
    config = config_lib.to_config_dict(
        TrainConfig(model=model, data=data, optim=optim, weights=str(weights), workdir=str(folder))
    )
    cfg = resolve_config(config, 1, "float32")
    start = jax_train.build_start(cfg, read_data=False)
    record_side("jaxtrain", start, folder / "jaxtrain.jsonl", theirs, "hf")
    comparison = compare_traces(read_trace(folder / "jaxtrain.jsonl"), theirs)
    return report(comparison, folder / "llmc.png")

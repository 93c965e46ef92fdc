"""Trains the jaxtrain side of a comparison on one device and writes its trace."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.crosscheck.batches import describe_batch, micro_batch_losses
from jaxtrain.crosscheck.names import check_like
from jaxtrain.crosscheck.rounding import RoundingMeter
from jaxtrain.crosscheck.tensor_names import (
    as_stored,
    build_naming,
    relative_to_stored,
    transpose_as,
)
from jaxtrain.crosscheck.trace import Batch, Trace, TraceWriter
from jaxtrain.crosscheck.traced_step import build_traced_step
from jaxtrain.data.corpus import Corpus, open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.training.run import Run, build_run
from jaxtrain.training.step import TrainState


class Start(NamedTuple):
    """The common starting point of both sides."""

    run: Run
    state: TrainState
    weights: dict[str, Any]  # the parameters of `state` as NumPy arrays
    corpus: Corpus | None  # None if the batches come from a trace


def build_start(cfg: TrainConfig, read_data: bool = True) -> Start:
    """Builds a run on one device, its first state and its data.

    Raises:
        ValueError: the config does not fit the data or this machine.
        InteropError: cfg.weights cannot be read.
    """
    run = build_run(cfg, jax.devices()[:1])
    corpus = None
    if read_data:
        corpus = open_corpus(cfg.data, "train", cfg.model.V, Path(cfg.workdir))
    state, _ = initial_state(run)
    return Start(run, state, jax.tree.map(np.asarray, state.params), corpus)


def record(
    start: Start,
    steps: int,
    path: str | Path,
    style: str = "jaxtrain",
    batches: Iterable[Batch] | None = None,
    keep_batches: bool = False,
    measure_rounding: bool = True,
    like: Trace | None = None,
) -> None:
    """Trains for `steps` steps and writes the trace; an existing file is replaced.

    Args:
        style: of the tensors' names, one of tensor_names.STYLES.
        batches: None reads the config's data.
        keep_batches: store the batches in the trace.
        measure_rounding: store each step's tolerances, too; takes about five times as long. Has no
            effect in bfloat16, whose traces are compared with a float32 trace.
        like: a trace whose initial parameters tell which matrices it stores transposed.

    Raises:
        ValueError: there are too few batches.
        TraceError: `like` names its parameters differently.
        InteropError: style is "hf" and the model belongs to no known family.
    """
    run, cfg = start.run, start.run.cfg
    name_tensors = build_naming(style, cfg.model, run.model.axes)
    stored = functools.partial(as_stored, style, cfg.model)
    if like is not None:
        name_tensors = transpose_as(like, name_tensors, stored(start.weights))
    sharding = batch_sharding(run.mesh)
    state, step = start.state, build_traced_step(run)
    no_noise = jax.tree.map(np.zeros_like, start.weights)
    is_measured = measure_rounding and cfg.model.dtype != "bfloat16"
    meter = RoundingMeter(run, step, state) if is_measured else None
    # In float64, as the difference of two float32 parameters would lose most of its digits.
    difference = lambda p, q: np.asarray(p, np.float64) - np.asarray(q, np.float64)
    with contextlib.ExitStack() as stack:
        if batches is None:
            assert start.corpus is not None  # build_start has read it
            batches = stack.enter_context(build_batches(cfg.data, start.corpus, run.mesh, cfg.seed))
        more = {"optim": dataclasses.asdict(cfg.optim)}
        writer = stack.enter_context(TraceWriter(path, "jaxtrain", cfg.model.dtype, more=more))
        first = {"step": 0, "parameter": writer.digests(name_tensors(stored(start.weights)))}
        writer.write(first)
        if like is not None:
            check_like(first, like)
        for read in islice(batches, steps):
            parts = cfg.accumulation
            rows = list(read.get("rows", [len(read["tokens"]) // parts] * parts))
            batch = {name: x for name, x in read.items() if name != "rows"}
            batch = {name: jax.device_put(np.asarray(x), sharding) for name, x in batch.items()}
            outputs = step(state, batch, run.rates(), no_noise)
            new, scalars, grads, activations = outputs
            updates = jax.tree.map(difference, new.params, state.params)
            line = {
                "step": int(new.step),
                **describe_batch(batch, rows),
                "loss": scalars["train/loss_nats"],
                "grad_norm": scalars["train/grad_norm"],
                "activations": writer.digests(activations.items()),
                "gradient": writer.digests(name_tensors(grads)),
                "update": writer.digests(name_tensors(updates)),
                "parameter": writer.digests(name_tensors(stored(new.params))),
            }
            if len(rows) > 1:
                line["losses"] = micro_batch_losses(activations["logits"], batch, rows)
            if meter is not None:
                before = jax.tree.map(np.asarray, state.params)
                found = meter.tolerances(before, outputs, batch, run.rates(), name_tensors)
                named = (dict(name_tensors(x)) for x in (new.params, stored(new.params)))
                found["parameter"] = relative_to_stored(found["parameter"], *named)
                line["tolerance"] = found
            if keep_batches:
                line |= {name: np.asarray(x).tolist() for name, x in batch.items()}
            writer.write(line)
            state = new
    if int(state.step) < steps:
        raise ValueError(f"there must be batches for {steps} steps; got {state.step}. Set --steps.")

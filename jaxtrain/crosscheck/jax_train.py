"""The JAX side of a trace: the training step's own gradients and updates, on one device."""

import contextlib
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxtrain.crosscheck.tensor_names import build_naming
from jaxtrain.crosscheck.trace import Writer, batch_hash
from jaxtrain.data.corpus import Corpus, open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.optim.schedule import build_schedule
from jaxtrain.training.run import Run, build_run
from jaxtrain.training.step import TrainState, build_advance


class Start(NamedTuple):
    """What both sides begin with."""

    run: Run
    state: TrainState
    weights: dict  # the parameters of that state, in NumPy
    corpus: Corpus | None  # None: batches are given


def start(cfg, read_data=True) -> Start:
    """A TrainConfig's run on one device, its first state and its data.

    Raises:
        ValueError: the config does not fit the data or this machine.
        InteropError: cfg.weights cannot be read.
    """
    run = build_run(cfg, jax.devices()[:1])
    corpus = None
    if read_data:
        corpus = open_corpus(cfg.data, "train", cfg.model.V, Path(cfg.workdir))
    state = initial_state(run)
    return Start(run, state, jax.tree.map(np.asarray, state.params), corpus)


def build_traced_step(run):
    """step(state, batch, rates) -> (new state, scalars, grads, activations), jitted."""
    cfg = run.cfg
    advance = build_advance(
        run.model, run.loss, run.optimizer, build_schedule(cfg.optim), None, cfg.accumulation
    )

    def activations(params, batch):
        inputs = batch["tokens"][:, :-1]
        docs = batch["docs"][:, :-1] if "docs" in batch else None
        layers, hidden_BTD = run.model.hidden_states(params, inputs, docs)
        named = {f"blocks.{i - 1}" if i else "embed": h_BTD for i, h_BTD in enumerate(layers)}
        return named | {"logits": run.model.logits(params, hidden_BTD)}

    def step(state, batch, rates):
        return *advance(state, batch, rates), activations(state.params, batch)

    return jax.jit(step)


def record(start, steps, path, style="jaxtrain", batches=None, keep_batches=False) -> None:
    """Trains `steps` steps and writes their trace.

    Args:
        path: of the trace; it is written anew.
        style: whose names the tensors have, one of names.STYLES.
        batches: {"tokens", "docs"} int32 [B,T+1] to train on instead of the corpus.
        keep_batches: the trace holds the batches.

    Raises:
        ValueError: batches end early.
        InteropError: style is hf and the model is not of a family.
    """
    run, cfg = start.run, start.run.cfg
    naming = build_naming(style, cfg.model, run.model.axes)
    reading, at = contextlib.nullcontext(batches), batch_sharding(run.mesh)
    if batches is None:
        reading = build_batches(cfg.data, start.corpus, run.mesh, cfg.seed)
    state, step = start.state, build_traced_step(run)
    with reading as batches, Writer(path, "jaxtrain", cfg.model.dtype) as writer:
        writer.write({"step": 0, "parameter": writer.digests(naming(start.weights))})
        for batch in islice(batches, steps):
            batch = {name: jax.device_put(np.asarray(x), at) for name, x in batch.items()}
            state = _write_step(writer, naming, step, state, batch, run.rates(), keep_batches)
    if int(state.step) < steps:
        raise ValueError(f"there must be batches for {steps} steps; got {state.step}. Set --steps.")


def _write_step(writer, naming, step, state, batch, rates, keep_batches):
    """One step of the run, one line of the trace; the state after it."""
    new, scalars, grads, activations = step(state, batch, rates)
    wide = lambda x: np.asarray(x, np.float64)
    moved = jax.tree.map(lambda p, q: wide(p) - wide(q), new.params, state.params)
    line = {
        "step": int(new.step),
        "batch": batch_hash(batch["tokens"]),
        "loss": scalars["train/loss_nats"],
        "grad_norm": scalars["train/grad_norm"],
        "activations": writer.digests(activations.items()),
        "gradient": writer.digests(naming(grads)),
        "update": writer.digests(naming(moved)),
        "parameter": writer.digests(naming(new.params)),
    }
    kept = {name: np.asarray(x).tolist() for name, x in batch.items()} if keep_batches else {}
    writer.write(line | kept)
    return new

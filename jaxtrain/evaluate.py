"""Held-out loss: nats per token and, where the text's bytes are known, bits per byte.

    jaxtrain evaluate --run=runs/quickstart
    jaxtrain evaluate --run=runs/quickstart --step=100
    jaxtrain evaluate --run=runs/quickstart --rows=4

Restores the newest good checkpoint of a run, or that of --step, and reads all of its validation
shard. --rows takes fewer sequences at once, where memory is short.
"""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
from absl import flags

from jaxtrain.commandline import Form
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import eval_batches
from jaxtrain.mesh import replicated
from jaxtrain.optim.accelerated import eval_params
from jaxtrain.report_text import eval_text
from jaxtrain.run import read_stored, restore_run, run_main
from jaxtrain.step import batch_loss, microbatches, target_weights

FEW_TOKENS = 1_000  # a token's nats vary by about 3, so the mean of 1,000 by about 0.1


def build_eval_step(run):
    """eval_step(params, batch) -> (sum of nats, targets), jitted; sums of one batch, float32.

    The batch is read in as many microbatches as training's is: what fits there fits here.
    """
    parts = run.cfg.accumulation

    def eval_step(params, batch):
        def one(batch):
            weights_BT = target_weights(batch)
            _, nats = batch_loss(run.model, run.loss, params, batch, weights_BT)
            return nats, weights_BT.sum()

        if parts == 1:
            return one(batch)
        split = jax.tree.map(lambda x: microbatches(x, parts), batch)
        return jax.tree.map(lambda sums: sums.sum(), jax.lax.map(one, split))

    return jax.jit(eval_step, out_shardings=replicated(run.mesh))


def build_byte_counter(corpus, mesh):
    """Returns count(batch) -> int32 [], the bytes of text that a batch's targets stand for.

    It is a program of its own, so that the evaluation step is the same with and without it. A
    token that starts a document stands for no byte. None where the tokenizer is unknown.
    """
    sizes = corpus.token_bytes()
    if sizes is None:
        return None
    whole = replicated(mesh)
    sizes_V = jax.device_put(sizes, whole)

    def count(sizes_V, batch):
        sizes_BT = sizes_V[batch["tokens"][:, 1:]]
        return jnp.where(target_weights(batch) > 0, sizes_BT, 0).sum()

    counted = jax.jit(count, out_shardings=whole)
    return lambda batch: counted(sizes_V, batch)


def rows_in_training(stored: dict) -> int:
    """Sequences that a device held at once, of a run's config.json."""
    cfg, mesh = stored["config"], stored["config"]["mesh"]
    if mesh["tensor"] > 0:
        split = stored["devices"] // mesh["tensor"]
    else:  # it was the rest of the devices
        split = mesh["replica"] * mesh["fsdp"]
    return cfg["data"]["batch"] // cfg["accumulation"] // split


def fit_parts(cfg, devices: int, rows: int):
    """The TrainConfig in the fewest microbatches of at most `rows` sequences a device.

    Raises:
        ValueError: rows is below 1.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}. Set --rows.")
    each = cfg.data.batch // devices  # restore_run has taken devices that divide it
    parts = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= rows)
    return dataclasses.replace(cfg, accumulation=parts)


def evaluate(
    eval_step, state, batches, count_bytes=None, max_tokens=0, asked=lambda: None
) -> dict | None:
    """{"eval/loss_nats", "eval/tokens", "eval/bits_per_byte"} of held-out batches.

    Bits per byte divide the nats of all targets by the bytes that the same targets stand for. The
    tokens that start documents add nats and no bytes.

    Args:
        state: a TrainState; its optimizer says which weights are evaluated.
        batches: from data.eval_batches; padding (docs of -1) does not count.
        count_bytes: from build_byte_counter; None leaves bits per byte out.
        max_tokens: stops after the batch that reaches it; 0 reads all.
        asked: called before each batch; the evaluation is given up, and None returned, once it
            returns a signal.

    Raises:
        ValueError: batches hold no target.
    """
    params = eval_params(state.opt_state, state.params)
    text_bytes = 0
    nats = tokens = 0.0  # float64 on the host: float32 would lose bits over a long shard
    for batch in batches:
        if asked():
            return None
        counted = count_bytes(batch) if count_bytes else 0
        batch_nats, batch_tokens = jax.device_get(eval_step(params, batch))
        nats, tokens = nats + float(batch_nats), tokens + float(batch_tokens)
        text_bytes += int(counted)
        if max_tokens and tokens >= max_tokens:
            break
    if not tokens:
        raise ValueError("evaluation needs a held-out token; got none. Set --data.shards.")
    metrics = {"eval/loss_nats": nats / tokens, "eval/tokens": int(tokens)}
    if text_bytes:
        metrics["eval/bits_per_byte"] = nats / math.log(2) / text_bytes
    return metrics


def warn_of_noise(metrics: dict) -> str:
    """Returns a warning where too few tokens were evaluated for a steady figure, else ""."""
    tokens = metrics["eval/tokens"]
    if tokens >= FEW_TOKENS:
        return ""
    return f"warning: only {tokens:,} held-out tokens were read, so the eval figures are noisy"


def main() -> None:
    from tqdm import tqdm

    args = flags.FLAGS
    run, state = restore_run(args.run, args.step or None)
    rows = args.rows or rows_in_training(read_stored(args.run))
    run = run._replace(cfg=fit_parts(run.cfg, run.mesh.size, rows))
    corpus = open_corpus(run.cfg.data, "val", run.cfg.model.V, run.cfg.workdir)
    print(corpus.describe())
    batches = eval_batches(run.cfg.data, corpus, run.mesh)
    progress = tqdm(batches, total=len(batches), unit="batch", disable=None)
    count_bytes = build_byte_counter(corpus, run.mesh)
    metrics = evaluate(build_eval_step(run), state, progress, count_bytes)
    if warning := warn_of_noise(metrics):
        print(warning, file=sys.stderr)
    print(f"step {int(state.step)}  {eval_text(metrics)}")
    print(json.dumps({"step": int(state.step)} | metrics))


def define_flags() -> None:
    flags.DEFINE_string("run", None, "folder of the run", required=True)
    flags.DEFINE_integer("step", 0, "checkpoint to evaluate; 0 is the newest good one")
    flags.DEFINE_integer("rows", 0, "sequences a device reads at once; 0 is training's")


def command(argv=None, prog="python -m jaxtrain.evaluate") -> None:
    run_main(main, (), Form("evaluate", __doc__, define_flags), argv, prog)


if __name__ == "__main__":
    command()

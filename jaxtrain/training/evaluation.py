"""Held-out loss: nats per token and, where the bytes of the text are known, bits per byte."""

import math

import jax
import jax.numpy as jnp

from jaxtrain.distributed.mesh import replicated
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.training.step import batch_loss, microbatches, target_weights

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


def evaluate(
    eval_step, state, batches, count_bytes=None, max_tokens=0, asked=lambda: None
) -> dict | None:
    """{"eval/loss_nats", "eval/tokens", "eval/bits_per_byte"} of held-out batches.

    Bits per byte divide the nats of all targets by the bytes that the same targets stand for. The
    tokens that start documents add nats and no bytes.

    Args:
        state: a TrainState; its optimizer says which weights are evaluated.
        batches: from data.build_eval_batches; padding (docs of -1) does not count.
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

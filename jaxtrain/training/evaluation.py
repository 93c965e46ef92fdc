"""Held-out loss: nats per token and, if the text's size in bytes is known, bits per byte."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.data.loader import build_eval_batches
from jaxtrain.data.sources import AnyCorpus, MixedCorpus, list_corpora
from jaxtrain.distributed.mesh import replicated
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.training.run import Run
from jaxtrain.training.step import TrainState, batch_loss, microbatches, target_weights

FEW_TOKENS = 1_000  # a token's nats vary by about 3, so the mean of 1,000 by about 0.1


def build_eval_step(run: Run) -> Callable:
    """Returns eval_step(params, batch) -> (sum of nats, targets), jitted; float32 [] each.

    It splits a batch into as many microbatches as training does, so that it needs no more memory.
    """
    parts = run.cfg.accumulation

    def eval_step(params, batch):
        def sum_of_microbatch(batch):
            weights_BT = target_weights(batch)
            _, nats = batch_loss(run.model, run.loss, params, batch, weights_BT)
            return nats, weights_BT.sum()

        if parts == 1:
            return sum_of_microbatch(batch)
        split = jax.tree.map(lambda x: microbatches(x, parts), batch)
        return jax.tree.map(lambda sums: sums.sum(), jax.lax.map(sum_of_microbatch, split))

    return jax.jit(eval_step, out_shardings=replicated(run.mesh))


def build_byte_counter(corpus: AnyCorpus, mesh: Mesh) -> Callable[[dict], jax.Array] | None:
    """Returns count(batch) -> int32 [], the bytes of text that a batch's targets stand for.

    It is a separate program, so that the evaluation step is the same with and without it. A token
    that starts a document counts as no bytes. Returns None if the tokenizer is unknown.
    """
    sizes = corpus.token_bytes()
    if sizes is None:
        return None
    sizes_V = jax.device_put(sizes, replicated(mesh))

    def count(sizes_V, batch):
        sizes_BT = sizes_V[batch["tokens"][:, 1:]]
        return jnp.where(target_weights(batch) > 0, sizes_BT, 0).sum()

    jitted = jax.jit(count, out_shardings=replicated(mesh))
    return lambda batch: jitted(sizes_V, batch)


def evaluate(
    eval_step: Callable,
    state: TrainState,
    batches: Iterable[dict],
    count_bytes: Callable[[dict], jax.Array] | None = None,
    max_tokens: int = 0,
    stop_signal: Callable = lambda: None,
) -> dict[str, float] | None:
    """Returns "eval/loss_nats", "eval/tokens" and "eval/bits_per_byte" of held-out batches.

    Bits per byte divide the nats of all targets by the bytes that the same targets stand for;
    tokens that start documents add nats and no bytes.

    Args:
        state: a TrainState; its optimizer chooses which weights are evaluated.
        batches: from data.build_eval_batches; padding (docs of -1) does not count.
        count_bytes: from build_byte_counter; None leaves bits per byte out.
        max_tokens: stops after the batch that reaches it; 0 reads everything.
        stop_signal: called before each batch; once it returns a signal, the result is None.

    Raises:
        ValueError: batches contain no target.
    """
    params = eval_params(state.opt_state, state.params)
    text_bytes = 0
    nats = tokens = 0.0  # float64 on the host: a float32 sum would lose bits over a long shard
    for batch in batches:
        if stop_signal():
            return None
        # Dispatched before the host waits for the step, so that the device computes both in turn.
        batch_bytes = count_bytes(batch) if count_bytes else 0
        batch_nats, batch_tokens = jax.device_get(eval_step(params, batch))
        nats, tokens = nats + float(batch_nats), tokens + float(batch_tokens)
        text_bytes += int(batch_bytes)
        if max_tokens and tokens >= max_tokens:
            break
    if not tokens:
        raise ValueError("evaluation needs a held-out token; got none. Set --data.shards.")
    metrics = {"eval/loss_nats": nats / tokens, "eval/tokens": int(tokens)}
    if text_bytes:
        metrics["eval/bits_per_byte"] = nats / math.log(2) / text_bytes
    return metrics


def evaluate_sources(
    run: Run,
    state: TrainState,
    corpus: AnyCorpus,
    eval_step: Callable,
    count_bytes: Callable[[dict], jax.Array] | None = None,
    max_tokens: int = 0,
    stop_signal: Callable = lambda: None,
    watch: Callable[[Iterable[dict]], Iterable[dict]] = lambda batches: batches,
) -> dict[str, float] | None:
    """Returns what evaluate does; for a mixture, also "eval/SOURCE_loss_nats" and the like.

    Each source of a mixture is evaluated on its own held-out text. The figures without a source's
    name are those of text in which the sources have the shares that they have in the whole run.

    Args:
        max_tokens: over all sources, each of which reads an equal part of them; 0 reads everything.
        watch: returns the batches of a source, and shows the progress.
    """
    found: dict[str, dict[str, float]] = {}
    corpora = list_corpora(corpus)
    for name, part in corpora.items():
        batches = watch(build_eval_batches(run.cfg.data, part, run.mesh))
        limit = -(-max_tokens // len(corpora))
        metrics = evaluate(eval_step, state, batches, count_bytes, limit, stop_signal)
        if metrics is None:
            return None
        found[name] = metrics
    return _mix(found, corpus.shares) if isinstance(corpus, MixedCorpus) else found[""]


def _mix(found: dict[str, dict[str, float]], shares: dict[str, float]) -> dict[str, float]:
    """Returns the metrics of a mixture from those of its sources."""
    loss, bits = "eval/loss_nats", "eval/bits_per_byte"
    mixed = {
        loss: sum(shares[name] * metrics[loss] for name, metrics in found.items()),
        "eval/tokens": sum(metrics["eval/tokens"] for metrics in found.values()),
    }
    if all(bits in metrics for metrics in found.values()):
        # A source's nats/token over its bits/byte are its bytes per token, up to a constant.
        size = lambda metrics: metrics[loss] / metrics[bits] if metrics[bits] else 0.0
        text_bytes = sum(shares[name] * size(metrics) for name, metrics in found.items())
        mixed[bits] = mixed[loss] / text_bytes if text_bytes else 0.0
    for name, metrics in found.items():
        own = {key: metrics[key] for key in (loss, bits) if key in metrics}
        mixed |= {key.replace("/", f"/{name}_"): value for key, value in own.items()}
    return mixed


def token_limit(cfg: TrainConfig) -> int:
    """Returns how many held-out tokens an evaluation reads at most; 0 is all.

    They are at most as many as the run trains on: one step of a large model should not be followed
    by hours of evaluation.
    """
    return min(cfg.eval_tokens, cfg.steps * cfg.data.batch * cfg.data.seq_len)


def warn_of_noise(metrics: dict[str, float]) -> str:
    """Returns a warning if too few tokens were evaluated for a steady figure, else ""."""
    tokens = metrics["eval/tokens"]
    if tokens >= FEW_TOKENS:
        return ""
    return f"warning: only {tokens:,} held-out tokens were read, so the eval figures are noisy"

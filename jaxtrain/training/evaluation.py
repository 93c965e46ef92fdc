"""Held-out loss: nats per token and, if the text's size in bytes is known, bits per byte.

An Evaluator adds the tasks and further held-out texts of eval.tasks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.data.corpus import Corpus
from jaxtrain.data.loader import EvalBatches, build_eval_batches
from jaxtrain.data.sources import AnyCorpus, MixedCorpus, list_corpora
from jaxtrain.data.tasks.open_tasks import Task, fingerprint_tasks
from jaxtrain.distributed.mesh import replicated
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.training.batch_arrays import microbatches, target_weights
from jaxtrain.training.run import Run
from jaxtrain.training.scoring import Scorer
from jaxtrain.training.step import TrainState, batch_loss
from jaxtrain.training.tasks import TaskScores

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


def build_byte_counter(corpus: Corpus, mesh: Mesh) -> Callable[[dict], jax.Array] | None:
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


class Evaluator:
    """Evaluates a run's weights on held-out text and on tasks, with programs compiled once.

    Args:
        run: from build_run.
        held_out: the run's own held-out text, or that of each source of its mixture.
        tasks: from open_tasks.

    Raises:
        ValueError: a held-out text is empty, or a document mask needs boundaries that it lacks; a
            task has the name of a source.
    """

    def __init__(self, run: Run, held_out: AnyCorpus, tasks: Sequence[Task] = ()):
        self.held_out, self._run, self._tasks = held_out, run, tasks
        self._step = build_eval_step(run)
        self._own = list_corpora(held_out)
        self._further = {task.name: task.corpus for task in tasks if task.corpus is not None}
        if both := sorted(self._own.keys() & {task.name for task in tasks}):
            raise ValueError(
                f"eval.tasks must not have the names of data.mixture's sources; got "
                f"{', '.join(both)} in both. Rename one of them."
            )
        texts = self._own | self._further
        build = lambda corpus: build_eval_batches(run.cfg.data, corpus, run.mesh)
        self._batches = {name: build(corpus) for name, corpus in texts.items()}
        self._texts = texts
        self._counters: dict[str, Callable | None] = {}
        has_examples = any(task.examples for task in tasks)
        self._scores = TaskScores(Scorer(run), tasks) if has_examples else None

    def describe(self) -> Iterator[str]:
        """Yields a line about each task."""
        yield from (task.describe(self._run.cfg.data.seq_len) for task in self._tasks)

    def fingerprint(self) -> str:
        """Returns the names and hashes of the tasks, which must be equal on all processes."""
        return fingerprint_tasks(self._tasks)

    def evaluate(
        self,
        state: TrainState,
        stop_signal: Callable = lambda: None,
        max_tokens: int = 0,
        watch: Callable[[EvalBatches], Iterable[dict]] = lambda batches: batches,
    ) -> dict[str, float] | None:
        """Returns the metrics of `evaluate` for the held-out text, and those of all tasks.

        Each source of a mixture is evaluated on its own held-out text: eval/SOURCE_loss_nats. The
        figures without a name are those of text in which the sources have their shares of the run.

        Args:
            state: a TrainState; its optimizer chooses which weights are evaluated.
            stop_signal: called before each batch; once it returns a signal, the result is None.
            max_tokens: limit of each held-out text, which the sources of a mixture share in equal
                parts; 0 reads everything.
            watch: returns the batches of the run's own text, and shows the progress.
        """
        texts: dict[str, dict[str, float]] = {}
        for name in self._texts:
            is_own = name in self._own
            batches = watch(self._batches[name]) if is_own else self._batches[name]
            limit = -(-max_tokens // len(self._own)) if is_own else max_tokens
            found = self._evaluate_text(name, batches, state, limit, stop_signal)
            if found is None:
                return None
            texts[name] = found
        if isinstance(self.held_out, MixedCorpus):
            own = {name: texts[name] for name in self._own}
            metrics = _mix(own, self.held_out.shares)
        else:
            metrics = texts[""]
        for name in self._further:
            metrics |= _with_name(name, texts[name])
        if self._scores is None:
            return metrics
        params = eval_params(state.opt_state, state.params)
        found = self._scores.evaluate(params, stop_signal)
        return None if found is None else metrics | found

    def _evaluate_text(
        self,
        name: str,
        batches: Iterable[dict],
        state: TrainState,
        max_tokens: int,
        stop_signal: Callable,
    ) -> dict[str, float] | None:
        if name not in self._counters:
            self._counters[name] = build_byte_counter(self._texts[name], self._run.mesh)
        return evaluate(self._step, state, batches, self._counters[name], max_tokens, stop_signal)


def _with_name(name: str, metrics: dict[str, float]) -> dict[str, float]:
    return {key.replace("eval/", f"eval/{name}_"): value for key, value in metrics.items()}


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
        mixed |= _with_name(name, metrics)
    return mixed


def token_limit(cfg: TrainConfig) -> int:
    """Returns how many held-out tokens an evaluation reads at most; 0 is all.

    They are at most as many as the run trains on: one step of a large model should not be followed
    by hours of evaluation.
    """
    return min(cfg.eval_tokens, cfg.data.tokens_before(cfg.steps))


def warn_of_noise(metrics: dict[str, float]) -> str:
    """Returns a warning if too few tokens were evaluated for a steady figure, else ""."""
    tokens = metrics["eval/tokens"]
    if tokens >= FEW_TOKENS:
        return ""
    return f"warning: only {tokens:,} held-out tokens were read, so the eval figures are noisy"

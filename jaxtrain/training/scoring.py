"""Scores continuations: the nats of their tokens, and whether each token is the likeliest one.

Sequences are padded to one of a few lengths and scored in batches of a fixed shape, so that each
length has one program, which is compiled at its first use. A batch of a shorter length has more
rows, hence as many tokens as a microbatch of training.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.data.batch_placer import BatchPlacer
from jaxtrain.data.tasks.tokens import Piece
from jaxtrain.distributed.mesh import replicated
from jaxtrain.model.dense import wide_dtype
from jaxtrain.model.loss import chunk_steps, split_time
from jaxtrain.training.run import Run, build_routed_model

SHORTEST = 64  # tokens; a shorter program would take about as long, and as long to compile


class Scorer:
    """Scores pieces on a run's mesh. Each device scores other rows of a batch.

    Args:
        run: from build_run; its config gives the longest sequence and the rows of a batch.

    Attributes:
        context_length: tokens that a piece has at most, less the one that is only predicted.
    """

    def __init__(self, run: Run):
        data = run.cfg.data
        self._run, self.context_length = run, data.seq_len
        rows, length = data.batch // run.cfg.accumulation, data.seq_len
        self._rows = {length: rows}  # length -> rows of a batch, longest first
        while length // 2 >= SHORTEST:
            length, rows = length // 2, 2 * rows
            self._rows[length] = rows
        self._programs: dict[int, Callable] = {}

    def score(
        self, params, pieces: Sequence[Piece], stop_signal: Callable = lambda: None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the nats of each piece's scored tokens and whether all are the likeliest ones.

        Args:
            params: weights, with the shardings of the run's state.
            stop_signal: called before each batch; once it returns a signal, the result is None.

        Returns:
            float64 [pieces], bool [pieces]; the same on every process.
        """
        nats, greedy = np.zeros(len(pieces)), np.zeros(len(pieces), bool)
        for length, numbers in self._batches(pieces):
            if stop_signal():
                return None
            batch = self._fill(length, [pieces[i] for i in numbers])
            row_nats, row_greedy = jax.device_get(self._program(length)(params, batch))
            nats[numbers] = row_nats[: len(numbers)]
            greedy[numbers] = row_greedy[: len(numbers)]
        return nats, greedy

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the length of each batch and the numbers of its pieces, in order."""
        read = np.array([len(piece.tokens) - 1 for piece in pieces])
        assert not len(read) or read.max() <= self.context_length, "cut_pieces cuts them"
        shortest_fitting = np.array([min(n for n in self._rows if n >= tokens) for tokens in read])
        for length, rows in self._rows.items():
            numbers = np.flatnonzero(shortest_fitting == length)
            for start in range(0, len(numbers), rows):
                yield length, numbers[start : start + rows]

    def _fill(self, length: int, pieces: Sequence[Piece]) -> dict[str, jax.Array]:
        """Returns {"tokens": int32 [B,T+1], "weights": float32 [B,T]}, padded on the right.

        Attention is causal, so what follows a token does not change its score.
        """
        placer = BatchPlacer(self._rows[length], self._run.mesh)
        tokens = np.zeros((self._rows[length], length + 1), np.int32)
        weights = np.zeros((self._rows[length], length), np.float32)
        for row, piece in enumerate(pieces):
            end = len(piece.tokens)
            tokens[row, :end] = piece.tokens
            weights[row, end - 1 - piece.scored : end - 1] = 1
        return placer.place({"tokens": tokens[placer.places], "weights": weights[placer.places]})

    def _program(self, length: int) -> Callable:
        if length not in self._programs:
            self._programs[length] = build_score(self._run, self._rows[length], length)
        return self._programs[length]


def build_score(run: Run, rows: int, length: int) -> Callable:
    """Returns score(params, batch) -> (nats float32 [B], greedy bool [B]), jitted.

    Args:
        rows: B, all devices together.
        length: T. Kernels are chosen for these shapes; one that does not fit them is replaced.
    """
    cfg, mesh = run.cfg, run.mesh
    cfg = dataclasses.replace(
        cfg,
        accumulation=1,
        strict=False,
        model=dataclasses.replace(cfg.model, attention="auto", remat=run.remat),
        kernels=dataclasses.replace(cfg.kernels, strict=False),
        # A sequence is one document, so no mask is needed.
        data=dataclasses.replace(
            cfg.data, batch=rows, batch_schedule="", seq_len=length, pack=False, document_mask=False
        ),
    )
    _, model = build_routed_model(cfg, mesh)
    wide = wide_dtype(jnp.dtype(cfg.model.dtype))
    own_rows = rows // mesh.shape["replica"] // mesh.shape["fsdp"]
    steps = chunk_steps(own_rows, length, cfg.model.V, cfg.loss.chunk_bytes)

    def score(params, batch):
        h_BTD = model.apply(params, batch["tokens"][:, :-1])

        def score_chunk(sums, chunk):
            h, targets, weights = chunk
            logits = model.logits(params, h).astype(wide)
            is_target = jnp.arange(cfg.model.V) == targets[..., None]
            target = jnp.where(is_target, logits, 0).sum(-1)
            nll = jax.nn.logsumexp(logits, -1) - target
            missed = weights * (logits.argmax(-1) != targets)
            return (sums[0] + (weights * nll).sum(1), sums[1] + missed.sum(1)), None

        parts = h_BTD, batch["tokens"][:, 1:], batch["weights"].astype(wide)
        zero_B = jnp.zeros(rows, wide)
        sums, _ = jax.lax.scan(
            score_chunk, (zero_B, zero_B), tuple(split_time(x, steps) for x in parts)
        )
        return sums[0], sums[1] == 0

    return jax.jit(score, out_shardings=replicated(mesh))

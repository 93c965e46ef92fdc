"""Batches on the mesh: batch n is a pure function of (corpus fingerprint, seed, n).

Rows are windows of the token stream, or packed documents; the row that batch n holds at place b
is row n * B + b of an endless sequence of epochs, each a shuffle of all rows. A process reads only
the rows that its devices hold. Grain reads ahead in a thread; no state lives there but n.
"""

import sys
import time

import grain
import jax
import numpy as np

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import Corpus, check_eot
from jaxtrain.data.packing import pack
from jaxtrain.data.shuffle import permute
from jaxtrain.distributed.mesh import batch_sharding

BLOCK = 4096  # indices shuffled at once: 40 us each at 8 a call, 0.3 us in a block
STATE_FLAGS = {
    "fingerprint": "data.shards or data.text",
    "seed": "seed",
    "batch": "data.batch",
    "seq_len": "data.seq_len",
    "pack": "data.pack",
    "eot": "data.eot",
}


class WindowRows:
    """Row r: the T+1 tokens from r * T of the corpus, counted within shards."""

    def __init__(self, corpus: Corpus, T: int, tail: bool = False):
        """tail: the last tokens of a shard, fewer than T+1, are a row too (padded)."""
        self._corpus, self._T = corpus, T
        windows = corpus.windows_by_shard(T)
        if tail:
            windows = windows + np.array([(s.tokens - 1) % T > 0 for s in corpus.shards])
        self._ends = np.cumsum(windows)
        self._firsts = (self._ends - windows).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: np.ndarray, with_docs: bool = True) -> dict[str, np.ndarray]:
        """[rows] -> "tokens" and "docs", int32 [rows, T+1]; docs count the eots inside the row.

        Padding, which only the tail has, is -1 in docs.
        """
        T = self._T
        tokens = np.zeros((len(rows), T + 1), np.int32)
        lengths = np.full((len(rows), 1), T + 1)
        shards = np.searchsorted(self._ends, rows, side="right")
        for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            start = (row - self._firsts[shard]) * T
            window = self._corpus.read(shard, start, start + T + 1)
            tokens[i, : len(window)] = window
            lengths[i] = len(window)
        if not with_docs:
            return {"tokens": tokens}
        # A row's first document is 0, whether it starts there or before; eot -1 is no token.
        starts = tokens[:, 1:] == self._corpus.eot
        docs = np.zeros_like(tokens)
        np.cumsum(starts, axis=1, out=docs[:, 1:])
        docs[np.arange(T + 1) >= lengths] = -1
        return {"tokens": tokens, "docs": docs}


class PackedRows:
    """Row r: documents, or parts of those longer than a row, best-fit into T+1 tokens."""

    def __init__(self, corpus: Corpus, T: int):
        self._corpus, self._T = corpus, T
        self._packing = pack(corpus.documents(), T + 1)

    def __len__(self) -> int:
        return self._packing.rows

    def read(self, rows: np.ndarray, with_docs: bool = True) -> dict[str, np.ndarray]:
        """[rows] -> "tokens" and "docs", int32 [rows, T+1]; docs count the pieces of the row.

        Padding is -1 in docs and eot in tokens, so docs are always there.
        """
        assert with_docs, "without docs, padding would be trained on"
        tokens = np.full((len(rows), self._T + 1), self._corpus.eot, np.int32)
        docs = np.full((len(rows), self._T + 1), -1, np.int32)
        shard, start, length, first = self._packing
        for i, row in enumerate(rows.tolist()):
            at = 0
            for doc, piece in enumerate(range(first[row], first[row + 1])):
                begin, size = int(start[piece]), int(length[piece])
                tokens[i, at : at + size] = self._corpus.read(
                    int(shard[piece]), begin, begin + size
                )
                docs[i, at : at + size] = doc
                at += size
        return {"tokens": tokens, "docs": docs}


class BatchSource:
    """Grain's source: item n is this process's part of batch n, {"tokens", "docs"} in NumPy."""

    def __init__(self, rows, batch: int, seed: int, places: np.ndarray, with_docs: bool):
        self._rows, self._batch, self._seed = rows, batch, seed
        self._places = places  # of the batch that this process reads, ascending
        self._with_docs = with_docs
        self._block = (-1, None)

    def __len__(self) -> int:
        return sys.maxsize // self._batch  # steps have no end

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        positions = step * self._batch + self._places
        return self._rows.read(self._shuffled(positions), self._with_docs)

    def _shuffled(self, positions):
        """Rows at positions of the endless sequence of epochs. [N] int64 -> [N] int64"""
        out = np.empty_like(positions)
        blocks = positions // BLOCK
        for number in np.unique(blocks):
            known, block = self._block  # one tuple: several threads may replace it
            if known != number:
                block = self._shuffle(number * BLOCK + np.arange(BLOCK))
                self._block = (number, block)
            here = blocks == number
            out[here] = block[positions[here] - number * BLOCK]
        return out

    def _shuffle(self, positions):
        n = len(self._rows)
        epochs, indices = np.divmod(positions, n)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(indices[here], n, self._seed, int(epoch))
        return out


class Placer:
    """NumPy rows of this process -> global arrays [B,T+1], laid out by batch_sharding(mesh)."""

    def __init__(self, batch: int, T: int, mesh):
        self._shape = (batch, T + 1)
        self._sharding = batch_sharding(mesh)
        indices = self._sharding.addressable_devices_indices_map(self._shape).values()
        ranges = [index[0].indices(batch)[:2] for index in indices]
        self.places = np.unique(np.concatenate([np.arange(*span) for span in ranges]))

    def place(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        with jax.transfer_guard("allow"):  # the one copy to the devices that a step means to make
            return {name: self._place(array) for name, array in rows.items()}

    def _place(self, array):
        def part(index):
            start, stop = index[0].indices(self._shape[0])[:2]
            first = int(np.searchsorted(self.places, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback(self._shape, self._sharding, part)


class Batches:
    """Endless iterator of {"tokens": int32[B,T+1], and "docs" with pack or document_mask}."""

    def __init__(self, cfg: DataConfig, corpus: Corpus, mesh, seed: int):
        self._placer = Placer(cfg.batch, cfg.seq_len, mesh)
        rows = (PackedRows if cfg.pack else WindowRows)(corpus, cfg.seq_len)
        if len(rows) < cfg.batch:
            raise ValueError(
                f"the {corpus.split} corpus must hold at least one batch of data.batch={cfg.batch} "
                f"sequences of data.seq_len={cfg.seq_len} + 1 tokens; got {len(rows)} sequences "
                f"from {corpus.tokens} tokens. Set --data.batch or --data.seq_len."
            )
        with_docs = cfg.pack or cfg.document_mask
        source = BatchSource(rows, cfg.batch, seed, self._placer.places, with_docs)
        threads = min(cfg.prefetch, 16)  # more hide no more of a slow disk
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=cfg.prefetch)
        self._reader = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        self._identity = {
            "fingerprint": corpus.fingerprint,
            "seed": seed,
            "batch": cfg.batch,
            "seq_len": cfg.seq_len,
            "pack": cfg.pack,
            "eot": corpus.eot if with_docs else None,
        }
        self.step = 0  # batches handed out; the next is batch `step`
        self.rows = len(rows)  # of an epoch
        self._wait_s = 0.0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        rows = next(self._reader)
        self._wait_s += time.perf_counter() - start
        self.step += 1
        return self._placer.place(rows)

    def wait_s(self) -> float:
        """Seconds that next() has waited for rows since the last call of wait_s."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited

    def state(self) -> dict:
        """The position, and what it is a position in; JSON-able."""
        return self._identity | {"step": self.step}

    def restore(self, state: dict) -> None:
        """Continues at a state().

        Raises:
            ValueError: the state is of other data, seed or shape.
        """
        changed = [
            f"{name}={state.get(name)!r}, now {value!r} (--{STATE_FLAGS[name]})"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"a run must resume on the data it began with; got {'; '.join(changed)}. Set "
                "the flags back, or start a new --workdir."
            )
        self._reader.set_state({"next_index": state["step"]})
        self.step = state["step"]

    def close(self) -> None:
        """Ends the reading thread; the position stays readable."""
        self._reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class EvalBatches:
    """Every window of a corpus once, in order: {"tokens", "docs"} int32[B,T+1]; may be repeated.

    The last tokens of a shard, too few for a whole window, are a row too: every token but each
    shard's first is predicted once. Padding has docs = -1.
    """

    def __init__(self, cfg: DataConfig, corpus: Corpus, mesh):
        if cfg.document_mask:
            check_eot(corpus)
        self._batch = cfg.batch
        self._rows = WindowRows(corpus, cfg.seq_len, tail=True)
        if not len(self._rows):
            raise ValueError(
                f"the {corpus.split} corpus must hold at least 2 tokens; got {corpus.tokens}. "
                "Set --data.val_fraction or --data.shards."
            )
        self._placer = Placer(cfg.batch, cfg.seq_len, mesh)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch)

    def __iter__(self):
        for step in range(len(self)):
            rows = step * self._batch + self._placer.places
            inside = rows < len(self._rows)
            batch = self._rows.read(np.minimum(rows, len(self._rows) - 1))
            batch["tokens"][~inside], batch["docs"][~inside] = 0, -1
            yield self._placer.place(batch)


def build_batches(cfg: DataConfig, corpus: Corpus, mesh, seed: int) -> Batches:
    """Training batches from step 0, shuffled by `seed`.

    Raises:
        ValueError: the corpus is shorter than a batch, or documents are asked for and their eot
            is unknown.
    """
    if cfg.pack or cfg.document_mask:
        check_eot(corpus)
    return Batches(cfg, corpus, mesh, seed)


def build_eval_batches(cfg: DataConfig, corpus: Corpus, mesh) -> EvalBatches:
    """The corpus once, in order, in batches of data.batch rows."""
    return EvalBatches(cfg, corpus, mesh)

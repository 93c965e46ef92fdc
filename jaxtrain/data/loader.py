"""Makes the batches: reads sequences in shuffled order and lays them out on the device mesh.

Batch n is a pure function of (corpus fingerprint, seed, n), whatever the number of processes. All
epochs form one endless list of sequences, each epoch in its own shuffled order; batch n holds the
entries n * B to (n + 1) * B - 1 or, with data.batch_schedule, those that follow the entries of all
batches before it. Of S sites, site k takes the entries k, k + S, k + 2S, ... of that list instead:
no two sites read the same entry, whatever their batch sizes, and the batches n of sites with equal
ones are together batch n of one run with S * B sequences. With data.mixture, the list is that of
`mixture.py`. A process reads only the sequences that its devices hold. Grain reads ahead in
threads; the only state is n, so a checkpoint stores n and the identity of the data.
"""

import operator
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data import batch_state
from jaxtrain.data.batch_placer import BatchPlacer
from jaxtrain.data.batch_source import BatchSource, Origin, epoch_order
from jaxtrain.data.corpus import Corpus, check_boundaries
from jaxtrain.data.mixture import MixedOrder
from jaxtrain.data.mixture_state import describe_changes, stored_mixture
from jaxtrain.data.sequences import JoinedSequences, PackedSequences, WindowSequences
from jaxtrain.data.source_counts import SourceCounts
from jaxtrain.data.sources import AnyCorpus, MixedCorpus, list_corpora

STATE_FLAGS = {
    "fingerprint": "data.shards, data.text or data.mixture",
    "seed": "seed",
    "seq_len": "data.seq_len",
    "pack": "data.pack",
    "eot": "data.eot",
    "boundaries": "data.shards",
    "site": "site",
}


class Batches:
    """Endless iterator of {"tokens": int32 [B,T+1]}.

    With pack or document_mask, a batch also has "docs", int32 [B,T+1], and "weights", float32
    [B,T]; `sequences.py` describes them. With data.mixture it has "source", int32 [B].
    """

    def __init__(
        self,
        cfg: DataConfig,
        corpus: AnyCorpus,
        mesh: Mesh,
        seed: int,
        site: tuple[int, int] = (0, 1),
    ):
        self._sizes = cfg.sizes
        used = sorted({phase.sequences for phase in self._sizes.phases})
        self._placers = {size: BatchPlacer(size, mesh) for size in used}
        build = PackedSequences if cfg.pack else WindowSequences
        with_docs = cfg.pack or cfg.document_mask
        parts = [build(part, cfg.seq_len) for part in list_corpora(corpus).values()]
        self.sources: SourceCounts | None = None
        self._identity: dict[str, Any] = {
            "seed": seed,
            "seq_len": cfg.seq_len,
            "pack": cfg.pack,
            "site": f"{site[0]} of {site[1]}" if site[1] > 1 else None,
        }
        if isinstance(corpus, MixedCorpus):
            sizes = [len(part) for part in parts]
            _check_sizes(cfg, corpus, sizes)
            self.sources = SourceCounts(corpus, sizes, self.places_before, cfg.seq_len, site[1])
            self.sources.check_limits()
            sequences, order = JoinedSequences(parts), MixedOrder(corpus.mixture, sizes, seed, site)
            self._identity["mixture"] = stored_mixture(corpus, with_docs)
        else:
            [sequences] = parts
            _check_batch(cfg, corpus, len(sequences))
            order = epoch_order(len(sequences), seed, site)
            self._identity |= {
                "fingerprint": corpus.fingerprint,
                "eot": corpus.eot if with_docs else None,
                "boundaries": corpus.boundaries_fingerprint() if with_docs else None,
            }
        places = {size: placer.places for size, placer in self._placers.items()}
        self._source = BatchSource(sequences, self._sizes, order, places, with_docs)
        threads = min(cfg.prefetch, 16)  # more threads do not hide more of a slow disk's latency
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=cfg.prefetch)
        self._reader = iter(grain.MapDataset.source(self._source).to_iter_dataset(options))
        self.step = 0  # batches returned so far, hence the number of the next one
        self.sequences_per_epoch = len(sequences)
        self._wait_s = 0.0

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch = next(self._reader)
        self._wait_s += time.perf_counter() - start
        self.step += 1
        return self._placers[self._source.size(self.step - 1)].place(batch)

    def wait_s(self) -> float:
        """Returns the seconds that next() waited for data since the last call of wait_s."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited

    def state(self) -> dict:
        """Returns the loader's state for a checkpoint: the step and the dataset's identity."""
        sizes = batch_state.store_sizes(self._sizes, self._source.origin)
        return self._identity | {"batch": sizes, "step": self.step}

    def places_before(self, batches: int) -> int:
        """Returns the place of the endless list at which batch number `batches` begins."""
        return self._source.places_before(batches)

    def restore(self, state: dict) -> None:
        """Continues from what state() returned, in this process or an earlier one.

        Raises:
            ValueError: the state belongs to other data or another seed, or the batches that were
                read have other sizes now.
        """
        changed = self.describe_other_data(state) + self._describe_other_sizes(state)
        if changed:
            raise ValueError(
                f"a run must resume on the data it began with; got {'; '.join(changed)}. Set "
                "the flags back, or start a new --workdir."
            )
        _, self._source.origin = batch_state.read_sizes(state["batch"])
        self._go_to(state["step"])

    def describe_other_data(self, state: dict) -> list[str]:
        """Returns sentences on how the data that a state has read differ from these; [] if not."""
        changed = [
            f"{name}={state.get(name)!r}, now {value!r} (--{STATE_FLAGS[name]})"
            for name, value in self._identity.items()
            if name != "mixture" and state.get(name) != value
        ]
        if changed:
            return changed
        mixtures = state.get("mixture"), self._identity.get("mixture")
        places = batch_state.stored_places(state["batch"], state["step"])
        return describe_changes(*mixtures, places, self._sizes.step_at)

    def has_sizes_of(self, state: dict) -> bool:
        """Returns whether the batches that a state has read have the same sizes here."""
        return not self._describe_other_sizes(state)

    def _describe_other_sizes(self, state: dict) -> list[str]:
        return batch_state.describe_changes(state["batch"], self._sizes, state["step"])

    def check_step(self, step: int) -> None:
        """Raises ValueError unless the next batch is that of the step with this number, from 0."""
        if not self._sizes.is_constant and self._source.origin.step + self.step != step:
            raise ValueError(
                f"data.batch_schedule must be set when a branch with other data is created; got it "
                f"at step {step}, which is step {self.step} of its data. Set "
                "--data.batch_schedule='', or create another branch."
            )

    def begin_at(self, step: int, place: int) -> None:
        """Places a branch: its step `step`, counted from 0, reads from `place` of the list on.

        If all batches have one size, it reads from the first batch on that begins there or later.
        """
        if self._sizes.is_constant:
            self._source.origin = Origin()
            self._go_to(-(-place // self._sizes.largest))
        else:
            self._source.origin = Origin(step, place)
            self._go_to(0)

    def _go_to(self, batch: int) -> None:
        self._reader.set_state({"next_index": batch})
        self.step = batch

    def source_metrics(self, batches: int) -> dict[str, int | float]:
        """Returns what the first `batches` batches read of each source; {} without a mixture."""
        return self.sources.metrics(batches) if self.sources else {}

    def close(self) -> None:
        """Ends the reading threads; state() can still be called."""
        self._reader.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class EvalBatches:
    """All windows of a corpus in order, {"tokens", "docs"} int32[B,T+1]; can be iterated again.

    Tokens at the end of a shard that do not fill a window are padded, so that every token but the
    first of each shard is predicted exactly once. Padding has docs = -1. Targets have no weights:
    every token counts, so that figures of runs with and without data.pack can be compared.
    """

    def __init__(self, cfg: DataConfig, corpus: Corpus, mesh: Mesh):
        if cfg.document_mask:
            check_boundaries(corpus)
        self._batch = cfg.batch
        self._sequences = WindowSequences(corpus, cfg.seq_len, partial=True)
        if not len(self._sequences):
            raise ValueError(
                f"the {corpus.split} corpus must contain at least 2 tokens; got {corpus.tokens}. "
                "Set --data.val_fraction or --data.shards."
            )
        self._placer = BatchPlacer(cfg.batch, mesh)

    def __len__(self) -> int:
        return -(-len(self._sequences) // self._batch)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        last = len(self._sequences) - 1
        for step in range(len(self)):
            numbers = step * self._batch + self._placer.places
            batch = self._sequences.read(np.minimum(numbers, last))
            del batch["weights"]
            past_end = numbers > last  # the last batch is padded to the shape of the others
            batch["tokens"][past_end], batch["docs"][past_end] = 0, -1
            yield self._placer.place(batch)


def _check_batch(cfg: DataConfig, corpus: Corpus, sequences: int) -> None:
    if sequences < cfg.sizes.largest:
        flag = "data.batch_schedule" if cfg.batch_schedule else "data.batch"
        raise ValueError(
            f"the {corpus.split} corpus must contain at least one batch of "
            f"{flag}={cfg.sizes.largest} sequences of data.seq_len={cfg.seq_len} + 1 tokens; got "
            f"{sequences} sequences from {corpus.tokens} tokens. Set --{flag} or --data.seq_len."
        )


def _check_sizes(cfg: DataConfig, corpus: MixedCorpus, sizes: list[int]) -> None:
    for (name, part), size in zip(corpus.sources.items(), sizes, strict=True):
        if not size:
            raise ValueError(
                f"each source of data.mixture must contain a sequence of data.seq_len="
                f"{cfg.seq_len} + 1 tokens; got {part.tokens} tokens in {name}. Set "
                "--data.mixture or --data.seq_len."
            )


def build_batches(
    cfg: DataConfig,
    corpus: AnyCorpus,
    mesh: Mesh,
    seed: int,
    site: tuple[int, int] = (0, 1),
) -> Batches:
    """Returns the training batches from step 0 on, shuffled by `seed`.

    Args:
        mesh: from build_mesh, or one with the same axes.
        seed: an integer, not a key of jax.random.
        site: index of this site, and number of sites; their batches are disjoint.

    Raises:
        ValueError: the corpus is smaller than a batch, or the mesh does not divide the batch;
            data.pack or data.document_mask is set and it is unknown where documents start; a source
            of a mixture would be read more often than data.max_epochs allows.
    """
    try:
        seed = operator.index(seed)  # also of NumPy's integers
    except TypeError:
        raise ValueError(
            f"seed must be an integer; got {seed!r}. Pass an integer, not a key of jax.random."
        ) from None
    if cfg.pack or cfg.document_mask:
        for part in list_corpora(corpus).values():
            check_boundaries(part)
    return Batches(cfg, corpus, mesh, seed, site)


def build_eval_batches(cfg: DataConfig, corpus: Corpus, mesh: Mesh) -> EvalBatches:
    """Returns all windows of the corpus in order, in batches of data.batch sequences.

    Raises:
        ValueError: the corpus is empty, or the mesh does not divide the batch; data.document_mask
            is set and it is unknown where documents start.
    """
    return EvalBatches(cfg, corpus, mesh)

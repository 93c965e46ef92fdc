import json
import threading
from collections import Counter

import jax
import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import BatchSource, build_batches, build_eval_batches
from jaxtrain.data.sequences import WindowSequences
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.data.shuffle import permute
from jaxtrain.distributed.mesh import batch_sharding, build_mesh

T, B, EOT = 16, 8, 1_000


def documents(seed, n):
    """n documents of random lengths; a token is unique in its shard, so rows name their place."""
    lengths = np.random.default_rng(seed).integers(2, 60, n)
    tokens = 1_001 + np.arange(lengths.sum())
    tokens[np.cumsum(lengths) - lengths] = EOT
    return tokens + seed * 20_000 * (tokens != EOT)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Shards of 1500, 1500 and some train tokens, and a validation shard."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, seed, n in (("train", 0, 120), ("val", 1, 30)):
        tokens = documents(seed, n)
        writer = ShardWriter(tmp_path, "x", split, "<u2", 1_500)
        writer.append(tokens, [(len(tokens), 0)])
        writer.close()
    return tmp_path


def opened(folder, split="train", **knobs):
    cfg = DataConfig(shards=str(folder), batch=B, seq_len=T, eot=EOT, **knobs)
    return cfg, open_corpus(cfg, split, 65_536, folder)


def mesh_of(replica=1, fsdp=1, tensor=1):
    devices = jax.devices()[: replica * fsdp * tensor]
    return build_mesh(MeshConfig(replica=replica, fsdp=fsdp, tensor=tensor), devices=devices)


def stream(folder, steps, start=0, seed=3, mesh=None, **knobs):
    """Batches start..start+steps as NumPy."""
    cfg, corpus = opened(folder, **knobs)
    with build_batches(cfg, corpus, mesh or mesh_of(), seed) as batches:
        batches.restore(batches.state() | {"step": start})
        return [jax.tree.map(np.asarray, next(batches)) for _ in range(steps)]


def same(a, b):
    return all(
        x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x)
        for x, y in zip(a, b, strict=True)
    )


KINDS = [{}, {"document_mask": True}, {"pack": True}]


@pytest.mark.parametrize("knobs", KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_batches_are_the_same_on_every_mesh(knobs, shape, folder):
    mesh = mesh_of(*shape)
    assert same(stream(folder, 5, mesh=mesh, **knobs), stream(folder, 5, **knobs))
    cfg, corpus = opened(folder, **knobs)
    with build_batches(cfg, corpus, mesh, 3) as batches:
        for array in next(batches).values():
            assert array.sharding == batch_sharding(mesh)
            assert array.shape == (B, T + 1) and array.dtype == np.int32


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_parts_that_processes_read_make_the_whole_batch(processes, folder):
    rows = WindowSequences(opened(folder)[1], T)
    whole = BatchSource(rows, B, 3, np.arange(B), True)
    places = np.split(np.arange(B), processes)
    parts = [BatchSource(rows, B, 3, mine, True) for mine in places]
    for step in (0, 1, len(rows) // B, 10_000):
        joined = {k: np.concatenate([p[step][k] for p in parts]) for k in ("tokens", "docs")}
        assert same([whole[step]], [joined])


@pytest.mark.parametrize("knobs", KINDS)
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_a_restored_run_continues_as_if_never_stopped(knobs, prefetch, folder):
    cfg, corpus = opened(folder, prefetch=prefetch, **knobs)
    with build_batches(cfg, corpus, mesh_of(), 3) as batches:
        epoch = -(-batches.sequences_per_epoch // B)
        for stop in (0, 3, epoch - 1, epoch, 2 * epoch + 1):  # within and across epochs
            batches.restore(batches.state() | {"step": 0})
            for _ in range(stop):
                next(batches)
            state = json.loads(json.dumps(batches.state()))
            ahead = [jax.tree.map(np.asarray, next(batches)) for _ in range(4)]
            assert batches.step == stop + 4
            with build_batches(cfg, corpus, mesh_of(), 3) as fresh:
                fresh.restore(state)
                assert fresh.step == stop
                assert same([next(fresh) for _ in range(4)], ahead)


@pytest.mark.parametrize("knobs", [{}, {"pack": True}])
def test_every_row_appears_exactly_once_an_epoch(knobs, folder):
    cfg, corpus = opened(folder, **knobs)
    with build_batches(cfg, corpus, mesh_of(), 3) as batches:
        n = batches.sequences_per_epoch
    rows = np.concatenate([b["tokens"] for b in stream(folder, 3 * n // B + 1, **knobs)])
    epochs = [sorted(map(tuple, rows[i * n : (i + 1) * n])) for i in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] and len(set(epochs[0])) == n
    orders = [rows[i * n : (i + 1) * n].tolist() for i in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_windows_tile_each_shard_and_never_cross_two(folder):
    cfg, corpus = opened(folder)
    n = corpus.windows(T)
    assert n == sum((shard.tokens - 1) // T for shard in corpus.shards)
    rows = WindowSequences(corpus, T).read(np.arange(n))["tokens"]
    expected = [
        corpus.read(s, w * T, w * T + T + 1)
        for s, shard in enumerate(corpus.shards)
        for w in range((shard.tokens - 1) // T)
    ]
    assert (rows == np.array(expected)).all()


def test_packed_rows_hold_every_token_once_and_mark_the_rest_as_padding(folder):
    cfg, corpus = opened(folder, pack=True)
    with build_batches(cfg, corpus, mesh_of(), 0) as batches:
        n = batches.sequences_per_epoch
    batches = stream(folder, n // B + 1, pack=True)
    tokens, docs = (np.concatenate([b[k] for b in batches])[:n] for k in ("tokens", "docs"))
    found = Counter(tokens[docs >= 0].tolist())
    stored = [corpus.read(i, 0, shard.tokens) for i, shard in enumerate(corpus.shards)]
    assert found == Counter(np.concatenate(stored).tolist())
    assert (docs[:, 0] == 0).all() and (tokens[docs < 0] == EOT).all()
    change = np.diff(docs, axis=1)
    assert ((change == 0) | (change == 1) | (docs[:, 1:] == -1)).all()
    consecutive = np.diff(tokens, axis=1) == 1  # inside a document, past its eot
    inside = (change == 0) & (docs[:, 1:] >= 0) & (tokens[:, :-1] != EOT)
    assert consecutive[inside].all()


def test_document_ids_count_the_starts_inside_a_row(folder):
    for batch in stream(folder, 20, document_mask=True):
        starts = batch["tokens"] == EOT
        starts[:, 0] = False
        assert (batch["docs"] == np.cumsum(starts, axis=1)).all()


class Numbers:
    """Rows that are their own index."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def read(self, rows, with_docs):
        return {"tokens": rows}


@pytest.mark.parametrize("n", [7, 5_000])
def test_the_order_is_each_epochs_permutation_however_it_is_asked_for(n):
    steps = -(-3 * n // B) + 2
    source = BatchSource(Numbers(n), B, 3, np.arange(B), False)
    got = np.concatenate([source[step]["tokens"] for step in range(steps)])
    expected = [permute(np.arange(n), n, 3, epoch) for epoch in range(1 + steps * B // n)]
    assert (got == np.concatenate(expected)[: steps * B]).all()
    backwards = [source[step]["tokens"] for step in reversed(range(steps))]
    assert (np.concatenate(backwards[::-1]) == got).all()


def test_seeds_and_data_give_different_orders(folder):
    assert not same(stream(folder, 3, seed=0), stream(folder, 3, seed=1))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"fingerprint": "0"}, "data.shards"),
        ({"seed": 4}, "seed"),
        ({"batch": 16}, "data.batch"),
        ({"seq_len": 17}, "data.seq_len"),
        ({"pack": True}, "data.pack"),
    ],
)
def test_resuming_on_other_data_is_refused_with_what_changed(change, flag, folder):
    cfg, corpus = opened(folder)
    with build_batches(cfg, corpus, mesh_of(), 3) as batches:
        [(name, value)] = change.items()
        with pytest.raises(ValueError, match=rf"{name}={value!r}, now .*--{flag}"):
            batches.restore(batches.state() | change)


def test_too_few_windows_for_a_batch_is_an_error_that_names_both(folder):
    cfg, corpus = opened(folder, split="val")
    wide = DataConfig(batch=512, seq_len=T)
    with pytest.raises(ValueError, match=r"data\.batch=512 .* got 5\d sequences") as error:
        build_batches(wide, corpus, mesh_of(), 0)
    assert "--data.batch" in str(error.value)


def test_evaluation_predicts_every_token_but_the_first_once_in_order(folder):
    cfg, corpus = opened(folder, split="val")
    for mesh in (mesh_of(), mesh_of(2, 2, 2)):
        evaluation = build_eval_batches(cfg, corpus, mesh)
        for _ in range(2):  # it may be repeated
            batches = [jax.tree.map(np.asarray, batch) for batch in evaluation]
            assert len(batches) == len(evaluation)
            tokens, docs = (np.concatenate([b[k] for b in batches]) for k in ("tokens", "docs"))
            assert (docs[:, 0] >= 0).sum() == -(-(corpus.tokens - 1) // T)
            assert (tokens[:, 1:][docs[:, 1:] >= 0] == corpus.read(0, 1, corpus.tokens)).all()
            assert (docs[-1] == -1).any()  # the fixture's last batch is not full


def test_next_may_copy_to_the_devices_where_hidden_copies_are_forbidden(folder):
    cfg, corpus = opened(folder)
    with build_batches(cfg, corpus, mesh_of(2, 2, 2), 0) as batches:
        with jax.transfer_guard("disallow"):
            next(batches)


def test_waiting_is_counted_since_last_asked_and_threads_end(folder):
    cfg, corpus = opened(folder)
    before = threading.active_count()
    with build_batches(cfg, corpus, mesh_of(), 0) as batches:
        next(batches)
        assert batches.wait_s() > 0 == batches.wait_s()
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(timeout=10)
    assert threading.active_count() == before

import json
import threading
from collections import Counter

import jax
import numpy as np
import pytest

from jaxtrain.config.batch_schedule import parse_schedule
from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.batch_source import BatchSource, epoch_order
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches, build_eval_batches
from jaxtrain.data.sequences import WindowSequences
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.data.shuffle import permute
from jaxtrain.distributed.mesh import batch_sharding, build_mesh

T, B, EOT = 16, 8, 1_000


def documents(seed, n):
    """Returns n documents of random lengths, in which every token but EOT is unique."""
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


def open_split(folder, split="train", **options):
    cfg = DataConfig(shards=str(folder), batch=B, seq_len=T, eot=EOT, **options)
    return cfg, open_corpus(cfg, split, 65_536, folder)


def mesh_of(replica=1, fsdp=1, tensor=1):
    devices = jax.devices()[: replica * fsdp * tensor]
    return build_mesh(MeshConfig(replica=replica, fsdp=fsdp, tensor=tensor), devices=devices)


def read_batches(folder, steps, start=0, seed=3, mesh=None, site=(0, 1), **options):
    """Returns batches start..start+steps as NumPy arrays."""
    cfg, corpus = open_split(folder, **options)
    with build_batches(cfg, corpus, mesh or mesh_of(), seed, site) as batches:
        batches.restore(batches.state() | {"step": start})
        return [jax.tree.map(np.asarray, next(batches)) for _ in range(steps)]


def equal(a, b):
    return all(
        x.keys() == y.keys() and all((x[k] == y[k]).all() for k in x)
        for x, y in zip(a, b, strict=True)
    )


KINDS = [{}, {"document_mask": True}, {"pack": True}]


def test_the_batches_of_three_sites_are_together_those_of_one_site(folder):
    steps = 8  # more than an epoch
    rows = lambda batches: [tuple(row) for batch in batches for row in batch["tokens"]]
    whole = rows(read_batches(folder, 3 * steps))
    sites = [rows(read_batches(folder, steps, site=(k, 3))) for k in range(3)]
    for n in range(0, steps * B, B):
        together = [row for site in sites for row in site[n : n + B]]
        assert Counter(together) == Counter(whole[3 * n : 3 * (n + B)])
    assert read_batches(folder, 1, start=5, site=(1, 3))[0]["tokens"].shape == (B, T + 1)


def test_a_site_does_not_resume_with_the_batches_of_another_site(folder):
    cfg, corpus = open_split(folder)
    states = {}
    for site in ((0, 1), (0, 2), (1, 2)):
        with build_batches(cfg, corpus, mesh_of(), 3, site) as batches:
            states[site] = batches.state()
    with build_batches(cfg, corpus, mesh_of(), 3, (1, 2)) as batches:
        for other in ((0, 1), (0, 2)):
            with pytest.raises(ValueError, match="now '1 of 2'"):
                batches.restore(states[other])
    del states[0, 1]["site"]  # as in the checkpoints of runs before there were sites
    with build_batches(cfg, corpus, mesh_of(), 3) as batches:
        batches.restore(states[0, 1])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_batches_are_the_same_on_every_mesh(options, shape, folder):
    mesh = mesh_of(*shape)
    assert equal(read_batches(folder, 5, mesh=mesh, **options), read_batches(folder, 5, **options))
    cfg, corpus = open_split(folder, **options)
    with build_batches(cfg, corpus, mesh, 3) as batches:
        for name, array in next(batches).items():
            shape, dtype = ((B, T), "float32") if name == "weights" else ((B, T + 1), "int32")
            assert array.sharding == batch_sharding(mesh)
            assert array.shape == shape and array.dtype == dtype


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_parts_that_processes_read_make_up_the_batch(processes, folder):
    rows = WindowSequences(open_split(folder)[1], T)
    order = epoch_order(len(rows), 3)
    sizes = parse_schedule("0:8 256:16", B, T)  # 8 sequences in the first two steps
    whole = BatchSource(rows, sizes, order, {n: np.arange(n) for n in (B, 2 * B)}, True)
    split = {n: np.split(np.arange(n), processes) for n in (B, 2 * B)}
    parts = [
        BatchSource(rows, sizes, order, {n: split[n][i] for n in split}, True)
        for i in range(processes)
    ]
    for step in (0, 1, 2, len(rows) // B, 10_000):
        assert len(whole[step]["tokens"]) == (B if step < 2 else 2 * B)
        joined = {k: np.concatenate([p[step][k] for p in parts]) for k in whole[step]}
        assert equal([whole[step]], [joined])


@pytest.mark.parametrize(
    ("options", "prefetch"), [({}, 0), ({}, 5), ({"document_mask": True}, 1), ({"pack": True}, 5)]
)
def test_a_restored_loader_continues_as_if_never_stopped(options, prefetch, folder):
    cfg, corpus = open_split(folder, prefetch=prefetch, **options)
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
                assert equal([next(fresh) for _ in range(4)], ahead)


@pytest.mark.parametrize("options", [{}, {"pack": True}])
def test_every_sequence_appears_exactly_once_per_epoch(options, folder):
    cfg, corpus = open_split(folder, **options)
    with build_batches(cfg, corpus, mesh_of(), 3) as batches:
        n = batches.sequences_per_epoch
    rows = np.concatenate([b["tokens"] for b in read_batches(folder, 3 * n // B + 1, **options)])
    epochs = [sorted(map(tuple, rows[i * n : (i + 1) * n])) for i in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] and len(set(epochs[0])) == n
    orders = [rows[i * n : (i + 1) * n].tolist() for i in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_windows_tile_each_shard_and_never_cross_two(folder):
    cfg, corpus = open_split(folder)
    n = corpus.windows(T)
    assert n == sum((shard.tokens - 1) // T for shard in corpus.shards)
    rows = WindowSequences(corpus, T).read(np.arange(n))["tokens"]
    expected = [
        corpus.read(s, w * T, w * T + T + 1)
        for s, shard in enumerate(corpus.shards)
        for w in range((shard.tokens - 1) // T)
    ]
    assert (rows == np.array(expected)).all()


def test_packed_sequences_contain_every_token_once_and_the_rest_is_padding(folder):
    cfg, corpus = open_split(folder, pack=True)
    with build_batches(cfg, corpus, mesh_of(), 0) as batches:
        n = batches.sequences_per_epoch
    batches = read_batches(folder, n // B + 1, pack=True)
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
    for batch in read_batches(folder, 20, document_mask=True):
        starts = batch["tokens"] == EOT
        starts[:, 0] = False
        assert (batch["docs"] == np.cumsum(starts, axis=1)).all()


class Numbers:
    """Sequences that consist of their own number."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def read(self, numbers, with_docs):
        return {"tokens": numbers}


@pytest.mark.parametrize("n", [7, 5_000])
def test_batches_follow_the_permutation_of_each_epoch_in_any_order_of_reading(n):
    steps = -(-3 * n // B) + 2
    sizes = parse_schedule("", B, T)
    source = BatchSource(Numbers(n), sizes, epoch_order(n, 3), {B: np.arange(B)}, False)
    got = np.concatenate([source[step]["tokens"] for step in range(steps)])
    expected = [permute(np.arange(n), n, 3, epoch) for epoch in range(1 + steps * B // n)]
    assert (got == np.concatenate(expected)[: steps * B]).all()
    backwards = [source[step]["tokens"] for step in reversed(range(steps))]
    assert (np.concatenate(backwards[::-1]) == got).all()


def test_another_seed_gives_another_order(folder):
    assert not equal(read_batches(folder, 3, seed=0), read_batches(folder, 3, seed=1))


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
def test_the_error_for_resuming_on_other_data_says_what_changed(change, flag, folder):
    cfg, corpus = open_split(folder)
    with build_batches(cfg, corpus, mesh_of(), 3) as batches:
        [(name, value)] = change.items()
        with pytest.raises(ValueError, match=rf"{name}={value!r}, now .*--{flag}"):
            batches.restore(batches.state() | change)


def test_a_corpus_smaller_than_a_batch_is_refused(folder):
    cfg, corpus = open_split(folder, split="val")
    wide = DataConfig(batch=512, seq_len=T)
    with pytest.raises(ValueError, match=r"data\.batch=512 .* got 5\d sequences") as error:
        build_batches(wide, corpus, mesh_of(), 0)
    assert "--data.batch" in str(error.value)


@pytest.mark.parametrize("build", [build_batches, build_eval_batches])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(build, folder):
    cfg, corpus = open_split(folder)
    seed = (0,) if build is build_batches else ()
    with pytest.raises(ValueError, match="multiple of replica x fsdp = 3; got data.batch=8"):
        build(cfg, corpus, mesh_of(3), *seed)


@pytest.mark.parametrize("seed", [jax.random.key(0), "0", 1.0, None])
def test_a_seed_that_is_not_an_int_is_refused(seed, folder):
    cfg, corpus = open_split(folder)
    with pytest.raises(ValueError, match="seed must be an integer; got"):
        build_batches(cfg, corpus, mesh_of(), seed)


def test_evaluation_predicts_every_token_but_the_first_exactly_once_in_order(folder):
    cfg, corpus = open_split(folder, split="val")
    for mesh in (mesh_of(), mesh_of(2, 2, 2)):
        evaluation = build_eval_batches(cfg, corpus, mesh)
        for _ in range(2):  # it can be iterated again
            batches = [jax.tree.map(np.asarray, batch) for batch in evaluation]
            assert len(batches) == len(evaluation)
            tokens, docs = (np.concatenate([b[k] for b in batches]) for k in ("tokens", "docs"))
            assert (docs[:, 0] >= 0).sum() == -(-(corpus.tokens - 1) // T)
            assert (tokens[:, 1:][docs[:, 1:] >= 0] == corpus.read(0, 1, corpus.tokens)).all()
            assert (docs[-1] == -1).any()  # the fixture's last batch is not full


def test_next_copies_to_the_devices_even_if_implicit_copies_are_forbidden(folder):
    cfg, corpus = open_split(folder)
    with build_batches(cfg, corpus, mesh_of(2, 2, 2), 0) as batches:
        with jax.transfer_guard("disallow"):
            next(batches)


def test_wait_s_is_reset_when_read_and_close_ends_the_threads(folder):
    cfg, corpus = open_split(folder)
    before = threading.active_count()
    with build_batches(cfg, corpus, mesh_of(), 0) as batches:
        next(batches)
        assert batches.wait_s() > 0 == batches.wait_s()
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(timeout=10)
    assert threading.active_count() == before

"""Where documents start, what packed rows contain, and which of their targets are trained."""

import jax
import numpy as np
import pytest
from data_samples import llmc, megatron_index, open_shards

from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.loader import build_batches
from jaxtrain.data.sequences import PackedSequences, WindowSequences
from jaxtrain.distributed.mesh import build_mesh

pytestmark = pytest.mark.usefixtures("shard_cache")

# Six documents, two of which are two sequences. Byte 0, which starts documents in shards that
# jaxtrain encodes as bytes, is inside some of them and at the start of none.
LENGTHS = [9, 4, 7, 1, 12, 6, 10, 3]
DOCUMENTS = [0, 1, 3, 4, 5, 7, 8]
STARTS = [0, 9, 20, 21, 33, 49]
TOKENS = np.arange(1, sum(LENGTHS) + 1)
TOKENS[[15, 25, 40]] = 0


def write_megatron(folder, tokens=TOKENS, name="x", **index):
    np.asarray(tokens, "<u2").tofile(folder / f"{name}.bin")
    options = {"lengths": LENGTHS, "documents": DOCUMENTS} | index
    (folder / f"{name}.idx").write_bytes(megatron_index(**options))
    return folder


def packed(corpus, T):
    sequences = PackedSequences(corpus, T)
    return sequences.read(np.arange(len(sequences)))


def pieces_of(batch):
    """Returns the pieces of documents in all rows, as tuples of tokens."""
    rows = zip(batch["tokens"], batch["docs"], strict=True)
    return [tuple(row[docs == doc].tolist()) for row, docs in rows for doc in range(docs.max() + 1)]


def test_packing_uses_the_documents_of_megatrons_index(tmp_path):
    corpus = open_shards(write_megatron(tmp_path), vocab_size=256)
    shard, start, length = corpus.documents()
    assert (start.tolist(), length.sum(), set(shard)) == (STARTS, len(TOKENS), {0})
    documents = [tuple(part.tolist()) for part in np.split(TOKENS, STARTS[1:])]
    assert sorted(pieces_of(packed(corpus, 19))) == sorted(documents)


def test_document_ids_of_windows_follow_megatrons_index(tmp_path):
    corpus = open_shards(write_megatron(tmp_path), vocab_size=256)
    windows = WindowSequences(corpus, 10)
    docs = windows.read(np.arange(len(windows)))["docs"]
    for i, row in enumerate(docs):
        inside = [start - 10 * i for start in STARTS if 10 * i < start <= 10 * i + 10]
        assert np.flatnonzero(np.diff(row)).tolist() == [start - 1 for start in inside]


def test_empty_documents_and_sequences_of_an_index_are_left_out(tmp_path):
    write_megatron(tmp_path, [5, 6, 7], lengths=[0, 2, 0, 1, 0], documents=[0, 0, 1, 2, 3, 4, 4, 5])
    assert open_shards(tmp_path).documents()[1].tolist() == [0, 2]


@pytest.mark.parametrize("documents", [[0, 5, 4, 8], [0, 9], [-1, 8], [0, 3, 2**62]], ids=str)
def test_an_index_whose_documents_are_not_ascending_sequences_is_refused(documents, tmp_path):
    write_megatron(tmp_path, documents=documents)
    with pytest.raises(ValueError, match=r"x\.idx: expected documents that begin at .*0 to 8"):
        open_shards(tmp_path)


UNKNOWN = {
    "llm.c": lambda folder: (folder / "x_train_000000.bin").write_bytes(llmc(TOKENS)),
    "nanogpt": lambda folder: TOKENS.astype("<u2").tofile(folder / "train.bin"),
    "an index without documents": lambda folder: write_megatron(folder, documents=[]),
    "an index of the first documents": lambda folder: write_megatron(folder, documents=[0, 3]),
    "an index of the last documents": lambda folder: write_megatron(folder, documents=[3, 8]),
    "a mixture": lambda folder: UNKNOWN["nanogpt"](write_megatron(folder)),
}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("flag", ["pack", "document_mask"])
def test_an_unknown_end_of_text_token_is_asked_for_and_not_guessed(flag, kind, tmp_path):
    """All tokens are below 256, so the shards could be bytes, whose eot would be 0."""
    UNKNOWN[kind](tmp_path)
    corpus = open_shards(tmp_path, vocab_size=256)
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    cfg = DataConfig(seq_len=4, batch=2)
    assert corpus.eot == -1
    assert build_batches(cfg, corpus, mesh, 0).sequences_per_epoch  # plain windows need none
    with pytest.raises(ValueError, match=r"got data\.eot=-1, and .*Set --data\.eot"):
        build_batches(DataConfig(seq_len=4, batch=2, **{flag: True}), corpus, mesh, 0)


def test_a_run_does_not_resume_with_other_documents_of_the_same_tokens(tmp_path):
    mesh = build_mesh(MeshConfig(), jax.devices()[:1])
    options = {"seq_len": 19, "batch": 2, "pack": True}

    def open_batches():
        return build_batches(DataConfig(**options), open_shards(tmp_path), mesh, 0)

    write_megatron(tmp_path)
    with open_batches() as batches:
        state = batches.state()
        batches.restore(state)
    write_megatron(tmp_path, documents=[0, 2, 3, 4, 5, 7, 8])
    with open_batches() as batches, pytest.raises(ValueError, match="boundaries=.*--data.shards"):
        batches.restore(state)


EOT = 9


def weights_of_packed_rows(folder, T, eot=EOT, **shards):
    """Returns [(tokens, weights of tokens[1:])] of each packed row without its padding."""
    for name, tokens in shards.items():
        (folder / f"{name}.bin").write_bytes(llmc(tokens))
    batch = packed(open_shards(folder, eot=eot), T)
    assert not batch["weights"][batch["docs"][:, 1:] < 0].any()
    sizes = (batch["docs"] >= 0).sum(1)
    rows = zip(batch["tokens"].tolist(), batch["weights"].tolist(), sizes, strict=True)
    return sorted((row[:size], weights[: size - 1]) for row, weights, size in rows)


def test_a_target_at_the_place_where_a_document_was_cut_has_weight_0(tmp_path):
    # Rows of 6 tokens. The first document has 8: its last two come after [9 5 6] in a row.
    first, second = [EOT, 1, 2, 3, 4, 5, 6, 7], [EOT, 5, 6]
    rows = weights_of_packed_rows(tmp_path, 5, a_train=[*first, *second])
    assert rows == [
        # 6 7 is the rest of the first document. It has ended, so that 9 after it is a target.
        ([6, 7, EOT, 5, 6], [1, 1, 1, 1]),
        (first[:6], [1] * 5),
    ]
    rows = weights_of_packed_rows(tmp_path, 5, a_train=[*second, *first])
    assert rows == [
        (first[:6], [1] * 5),
        ([EOT, 5, 6, 6, 7], [1, 1, 0, 1]),  # 6 does not follow from 9 5 6
    ]


def test_a_document_that_a_shard_cuts_does_not_end_there(tmp_path):
    rows = weights_of_packed_rows(tmp_path, 7, a_train=[EOT, 1, 2, EOT, 3], b_train=[4, EOT, 5])
    assert rows == [([EOT, 1, 2, EOT, 3, 4, EOT, 5], [1, 1, 1, 1, 0, 1, 1])]
    rows = weights_of_packed_rows(tmp_path, 7, a_train=[EOT, 1, 2, EOT, 3], b_train=[EOT, 4, 5])
    assert rows == [([EOT, 1, 2, EOT, 3, EOT, 4, 5], [1] * 7)]


def test_documents_of_an_index_are_separated_only_by_the_end_of_text_token(tmp_path):
    # As by Megatron's --append-eod, except for the second document.
    tokens, lengths = [1, 2, EOT, 3, 4, 5, EOT], [3, 2, 2]
    options = {"lengths": lengths, "documents": [0, 1, 2, 3]}
    for eot, separated in ((EOT, [1, 0]), (-1, [0, 0])):
        corpus = open_shards(write_megatron(tmp_path, tokens, **options), eot=eot)
        expected = [1, 1, separated[0], 1, separated[1], 1]
        for sequences in (PackedSequences(corpus, 6), WindowSequences(corpus, 6)):
            batch = sequences.read(np.arange(1))
            assert batch["tokens"].tolist() == [tokens]
            assert batch["docs"].tolist() == [[0, 0, 0, 1, 1, 2, 2]]
            assert batch["weights"].tolist() == [expected]

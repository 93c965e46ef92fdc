import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus

TOKENS = np.random.default_rng(0).integers(0, 1_000, 5_000)
TOKENS[::97] = 7  # starts documents
V = 1_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Scans are remembered below the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llmc(tokens=TOKENS, magic=20240520, version=1, count=None, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens).astype(dtype).tobytes()


def megatron_index(lengths, dtype_code=8, version=1, magic=b"MMIDIDX\x00\x00", width=2):
    pointers = (np.cumsum(lengths) - lengths) * width
    return (
        magic
        + struct.pack("<QBQQ", version, dtype_code, len(lengths), len(lengths) + 1)
        + np.asarray(lengths, "<i4").tobytes()
        + np.asarray(pointers, "<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )


def opened(source, split="train", vocab_size=V, **knobs):
    cfg = DataConfig(shards=str(source), **knobs)
    return open_corpus(cfg, split, vocab_size, workdir="unused")


def everything(corpus):
    return np.concatenate(
        [corpus.read(i, 0, shard.tokens) for i, shard in enumerate(corpus.shards)]
    )


def write_format(folder, name):
    """TOKENS as the writers of each format lay them down; the file to open."""
    if name == "llmc":
        (folder / "x_train_000000.bin").write_bytes(llmc())
    elif name == "llmc_uint32":
        (folder / "x_train_000000.bin").write_bytes(llmc(magic=20240801, version=7, dtype="<u4"))
    elif name == "nanogpt":
        TOKENS.astype("<u2").tofile(folder / "train.bin")
    else:
        code, dtype = {"megatron": (8, "<u2"), "megatron_int32": (4, "<i4")}[name]
        TOKENS.astype(dtype).tofile(folder / "x_text_document.bin")
        index = megatron_index([2_000, 2_999, 1], code, width=np.dtype(dtype).itemsize)
        (folder / "x_text_document.idx").write_bytes(index)
    return next(folder.glob("*.bin"))


FORMATS = ["llmc", "llmc_uint32", "nanogpt", "megatron", "megatron_int32"]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_and_gives_back_its_tokens(name, tmp_path):
    path = write_format(tmp_path, name)
    for source in (tmp_path, path, tmp_path / "*.bin"):
        corpus = opened(source)
        assert (everything(corpus) == TOKENS).all()
        assert corpus.tokens == len(TOKENS) and corpus.largest_token == TOKENS.max()
        assert f" of {name.split('_')[0]} " in corpus.describe()  # which format was taken


def test_the_fingerprint_names_the_tokens_and_not_their_file(tmp_path):
    prints = {}
    for name in ("llmc", "nanogpt", "megatron"):
        (tmp_path / name).mkdir()
        write_format(tmp_path / name, name)
        prints[name] = opened(tmp_path / name).fingerprint
    assert len(set(prints.values())) == 1
    other = TOKENS.copy()
    other[-1] ^= 1
    (tmp_path / "llmc" / "x_train_000000.bin").write_bytes(llmc(other))
    assert opened(tmp_path / "llmc").fingerprint != prints["llmc"]


# What is wrong, the bytes of x_train_000000.bin, and what the message must hold.
BAD_LLMC = {
    "truncated": (llmc()[:-100], ["expected 11024 bytes", "found 10924 bytes", "truncated"]),
    "truncated in its header": (llmc()[:500], ["expected a header of 1024", "found a file of 500"]),
    "too long": (llmc() + b"\1\2", ["expected 11024 bytes", "found 11026 bytes"]),
    "an empty file": (b"", ["expected a token shard", "found an empty file"]),
    "declared empty": (llmc([]), ["expected a declared count of at least 1", "found a count of 0"]),
    "negative": (llmc(count=-5), ["expected a declared count", "found a count of -5"]),
    "another version": (llmc(version=2), ["expected version 1", "found version 2"]),
    "another magic": (llmc(magic=99), ["20240520 or 20240801", "63 00 00 00", "nanogpt"]),
    "an llm.c model": (llmc(magic=20240326), ["expected a token shard", "found an llm.c model"]),
    "an npy file": (b"\x93NUMPY" + bytes(2000), ["expected a token shard", "found a NumPy"]),
    "text": (b"Hello there." * 200, ["20240520 or 20240801", "48 65 6c 6c"]),
    "uint32 under uint16": (llmc(dtype="<u4"), ["uint16 tokens", "4 bytes a token", "dtype"]),
    "a token of another vocabulary": (llmc([1, 1_000]), ["below model.V=1000", "found 1000"]),
}


@pytest.mark.parametrize("kind", BAD_LLMC)
def test_a_bad_llmc_shard_is_refused_with_file_expected_and_found(kind, tmp_path):
    content, parts = BAD_LLMC[kind]
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        opened(tmp_path)
    for part in [str(path), "expected", "found", *parts]:
        assert part in str(error.value)


BAD_NANOGPT = {
    "half a token": (
        TOKENS.astype("<u2").tobytes()[:-1],
        ["expected an even number", "found 9999"],
    ),
    "uint32": (TOKENS.astype("<u4").tobytes(), ["expected uint16", "uint32"]),
    "an llm.c shard": (llmc(), ["expected headerless", "found an llm.c header"]),
    "a zip": (b"PK\x03\x04" + bytes(100), ["expected a token shard", "found a zip"]),
}


@pytest.mark.parametrize("kind", BAD_NANOGPT)
def test_a_bad_nanogpt_file_is_refused_with_file_expected_and_found(kind, tmp_path):
    content, parts = BAD_NANOGPT[kind]
    (tmp_path / "some.bin").write_bytes(content)
    with pytest.raises(ValueError) as error:
        opened(tmp_path, shard_format="nanogpt")
    for part in [str(tmp_path / "some.bin"), *parts]:
        assert part in str(error.value)


def test_headerless_tokens_are_read_only_when_said_or_named_as_nanogpt_names_them(tmp_path):
    TOKENS.astype("<u2").tofile(tmp_path / "some.bin")
    with pytest.raises(ValueError, match="shard_format=nanogpt"):
        opened(tmp_path)
    assert (everything(opened(tmp_path, shard_format="nanogpt")) == TOKENS).all()


LENGTHS = [2_000, 2_999, 1]
BAD_INDEX = {
    "another magic": (megatron_index(LENGTHS, magic=b"MMIDIDY\x00\x00"), ["MMIDIDX", "MMIDIDY"]),
    "another version": (megatron_index(LENGTHS, version=2), ["version 1", "found version 2"]),
    "float tokens": (megatron_index(LENGTHS, dtype_code=7), ["dtype code", "found code 7"]),
    "an unknown dtype": (megatron_index(LENGTHS, dtype_code=9), ["dtype code", "found code 9"]),
    "truncated": (megatron_index(LENGTHS)[:-3], ["expected 102 bytes", "found 99 bytes"]),
    "truncated in its header": (megatron_index(LENGTHS)[:20], ["expected a header of 34"]),
    "of a longer .bin": (
        megatron_index([2_000, 3_000, 1]),
        ["expected 10002 bytes", "found 10000"],
    ),
    "of a wider dtype": (megatron_index(LENGTHS, dtype_code=4), ["pointers"]),
    "of wider tokens": (megatron_index(LENGTHS, 4, width=4), ["expected 20000", "found 10000"]),
    "no file": (None, ["found no such file"]),
}


@pytest.mark.parametrize("kind", BAD_INDEX)
def test_a_megatron_pair_that_does_not_match_is_refused(kind, tmp_path):
    content, parts = BAD_INDEX[kind]
    TOKENS.astype("<u2").tofile(tmp_path / "x.bin")
    if content is not None:
        (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(ValueError) as error:
        opened(tmp_path, shard_format="megatron")
    for part in [str(tmp_path / "x."), "expected", "found", *parts]:
        assert part in str(error.value)


def test_a_megatron_index_without_its_tokens_is_refused(tmp_path):
    (tmp_path / "x.idx").write_bytes(megatron_index(LENGTHS))
    with pytest.raises(ValueError, match=r"x\.bin: expected .*; found no such file"):
        opened(tmp_path)


def test_negative_tokens_are_refused(tmp_path):
    np.array([3, -1], "<i4").tofile(tmp_path / "x.bin")
    (tmp_path / "x.idx").write_bytes(megatron_index([2], 4, width=4))
    with pytest.raises(ValueError, match=r"x\.bin: expected tokens of at least 0; found -1"):
        opened(tmp_path)


def test_one_error_lists_every_bad_shard_and_every_missing_one(tmp_path):
    contents = [llmc(), llmc()[:-2], None, llmc([V]), b"", llmc()]
    for i, content in enumerate(contents):
        if content is not None:
            (tmp_path / f"x_train_{i:06d}.bin").write_bytes(content)
    with pytest.raises(ValueError, match="^4 of 6 shards cannot be used") as error:
        opened(tmp_path)
    named = [i for i in range(6) if f"x_train_{i:06d}.bin: expected" in str(error.value)]
    assert named == [1, 2, 3, 4]


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.bin", "."])
def test_where_there_is_no_shard_the_flag_is_named(source, tmp_path):
    with pytest.raises(ValueError, match=r"--data\.shards"):
        opened(tmp_path / source)


def test_files_named_val_are_validation_and_the_rest_train(tmp_path):
    names = {"a_val_000000.bin": "val", "val.bin": "val", "a-validation.bin": "val"}
    names |= {"a_train_000000.bin": "train", "interval.bin": "train", "medieval_1.bin": "train"}
    for name in names:
        (tmp_path / name).write_bytes(llmc())
    for split in ("train", "val"):
        files = {Path(shard.path).name for shard in opened(tmp_path, split).shards}
        assert files == {name for name, kind in names.items() if kind == split}


def test_no_split_holds_a_test_set_and_the_note_says_so(tmp_path):
    names = ["train.bin", "val.bin", "test.bin", "a_dev_000000.bin", "eval-1.bin"]
    for name in [*names, "test_train_000000.bin", "contest.bin"]:
        (tmp_path / name).write_bytes(llmc())
    train, val = (opened(tmp_path, split) for split in ("train", "val"))
    read = {Path(shard.path).name for shard in train.shards}
    assert read == {"train.bin", "test_train_000000.bin", "contest.bin"}
    assert [Path(shard.path).name for shard in val.shards] == ["val.bin"]
    note = "3 file(s) left out by name: a_dev_000000.bin, eval-1.bin, test.bin"
    assert note in train.describe() and "left out" not in val.describe()
    with pytest.raises(ValueError, match="must hold a train shard.*only test.bin"):
        opened(tmp_path / "test.bin")


def test_validation_shards_are_missed_only_when_asked_for(tmp_path):
    (tmp_path / "x_train_000000.bin").write_bytes(llmc())
    assert opened(tmp_path).tokens == len(TOKENS)
    with pytest.raises(ValueError, match="must hold a val shard"):
        opened(tmp_path, "val")


def test_scans_are_remembered_until_the_file_changes_and_rebuilt_when_damaged(tmp_path, cache):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(llmc())
    first = opened(path)
    [entry] = cache.rglob("*.json")
    known = json.loads(entry.read_text())
    known["scan"]["largest"] = 123
    entry.write_text(json.dumps(known))
    assert opened(path).largest_token == 123  # recalled, not scanned again
    for damage in ("", "{", '{"key": 1}', json.dumps(known | {"scan": {"largest": "x"}})):
        entry.write_text(damage)
        assert opened(path) == first
    entry.write_text(json.dumps(known))
    os.utime(path, ns=(1, 1))
    assert opened(path) == first


def test_a_corpus_travels_without_its_tokens_and_reads_on_arrival(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(llmc(np.tile(TOKENS, 20)))
    corpus = opened(path)
    everything(corpus)
    frozen = pickle.dumps(corpus)
    assert len(frozen) < 2_000
    assert (everything(pickle.loads(frozen)) == everything(corpus)).all()


def test_documents_start_at_eot_and_hold_every_token_once(tmp_path):
    (tmp_path / "x_train_000000.bin").write_bytes(llmc(TOKENS[3:]))  # begins inside a document
    (tmp_path / "x_train_000001.bin").write_bytes(llmc())
    shard, start, length = opened(tmp_path, eot=7).documents()
    for i, tokens in enumerate((TOKENS[3:], TOKENS)):
        starts, lengths = start[shard == i], length[shard == i]
        assert starts.tolist() == sorted({0, *np.flatnonzero(tokens == 7).tolist()})
        assert (np.cumsum(lengths)[:-1] == starts[1:]).all() and lengths.sum() == len(tokens)


def test_an_eot_that_stands_nowhere_or_is_unknown_is_refused(tmp_path):
    (tmp_path / "x_train_000000.bin").write_bytes(llmc(TOKENS + 20))
    with pytest.raises(ValueError, match=r"--data\.eot"):
        opened(tmp_path, eot=9, vocab_size=2_000).documents()
    unknown = opened(tmp_path, vocab_size=2_000)  # tokens past 255 are no bytes
    assert (unknown.tokenizer_name, unknown.eot, unknown.bytes_per_token) == (None, -1, None)
    with pytest.raises(ValueError, match=r"--data\.eot"):
        unknown.documents()

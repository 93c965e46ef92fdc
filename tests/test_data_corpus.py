import functools
import json
import os
import pickle
from pathlib import Path

import data_samples
import numpy as np
import pytest
from data_samples import encode_source, llmc, megatron_index, tokens_of

TOKENS = np.random.default_rng(0).integers(0, 1_000, 5_000)
TOKENS[::97] = 7  # starts documents
V = 1_000
open_shards = functools.partial(data_samples.open_shards, vocab_size=V)


pytestmark = pytest.mark.usefixtures("shard_cache")


def write_format(folder, name):
    """Writes TOKENS in a format and returns the file to open."""
    if name == "llmc":
        (folder / "x_train_000000.bin").write_bytes(llmc(TOKENS))
    elif name == "llmc_uint32":
        (folder / "x_train_000000.bin").write_bytes(
            llmc(TOKENS, magic=20240801, version=7, dtype="<u4")
        )
    elif name == "nanogpt":
        TOKENS.astype("<u2").tofile(folder / "train.bin")
    else:
        code, dtype = {"megatron": (8, "<u2"), "megatron_int32": (4, "<i4")}[name]
        TOKENS.astype(dtype).tofile(folder / "x_text_document.bin")
        index = megatron_index([2_000, 2_999, 1], code, width=np.dtype(dtype).itemsize)
        (folder / "x_text_document.idx").write_bytes(index)
    return next(folder.glob("*.bin"))


FORMATS = ["llmc", "llmc_uint32", "nanogpt", "megatron", "megatron_int32"]


def test_shards_below_a_folder_whose_name_is_not_utf8_are_opened(tmp_path):
    """An ASCII locale gives every folder with a non-ASCII name such a path."""
    folder = tmp_path / "\udcff"
    folder.mkdir()
    write_format(folder, "nanogpt")
    np.testing.assert_array_equal(tokens_of(open_shards(folder)), TOKENS)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_and_gives_back_its_tokens(name, tmp_path):
    path = write_format(tmp_path, name)
    for source in (tmp_path, path, tmp_path / "*.bin"):
        corpus = open_shards(source)
        assert (tokens_of(corpus) == TOKENS).all()
        assert corpus.tokens == len(TOKENS) and corpus.largest_token == TOKENS.max()
        assert f" of {name.split('_')[0]} " in corpus.describe()  # the detected format


def test_the_fingerprint_depends_on_the_tokens_and_not_on_their_format(tmp_path):
    prints = {}
    for name in ("llmc", "nanogpt", "megatron"):
        (tmp_path / name).mkdir()
        write_format(tmp_path / name, name)
        prints[name] = open_shards(tmp_path / name).fingerprint
    assert len(set(prints.values())) == 1
    other = TOKENS.copy()
    other[-1] ^= 1
    (tmp_path / "llmc" / "x_train_000000.bin").write_bytes(llmc(other))
    assert open_shards(tmp_path / "llmc").fingerprint != prints["llmc"]


# kind: (the bytes of x_train_000000.bin, what the message must contain)
BAD_LLMC = {
    "truncated": (llmc(TOKENS)[:-100], ["expected 11024 bytes", "found 10924 bytes", "truncated"]),
    "truncated in its header": (
        llmc(TOKENS)[:500],
        ["expected a header of 1024", "found a file of 500"],
    ),
    "too long": (llmc(TOKENS) + b"\1\2", ["expected 11024 bytes", "found 11026 bytes"]),
    "an empty file": (b"", ["expected a token shard", "found an empty file"]),
    "declared empty": (llmc([]), ["expected a declared count of at least 1", "found a count of 0"]),
    "negative": (llmc(TOKENS, count=-5), ["expected a declared count", "found a count of -5"]),
    "another version": (llmc(TOKENS, version=2), ["expected version 1", "found version 2"]),
    "another magic": (llmc(TOKENS, magic=99), ["20240520 or 20240801", "63 00 00 00", "nanogpt"]),
    "an llm.c model": (
        llmc(TOKENS, magic=20240326),
        ["expected a token shard", "found an llm.c model"],
    ),
    "an npy file": (b"\x93NUMPY" + bytes(2000), ["expected a token shard", "found a NumPy"]),
    "text": (b"Hello there." * 200, ["20240520 or 20240801", "48 65 6c 6c"]),
    "uint32 under uint16": (
        llmc(TOKENS, dtype="<u4"),
        ["uint16 tokens", "4 bytes a token", "dtype"],
    ),
    "a token of another vocabulary": (llmc([1, 1_000]), ["below model.V=1000", "found 1000"]),
}


@pytest.mark.parametrize("kind", BAD_LLMC)
def test_the_error_for_a_bad_llmc_shard_states_what_was_expected_and_found(kind, tmp_path):
    content, parts = BAD_LLMC[kind]
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_shards(tmp_path)
    for part in [str(path), "expected", "found", *parts]:
        assert part in str(error.value)


BAD_NANOGPT = {
    "half a token": (
        TOKENS.astype("<u2").tobytes()[:-1],
        ["expected an even number", "found 9999"],
    ),
    "uint32": (TOKENS.astype("<u4").tobytes(), ["expected uint16", "uint32"]),
    "an llm.c shard": (llmc(TOKENS), ["expected headerless", "found an llm.c header"]),
    "a zip": (b"PK\x03\x04" + bytes(100), ["expected a token shard", "found a zip"]),
}


@pytest.mark.parametrize("kind", BAD_NANOGPT)
def test_the_error_for_a_bad_nanogpt_file_states_what_was_expected_and_found(kind, tmp_path):
    content, parts = BAD_NANOGPT[kind]
    (tmp_path / "some.bin").write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_shards(tmp_path, shard_format="nanogpt")
    for part in [str(tmp_path / "some.bin"), *parts]:
        assert part in str(error.value)


def test_headerless_tokens_need_a_flag_or_the_file_names_of_nanogpt(tmp_path):
    TOKENS.astype("<u2").tofile(tmp_path / "some.bin")
    with pytest.raises(ValueError, match="shard_format=nanogpt"):
        open_shards(tmp_path)
    assert (tokens_of(open_shards(tmp_path, shard_format="nanogpt")) == TOKENS).all()


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
        open_shards(tmp_path, shard_format="megatron")
    for part in [str(tmp_path / "x."), "expected", "found", *parts]:
        assert part in str(error.value)


def test_a_megatron_index_without_its_tokens_is_refused(tmp_path):
    (tmp_path / "x.idx").write_bytes(megatron_index(LENGTHS))
    with pytest.raises(ValueError, match=r"x\.bin: expected .*; found no such file"):
        open_shards(tmp_path)


def test_negative_tokens_are_refused(tmp_path):
    np.array([3, -1], "<i4").tofile(tmp_path / "x.bin")
    (tmp_path / "x.idx").write_bytes(megatron_index([2], 4, width=4))
    with pytest.raises(ValueError, match=r"x\.bin: expected tokens of at least 0; found -1"):
        open_shards(tmp_path)


def test_a_single_error_lists_all_bad_and_all_missing_shards(tmp_path):
    contents = [llmc(TOKENS), llmc(TOKENS)[:-2], None, llmc([V]), b"", llmc(TOKENS)]
    for i, content in enumerate(contents):
        if content is not None:
            (tmp_path / f"x_train_{i:06d}.bin").write_bytes(content)
    with pytest.raises(ValueError, match="^4 of 6 shards cannot be used") as error:
        open_shards(tmp_path)
    named = [i for i in range(6) if f"x_train_{i:06d}.bin: expected" in str(error.value)]
    assert named == [1, 2, 3, 4]


def test_shards_in_the_metadata_must_exist_and_match_their_fingerprints(tmp_path):
    (tmp_path / "text.txt").write_text("some words\n" * 300)
    encode_source(tmp_path / "text.txt", tmp_path / "out", val_fraction=0.0, shard_tokens=1_500)
    path = tmp_path / "out" / "text_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[2_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"000001\.bin: expected fingerprint .*; found"):
        open_shards(tmp_path / "out")
    (tmp_path / "out" / "text_train_000002.bin").unlink()
    with pytest.raises(ValueError, match=r"000002\.bin: expected .*; found no such file"):
        open_shards(tmp_path / "out")


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.bin", "."])
def test_the_error_for_a_folder_without_shards_names_the_flag(source, tmp_path):
    with pytest.raises(ValueError, match=r"--data\.shards"):
        open_shards(tmp_path / source)


def test_files_named_val_are_for_validation_and_the_others_for_training(tmp_path):
    names = {"a_val_000000.bin": "val", "val.bin": "val", "a-validation.bin": "val"}
    names |= {"a_train_000000.bin": "train", "interval.bin": "train", "medieval_1.bin": "train"}
    for name in names:
        (tmp_path / name).write_bytes(llmc(TOKENS))
    for split in ("train", "val"):
        files = {Path(shard.path).name for shard in open_shards(tmp_path, split).shards}
        assert files == {name for name, kind in names.items() if kind == split}


def test_files_named_like_test_sets_are_in_no_split_and_are_reported(tmp_path):
    names = ["train.bin", "val.bin", "test.bin", "a_dev_000000.bin", "eval-1.bin"]
    for name in [*names, "test_train_000000.bin", "contest.bin"]:
        (tmp_path / name).write_bytes(llmc(TOKENS))
    train, val = (open_shards(tmp_path, split) for split in ("train", "val"))
    read = {Path(shard.path).name for shard in train.shards}
    assert read == {"train.bin", "test_train_000000.bin", "contest.bin"}
    assert [Path(shard.path).name for shard in val.shards] == ["val.bin"]
    note = "3 file(s) left out by name: a_dev_000000.bin, eval-1.bin, test.bin"
    assert note in train.describe() and "left out" not in val.describe()
    with pytest.raises(ValueError, match="must contain a train shard.*only test.bin"):
        open_shards(tmp_path / "test.bin")


def test_missing_validation_shards_are_an_error_only_when_validation_is_opened(tmp_path):
    (tmp_path / "x_train_000000.bin").write_bytes(llmc(TOKENS))
    assert open_shards(tmp_path).tokens == len(TOKENS)
    with pytest.raises(ValueError, match="must contain a val shard"):
        open_shards(tmp_path, "val")


def test_checksums_are_cached_until_the_file_changes_and_rebuilt_if_damaged(tmp_path, shard_cache):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(llmc(TOKENS))
    first = open_shards(path)
    [entry] = shard_cache.rglob("*.json")
    known = json.loads(entry.read_text())
    known["scan"]["largest"] = 123
    entry.write_text(json.dumps(known))
    assert open_shards(path).largest_token == 123  # from the cache, not computed
    for damage in ("", "{", '{"key": 1}', json.dumps(known | {"scan": {"largest": "x"}})):
        entry.write_text(damage)
        assert open_shards(path) == first
    entry.write_text(json.dumps(known))
    os.utime(path, ns=(1, 1))
    assert open_shards(path) == first


def test_a_pickled_corpus_is_small_and_opens_its_files_again(tmp_path):
    path = tmp_path / "x_train_000000.bin"
    path.write_bytes(llmc(np.tile(TOKENS, 20)))
    corpus = open_shards(path)
    tokens_of(corpus)
    frozen = pickle.dumps(corpus)
    assert len(frozen) < 2_000
    assert (tokens_of(pickle.loads(frozen)) == tokens_of(corpus)).all()


def test_documents_start_at_eot_and_contain_every_token_once(tmp_path):
    (tmp_path / "x_train_000000.bin").write_bytes(llmc(TOKENS[3:]))  # starts inside a document
    (tmp_path / "x_train_000001.bin").write_bytes(llmc(TOKENS))
    shard, start, length = open_shards(tmp_path, eot=7).documents()
    for i, tokens in enumerate((TOKENS[3:], TOKENS)):
        starts, lengths = start[shard == i], length[shard == i]
        assert starts.tolist() == sorted({0, *np.flatnonzero(tokens == 7).tolist()})
        assert (np.cumsum(lengths)[:-1] == starts[1:]).all() and lengths.sum() == len(tokens)


def test_documents_need_a_known_eot_that_the_shards_contain(tmp_path):
    (tmp_path / "x_train_000000.bin").write_bytes(llmc(TOKENS + 20))
    with pytest.raises(ValueError, match=r"--data\.eot"):
        open_shards(tmp_path, eot=9, vocab_size=2_000).documents()
    unknown = open_shards(tmp_path, vocab_size=2_000)  # tokens past 255 cannot be bytes
    assert (unknown.tokenizer_name, unknown.eot, unknown.bytes_per_token) == (None, -1, None)
    with pytest.raises(ValueError, match=r"--data\.eot"):
        unknown.documents()

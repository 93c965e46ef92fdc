"""All bad shards are reported in one list; repeated ones in a warning."""

import os
import stat

import numpy as np
import pytest
from data_samples import llmc, megatron_index, open_shards

from jaxtrain.data.corpus import note_shared_shards

pytestmark = pytest.mark.usefixtures("shard_cache")
V = 1_000
GOOD = llmc(np.arange(40))
BAD = {
    "a_folder": (lambda path: path.mkdir(), "found a folder"),
    "b_dangling": (lambda path: path.symlink_to("gone"), "link to gone, which does not exist"),
    "c_loop": (lambda path: path.symlink_to(path.name), "found a file that cannot be read: "),
    "d_pipe": (lambda path: os.mkfifo(path), "found a pipe, a socket or a device"),
    "e_empty": (lambda path: path.touch(), "found an empty file"),
    "f_magic": (lambda path: path.write_bytes(b"abcdefgh" * 9), "first bytes 61 62 63 64"),
    "g_cut": (lambda path: path.write_bytes(GOOD[:-1]), "found 1103 bytes"),
    "h_large": (lambda path: path.write_bytes(llmc([3, V])), "below model.V=1000; found 1000"),
    "i_index": (
        lambda path: [path.write_bytes(bytes(80)), path.with_suffix(".idx").symlink_to("gone")],
        "i_index.idx: expected the index of its .bin; found a link to gone",
    ),
    "j_longer": (
        lambda path: [
            path.write_bytes(bytes(80)),
            path.with_suffix(".idx").write_bytes(megatron_index([20, 21])),
        ],
        "expected 82 bytes (41 uint16 tokens by its index); found 80",
    ),
}


@pytest.mark.parametrize("glob", ["", "*.bin", "*"])
def test_one_error_lists_every_bad_shard_with_its_reason(glob, tmp_path):
    (tmp_path / "good.bin").write_bytes(GOOD)
    for name, (write, _) in BAD.items():
        write(tmp_path / f"{name}.bin")
    with pytest.raises(ValueError, match="^10 of 11 shards cannot be used:\n") as error:
        open_shards(tmp_path / glob, vocab_size=V)
    _, *lines = str(error.value).splitlines()
    assert len(lines) == len(BAD)
    for line, (name, (_, reason)) in zip(lines, BAD.items(), strict=True):
        assert line.startswith(f"  {tmp_path / name}.") and reason in line


@pytest.mark.parametrize("name", ["a_folder", "b_dangling", "c_loop"])
def test_a_bad_shard_that_is_named_itself_is_reported_with_its_reason(name, tmp_path):
    write, reason = BAD[name]
    write(tmp_path / "x.bin")
    if name == "a_folder":
        (tmp_path / "x.bin" / "y.bin").mkdir()
    with pytest.raises(ValueError, match="1 of 1 shards") as error:
        open_shards(tmp_path / "x.bin")
    assert reason in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_shard_without_permission_is_reported(tmp_path):
    for name in ("x.bin", "y.bin"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "x.bin").chmod(stat.S_IWUSR)
    with pytest.raises(ValueError, match="1 of 2 shards.*\n.*x.bin: .*Permission denied"):
        open_shards(tmp_path)


def test_shards_with_the_same_tokens_are_reported_and_used(tmp_path):
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "c.bin").symlink_to("a.bin")
    (tmp_path / "d.bin").write_bytes(llmc(np.arange(41)))
    corpus = open_shards(tmp_path)
    assert corpus.tokens == 161
    listed = "; ".join(f"{tmp_path / n}.bin those of {tmp_path}/a.bin" for n in "bc")
    assert f"warning: shards repeat tokens: {listed}" in corpus.describe()
    (tmp_path / "b.bin").unlink()
    (tmp_path / "c.bin").unlink()
    assert "warning" not in open_shards(tmp_path).describe()


def test_a_held_out_shard_with_tokens_of_training_is_reported(tmp_path):
    for name in ("a.bin", "val.bin"):
        (tmp_path / name).write_bytes(GOOD)
    train, held_out = (open_shards(tmp_path, split) for split in ("train", "val"))
    expected = f"repeat tokens of training: {tmp_path}/val.bin those of {tmp_path}/a.bin"
    assert expected in note_shared_shards(train, held_out).describe()
    (tmp_path / "val.bin").write_bytes(llmc(np.arange(41)))
    assert note_shared_shards(train, open_shards(tmp_path, "val")) is train

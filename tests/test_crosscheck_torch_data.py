import jax
import numpy as np
import pytest

from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.distributed.mesh import build_mesh

pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)
from jaxtrain.crosscheck.torch_data import read_shard, shard_batches, shuffled  # noqa: E402


def write_shards(folder, dtype):
    writer = ShardWriter(folder, "x", "train", dtype, 500)
    tokens = np.random.default_rng(0).integers(0, 60_000, 1_234)
    writer.append(tokens, [(len(tokens), 0)])
    writer.close()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("T, B, seed", [(16, 8, 0), (7, 3, 5), (100, 5, 2**31 - 1)])
def test_both_sides_read_the_same_batches_over_epochs_and_shards(dtype, T, B, seed, tmp_path):
    write_shards(tmp_path, dtype)
    cfg = DataConfig(shards=str(tmp_path), batch=B, seq_len=T)
    corpus = open_corpus(cfg, "train", 65_536, tmp_path)
    paths = [shard.path for shard in corpus.shards]
    assert len(paths) == 3
    steps = 2 + 3 * corpus.windows(T) // B
    theirs = shard_batches(paths, B, T, seed)
    with build_batches(cfg, corpus, build_mesh(MeshConfig(), jax.devices()[:1]), seed) as ours:
        for _ in range(steps):
            want = np.asarray(next(ours)["tokens"])
            np.testing.assert_array_equal(next(theirs)["tokens"].numpy(), want)


def test_an_epoch_reads_every_row_once():
    assert sorted(shuffled(i, 37, 3, 1) for i in range(37)) == list(range(37))


def test_a_file_of_another_format_or_length_is_an_error(tmp_path):
    np.arange(600, dtype="<i4").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="the PyTorch side reads llm.c's token files"):
        read_shard(tmp_path / "a.bin")
    write_shards(tmp_path, "<u2")
    path = next(tmp_path.glob("x_train*"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="must have 500 tokens by its header; got 499"):
        read_shard(path)

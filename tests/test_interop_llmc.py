import jax
import numpy as np
import pytest
from small_models import export, logits, model_of, read

from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config
from jaxtrain.model.trees import named_leaves

C, V, T, L, P = 32, 96, 64, 2, 128  # of the small GPT-2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return export("gpt2", tmp_path_factory.mktemp("llmc") / "gpt2.bin")


def test_the_file_layout_is_llm_cs(path):
    head = np.fromfile(path, "<i4", 256)
    assert head[:8].tolist() == [20240326, 3, T, V, L, 4, C, P]
    body = np.fromfile(path, "<f4", offset=1024)
    _, _, params = model_of("gpt2")
    np.testing.assert_array_equal(body[: V * C].reshape(V, C), params["embed"])
    assert not body[V * C : P * C].any()
    at = P * C + T * C + 2 * L * C  # past the tables and the first norms, over all layers
    fused = body[at : at + L * 3 * C * C].reshape(L, 3 * C, C)  # outputs first
    k_LDO = np.asarray(params["blocks"]["attention"]["k"]["w"]).reshape(L, C, C)
    np.testing.assert_array_equal(fused[:, C : 2 * C], k_LDO.swapaxes(1, 2))
    np.testing.assert_array_equal(body[-C:], params["final_norm"]["bias"])


def test_a_written_file_is_read_back_bitwise(path):
    cfg, _, params = model_of("gpt2")
    assert vars(read_config(path)) == vars(cfg)
    for key, x in read(path, "gpt2").items():
        np.testing.assert_array_equal(x, named_leaves(params)[key])


def test_a_bfloat16_file_is_version_5_with_rounded_weights(tmp_path):
    export("gpt2", tmp_path / "b.bin", dtype="bfloat16")
    assert np.fromfile(tmp_path / "b.bin", "<i4", 2)[1] == 5
    for key, x in read(tmp_path / "b.bin", "gpt2").items():
        want = named_leaves(model_of("gpt2")[2])[key]
        np.testing.assert_allclose(x, want, rtol=2.0**-8, atol=1e-7)


def test_a_folder_and_a_file_of_the_same_model_compute_the_same(path, tmp_path):
    export("gpt2", tmp_path / "hf")
    _, model, params = model_of("gpt2")
    trees = [
        jax.tree.unflatten(
            jax.tree.structure(params), [read(source, "gpt2")[k] for k in named_leaves(params)]
        )
        for source in (path, tmp_path / "hf")
    ]
    np.testing.assert_array_equal(*(logits(model, tree) for tree in trees))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda head: head.__setitem__(0, 7), "must start with 20240326"),
        (lambda head: head.__setitem__(1, 4), "version 3 .float32. or 5 .bfloat16.; got 4"),
        (lambda head: head.__setitem__(4, 3), "must have .* bytes by its header"),
        (lambda head: head.__setitem__(7, 64), "sizes that fit each other; got .*padded V=64"),
    ],
)
def test_a_damaged_header_is_refused_with_its_values(path, tmp_path, edit, message):
    data = bytearray(path.read_bytes())
    edit(np.frombuffer(data, "<i4", 256))
    (tmp_path / "bad.bin").write_bytes(data)
    with pytest.raises(InteropError, match=message):
        read_config(tmp_path / "bad.bin")


def test_a_truncated_file_is_refused(path, tmp_path):
    (tmp_path / "cut.bin").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InteropError, match="must have .* bytes by its header; got"):
        read(tmp_path / "cut.bin", "gpt2")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("llama", {}, "llm.c reads only GPT-2; got Llama"),
        ("gpt2", {"dtype": "float16"}, "float32 or bfloat16; got float16. Set --dtype"),
    ],
)
def test_a_model_that_llm_c_lacks_is_refused_and_leaves_no_file(tmp_path, name, options, message):
    with pytest.raises(InteropError, match=message):
        export(name, tmp_path / "x.bin", **options)
    assert not list(tmp_path.iterdir())

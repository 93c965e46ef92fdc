import jax
import jax.numpy as jnp
import llmc_reference
import numpy as np
import pytest
from small_models import TOKENS, export, logits, model_of, read, tree_of

from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config, write_folder
from jaxtrain.model.trees import named_leaves

VERSIONS = {"float32": 3, "bfloat16": 5}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return export("gpt2", tmp_path_factory.mktemp("llmc") / "gpt2.bin")


@pytest.mark.parametrize("dtype", VERSIONS)
def test_llm_c_reads_an_export_and_computes_the_same_logits(tmp_path, dtype):
    path = export("gpt2", tmp_path / "out.bin", dtype=dtype)
    head, tensors = llmc_reference.read(path)
    assert head == (VERSIONS[dtype], 64, 96, 2, 4, 32, 128)
    assert not tensors["wte"][96:].any()
    _, model, params = model_of("gpt2")
    exported = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    expected = logits(model, exported)
    for row, tokens in enumerate(TOKENS):
        found = llmc_reference.forward(head, tensors, tokens)
        np.testing.assert_allclose(expected[row], found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", VERSIONS)
@pytest.mark.parametrize("padded", [96, 128])
def test_a_file_of_llm_c_is_imported_and_computes_the_same_logits(tmp_path, dtype, padded):
    head, tensors = random_model(VERSIONS[dtype], padded)
    tensors["wte"][96:] = np.nan  # padding is not read
    llmc_reference.write(tmp_path / "in.bin", head, tensors)
    cfg, model, params = model_of("gpt2")
    assert vars(read_config(tmp_path / "in.bin")) == vars(cfg)
    imported = tree_of(model, read(tmp_path / "in.bin", "gpt2"))
    head, stored = llmc_reference.read(tmp_path / "in.bin")
    found = logits(model, imported)
    for row, tokens in enumerate(TOKENS):
        expected = llmc_reference.forward(head, stored, tokens)
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-5)


def random_model(version, padded):
    """Returns a header of the small GPT-2, and random tensors."""
    head = llmc_reference.Header(version, 64, 96, 2, 4, 32, padded)
    rng = np.random.default_rng(2)
    shapes = llmc_reference.sizes(head)
    return head, {k: 0.3 * rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("dtype", VERSIONS)
def test_an_imported_file_is_exported_bitwise(tmp_path, dtype):
    head, tensors = random_model(VERSIONS[dtype], 128)
    tensors["wte"][96:] = 0.0
    llmc_reference.write(tmp_path / "in.bin", head, tensors)
    cfg, model, _ = model_of("gpt2")
    params = read(tmp_path / "in.bin", "gpt2")
    write_folder(tmp_path / "out.bin", cfg, named_leaves(model.axes), params, dtype)
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "in.bin").read_bytes()


def test_values_that_are_not_finite_are_refused_with_their_count(tmp_path):
    head, tensors = random_model(3, 128)
    tensors["fcw"][1, 5, :2] = np.nan, np.inf
    llmc_reference.write(tmp_path / "in.bin", head, tensors)
    with pytest.raises(InteropError, match="h.1.mlp.c_fc.weight has 1 NaN and 1 infinite of 4,096"):
        read(tmp_path / "in.bin", "gpt2")


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

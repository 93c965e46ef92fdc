import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoint import integrity
from jaxtrain.checkpoint.integrity import build_record, compute_digests, flatten_state, read_record
from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.errors import CheckpointError

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint16", "int32", "bool", "float64", "int64"]


def some_array(dtype, shape=(16, 24), seed=0):
    bits = np.random.default_rng(seed).integers(
        0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8
    )
    if dtype == "bool":
        bits &= 1
    return bits.reshape(*shape[:-1], -1).view(jnp.dtype(dtype))


@pytest.fixture(params=DTYPES)
def dtype(request):
    with jax.enable_x64(request.param in ("float64", "int64")):
        yield request.param


def test_a_flipped_bit_anywhere_changes_the_digest(dtype):
    x = some_array(dtype)
    before = compute_digests([jnp.asarray(x)])
    raw = np.frombuffer(x.tobytes(), np.uint8)
    rng = np.random.default_rng(1)
    for byte in [0, raw.size - 1, *rng.integers(0, raw.size, 8)]:
        flipped = raw.copy()
        flipped[byte] ^= 1 if dtype == "bool" else 1 << rng.integers(0, 8)
        assert compute_digests([jnp.asarray(flipped.view(x.dtype).reshape(x.shape))]) != before


def test_a_swap_of_two_elements_changes_the_digest(dtype):
    x = some_array(dtype)
    before = compute_digests([jnp.asarray(x)])
    flat = x.reshape(-1)
    for i, j in [(0, 1), (0, flat.size - 1), (3, 3 + x.shape[1]), (100, 37)]:
        if flat[i].tobytes() == flat[j].tobytes():
            continue
        swapped = flat.copy()
        swapped[[i, j]] = flat[[j, i]]
        assert compute_digests([jnp.asarray(swapped.reshape(x.shape))]) != before


def test_a_swap_of_a_number_and_its_negative_changes_the_digest():
    x = np.arange(64, dtype=np.float32)
    x[[3, 40]] = 5.0, -5.0
    swapped = x.copy()
    swapped[[3, 40]] = -5.0, 5.0
    assert compute_digests([jnp.asarray(x)]) != compute_digests([jnp.asarray(swapped)])


def test_the_digest_distinguishes_signed_zeros_and_nan_bits():
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    values = [np.float32(0.0), np.float32(-0.0), quiet, other]
    assert len(set(compute_digests([jnp.full(3, value) for value in values]))) == 4


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2)])
def test_the_digest_does_not_depend_on_the_layout(sizes):
    x = some_array("float32", (16, 8, 24))
    mesh = build_mesh(MeshConfig(*sizes))
    specs = [P(), P("fsdp"), P(None, "fsdp", "tensor"), P("tensor", None, ("replica", "fsdp"))]
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs]
    assert set(compute_digests(arrays)) == set(compute_digests([jnp.asarray(x)]))


def test_the_digest_needs_no_temporary_of_the_arrays_size():
    for sharding in (None, NamedSharding(build_mesh(MeshConfig()), P(None, "fsdp"))):
        x = jax.ShapeDtypeStruct((1024, 4096), jnp.float32, sharding=sharding)
        compiled = (
            integrity._jitted_digests(sharding.mesh if sharding else None).lower([x]).compile()
        )
        assert compiled.memory_analysis().temp_size_in_bytes < 4096


def test_a_dtype_without_addressable_bits_is_refused():
    for x in (jax.random.key(0), jnp.zeros(2, jnp.complex64), jnp.zeros(2, jnp.int4)):
        for leaf in (x, jax.ShapeDtypeStruct(x.shape, x.dtype)):
            with pytest.raises(ValueError, match="must be bool, integer or float, of 8 to 64 bits"):
                flatten_state({"x": leaf})


def test_a_record_with_any_changed_character_is_rejected(tmp_path):
    folder = tmp_path / "7"
    for name in ("record/metadata", "state/_METADATA", "state/manifest.ocdbt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    meta = {"data": {"next": 12}, "rate": 0.1, "name": "é", "shape": (1, 2)}
    text = json.dumps(build_record(7, {"w": jnp.ones(3)}, meta))
    file = folder / "record/metadata"
    file.write_text(text)
    assert read_record(folder)["meta"] == {**meta, "shape": [1, 2]}
    for i, letter in enumerate(text):
        if letter in string.ascii_letters + string.digits + '{}[],"':
            file.write_text(text[:i] + ("1" if letter != "1" else "2") + text[i + 1 :])
            with pytest.raises(CheckpointError, match="record/metadata"):
                read_record(folder)


@pytest.mark.parametrize(
    ("leaf", "got"), [(np.zeros((2, 3), "f4"), r"ndarray float32\[2,3\]"), (0.1, "float 0.1")]
)
def test_a_leaf_of_numpy_or_python_is_refused_with_what_to_do(leaf, got):
    with pytest.raises(ValueError, match=f"got x, {got}. Convert it with jnp.asarray, or put"):
        flatten_state({"x": leaf})

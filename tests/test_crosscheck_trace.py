import numpy as np
import pytest

from jaxtrain.crosscheck.comparison import compare_traces, digest_distance
from jaxtrain.crosscheck.trace import (
    CHUNK,
    TraceError,
    TraceWriter,
    batch_hash,
    batches_of,
    digest,
    read_trace,
)


def random_array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (CHUNK + 5,)])
def test_numpy_and_pytorch_compute_the_same_digest(shape):
    torch = pytest.importorskip("torch", reason="torch is missing: the extra crosscheck")
    from jaxtrain.crosscheck import recorder

    x = random_array(*shape)
    for seed in (0, 7):
        ours, theirs = digest(x, seed), recorder.digest(torch.tensor(x), seed)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert digest(x, 0)[3:] != digest(x, 7)[3:]


def test_numpy_and_pytorch_hash_a_batch_alike_and_the_hash_depends_on_every_token():
    torch = pytest.importorskip("torch", reason="torch is missing: the extra crosscheck")
    from jaxtrain.crosscheck import recorder

    tokens = np.random.default_rng(0).integers(0, 50_257, (4, 9))
    theirs = torch.from_numpy(tokens)
    parts = lambda x: (x[:, :-1], x[:, 1:])
    ours = batch_hash(*parts(tokens))
    assert ours == recorder.batch_hash(*parts(theirs))
    for place in np.ndindex(*tokens.shape):
        other = tokens.copy()
        other[place] += 1
        assert batch_hash(*parts(other)) != ours


def test_the_distance_of_two_digests_estimates_that_of_the_tensors():
    x = random_array(64, 32)
    for size in (1.0, 1e-3, 1e-9):
        found = []
        for seed in range(1, 9):
            y = x + size * random_array(64, 32, seed=seed)
            found.append(digest_distance(np.array(digest(x)), np.array(digest(y))))
        true = size * np.linalg.norm(random_array(64, 32, seed=1)) / np.linalg.norm(x)
        if size < 1:
            assert np.median(found) == pytest.approx(true, rel=0.35)
        assert min(found) > 0.3 * size


def test_equal_tensors_have_distance_zero_and_a_nan_exceeds_any_tolerance():
    x = np.array(digest(random_array(5)))
    assert digest_distance(x, x) == 0
    zero = np.array(digest(np.zeros(5)))
    assert digest_distance(zero, zero) == 0
    assert not digest_distance(x, np.array(digest(np.full(5, np.nan)))) <= 1e9


def write(path, steps=3, seed=0, precision="float64", names=("a", "b"), shift=0.0):
    with TraceWriter(path, path.stem, precision, seed) as writer:
        for step in range(1, steps + 1):
            named = [(name, random_array(4, seed=step) + shift) for name in names]
            digests = {q: writer.digests(named) for q in ("gradient", "update", "parameter")}
            writer.write({"step": step, "batch": "0", "loss": 2.0 + shift} | digests)
    return path


def test_a_trace_reads_back_as_it_was_written(tmp_path):
    found = read_trace(write(tmp_path / "a.jsonl"))
    assert [line["step"] for line in found.steps] == [1, 2, 3]
    assert found.header["precision"] == "float64"
    assert found.steps[1]["gradient"]["a"].tolist() == digest(random_array(4, seed=2))


def test_the_batches_of_a_trace_have_its_documents_and_weights(tmp_path):
    batch = {"tokens": [[5, 6, 7]], "docs": [[0, 0, 1]], "weights": [[1.0, 0.25]]}
    with TraceWriter(tmp_path / "t.jsonl", "a", "float32") as writer:
        writer.write({"step": 1, "batch": "0", "loss": 1.0} | batch)
        writer.write({"step": 2, "batch": "0", "loss": 1.0, "tokens": [[1, 2, 3]]})
    first, second = batches_of(read_trace(tmp_path / "t.jsonl"))
    assert {name: x.tolist() for name, x in first.items()} == batch
    assert [x.dtype for x in first.values()] == [np.int32, np.int32, np.float64]
    assert list(second) == ["tokens"]


def test_a_trace_of_a_killed_loop_has_its_finished_steps(tmp_path):
    path = write(tmp_path / "a.jsonl")
    path.write_text(path.read_text()[:-40])
    assert [line["step"] for line in read_trace(path).steps] == [1, 2]


@pytest.mark.parametrize(
    "damage, error",
    [
        (lambda lines: [], "must begin with format 1 or 2"),
        (lambda lines: lines[1:], "must begin with format 1 or 2"),
        (lambda lines: lines[:1], "at least one step"),
        (lambda lines: [*lines[:2], "{", *lines[2:]], "line 3 .* must be a JSON object"),
        (lambda lines: [lines[0], lines[2], lines[1]], "steps must ascend"),
        (lambda lines: [lines[0], '{"step": 1}'], "must have batch and loss"),
        (
            lambda lines: [lines[0], '{"step": 1, "batch": "", "loss": 1, "gradient": {"w": [1]}}'],
            "gradient of w must have 19 numbers; got 1",
        ),
    ],
)
def test_a_damaged_trace_is_an_error_that_names_the_line(tmp_path, damage, error):
    path = write(tmp_path / "a.jsonl")
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(TraceError, match=error):
        read_trace(path)
    with pytest.raises(TraceError, match="readable"):
        read_trace(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    "other, error",
    [
        ({"seed": 1}, "the same seed"),
        ({"names": ("a", "c")}, "must name their tensors alike"),
        ({"precision": "bfloat16"}, "set --truth"),
    ],
)
def test_traces_that_cannot_be_compared_are_an_error_with_the_reason(tmp_path, other, error):
    first = read_trace(write(tmp_path / "a.jsonl"))
    second = read_trace(write(tmp_path / "b.jsonl", **other))
    with pytest.raises(TraceError, match=error):
        compare_traces(first, second)


def test_a_quantity_that_only_one_trace_has_is_reported_and_not_compared(tmp_path):
    first = read_trace(write(tmp_path / "a.jsonl"))
    second = read_trace(write(tmp_path / "b.jsonl"))
    for line in second.steps:
        del line["update"], line["parameter"]
    found = compare_traces(first, second)
    assert found.missing == ["parameter", "update"]
    assert found.divergence is None


def test_traces_without_a_common_step_are_an_error(tmp_path):
    first = read_trace(write(tmp_path / "a.jsonl", steps=2))
    second = first._replace(steps=[line | {"step": line["step"] + 9} for line in first.steps])
    with pytest.raises(TraceError, match="must share a step"):
        compare_traces(first, second)

import json

import numpy as np
import pytest

from jaxtrain.crosscheck import trace
from jaxtrain.crosscheck.comparison import compare, distance
from jaxtrain.crosscheck.trace import CHUNK, TraceError, Writer, batch_hash, digest, read_trace


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (CHUNK + 5,)])
def test_numpy_and_pytorch_write_the_same_digest(shape):
    torch = pytest.importorskip("torch", reason="torch is missing: the extra crosscheck")
    from jaxtrain.crosscheck import recorder

    x = draw(*shape)
    for seed in (0, 7):
        ours, theirs = digest(x, seed), recorder.digest(torch.tensor(x), seed)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert digest(x, 0)[3:] != digest(x, 7)[3:]


def test_numpy_and_pytorch_hash_a_batch_alike_and_see_every_token():
    torch = pytest.importorskip("torch", reason="torch is missing: the extra crosscheck")
    from jaxtrain.crosscheck import recorder

    tokens = np.random.default_rng(0).integers(0, 50_257, (4, 9))
    theirs = torch.from_numpy(tokens)
    assert batch_hash(tokens) == recorder.batch_hash(theirs[:, :-1], theirs[:, 1:])
    for place in np.ndindex(*tokens.shape):
        other = tokens.copy()
        other[place] += 1
        assert batch_hash(other) != batch_hash(tokens)


def test_the_distance_of_two_digests_is_about_that_of_the_tensors():
    x = draw(64, 32)
    for size in (1.0, 1e-3, 1e-9):
        found = []
        for seed in range(1, 9):
            y = x + size * draw(64, 32, seed=seed)
            found.append(distance(np.array(digest(x)), np.array(digest(y))))
        true = size * np.linalg.norm(draw(64, 32, seed=1)) / np.linalg.norm(x)
        if size < 1:
            assert np.median(found) == pytest.approx(true, rel=0.35)
        assert min(found) > 0.3 * size


def test_equal_tensors_have_no_distance_and_a_nan_is_beyond_any():
    x = np.array(digest(draw(5)))
    assert distance(x, x) == 0
    zero = np.array(digest(np.zeros(5)))
    assert distance(zero, zero) == 0
    assert not distance(x, np.array(digest(np.full(5, np.nan)))) <= 1e9


def write(path, steps=3, seed=0, precision="float64", names=("a", "b"), shift=0.0):
    with Writer(path, path.stem, precision, seed) as writer:
        for step in range(1, steps + 1):
            named = [(name, draw(4, seed=step) + shift) for name in names]
            digests = {q: writer.digests(named) for q in ("gradient", "update", "parameter")}
            writer.write({"step": step, "batch": "0", "loss": 2.0 + shift} | digests)
    return path


def test_a_trace_comes_back_as_it_was_written(tmp_path):
    found = read_trace(write(tmp_path / "a.jsonl"))
    assert [line["step"] for line in found.steps] == [1, 2, 3]
    assert found.header["precision"] == "float64"
    assert found.steps[1]["gradient"]["a"].tolist() == digest(draw(4, seed=2))


def test_a_trace_whose_loop_was_killed_keeps_its_whole_steps(tmp_path):
    path = write(tmp_path / "a.jsonl")
    path.write_text(path.read_text()[:-40])
    assert [line["step"] for line in read_trace(path).steps] == [1, 2]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda lines: [], "must begin with format 1"),
        (lambda lines: lines[1:], "must begin with format 1"),
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
def test_a_file_that_is_no_whole_trace_is_refused_with_its_line(tmp_path, spoil, says):
    path = write(tmp_path / "a.jsonl")
    path.write_text("".join(f"{line}\n" for line in spoil(path.read_text().splitlines())))
    with pytest.raises(TraceError, match=says):
        read_trace(path)
    with pytest.raises(TraceError, match="readable"):
        read_trace(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    "other, says",
    [
        ({"seed": 1}, "one seed"),
        ({"names": ("a", "c")}, "must name their tensors alike"),
        ({"precision": "bfloat16"}, "Set --truth"),
    ],
)
def test_traces_that_cannot_be_compared_say_why(tmp_path, other, says):
    first = read_trace(write(tmp_path / "a.jsonl"))
    second = read_trace(write(tmp_path / "b.jsonl", **other))
    with pytest.raises(TraceError, match=says):
        compare(first, second)


def test_what_only_one_trace_holds_is_said_not_judged(tmp_path):
    first = read_trace(write(tmp_path / "a.jsonl"))
    second = read_trace(write(tmp_path / "b.jsonl"))
    for line in second.steps:
        del line["update"], line["parameter"]
    found = compare(first, second)
    assert found.absent == ["parameter", "update"]
    assert found.divergence is None


def test_traces_with_no_step_in_common_are_refused(tmp_path):
    first = read_trace(write(tmp_path / "a.jsonl", steps=2))
    second = first._replace(steps=[line | {"step": line["step"] + 9} for line in first.steps])
    with pytest.raises(TraceError, match="must share a step"):
        compare(first, second)


def test_each_line_of_a_trace_is_plain_json(tmp_path):
    lines = write(tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["trace"] == trace.FORMAT
    assert all(json.loads(line) for line in lines)

import json

import numpy as np
import pytest

from jaxtrain.crosscheck.batches import describe_batch, describe_difference, differing_parts
from jaxtrain.crosscheck.trace import TraceWriter, batches_of, read_trace

NAMES = ("ours", "theirs")
TOKENS = np.random.default_rng(0).integers(0, 99, (4, 9)).astype(np.int32)
MASK = (np.arange(32).reshape(4, 8) % 5 > 0).astype(float)


def describe(tokens=TOKENS, rows=(4,), **more):
    return describe_batch({"tokens": tokens} | more, rows)


def changed(place):
    tokens = TOKENS.copy()
    tokens[place] += 1
    return tokens


UNEQUAL = MASK * np.array([[1.0], [2.0], [2.0], [2.0]])
CASES = {
    "nothing": (describe(), []),
    "the inputs": (describe(changed((1, 3))), ["inputs"]),
    "the last target": (describe(changed((1, 8))), ["targets"]),
    "a mask": (describe(weights=MASK), ["mask"]),
    "the size of micro-batches of equal weights": (describe(rows=(2, 2)), []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_parts_in_which_batches_differ_are_named(case):
    other, parts = CASES[case]
    assert differing_parts(describe(), other) == parts


def test_weights_differ_only_if_their_ratios_do():
    masked, unequal = describe(weights=MASK), describe(weights=UNEQUAL, rows=(1, 3))
    assert differing_parts(masked, describe(weights=7 * MASK)) == []
    assert differing_parts(unequal, describe(weights=np.float32(UNEQUAL), rows=(1, 3))) == []
    assert differing_parts(masked, unequal) == ["weights"]
    text = "; ".join(describe_difference(masked, unequal, NAMES))
    assert "the mean of the micro-batches' means" in text
    assert "ours has 4 rows, theirs 1 + 3" in text


def test_padding_is_a_mask_like_weights_of_zero():
    docs = np.zeros((4, 9), np.int32)
    docs[:, 1:] = np.where(MASK > 0, 0, -1)
    assert differing_parts(describe(docs=docs), describe(weights=MASK)) == []


def test_a_trace_of_format_1_is_read_and_compared_by_its_hash(tmp_path):
    path = tmp_path / "a.jsonl"
    line = {"step": 1, "batch": describe()["batch"], "loss": 2.0, "tokens": TOKENS.tolist()}
    with TraceWriter(path, "old", "float32") as writer:
        writer.write(line)
    text = path.read_text().replace('"trace": 2', '"trace": 1').replace('"trace":2', '"trace":1')
    assert json.loads(text.splitlines()[0])["trace"] == 1
    path.write_text(text)
    (batch,) = batches_of(read_trace(path))
    assert batch.keys() == {"tokens"} and np.array_equal(batch["tokens"], TOKENS)
    assert differing_parts(line, describe()) == []
    assert differing_parts(line, describe(changed((0, 0)))) == ["tokens"]


def test_the_recorder_describes_a_batch_as_jaxtrain_does(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing: the extra crosscheck")
    from jaxtrain.crosscheck.recorder import Recorder

    x, y = (torch.from_numpy(part.copy()).long() for part in (TOKENS[:, :-1], TOKENS[:, 1:]))
    weights = torch.from_numpy(UNEQUAL)
    y[MASK == 0] = -100
    with Recorder(tmp_path / "a.jsonl", torch.nn.Linear(2, 2), activations={}) as recorder:
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
            T = 6 if rows.start else 8  # the later micro-batches are shorter
            recorder.micro_batch(x[rows, :T], y[rows, :T], torch.ones(()))
        recorder.before_step()
        recorder.after_step()
        recorder.before_step(x, y, torch.ones(()), weights)
        recorder.after_step()
    first, second = read_trace(tmp_path / "a.jsonl").steps[1:]
    assert first["parts"]["micro_batches"] == [1, 2, 1]
    assert first["loss"] == 3.0  # the losses of micro-batches are shares of the step's
    assert differing_parts(second, describe(weights=UNEQUAL)) == []
    read = list(batches_of(read_trace(tmp_path / "a.jsonl")))
    for step, batch in zip((first, second), read, strict=True):
        assert differing_parts(step, describe_batch(batch, batch.get("rows", [4]))) == []
    each = [batch.sum() for batch in np.split(read[0]["weights"], [1, 3])]
    np.testing.assert_allclose(each, each[0])  # the mean of the micro-batches' means


@pytest.mark.parametrize(
    "misuse, error",
    [
        (lambda r, x, loss: r.after_step(), "before_step must come before after_step"),
        (lambda r, x, loss: r.before_step(), "needs inputs, targets and loss"),
        (lambda r, x, loss: [r.before_step(x, x, loss) for _ in range(2)], "must follow each"),
        (lambda r, x, loss: r.before_step(x[0], x[0], loss), r"tensors \[B,T\]; got shapes \(3,\)"),
        (lambda r, x, loss: r.before_step(x, x[:, 1:], loss), r"got shapes \(2, 3\) and \(2, 2\)"),
        (lambda r, x, loss: r.before_step(x, x, 2.0), "loss must be the tensor .* got float"),
    ],
)
def test_a_recorder_that_is_used_in_another_order_says_so(misuse, error, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing: the extra crosscheck")
    from jaxtrain.crosscheck.recorder import Recorder

    with Recorder(tmp_path / "a.jsonl", torch.nn.Linear(2, 2), activations={}) as recorder:
        with pytest.raises(ValueError, match=error):
            misuse(recorder, torch.zeros(2, 3, dtype=torch.int64), torch.tensor(2.0))

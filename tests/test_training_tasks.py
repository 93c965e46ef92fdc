"""Scores of tasks: against direct computations, and for any batch and mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import debug
from jaxtrain.config.train_config import MeshConfig, freeze
from jaxtrain.data.tasks.open_tasks import Task
from jaxtrain.data.tasks.tokens import Piece, TokenExample
from jaxtrain.distributed.mesh import param_sharding
from jaxtrain.training.run import build_run
from jaxtrain.training.scoring import Scorer
from jaxtrain.training.tasks import TaskScores, task_metrics

T, V = 128, 256
LENGTHS = (2, 65, 66, 129)  # tokens of a piece; 65 just fit the shorter of the two programs


def build(batch=8, accumulation=1, devices=1, mesh=(1, -1, 1)):
    config = debug.get_config()
    config.update(accumulation=accumulation)
    config.data.update(batch=batch, seq_len=T, document_mask=True)  # a mask that scores ignore
    config.model.update(L=1)
    cfg = dataclasses.replace(freeze(config), mesh=MeshConfig(*mesh))
    return build_run(cfg, jax.devices()[:devices])


def shardings_of(run):
    sharding = lambda axes, shape: param_sharding(axes, shape.shape, run.mesh)
    return jax.tree.map(sharding, run.model.axes, run.model.shapes)


@pytest.fixture(scope="module")
def params():
    """Weights that are large enough for greedy decoding to be sure."""
    run = build()
    return jax.tree.map(lambda w: 2 * w, jax.jit(run.model.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def scorer():
    return Scorer(build())


@pytest.fixture(scope="module")
def pieces(params):
    """Pieces of several lengths; each third one ends in the likeliest tokens."""
    rng, found = np.random.default_rng(0), []
    model = build().model
    next_token = jax.jit(lambda t: model.logits(params, model.apply(params, t)).argmax(-1))
    for i in range(30):
        length = LENGTHS[i % len(LENGTHS)]
        tokens, scored = rng.integers(0, V, length), int(rng.integers(1, length))
        scored = min(scored, 2) if i % 3 == 0 else scored
        if i % 3 == 0:
            for end in range(length - scored, length):
                padded = np.zeros((1, T), np.int32)
                padded[0, :end] = tokens[:end]
                tokens[end] = next_token(padded)[0, end - 1]
        found.append(Piece(tokens.astype(np.int32), scored))
    return found


@pytest.fixture(scope="module")
def direct(params, pieces):
    """Each piece by itself, without padding, from all logits in float64 on the host."""
    model = build().model
    logits_of = jax.jit(lambda tokens: model.logits(params, model.apply(params, tokens)))
    nats, greedy = [], []
    for piece in pieces:
        logits = np.asarray(logits_of(piece.tokens[None, :-1])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = np.arange(len(logits))[-piece.scored :]
        targets = piece.tokens[-piece.scored :]
        nats.append(-log_p[rows, targets].sum())
        greedy.append(bool((logits[rows].argmax(-1) == targets).all()))
    return np.array(nats), np.array(greedy)


@pytest.mark.parametrize(
    "layout",
    [{}, {"batch": 8, "accumulation": 2, "devices": 8, "mesh": (2, 2, 2)}],
    ids=["one device", "fewer rows on 8 devices"],
)
def test_scores_equal_a_direct_computation_for_any_batch_and_mesh(
    scorer, params, pieces, direct, layout
):
    run = build(**layout)
    placed = jax.device_put(params, shardings_of(run))
    nats, greedy = (Scorer(run) if layout else scorer).score(placed, pieces)
    np.testing.assert_allclose(nats, direct[0], rtol=1e-5)
    assert greedy.tolist() == direct[1].tolist()
    assert 5 <= greedy.sum() < len(pieces)


def test_a_second_evaluation_compiles_nothing(scorer, params, pieces):
    placed = jax.device_put(params, shardings_of(build()))
    scorer.score(placed, pieces)
    scorer.score(jax.tree.map(lambda w: w + 0, placed), pieces[:7])
    assert [program._cache_size() for program in scorer._programs.values()] == [1, 1]


def test_a_signal_ends_the_scoring_before_the_next_batch(scorer, params, pieces):
    assert scorer.score(params, pieces, lambda: "SIGTERM") is None


def example(sizes, answer=0, answer_bytes=10):
    choices = tuple(np.ones(1, np.int32) for _ in sizes)
    return TokenExample(np.ones(1, np.int32), choices, answer, sizes, answer_bytes)


def test_the_fewest_nats_win_and_the_first_of_equal_ones():
    examples = [example((1, 1, 1), answer) for answer in (0, 1, 2)]
    nats = np.array([3.0, 2.0, 2.0] * 3)
    metrics = task_metrics(examples, nats, np.zeros(9, bool))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["accuracy_stderr"] == pytest.approx(np.std([0, 1, 0], ddof=1) / 3**0.5)
    assert metrics["bits_per_byte"] == pytest.approx(7 / np.log(2) / 30)
    assert metrics["examples"] == 3


def test_normalised_accuracy_divides_by_sizes():
    metrics = task_metrics([example((1, 4), answer=1)], np.array([2.0, 6.0]), np.zeros(2, bool))
    assert (metrics["accuracy"], metrics["accuracy_norm"]) == (0, 1)
    assert "accuracy_stderr" not in metrics  # of one example it is undefined


def test_one_choice_is_right_if_it_is_the_greedy_one():
    metrics = task_metrics([example((1,))] * 4, np.ones(4), np.array([True, False, False, True]))
    assert metrics["accuracy"] == 0.5 and "accuracy_norm" not in metrics
    unknown = task_metrics([example((1,), answer_bytes=0)], np.ones(1), np.ones(1, bool))
    assert "bits_per_byte" not in unknown


def test_tasks_are_scored_together_and_reported_by_name(scorer, params):
    """A choice longer than the context is scored in two pieces, and its task counts it as cut."""
    rng = np.random.default_rng(1)
    ids = lambda count: rng.integers(1, V, count).astype(np.int32)
    long = TokenExample(ids(5), (ids(T + 30),), 0, (1,), T + 30)
    short = TokenExample(ids(5), (ids(3), ids(4)), 1, (3, 4), 4)
    tasks = [Task("long", "llmc", 1, (long,)), Task("short", "arc", 2, (short, short))]
    params = jax.device_put(params, shardings_of(build()))
    metrics = TaskScores(scorer, tasks).evaluate(params)
    whole = np.concatenate([long.context, *long.choices])
    split = [Piece(whole[: 5 + 30], 30), Piece(whole[-T - 1 :], T)]
    bits = scorer.score(params, split)[0].sum() / np.log(2)
    assert metrics["eval/long_bits_per_byte"] == pytest.approx(bits / (T + 30), rel=1e-6)
    assert (metrics["eval/long_truncated"], metrics["eval/short_truncated"]) == (1, 0)
    assert metrics["eval/short_examples"] == 2

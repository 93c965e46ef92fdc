"""The last part of a step (rate, decay, norms) equals twins in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_twins import (
    ADAM_RATE,
    AXES,
    OPTIONS,
    RATE,
    SHAPES,
    Adam,
    Muon,
    assert_histories_agree,
    decoupled,
    draw,
    train_ours,
    train_twin,
)

from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.acceleration import ema_lookahead, gradient_transport
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.param_groups import group_table
from jaxtrain.optim.recipes import adam_h, muon_h


def cautious(p, u, rate, decay):
    """One line of Algorithm 1 of https://arxiv.org/abs/2510.12402."""
    return p - rate * (u + decay * p * (u * p > 0))


@pytest.mark.parametrize("name, twin, rate", [("muon", Muon, RATE), ("adamw", Adam, ADAM_RATE)])
@pytest.mark.parametrize("is_cautious", [False, True])
def test_weight_decay_equals_its_twin_over_50_steps(name, twin, rate, is_cautious):
    ours, _ = train_ours(name=name, weight_decay=1.0, cautious_decay=is_cautious)
    expected = train_twin(twin, cautious if is_cautious else decoupled, decay=1.0, rate=rate)
    assert_histories_agree([params for params, _ in ours], expected)


def test_cautious_decay_shrinks_only_entries_that_the_step_moves_towards_zero():
    first = lambda **options: train_ours(weight_decay=1.0, **options)[0][0][0]
    start, ours, plain = draw(0), first(cautious_decay=True), first(decay_groups="")
    for name in ("w_in", "w_out", "embed"):
        towards_zero = (np.asarray(plain[name]) - start[name]) * start[name] < 0
        shrunk = np.abs(np.asarray(ours[name])) < np.abs(np.asarray(plain[name]))
        assert np.array_equal(shrunk, towards_zero), name


def norm_preserving(p, u, rate, decay):
    """The step of the class MuonH in modded-nanogpt's 20260430_muonh; decay has no effect."""
    del decay
    norm = np.linalg.norm(p)
    new = p - rate * u * norm / max(np.linalg.norm(u), 1e-10)
    return new / max(np.linalg.norm(new), 1e-10) * norm


@pytest.mark.parametrize("name, twin", [("muon_h", Muon), ("adam_h", Adam)])
def test_norm_preserving_optimizers_equal_their_twins_over_50_steps(name, twin):
    ours, _ = train_ours(name=name, weight_decay=1.0)
    expected = train_twin(twin, norm_preserving, decay=1.0, rest_apply=decoupled)
    assert_histories_agree([params for params, _ in ours], expected)


WRAPPERS = {
    "none": lambda inner: inner,
    "transport": lambda inner: gradient_transport(inner, 0.95, 0.25),
    "transport_narrow": lambda inner: gradient_transport(inner, 0.95, 0.25, jnp.bfloat16),
    "ema_lookahead": lambda inner: ema_lookahead(inner, 0.6),
}


@pytest.mark.parametrize(
    ("wrapper", "per_head"),
    [("none", True), ("transport", False), ("transport_narrow", True), ("ema_lookahead", False)],
)
def test_the_evaluated_matrices_have_the_norms_of_init_to_the_last_digits(wrapper, per_head):
    cfg = OptimConfig(**OPTIONS | {"name": "muon_h", "per_head": per_head, "learning_rate": 0.1})
    history, _ = train_ours(WRAPPERS[wrapper](build_optimizer(cfg, AXES)))
    head = (1, 3) if per_head else (1, 2, 3)  # dims of a matrix in w_in, [L,D,H,K]
    for name, dims in {"w_in": head, "w_out": (1, 2)}.items():
        norms = lambda x, dims=dims: np.sqrt((np.asarray(x) ** 2).sum(dims))
        for _, iterate in history:
            np.testing.assert_allclose(norms(iterate[name]), norms(draw(0)[name]), rtol=1e-13)
        assert np.abs(np.asarray(history[-1][1][name]) - draw(0)[name]).max() > 0.5


def test_float32_norms_do_not_drift():
    axes, start = {"w": AXES["w_out"]}, jnp.asarray(draw(0)["w_out"], jnp.float32)
    optimizer = build_optimizer(OptimConfig(name="muon_h", schedule="constant"), axes)
    params = {"w": start}

    def advance(i, carry):
        params, state = carry
        grads = {"w": jax.random.normal(jax.random.key(i), start.shape, jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    loop = jax.jit(lambda carry: jax.lax.fori_loop(0, 1000, advance, carry))
    params, _ = loop((params, optimizer.init(params)))
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64).reshape(2, -1), axis=1)
    np.testing.assert_allclose(norm(params["w"]), norm(start), rtol=3e-7)


def test_decay_leaves_norm_preserving_matrices_out_of_the_group_table():
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    for name in ("muon_h", "adam_h"):
        rows = group_table(OptimConfig(name=name, weight_decay=0.1), AXES, params)
        assert {row.name: row.decay for row in rows if row.decay} == {"embed": 0.1}
        assert {row.scale for row in rows} == {1.0}


def test_a_zero_matrix_is_an_error_that_names_it():
    params = draw(0) | {"w_out": np.zeros(SHAPES["w_out"])}
    params["w_out"][0] = 1.0  # the other matrix of the stack is zero
    with pytest.raises(ValueError, match="w_out.*--optim.name"):
        build_optimizer(OptimConfig(name="muon_h"), AXES).init(params)


@pytest.mark.parametrize("recipe", [muon_h, adam_h])
def test_a_recipe_is_the_trainers_optimizer(recipe):
    rates = {"learning_rate": RATE, "weight_decay": 1.0, "adam_learning_rate": ADAM_RATE}
    axes = {name: str(a) for name, a in AXES.items()}
    fixed = {"clip_norm": 0.0, "schedule": "constant", "warmup_steps": 0, "ns_dtype": "float64"}
    dtype = {"dtype": "float64"} if recipe is muon_h else {}
    ours, _ = train_ours(recipe(axes, **rates, **dtype))
    theirs, _ = train_ours(name=recipe.__name__, **rates, **fixed)
    assert_histories_agree([p for p, _ in ours], [p for p, _ in theirs], 1e-12)

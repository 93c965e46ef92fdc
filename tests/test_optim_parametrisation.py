"""Coordinate checks of optim.parametrisation, and its rules."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig, freeze
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim.build import build_optimizer, peak_rates
from jaxtrain.optim.param_groups import group_table
from jaxtrain.optim.parametrisation import scale_by_size, scale_initial_values

WIDTH, DEPTH, STEPS = 64, 2, 10
OPTIMIZERS = ("muon", "accelerated_lmo", "adamw")
STEEPEST = 0.25  # slope of log size over log width or depth; a wrong exponent would be 0.5 or 1
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 17))


def config(width=WIDTH, depth=DEPTH, optim=(), **model):
    """Returns a tiny config whose matrices grow with the width, as many heads and narrow MLPs."""
    shape = {"L": depth, "D": width, "H": width // 64, "G": width // 64, "K": 8, "F": width // 8}
    shape |= {"V": 32, "mlp": "gelu", "dtype": "float32", "attention": "reference", "unroll": 1}
    rules = {"parametrisation": "spectral", "base_width": WIDTH, "base_depth": DEPTH}
    rules |= {"schedule": "constant", "warmup_steps": 0, "ns_dtype": "float32"}
    return freeze({"optim": rules | {"ns_form": "standard"} | dict(optim), "model": shape | model})


def network_of(cfg):
    routes = choose_routes(cfg.model, False, "cpu", False)
    return scale_initial_values(cfg, build_model(cfg.model, routes))


@functools.cache
def sizes_of(width, depth, parametrisation="spectral", names=OPTIMIZERS):
    """Trains on one batch with each optimizer, all in one compiled program.

    Returns:
        [2,2,N]: RMS of (the last layer's output, the logits) and of their changes over STEPS.
    """
    configs = [config(width, depth, {"name": n, "parametrisation": parametrisation}) for n in names]
    network = network_of(configs[0])
    optimizers = [build_optimizer(cfg.optim, network.axes) for cfg in configs]

    def loss(params):
        states_LBTD, hidden_BTD = network.hidden_states(params, TOKENS[:, :-1])
        logits_BTV = network.logits(params, hidden_BTD)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), TOKENS[:, 1:, None], -1)
        return -picked.mean(), (states_LBTD[-1], logits_BTV)

    def step(carry, _):
        params, states = carry
        grads, outputs = jax.vmap(jax.grad(loss, has_aux=True))(params)
        new_params, new_states = [], []
        for i, optimizer in enumerate(optimizers):
            g, p = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (grads, params))
            updates, state = optimizer.update(g, states[i], p)
            new_params.append(jax.tree.map(jnp.add, p, updates))
            new_states.append(state)
        return (jax.tree.map(lambda *x: jnp.stack(x), *new_params), new_states), outputs

    @jax.jit
    def train(key):
        start = network.init(key)
        states = [optimizer.init(start) for optimizer in optimizers]
        stacked = jax.tree.map(lambda x: jnp.stack([x] * len(names)), start)
        _, outputs = jax.lax.scan(step, (stacked, states), length=STEPS + 1)
        rms = lambda x: jnp.sqrt(jnp.mean(x**2, range(1, x.ndim)))
        return [rms(x[-1]) for x in outputs], [rms(x[-1] - x[0]) for x in outputs]

    return np.array(train(jax.random.key(0)))


def slope(small, large, small_sizes, large_sizes):
    """Returns the slope of each log size over the log of the width or depth."""
    growth = math.log(large[0] * large[1] / (small[0] * small[1]))
    return np.log(large_sizes / small_sizes) / growth


@pytest.mark.long
@pytest.mark.parametrize("small, large", [((64, 2), (1024, 2)), ((64, 8), (64, 32))])
def test_sizes_of_activations_and_of_their_changes_are_flat(small, large):
    slopes = slope(small, large, sizes_of(*small), sizes_of(*large))
    assert np.abs(slopes).max() < STEEPEST, slopes


@pytest.mark.long
@pytest.mark.parametrize("name, large", [("adamw", (256, 2)), ("muon", (64, 32))])
def test_the_standard_parametrisation_fails_the_same_check(name, large):
    small = WIDTH, DEPTH  # where both parametrisations are the same
    small_sizes = sizes_of(*small)[..., [OPTIMIZERS.index(name)]]
    slopes = slope(small, large, small_sizes, sizes_of(*large, "standard", (name,)))
    assert slopes.max() > 2 * STEEPEST, slopes


def factors_of(cfg):
    """Returns {name: (factor of the initial values, factor of the step)}."""
    model = build_model(cfg.model, choose_routes(cfg.model, False, "cpu", False))
    ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), model.shapes)
    initial = scale_initial_values(cfg, model._replace(init=lambda key: ones)).init(None)
    identity = optax.with_extra_args_support(optax.identity())
    steps, _ = scale_by_size(cfg.optim, model.axes, identity, False).update(ones, ())
    pairs = zip(named_leaves(initial).items(), jax.tree.leaves(steps), strict=True)
    return {name: (x.flat[0], step.flat[0]) for (name, x), step in pairs}


ALL_KINDS = {"norm_place": "both", "bias": True, "norm": "layer", "position": "learned"}
# Each parameter's factors of (initial values, steps) at twice the width and four times the depth.
RULES = {
    "embed": (2**0.5, 1),
    "positions": (2**0.5, 1),
    "head": (1, 1 / 2),
    "final_norm.gain": (1, 1),
    "blocks.attention_norm.gain": (1, 1),
    "blocks.mlp_post_norm.gain": (1 / 4, 1 / 4),
    "blocks.attention.q.b": (1, 1),
    "blocks.mlp.down.b": (1, 1 / 4),
}
ADAMW_MATRICES = {"blocks.mlp.up.w": (1, 1 / 2), "blocks.attention.o.w": (1, 1 / 8)}
MUON_MATRICES = {"blocks.mlp.up.w": (1, 1), "blocks.attention.o.w": (1, 1 / 4)}
TIED = {"embed": (2**0.5, 1), "final_norm.gain": (1 / 2, 1 / 2), "final_norm.bias": (1 / 2, 1 / 2)}


@pytest.mark.parametrize(
    "optim, model, rules",
    [
        ({"name": "adamw"}, {}, RULES | ADAMW_MATRICES),
        ({"name": "muon"}, {}, RULES | MUON_MATRICES),
        ({"name": "muon", "scale": "match_rms"}, {}, {"blocks.mlp.up.w": (1, 2**-0.5)}),
        ({"name": "accelerated_lmo", "rest": "lmo"}, {}, RULES | MUON_MATRICES | {"head": (1, 1)}),
        ({"name": "adamw"}, {"tied": True}, TIED),
        ({"name": "adamw"}, {"tied": True, "embed_norm": True}, {"embed": (2, 1)}),
    ],
)
def test_the_rules_of_each_role(optim, model, rules):
    factors = factors_of(config(2 * WIDTH, 4 * DEPTH, optim, **ALL_KINDS | model))
    for name, expected in rules.items():
        assert factors[name] == pytest.approx(expected), name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_at_the_base_size_every_factor_is_exactly_1(name, tied):
    factors = factors_of(config(optim={"name": name}, tied=tied, **ALL_KINDS))
    assert set(factors.values()) == {(1, 1)}


FEW = {"embed": "V|D", "head": "|V<-D", "blocks": {"mlp": {"up": {"w": "L|D->F"}}}}
FEW_SIZES = {"L": 4 * DEPTH, "D": 2 * WIDTH, "F": 4, "V": 2}


def first_update(gradient, **optim):
    """Returns {name: an entry} of AdamW's first update of FEW parameters, which are all ones."""
    axes = jax.tree.map(Axes.parse, FEW)
    params = jax.tree.map(lambda a: jnp.ones(a.shape(FEW_SIZES)), axes)
    cfg = config(optim={"name": "adamw", "clip_norm": 0.0} | optim).optim
    optimizer = build_optimizer(cfg, axes)
    grads = jax.tree.map(lambda p: gradient * p, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    entries = {name: float(np.ravel(u)[0]) for name, u in named_leaves(updates).items()}
    return {name: entry / cfg.adam_learning_rate for name, entry in entries.items()}


def test_weight_decay_per_step_does_not_depend_on_the_size():
    updates = first_update(gradient=0.0, weight_decay=0.1)
    assert list(updates.values()) == pytest.approx([-0.1] * len(FEW))


def test_adams_eps_shrinks_as_gradients_do():
    updates = first_update(gradient=1e-3, adam_eps=8e-3)
    assert updates["embed"] == pytest.approx(-1 / (1 + 8 / 2))  # half as wide, half of eps
    assert updates["head"] == pytest.approx(-1 / (1 + 8) / 2)
    assert updates["blocks.mlp.up.w"] == pytest.approx(-1 / (1 + 8 / 2 / 4) / 2)


def test_the_group_table_shows_effective_rates_and_the_peak_rates_stay_base_rates():
    cfg = config(128, 4, {"name": "muon", "weight_decay": 0.1})
    network = network_of(cfg)
    rows = {row.name: row for row in group_table(cfg.optim, network.axes, network.shapes)}
    assert rows["head"].rate == 3e-3 / 2 and rows["head"].decay == 0.2
    assert rows["embed"].rate == 3e-3 and rows["blocks.mlp.down.w"].rate == 0.02 / 2
    assert peak_rates(cfg.optim, network.axes) == {"matrices": 0.02, "rest": 3e-3}


@pytest.mark.parametrize("field, value", [("name", "normuon"), ("per_head", True)])
def test_what_the_rules_do_not_cover_is_an_error(field, value):
    with pytest.raises(ValueError, match=f"optim.{field} must be .*parametrisation=spectral"):
        OptimConfig(parametrisation="spectral", **{field: value})


def test_axes_without_a_width_are_an_error():
    with pytest.raises(ValueError, match="axes must name the width D .* got .I->O"):
        build_optimizer(config().optim, {"w": Axes.parse("|I->O")})


def test_without_gains_a_tied_head_cannot_be_scaled():
    with pytest.raises(ValueError, match="model.norm_gain must be true .* unless model.tied=false"):
        config(tied=True, norm_gain=False)

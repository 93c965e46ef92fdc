import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim import build
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.optim.build import OPTIMIZERS, apply_and_measure, build_optimizer
from jaxtrain.optim.clipping import clip_gradients
from jaxtrain.optim.param_groups import format_group_table, group_table
from jaxtrain.optim.schedule import build_schedule

SIZES = {"L": 8, "D": 64, "H": 4, "G": 2, "K": 16, "F": 192, "V": 128, "T": 32}
AXES = jax.tree.map(
    Axes.parse,
    {
        "blocks": {
            "wq": "L|D->HK",
            "wk": "L|D->GK",
            "wo": "L|HK->D",
            "w_gate": "L|D->F",
            "w_down": "L|F->D",
            "norm": "L|D",
        },
        "embed": "V|D",
        "head": "|V<-D",
        "positions": "T|D",
        "final_norm": "|D",
    },
)
FEW = {
    "w_in": Axes.parse("L|D->HK"),
    "w_out": Axes.parse("L|F->D"),
    "norm": Axes.parse("L|D"),
    "embed": Axes.parse("V|D"),
}
FEW_SIZES = {"L": 2, "D": 16, "H": 2, "K": 8, "F": 24, "V": 32}  # whose steps are computed
MATRICES = {"blocks.wq", "blocks.wk", "blocks.wo", "blocks.w_gate", "blocks.w_down"}


def random_params(seed, axes=FEW):
    rng = np.random.default_rng(seed)
    sizes = FEW_SIZES if axes is FEW else SIZES
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape(sizes)), jnp.float32)
    return jax.tree.map(draw, axes)


def train(optimizer, params, steps=3, gradient=random_params):
    """Returns the weights to evaluate after each step, and the last optimizer state."""

    @jax.jit
    def advance(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, history = jax.jit(optimizer.init)(params), []
    evaluated = jax.jit(eval_params)
    for i in range(steps):
        params, state = advance(params, state, gradient(100 + i))
        history.append(evaluated(state, params))
    return history, state


@functools.cache
def compile_noisy(name, rest="adamw"):
    """Returns (config, compiled init, compiled update(grads, state, params, good)).

    The noise is a multiple of the first gradient, so that zero gradients stay zero.
    """
    cfg = OptimConfig(name=name, rest=rest, weight_decay=0.1, noise_scale=0.1, warmup_steps=2)
    optimizer = build_optimizer(cfg, FEW)
    update = lambda grads, state, params, good: optimizer.update(grads, state, params, good=good)
    return cfg, jax.jit(optimizer.init), jax.jit(update)


def rows_by_name(cfg, axes=AXES):
    return {row.name: row for row in group_table(cfg, axes, random_params(0, axes))}


def test_only_matrices_follow_muon_and_only_matrices_embedding_and_head_decay():
    rows = rows_by_name(OptimConfig(weight_decay=0.1))
    assert {name for name, row in rows.items() if row.optimizer == "muon"} == MATRICES
    assert {name for name, row in rows.items() if row.decay} == MATRICES | {"embed", "head"}
    assert {rows[name].rate for name in MATRICES} == {0.02}
    assert {rows[name].rate for name in rows.keys() - MATRICES} == {3e-3}
    assert rows["blocks.wo"].view == "8x64x64"


def test_the_state_has_one_moment_for_matrices_and_two_for_the_rest():
    params = random_params(0, AXES)
    state = build_optimizer(OptimConfig(), AXES).init(params)
    sizes = {name: x.size for name, x in named_leaves(params).items()}
    matrices = sum(sizes[name] for name in MATRICES)
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == matrices + 2 * (sum(sizes.values()) - matrices)


def test_the_group_table_lists_every_parameter_in_aligned_columns():
    rows = group_table(OptimConfig(), AXES, random_params(0, AXES))
    lines, names = format_group_table(rows).splitlines(), named_leaves(AXES)
    assert len(lines) == 1 + len(names)
    assert len({line.index(name) for line, name in zip(lines[1:], names, strict=True)}) == 1
    column = lines[0].index("rate")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_a_zero_gradient_the_parameters_decay_exactly(name):
    cfg, init, update = compile_noisy(name)
    params, schedule, rows = random_params(0), build_schedule(cfg), rows_by_name(cfg, FEW)
    zeros, state, before = jax.tree.map(jnp.zeros_like, params), init(params), params
    # The iterate is computed from the query point, and Muown's rows from length and direction.
    ulps = {"accelerated_lmo": 3, "muown": 4}.get(name, 1)
    for count in range(3):
        updates, state = update(zeros, state, params, True)
        params = optax.apply_updates(params, updates)
        evaluated = eval_params(state, params)
        for key, after in evaluated.items():
            factor = np.float32(1 - rows[key].rate * float(schedule(count)) * rows[key].decay)
            expected = np.asarray(before[key] * factor)
            np.testing.assert_array_max_ulp(np.asarray(after), expected, ulps)
        before = evaluated


def test_the_adamw_group_equals_optax_adamw():
    cfg = OptimConfig(weight_decay=0.1, clip_norm=0.0)
    history, _ = train(build_optimizer(cfg, FEW), random_params(0), steps=20)
    schedule = build_schedule(cfg)
    decays = jax.tree.map(lambda a: "V" in a.letters, FEW)
    rate = lambda count: 3e-3 * schedule(count)
    reference = optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decays)
    expected, _ = train(reference, random_params(0), steps=20)
    for key in ("norm", "embed"):
        np.testing.assert_allclose(history[-1][key], expected[-1][key], rtol=1e-6, atol=1e-7)


def test_adamw_on_everything_equals_torch_adamw():
    reason = "torch is missing: install the crosscheck extra to compare with torch.optim.AdamW"
    torch = pytest.importorskip("torch", reason=reason)
    cfg = OptimConfig(name="adamw", weight_decay=0.1, clip_norm=0.0, schedule="constant")
    schedule, start = build_schedule(cfg), random_params(0)
    history, _ = train(build_optimizer(cfg, FEW), start, steps=20)
    rows = rows_by_name(cfg, FEW)
    to_torch = lambda p: torch.nn.Parameter(torch.from_numpy(np.array(p)))
    twins = {key: to_torch(p) for key, p in named_leaves(start).items()}
    groups = [{"params": [p], "weight_decay": rows[k].decay} for k, p in twins.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for i in range(20):
        for key, g in named_leaves(random_params(100 + i)).items():
            twins[key].grad = torch.from_numpy(np.array(g))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * float(schedule(i))
        optimizer.step()
    for key, ours in named_leaves(history[-1]).items():
        np.testing.assert_allclose(ours, twins[key].detach().numpy(), rtol=1e-5, atol=2e-6)


def test_all_groups_count_the_same_steps_and_a_zero_rate_moves_nothing():
    cfg = OptimConfig(learning_rate=0.0, adam_learning_rate=0.0, weight_decay=0.1)
    start = random_params(0)
    history, state = train(build_optimizer(cfg, FEW), start)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, history[-1], start)))
    assert {int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32} == {3}


def test_clipping_scales_all_gradients_by_their_global_norm_and_leaves_small_ones():
    grads = random_params(1)
    norm = float(optax.tree.norm(grads))
    cases = [(norm / 8, 0.0, 1 / 8), (2 * norm, 0.0, 1), (0.0, 0.0, 1)]
    # clip_eps is added to the norm, as in torch's clip_grad_norm_: the last one clips for it alone.
    cases += [(norm / 4, norm, 1 / 8), (norm, norm / 2, 2 / 3)]
    for limit, eps, factor in cases:
        cfg = OptimConfig(name="adamw", clip_norm=limit, clip_eps=eps)
        optimizer = build_optimizer(cfg, FEW)
        _, state = train(optimizer, random_params(0), 1, lambda _: grads)
        for group, key in [("matrices", "w_in"), ("rest", "embed"), ("rest", "norm")]:
            first_moment = state[-1].inner_states[group].inner_state[0].mean[key]
            np.testing.assert_allclose(first_moment, 0.1 * factor * grads[key], rtol=1e-5)


def test_clipping_with_clip_eps_uses_the_norm_of_all_devices():
    grads = random_params(1, {"w": FEW["w_in"]})["w"]
    mesh = jax.make_mesh((8,), ("fsdp",))
    split = jax.device_put(grads, jax.sharding.NamedSharding(mesh, jax.P("fsdp")))
    clip = jax.jit(lambda g: clip_gradients(1.0, 0.5).update(g, optax.EmptyState())[0])
    expected = grads / (jnp.linalg.norm(grads) + 0.5)
    np.testing.assert_allclose(clip(split), expected, rtol=1e-5)


@pytest.mark.parametrize("rest", ["adamw", "lmo"])
@pytest.mark.parametrize(
    ("groups", "decayed"),
    [
        ("matrices,embedding,positions,head", MATRICES | {"embed", "head", "positions"}),
        ("vectors, positions", {"blocks.norm", "final_norm", "positions"}),
        ("", set()),
    ],
)
def test_decay_groups_chooses_the_parameters_that_decay(groups, decayed, rest):
    rows = rows_by_name(OptimConfig(weight_decay=0.1, decay_groups=groups, rest=rest))
    assert {name for name, row in rows.items() if row.decay == 0.1} == decayed
    assert {row.decay for row in rows.values()} <= {0.0, 0.1}


@pytest.mark.parametrize(
    "axes",
    [{"w": Axes.parse("|D->F"), "gain": None}, {"w": Axes.parse("|D->F"), "gain": "|D"}],
)
def test_missing_or_invalid_axes_are_an_error_that_names_the_parameter(axes):
    with pytest.raises(ValueError, match="gain"):
        build_optimizer(OptimConfig(), axes)


def test_a_parameter_without_axes_is_an_error_that_names_it():
    optimizer = build_optimizer(OptimConfig(), {"w": Axes.parse("|D->F")})
    with pytest.raises(ValueError, match="bias"):
        optimizer.init({"w": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})


@pytest.mark.parametrize(
    "axes, shape", [("L|D->F", (4, 6)), ("|D->F", (2, 4, 6)), ("|D->D", (4, 6)), ("V|D", (4,))]
)
def test_axes_that_do_not_fit_are_an_error_with_path_shape_and_axes(axes, shape):
    optimizer = build_optimizer(OptimConfig(), {"blocks": {"w": Axes.parse(axes)}})
    with pytest.raises(ValueError) as error:
        optimizer.init({"blocks": {"w": jnp.zeros(shape)}})
    assert all(part in str(error.value) for part in ("blocks.w", str(shape), axes))


def test_an_unknown_optimizer_lists_the_known_ones():
    cfg = OptimConfig()
    object.__setattr__(cfg, "name", "lion")
    with pytest.raises(ValueError, match="muon, normuon, .*--optim.name"):
        build_optimizer(cfg, FEW)


def test_updates_are_added_and_their_root_mean_square_is_that_of_each_group(monkeypatch):
    monkeypatch.setattr(build, "SLICE_BYTES", 16)  # several slices, which are not all equal
    fill = lambda a: jnp.full(a.shape(FEW_SIZES), 2.0 if a.is_matrix else 3.0)
    updates = jax.tree.map(fill, FEW)
    params, ones = jax.tree.map(jnp.ones_like, updates), jax.tree.map(jnp.ones_like, updates)
    measure = jax.jit(
        lambda params, updates: apply_and_measure(params, updates, FEW, OptimConfig())
    )
    new, rms = measure(params, updates)
    jax.tree.map(np.testing.assert_array_equal, new, jax.tree.map(jnp.add, ones, updates))
    assert {k: float(v) for k, v in rms.items()} == {
        "optim/matrices/update_rms": pytest.approx(2),
        "optim/rest/update_rms": pytest.approx(3),
    }


@pytest.mark.parametrize(
    ("name", "rest"), [(name, "adamw") for name in OPTIMIZERS] + [("muon", "lmo")]
)
def test_a_bad_step_changes_neither_parameters_nor_state(name, rest):
    (_, init, update), params = compile_noisy(name, rest), random_params(0)
    _, state = update(random_params(2), init(params), params, True)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), random_params(1))
    updates, after = update(bad, state, params, False)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), state, after)
    assert all(jax.tree.leaves(same))


def test_with_rest_lmo_every_role_has_its_norm_and_rate():
    cfg = OptimConfig(rest="lmo", weight_decay=0.1)
    rows = rows_by_name(cfg)
    roles = {"embed": "embedding", "head": "head", "positions": "embedding", "final_norm": "vector"}
    assert {name: rows[name].group for name in roles} == roles
    assert rows["embed"].geometry == "column_norm" and rows["embed"].rate == 0.02
    assert rows["head"].geometry == "sign" and rows["head"].rate == pytest.approx(1.2)
    assert rows["head"].view == "1x64x128" and rows["blocks.norm"].view == "8x1x64"
    params = random_params(0, AXES)
    buffers = [x for x in jax.tree.leaves(build_optimizer(cfg, AXES).init(params)) if x.ndim]
    assert optax.tree.size(buffers) == optax.tree.size(params)  # one momentum for each


def test_the_group_table_shows_per_head_views():
    rows = rows_by_name(OptimConfig(per_head=True, scale="match_rms"))
    assert rows["blocks.wq"].view == "32x64x16" and rows["blocks.wo"].view == "32x16x64"
    assert rows["blocks.w_gate"].view == "8x64x192"
    assert rows["blocks.wq"].scale == pytest.approx(0.2 * 8)

import functools
import importlib
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import MeshConfig, OptimConfig, freeze
from jaxtrain.distributed.mesh import build_mesh, moment_spec, param_sharding
from jaxtrain.optim.build import build_optimizer, state_shardings
from jaxtrain.optim.lmo import build_unit_step
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.sharded_muon import build_sharded_map, load_imbalance, pool_matrices
from jaxtrain.training.run import build_run

SIZES = {"D": 64, "H": 4, "G": 2, "K": 16, "F": 192, "V": 128}
MATRICES = {
    "wq": Axes.parse("L|D->HK"),
    "wk": Axes.parse("L|D->GK"),
    "wv": Axes.parse("L|D->GK"),
    "wo": Axes.parse("L|HK->D"),
    "w_gate": Axes.parse("L|D->F"),
    "w_down": Axes.parse("L|F->D"),
}
AXES = MATRICES | {"norm": Axes.parse("L|D"), "embed": Axes.parse("V|D")}
POOLS = 3  # wq with wo, wk with wv, w_gate with w_down
MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]
LAYERS = [8, 6]  # divisible by 8 devices, and not


def mesh_of(sizes):
    return build_mesh(MeshConfig(*sizes))


def draw(axes, layers, seed=0):
    rng = np.random.default_rng(seed)
    sizes = SIZES | {"L": layers}
    return {k: jnp.asarray(rng.normal(size=a.shape(sizes)), jnp.float32) for k, a in axes.items()}


def distance(ours, theirs):
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@functools.cache
def update_on(sizes, layers, name="muon", ns_dtype="bfloat16"):
    """Returns (jitted update, its arguments), sharded over a mesh or on one device."""
    cfg = OptimConfig(name=name, weight_decay=0.1, warmup_steps=0, ns_dtype=ns_dtype)
    params, grads = draw(AXES, layers), draw(AXES, layers, seed=1)
    if sizes is None:
        optimizer = build_optimizer(cfg, AXES)
        args = grads, optimizer.init(params), params
        return jax.jit(optimizer.update), args
    mesh = mesh_of(sizes)
    optimizer = build_optimizer(cfg, AXES, mesh)
    of_params = {k: param_sharding(a, params[k].shape, mesh) for k, a in AXES.items()}
    of_state = state_shardings(optimizer, AXES, params, mesh)
    state = jax.device_put(optimizer.init(params), of_state)
    args = jax.device_put(grads, of_params), state, jax.device_put(params, of_params)
    return jax.jit(optimizer.update, out_shardings=(of_params, of_state)), args


@functools.cache
def compile_on(*case):
    """Returns (compiled update, its arguments) of update_on(*case)."""
    update, args = update_on(*case)
    return update.lower(*args).compile(), args


@functools.cache
def step_on_one_device(layers, per_head):
    """Returns (unit steps' builder, the steps of all matrices on one device)."""
    options = {"dtype": jnp.float32, "per_head": per_head}
    unit_step = functools.partial(build_unit_step, NewtonSchulz(), **options)
    return unit_step, jax.jit(functools.partial(unit_step(), MATRICES))(draw(MATRICES, layers))


@pytest.mark.parametrize(
    "sizes, layers, per_head",
    [(sizes, 6, False) for sizes in MESHES[:3]]
    + [((2, 2, 2), 8, True), ((2, 2, 2), 7, False), ((4, 2, 1), 3, False)],
)
def test_sharded_steps_equal_those_of_one_device(sizes, layers, per_head):
    mesh, tree = mesh_of(sizes), draw(MATRICES, layers)
    specs = {k: moment_spec(a, tree[k].shape, mesh) for k, a in MATRICES.items()}
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    unit_step, whole = step_on_one_device(layers, per_head)
    for replicate in (True, False) if sizes[0] > 1 else (True,):
        step = unit_step(map_matrices=build_sharded_map(mesh, replicate))
        split = jax.jit(functools.partial(step, MATRICES))(jax.device_put(tree, shardings))
        for key, y in split.items():
            assert distance(y, whole[key]) <= 3e-6


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_the_bf16_update_on_a_mesh_equals_that_of_one_device_up_to_rounding(sizes):
    (split, args), (whole, whole_args) = compile_on(sizes, 8), compile_on(None, 8)
    ours, theirs = split(*args)[0], whole(*whole_args)[0]
    for key, u in ours.items():
        assert distance(u, theirs[key]) <= 2e-2


def test_momentum_is_sharded_like_its_parameter_and_over_replicas_too():
    _, (grads, state, params) = update_on((2, 2, 2), 8)
    momentum = state[-1].inner_states["matrices"].inner_state[0].momentum
    shard = lambda x: np.prod(x.sharding.shard_shape(x.shape))
    for key in MATRICES:
        assert 2 * shard(momentum[key]) == shard(params[key])
    rest = state[-1].inner_states["rest"].inner_state
    assert rest[0].square["embed"].sharding == params["embed"].sharding
    assert rest[1].count.is_fully_replicated


@pytest.mark.parametrize("layers", LAYERS)
def test_the_transport_buffer_is_sharded_over_replicas(layers):
    _, (_, state, params) = update_on((8, 1, 1), layers, "accelerated_lmo")
    offset = state[-1].inner_states["matrices"].inner_state.offset
    for key in MATRICES:
        assert 8 * np.prod(offset[key].sharding.shard_shape(params[key].shape)) == params[key].size


@pytest.mark.parametrize(
    "sizes, layers, name",
    [
        ((8, 1, 1), 6, "accelerated_lmo"),
        ((8, 1, 1), 6, "adamw"),
        ((2, 2, 2), 8, "normuon"),
    ],
)
def test_a_float32_update_on_a_mesh_equals_that_of_one_device(sizes, layers, name):
    case = layers, name, "float32"
    (split, args), (whole, whole_args) = compile_on(sizes, *case), compile_on(None, *case)
    ours, theirs = split(*args)[0], whole(*whole_args)[0]
    for key, u in ours.items():
        assert distance(u, theirs[key]) <= 3e-6


def collectives(compiled):
    """Counts (whether in the entry computation, op) in the compiled HLO."""
    counts, entry = Counter(), False
    for line in compiled.as_text().splitlines():
        if line and not line[0].isspace():
            entry = line.startswith("ENTRY")
        op = re.search(r" (all-to-all|all-gather|all-reduce|collective-permute)(-start)?\(", line)
        if op:
            counts[entry, op[1]] += 1
    return counts


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_the_loop_contains_no_collective(sizes):
    compiled, _ = compile_on(sizes, 8)
    assert "while(" in compiled.as_text()
    counts = collectives(compiled)
    assert all(entry for entry, _ in counts)
    assert counts[True, "all-to-all"] <= 2 * POOLS


@functools.cache
def flops_of_steps(sizes, layers):
    """Returns (XLA's FLOPs of a device, load_imbalance); matrices are wide: products dominate."""
    wide = SIZES | {"D": 128, "F": 512, "K": 32, "L": layers}
    tree = {k: jax.ShapeDtypeStruct(a.shape(wide), jnp.float32) for k, a in MATRICES.items()}
    options, load = {"dtype": jnp.float32}, 1.0
    if sizes is not None:
        mesh = mesh_of(sizes)
        load = load_imbalance(MATRICES, tree, mesh)
        for key, x in tree.items():
            sharding = NamedSharding(mesh, moment_spec(MATRICES[key], x.shape, mesh))
            tree[key] = x.update(sharding=sharding)
        options["map_matrices"] = build_sharded_map(mesh)
    newton_schulz = NewtonSchulz(chunk_bytes=0)  # no loop over chunks: XLA counts a loop once
    step = functools.partial(build_unit_step(newton_schulz, **options), MATRICES)
    return jax.jit(step).lower(tree).compile().cost_analysis()["flops"], load


@pytest.mark.parametrize("layers", [8, 26])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1)])
def test_a_device_does_the_flops_that_load_imbalance_predicts(sizes, layers):
    (split, load), (whole, _) = flops_of_steps(sizes, layers), flops_of_steps(None, layers)
    assert split <= 1.1 * whole / 8
    assert split == pytest.approx(load * whole / 8, rel=0.01)


@pytest.mark.parametrize(
    "name", ["gpt_124m", "gpt_350m", "gpt_774m", "gpt_1558m", "llama_135m", "llama_1400m"]
)
def test_shipped_models_load_eight_devices_evenly(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.accumulation = 1
    model = build_run(freeze(config), jax.devices()).model
    for sizes in MESHES[:3]:
        assert load_imbalance(model.axes, model.shapes, mesh_of(sizes)) <= 1.1, sizes


def test_the_program_does_not_grow_with_layers():
    size = lambda layers: len(compile_on(None, layers)[0].as_text())
    assert size(26) <= 1.02 * size(8)


def test_matrices_of_one_shape_share_a_pool_whatever_their_name_and_orientation():
    pools = pool_matrices(MATRICES, draw(MATRICES, 8), mesh_of((1, 8, 1)))
    names = [{name for name, _ in members} for members in pools.values()]
    assert names == [{"wq", "wo"}, {"wk", "wv"}, {"w_gate", "w_down"}]

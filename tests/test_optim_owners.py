"""On a mesh each device steps whole matrices with their SOAP state, and results are the same."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import debug
from jaxtrain.axes import Axes
from jaxtrain.config.train_config import MeshConfig, OptimConfig, freeze
from jaxtrain.distributed.mesh import build_mesh, param_sharding
from jaxtrain.optim.acceleration import gradient_transport
from jaxtrain.optim.build import build_optimizer, state_shardings
from jaxtrain.optim.owners import ownership
from jaxtrain.optim.preconditioner_cost import owner_imbalance, preconditioner_flops
from jaxtrain.optim.soap import scale_by_soap
from jaxtrain.training.memory_formula import estimate_memory

# Factors of square matrices have full rank in the first step, and so one eigenbasis. With one
# key/value head, `tensor` does not split wk: devices along it have copies. `single` has no stack.
AXES = {k: Axes.parse(a) for k, a in {"wq": "L|D->HK", "wk": "L|D->GK", "single": "|D->F"}.items()}


def draw(layers, seed):
    rng = np.random.default_rng(seed)
    shapes = {"wq": (layers, 16, 4, 4), "wk": (layers, 16, 1, 16), "single": (16, 16)}
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}


def train(name, layers, mesh=None):
    """Returns (updates and state after 4 steps, compiled update)."""
    cfg = OptimConfig(name=name, precondition_every=2, warmup_steps=0, ns_dtype="float32")
    optimizer, params = build_optimizer(cfg, AXES, mesh), draw(layers, 0)
    state, shardings = optimizer.init(params), None
    if mesh is not None:
        of_params = {k: param_sharding(a, params[k].shape, mesh) for k, a in AXES.items()}
        shardings = of_params, state_shardings(optimizer, AXES, params, mesh)
        params, state = jax.device_put((params, state), shardings)
    place = lambda grads: grads if mesh is None else jax.device_put(grads, shardings[0])
    update = jax.jit(optimizer.update, out_shardings=shardings)
    compiled = update.lower(place(draw(layers, 1)), state, params).compile()
    for step in range(4):
        updates, state = compiled(place(draw(layers, 1 + step)), state, params)
    return (updates, state), compiled


def owned_by(state):
    return state[-1].inner_states["matrices"].inner_state[0].owned


def check_shards(buffers):
    """Checks that each device has the buffers of one matrix of each parameter."""
    for name, x in buffers.items():
        of_one = x.shape if name == "single" else (1, *x.shape[1:])
        assert x.sharding.shard_shape(x.shape) == of_one


def test_a_stack_that_not_all_axes_divide_is_split_over_some_and_repeated_over_the_others():
    mesh = build_mesh(MeshConfig(2, 2, 2))
    (updates, state), compiled = train("soap", 4, mesh)
    (expected, expected_state), _ = train("soap", 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), updates, expected)
    pairs = zip(owned_by(state), owned_by(expected_state), strict=True)
    for ours, theirs in pairs:  # eigenvectors may differ in sign
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(abs(a), abs(b), atol=1e-4), ours, theirs
        )
        check_shards(ours)
    # Of 9 equal matrices, a device steps 3: one of each stack, with 4 owners each, and `single`.
    assert owner_imbalance(AXES, updates, mesh) == pytest.approx(3 / (9 / 8))


def test_each_mesh_axis_that_splits_a_parameter_costs_an_all_to_all_each_way():
    mesh = build_mesh(MeshConfig(1, 4, 2))
    (updates, state), compiled = train("soap_muon", 8, mesh)
    (expected, _), _ = train("soap_muon", 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), updates, expected)
    for buffers in owned_by(state):
        check_shards(buffers)
    op = r" (all-to-all|all-gather|collective-permute)(?:-start)?\("
    counts = Counter(re.findall(op, compiled.as_text()))
    # wq is split by fsdp and tensor; wk by fsdp, and tensor's copies of it are gathered at the end.
    # `single` is gathered over both, and every device cuts its part out of the step.
    assert counts == {"all-to-all": 2 * 3, "all-gather": 1 + 2}


def test_owners_are_found_inside_wrappers():
    mesh, params = build_mesh(MeshConfig(1, 8, 1)), draw(8, 0)
    inner = optax.chain(scale_by_soap(AXES, mesh=mesh), optax.scale(-1.0))
    wrapped = state_shardings(gradient_transport(inner, 0.9, 0.25), AXES, params, mesh)
    owned = ownership(AXES["wq"], params["wq"].shape, mesh).owned
    assert owned == jax.P(("fsdp",))
    assert {s.spec for s in wrapped.inner[0].owned.input_basis.values()} == {owned, jax.P(None)}


def test_the_memory_formula_splits_soaps_state_only_where_devices_divide_the_layers():
    config = debug.get_config()
    config.optim.name, config.model.L = "soap", 4
    state_bytes = lambda devices: estimate_memory(freeze(config), devices).state
    assert state_bytes(4) == pytest.approx(state_bytes(1) / 4, rel=0.02)
    assert state_bytes(8) > state_bytes(1) / 2  # 8 devices divide no stack of 4 layers


def test_flops_of_products_equal_xlas():
    sizes, axes = (1, 192, 320), Axes.parse("L|D->F")
    transform, x = scale_by_soap(axes, every=1), jnp.zeros(sizes)
    flops = jax.jit(transform.update).lower(x, transform.init(x)).compile().cost_analysis()["flops"]
    decomposition = 8 / 3 * (192**3 + 320**3)  # XLA does not count LAPACK's
    expected = preconditioner_flops([sizes], "soap", 1) - decomposition
    assert flops == pytest.approx(expected, rel=0.03)

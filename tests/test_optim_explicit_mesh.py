"""Recipes where parameters are split over explicit axes of a mesh, as jax.make_mesh gives them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.optim import recipes
from jaxtrain.optim.recipes import accelerated_lmo, adam_h, muon, scale_by_muon

OWN_LOOP = Path(__file__).parent.parent / "docs" / "own_loop.md"
VALUES = {"w": jax.random.normal(jax.random.key(0), (4, 8)), "bias": jnp.ones(8)}
SPLIT = {"w": P(None, "data"), "bias": P("data")}
BY_DIRECTION = [muon, recipes.normuon, accelerated_lmo, recipes.soap, recipes.soap_muon]
BY_DIRECTION += [recipes.muon_h, recipes.muown]


def place(specs, kind=AxisType.Explicit):
    """Returns (mesh of four devices, VALUES split over it)."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return mesh, jax.tree.map(put, VALUES, specs)


def step(update, mesh, params):
    with jax.set_mesh(mesh):
        return jax.jit(update)(params, params)


def update_by(optimizer):
    return lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize("recipe", BY_DIRECTION)
def test_a_matrix_split_over_an_explicit_axis_is_refused_with_both_cures(recipe):
    mesh, params = place(SPLIT)
    match = r"got w of P\(None, 'data'\)\. .*AxisType.Auto.*jax.set_mesh\(mesh\).*auto_axes\("
    with pytest.raises(ValueError, match=match), jax.set_mesh(mesh):
        jax.eval_shape(update_by(recipe()), params, params)


def test_the_bare_transform_is_refused_too():
    mesh, params = place(SPLIT)
    with pytest.raises(ValueError, match="got w of .*auto_axes"), jax.set_mesh(mesh):
        jax.eval_shape(update_by(scale_by_muon()), {"w": params["w"]}, {"w": params["w"]})


def test_what_needs_no_products_of_split_matrices_is_stepped():
    for optimizer, specs in ((muon(), SPLIT | {"w": P()}), (adam_h(), SPLIT)):
        mesh, params = place(specs)
        ours = step(update_by(optimizer), mesh, params)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-5),
            *(ours, jax.jit(update_by(optimizer))(VALUES, VALUES)),
        )


def by_auto_axes(optimizer):
    """Returns a step by the code of docs/own_loop.md for an explicit mesh."""
    [code] = re.findall(r"```python\n(specs = .*?)```", OWN_LOOP.read_text(), re.DOTALL)

    def update(grads, params):
        names = {"jax": jax, "optimizer": optimizer, "state": optimizer.init(params)}
        names |= {"grads": grads, "params": params}
        exec(code, names)
        return names["updates"]

    return update


@pytest.mark.parametrize("recipe", [muon, accelerated_lmo])
def test_both_cures_give_the_steps_of_one_device(recipe):
    optimizer = recipe(learning_rate=0.1, dtype="float32")
    expected = update_by(optimizer)(VALUES, VALUES)
    for kind, build in ((AxisType.Auto, update_by), (AxisType.Explicit, by_auto_axes)):
        ours = step(build(optimizer), *place(SPLIT, kind))
        assert ours["w"].sharding.spec == SPLIT["w"]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), ours, expected
        )

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.config.run_sections import MeshConfig
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.acceleration import TransportState
from jaxtrain.sites.fragments import build_programs, rounds_until, split_leaves


class State(NamedTuple):
    params: Any
    opt_state: Any = ()


SHAPES = {"blocks.w": (4, 16, 24), "embed": (40, 16), "gain": (16,), "head": (16, 40)}


def params(seed=0):
    rng = np.random.default_rng(seed)
    leaves = {path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in SHAPES.items()}
    return {"blocks": {"w": leaves.pop("blocks.w")}, **leaves}


def test_fragments_are_balanced_and_have_every_leaf_once_in_the_order_of_the_tree():
    for count in (1, 2, 3, 4):
        fragments = split_leaves(SHAPES, count)
        paths = [path for fragment in fragments for path in fragment.shapes]
        assert sorted(paths) == sorted(SHAPES) and len(fragments) == count
        for fragment in fragments:
            assert list(fragment.shapes) == [path for path in SHAPES if path in fragment.shapes]
    sizes = [fragment.elements for fragment in split_leaves(SHAPES, 2)]
    assert sizes == [1536, 1296] and sum(sizes) == sum(map(math.prod, SHAPES.values()))
    with pytest.raises(ValueError, match="sites.fragments must be at most 4, .*; got 5"):
        split_leaves(SHAPES, 5)


def test_every_fragment_starts_once_a_period_and_their_starts_are_spread():
    count = lambda n, f: rounds_until(n, 10, f, 3)
    starts = [[n for n in range(1, 21) if count(n, f) > count(n - 1, f)] for f in range(3)]
    assert [count(0, f) for f in range(3)] == [0, 0, 0]
    assert starts == [[10, 20], [3, 13], [6, 16]]


@pytest.mark.parametrize("devices", [1, 2, 6])
def test_a_fragments_vector_does_not_depend_on_the_mesh(devices):
    mesh = build_mesh(MeshConfig(replica=1), jax.devices()[:devices])
    fragment = split_leaves(SHAPES, 2)[1]
    shardings = jax.tree.map(lambda _: jax.NamedSharding(mesh, P()), State(params()))
    programs = build_programs(fragment, mesh, shardings)
    layout = programs.layout
    with jax.set_mesh(mesh):
        vector = programs.snapshot(State(params()))
        assert len({shard.device for shard in vector.addressable_shards}) == devices
        owned = layout.to_host(vector)
        leaves = named_leaves(params())
        expected = np.concatenate([np.ravel(leaves[path]) for path in fragment.shapes])
        assert (owned[: expected.size] == expected).all() and not owned[expected.size :].any()
        assert owned.size == len(layout.owned) * 1024 and layout.owned == range(2)
        # Replacing by another tree's vector changes this fragment's leaves only, bit for bit.
        other = programs.snapshot(State(params(1)))
        start = jax.device_put(State(params()), shardings)
        back = layout.to_devices(layout.to_host(other))
        new = programs.apply["replace"](start, back)
    mine, theirs, got = (named_leaves(tree) for tree in (params(), params(1), new.params))
    for path in SHAPES:
        assert (got[path] == (theirs if path in fragment.shapes else mine)[path]).all()


def test_the_point_of_the_gradient_moves_with_the_iterate():
    """The iterate is exchanged; the offset of the query point from it stays what it was."""
    mesh = build_mesh(MeshConfig(replica=1), jax.devices()[:1])
    offset = jax.tree.map(lambda x: np.asarray(x) / 8, params(1))
    # New arrays each time, because apply donates them.
    state = lambda: State(
        params(), TransportState(jnp.int32(0), (), jax.tree.map(jnp.array, offset))
    )
    shardings = jax.tree.map(lambda _: jax.NamedSharding(mesh, P()), state())
    programs = build_programs(split_leaves(SHAPES, 1)[0], mesh, shardings)
    layout = programs.layout
    iterate = jax.tree.map(jnp.subtract, params(), offset)
    with jax.set_mesh(mesh):
        owned = layout.to_host(programs.snapshot(state()))
        expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(iterate)])
        assert (owned[: expected.size] == expected).all()
        for mode, vector in (("replace", owned + 1), ("move", np.ones_like(owned))):
            new = programs.apply[mode](state(), layout.to_devices(vector))
            moved = jax.tree.map(lambda x: x + 1, params())
            for x, y in zip(jax.tree.leaves(new.params), jax.tree.leaves(moved), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
            assert jax.tree.all(jax.tree.map(jnp.array_equal, new.opt_state.offset, offset))

"""Checks that a state that is not finite on one machine is found, and the machine named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.training.finite import describe_spoiled, is_finite_here


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_spoiled_copy_of_a_replicated_weight_is_found(dtype):
    mesh = jax.make_mesh((4,), ("replica",), devices=jax.devices()[:4])
    copies = [jax.device_put(jnp.ones(3, dtype), device) for device in jax.devices()[:4]]
    spread = NamedSharding(mesh, PartitionSpec())
    whole = lambda parts: jax.make_array_from_single_device_arrays((3,), spread, parts)
    step = jnp.int32(7)
    assert is_finite_here({"w": whole(copies), "step": step})
    spoiled = [*copies[:2], copies[2] * np.nan, copies[3]]
    assert not is_finite_here({"w": whole(spoiled), "step": step})


def test_only_processes_that_differ_from_others_are_named():
    bad = "not finite"
    assert "process 1: its weights" in describe_spoiled(["", bad, ""])
    assert describe_spoiled([bad, bad]) == describe_spoiled(["", ""]) == ""

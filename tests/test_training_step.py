import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import Recompiled, abstract_state, build_gradient, init_state

B, T = 16, 16


@functools.cache
def build(mesh=(1, 1, 1), accumulation=1, docs=False, **optim):
    config = debug.get_config()
    config.model.update(L=1, D=16, H=2, G=2, K=8, F=32, attention="reference")
    config.mesh.replica, config.mesh.fsdp, config.mesh.tensor = mesh
    config.update(accumulation=accumulation, data=dict(batch=B, seq_len=T, pack=docs))
    # A geometry without Newton-Schulz, which takes longest to compile; test_train.py has Muon.
    config.optim.update(geometry="frobenius", **optim)
    return build_run(config_lib.freeze(config), jax.devices()[: int(np.prod(mesh))])


@functools.cache
def compiled(*args, **kwargs):
    """Returns (run, its compiled step); the arguments are build's."""
    run = build(*args, **kwargs)
    return run, compile_step(run)


def batch_at(step, mesh, docs=None):
    """Returns a learnable batch: each row counts up from a number that the step determines."""
    start = np.random.default_rng(step).integers(0, 256, (B, 1))
    tokens = ((start + np.arange(T + 1)) % 256).astype(np.int32)
    batch = {"tokens": tokens}
    if docs is not None:
        batch |= {"docs": docs, "weights": (docs[:, 1:] >= 0).astype(np.float32)}
    return jax.device_put(batch, batch_sharding(mesh))


def losses(mesh=(1, 1, 1), accumulation=1, steps=20):
    run, step = compiled(mesh, accumulation)
    state = init_state(run.model, run.optimizer, run.mesh, 0)
    out = []
    for n in range(steps):
        state, scalars = step(state, batch_at(n, run.mesh), run.rates())
        out.append(float(scalars["train/loss_nats"]))
    return np.array(out)


@functools.cache
def whole():
    return losses()


@pytest.mark.parametrize(("mesh", "accumulation"), [((8, 1, 1), 1), ((2, 2, 2), 4)])
def test_losses_agree_on_every_mesh_and_with_every_number_of_microbatches(mesh, accumulation):
    np.testing.assert_allclose(losses(mesh, accumulation, steps=5), whole()[:5], rtol=1e-5)


def test_training_learns_and_repeats_bitwise():
    assert whole()[-1] < whole()[0] - 0.5
    np.testing.assert_array_equal(losses(steps=5), whole()[:5])


def test_the_compiled_step_updates_every_buffer_of_the_state_in_place():
    run, step = compiled()
    state = abstract_state(run.model, run.optimizer, run.mesh)
    aliased = re.search(r"input_output_alias=\{(.*?) \}, ", step.compiled.as_text())[1]
    taken = [int(n) for n in re.findall(r"\((\d+), ", aliased)]
    assert sorted(taken) == list(range(len(jax.tree.leaves(state))))


def test_a_step_with_a_non_finite_loss_changes_only_the_counters():
    run, step = compiled()
    state = init_state(run.model, run.optimizer, run.mesh, 0)
    state, _ = step(state, batch_at(0, run.mesh), run.rates())
    poisoned = state._replace(
        params=jax.tree.map(lambda x: x.at[..., 0].set(jnp.inf), state.params)
    )
    before = jax.device_get((poisoned.params, poisoned.opt_state))
    after, scalars = step(poisoned, batch_at(1, run.mesh), run.rates())
    pairs = zip(
        jax.tree.leaves(before), jax.tree.leaves((after.params, after.opt_state)), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert (int(after.step), int(after.bad_steps), int(after.skipped_steps)) == (2, 1, 1)
    assert int(scalars["train/bad_steps"]) == 1


def test_a_good_step_resets_the_count_of_bad_steps_in_a_row():
    run, step = compiled()
    state = init_state(run.model, run.optimizer, run.mesh, 0)
    state = state._replace(bad_steps=jnp.int32(3), skipped_steps=jnp.int32(5))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))
    after, _ = step(state, batch_at(0, run.mesh), run.rates())
    assert (int(after.bad_steps), int(after.skipped_steps)) == (0, 5)


def test_padding_affects_neither_loss_nor_update():
    run, step = compiled(docs=True, name="adamw")
    docs = np.zeros((B, T + 1), np.int32)
    docs[:, 9:] = -1
    outcomes = []
    for filler in (0, 7):
        state = init_state(run.model, run.optimizer, run.mesh, 0)
        batch = jax.device_get(batch_at(0, run.mesh, docs))
        batch["tokens"] = np.where(docs < 0, filler, batch["tokens"])
        batch = jax.device_put(batch, batch_sharding(run.mesh))
        state, scalars = step(state, batch, run.rates())
        outcomes.append((float(scalars["train/loss_nats"]), jax.device_get(state.params["head"])))
    assert outcomes[0][0] == outcomes[1][0]
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])


def test_weights_of_targets_average_the_losses_of_their_rows():
    run = build()
    params = init_state(run.model, run.optimizer, run.mesh, 0).params
    gradient = jax.jit(build_gradient(run.model, run.loss, 1))
    batch = jax.device_get(batch_at(0, run.mesh))
    halves = np.arange(B)[:, None] < B // 2, np.arange(B)[:, None] >= B // 2
    first, second, mixed = (
        gradient(params, batch | {"weights": np.broadcast_to(w, (B, T)).astype(np.float32)})
        for w in (*halves, 3 * halves[0] + halves[1])
    )
    expected = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, first, second)
    assert abs(float(first[0] - second[0])) > 1e-3
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
    jax.tree.map(close, mixed, expected)


@pytest.mark.parametrize(("mesh", "accumulation"), [((1, 1, 1), 1), ((2, 2, 2), 2)])
def test_the_loss_of_each_source_is_that_of_its_rows(mesh, accumulation):
    run = build(mesh, accumulation)
    params = init_state(run.model, run.optimizer, run.mesh, 0).params
    source = np.arange(B) % 5 // 2  # 0 0 1 1 2: of different sizes, mixed among devices
    batch = jax.device_put(jax.device_get(batch_at(0, run.mesh)), batch_sharding(run.mesh))
    batch["source"] = jax.device_put(source.astype(np.int32), batch_sharding(run.mesh))
    build_with = functools.partial(build_gradient, run.model, run.loss, accumulation)
    (nats, by_source), objective, grads = jax.jit(build_with(sources=4))(params, batch)
    plain = jax.jit(build_with())
    weigh = lambda rows: jax.device_put(rows.astype(np.float32), batch_sharding(run.mesh))
    expected = plain(params, batch | {"weights": weigh(np.ones((B, T)))})
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, (nats, objective, grads), expected)
    for i in range(3):
        rows = np.broadcast_to((source == i)[:, None], (B, T))
        own, *_ = plain(params, batch | {"weights": weigh(rows)})
        close(by_source[i] / rows.mean(), own)
    assert float(by_source[3]) == 0  # a source without rows


def test_calling_the_step_with_another_shape_raises_and_names_it():
    run, step = compiled()
    state = init_state(run.model, run.optimizer, run.mesh, 0)
    short = {"tokens": batch_at(0, run.mesh)["tokens"][:, :-1]}
    with pytest.raises(Recompiled, match=r"\['tokens'\]: int32\[16, 17\] -> int32\[16, 16\]"):
        step(state, short, run.rates())


def test_the_step_compiled_for_one_learning_rate_works_for_another():
    rates = {"learning_rate": 0.03, "adam_learning_rate": 0.03}
    (_, step), (other, own_step) = compiled(), compiled(**rates)
    state = lambda: init_state(other.model, other.optimizer, other.mesh, 0)
    batch = batch_at(0, other.mesh)
    borrowed, _ = step(state(), batch, other.rates())
    own, _ = own_step(state(), batch, other.rates())
    jax.tree.map(np.testing.assert_array_equal, borrowed.params, own.params)


def test_the_state_is_donated():
    run, step = compiled()
    state = init_state(run.model, run.optimizer, run.mesh, 0)
    step(state, batch_at(0, run.mesh), run.rates())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="multiple of replica x fsdp = 8; got data.batch=16, accum"
    ):
        build((1, 8, 1), accumulation=4)


def test_a_mesh_that_does_not_match_the_devices_is_refused():
    config = debug.get_config()
    config.mesh.fsdp = 3
    with pytest.raises(ValueError, match="the device count, 8; got replica=1 fsdp=3 tensor=1"):
        build_run(config_lib.freeze(config))

import jax
import jax.numpy as jnp
import pytest

from configs import debug
from jaxtrain.config.train_config import freeze
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.metrics.hlo_collectives import KINDS, Collective, find_collectives
from jaxtrain.training.phases import build_exchange, build_forward, measure_phases, show_phases
from jaxtrain.training.run import build_run
from jaxtrain.training.step import build_gradient, init_state
from pallas_kernels.hlo import Program


@pytest.fixture(scope="module")
def run():
    config = debug.get_config()
    config.model.update(L=1, attention="reference")  # compiles fastest
    config.optim.name = "adamw"
    config.mesh.update(replica=2, fsdp=1)
    return build_run(freeze(config), jax.devices()[:2])


@pytest.fixture(scope="module")
def arguments(run):
    tokens = jax.random.randint(jax.random.key(0), (8, 33), 0, 256)
    batch = {"tokens": jax.device_put(tokens, batch_sharding(run.mesh))}
    return init_state(run.model, run.optimizer, run.mesh, 0), batch, run.rates()


def test_the_timed_forward_pass_computes_the_steps_loss(run, arguments):
    state, batch, _ = arguments
    both = [build(run.model, run.loss, 2) for build in (build_forward, build_gradient)]
    nats, (expected, *_) = jax.jit(lambda *args: [f(*args) for f in both])(state.params, batch)
    assert float(nats) == pytest.approx(float(expected), rel=1e-6)


def test_the_phases_of_a_step_add_up_to_overlap_and_exposed_time(run, arguments):
    state, _, _ = arguments
    figures = measure_phases(run, *arguments, whole_s=1.0)
    part = {name.removeprefix("perf/phase_").removesuffix("_s"): s for name, s in figures.items()}
    assert 0 < part["forward"] and 0 < part["exchange"]
    apart = part["forward_backward"] + part["optimizer"]
    assert part["overlap"] == pytest.approx(apart + part["exchange"] - 1.0)
    assert part["exposed"] == pytest.approx(1.0 - apart)
    payload = round(figures["comm/algbw_bytes_per_s"] * part["exchange"])
    assert 0 <= payload - 4 * run.parameters <= 256
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))  # not donated
    assert len(show_phases(figures)) == len(figures)


def test_the_timed_exchange_runs_each_collective_as_often_as_the_step(run):
    wanted = [Collective(kind, 4_096, ("replica",), 2, False, 3) for kind in KINDS]
    text = build_exchange(wanted, run.mesh).lower(jnp.float32(1)).compile().as_text()
    found = find_collectives(Program(text), run.mesh)
    assert [c[:6] for c in found] == [c[:6] for c in wanted]

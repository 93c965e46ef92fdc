import dataclasses
import importlib.util
import json

import jax
import numpy as np
import optax
import pytest

from configs import gpt_124m
from jaxtrain import bench
from jaxtrain.benchmarks import cpu_training, optimizer
from jaxtrain.config.train_config import ModelConfig, OptimConfig, TrainConfig, freeze
from jaxtrain.optim.build import build_optimizer
from jaxtrain.training.run import build_run
from jaxtrain.training.step import Step, abstract_state, build_update

TINY = dict(L=2, D=16, H=2, G=2, K=8, F=32, V=32, qk_norm=True, attention="reference")
HAS_TORCH = importlib.util.find_spec("torch") is not None
JAX_ONLY = ["jaxtrain float32", "optax float32", "jaxtrain bfloat16"]
INSTALLED = ("jaxtrain", "optax", "torch") if HAS_TORCH else ("jaxtrain", "optax")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    if not HAS_TORCH:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads are slower on matrices this small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(optimizer.SIZES, "s", TINY)
        yield optimizer.OptimizerProblem("s")


@pytest.fixture(scope="module")
def rows(tiny):
    measured = optimizer.measure("s", rounds=2, most_s=60, variants=INSTALLED)
    return {row["variant"]: row for row in measured}


@pytest.fixture(scope="module")
def stepped(tiny):
    """Returns jaxtrain's and optax's float32 updates after their first step."""
    updates = optimizer.build_updates(tiny, ["float32"], ["jaxtrain", "optax"])
    for update in updates.values():
        update(0)
    return updates


def test_the_sizes_are_those_of_suite_cpu_and_of_the_124m_config():
    model = freeze(gpt_124m.get_config()).model
    shapes = optimizer.ModelConfig(**optimizer.SIZES["124m"], remat=model.remat)
    assert shapes == model
    assert {name: optimizer.SIZES[name] for name in cpu_training.SIZES} == cpu_training.SIZES


def test_every_variant_takes_turns_and_is_compared_in_its_own_dtype(rows):
    assert [name for name in rows if "torch" not in name] == JAX_ONLY
    in_torch = [name for name in rows if "torch" in name]
    assert in_torch == ["torch float32", "torch bfloat16"] * HAS_TORCH
    assert {row["samples"] for row in rows.values()} == {2}
    compared = optimizer.ratios(rows.values())
    pairs = {"jaxtrain float32 / optax float32", "jaxtrain bfloat16 / optax float32"}
    same = {f"jaxtrain {dtype} / torch {dtype}" for dtype in optimizer.DTYPES}
    assert {row["ratio"] for row in compared} == pairs | (same if HAS_TORCH else set())
    for row in compared:
        ours, theirs = row["ratio"].split(" / ")
        assert row["wall"] == rows[theirs]["wall_s"] / rows[ours]["wall_s"]
        assert ("target >= 2" in row["target"]) == ("optax" in theirs)
        assert row["ratio"] in optimizer.tables(list(rows.values()))


def test_temporary_memory_is_xlas_and_is_compared_with_the_largest_stack(rows, stepped):
    for name, update in stepped.items():
        analysis = update.step.compiled.memory_analysis()
        assert rows[name]["temp_bytes"] == analysis.temp_size_in_bytes > 0
        # The largest is mlp.up, [L,D,F] in float32, and not one of attention's square matrices.
        assert rows[name]["largest_stack_bytes"] == 4 * 2 * 16 * 32
    row = rows["jaxtrain float32"]
    assert f"{row['temp_bytes'] / 4096:.2f} target <= 1.5" in optimizer.tables([row])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_update_of_a_step_needs_less_than_its_target_of_temporary_memory(name):
    """With clipping and the reported RMS of updates, at the default numbers of bits."""
    cfg = TrainConfig(model=ModelConfig(**optimizer.SIZES["m"]), optim=OptimConfig(name=name))
    run = build_run(cfg, jax.devices()[:1])
    state = abstract_state(run.model, run.optimizer, run.mesh)
    scalar = jax.ShapeDtypeStruct((), "float32")
    update = jax.jit(build_update(run.model, run.optimizer, cfg.optim), donate_argnums=0)
    step = Step(update, state, (scalar, scalar, state.params), dict.fromkeys(run.rates(), scalar))
    pairs = zip(jax.tree.leaves(run.model.axes), jax.tree.leaves(state.params), strict=True)
    largest = max(4 * x.size for axes, x in pairs if axes.is_matrix)
    temporary = step.compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= optimizer.MOST_OF_STACK * largest


def test_parameters_and_state_are_updated_in_place_but_the_problem_is_not(tiny, stepped):
    leaves = jax.tree.leaves(tiny.params)
    for update in stepped.values():
        moved = jax.tree.leaves(update.read_params())
        aliased = update.step.compiled.memory_analysis().alias_size_in_bytes
        # The parameters and at least one moment of each.
        assert aliased >= 2 * sum(x.nbytes for x in leaves)
        assert not any(map(np.array_equal, leaves, moved))


def test_optax_applies_muon_to_the_matrices_only(tiny):
    transform = optimizer.optax_muon(optimizer.optim_config("float32"), tiny.axes)
    momentum = transform.init(tiny.params)[1].inner_states["muon"].inner_state[0].mu
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    with_momentum = jax.tree.map(lambda m: not is_masked(m), momentum, is_leaf=is_masked)
    assert with_momentum == jax.tree.map(lambda a: a.is_matrix, tiny.axes)


@pytest.mark.parametrize("wrong", [dict(ns_steps=4), dict(adam_learning_rate=3.03e-3)])
def test_a_variant_that_makes_another_update_is_an_error(tiny, stepped, wrong):
    cfg = dataclasses.replace(optimizer.optim_config("float32"), **wrong)
    other = optimizer.JaxUpdate(build_optimizer(cfg, tiny.axes), tiny)
    other(0)
    updates = {"jaxtrain float32": stepped["jaxtrain float32"], "other float32": other}
    with pytest.raises(RuntimeError, match="must make the same first update within 0.0001; got "):
        optimizer.check_agreement("s", updates, tiny)


def test_one_wrong_matrix_of_a_stack_is_an_error(tiny, stepped, monkeypatch):
    optimizer.check_agreement("s", stepped, tiny)
    params, start = stepped["optax float32"].read_params(), tiny.params
    w_LDF, start_LDF = (tree["blocks"]["mlp"]["up"]["w"] for tree in (params, start))
    w_LDF[1] = 2 * start_LDF[1] - w_LDF[1]  # the update with the wrong sign
    monkeypatch.setattr(stepped["optax float32"], "read_params", lambda: params)
    with pytest.raises(RuntimeError, match="got 2 between .* in blocks.mlp.up.w of s"):
        optimizer.check_agreement("s", stepped, tiny)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is missing: install the crosscheck extra")
def test_torch_casts_to_bfloat16_again_after_a_float32_update(tiny):
    import torch

    update = optimizer.TorchUpdate("float32", tiny)
    update(0)
    assert torch.ones(1).bfloat16().dtype == torch.bfloat16


def test_the_suite_runs_only_the_chosen_variants(tiny, tmp_path, capsys):
    flags = ["--sizes=s", "--dtypes=bfloat16", "--variants=jaxtrain,optax", "--rounds=1"]
    bench.main(["--suite=optimizer", *flags, f"--json={tmp_path / 'rows.jsonl'}"])
    stored = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    variants = [row["variant"] for row in stored if "variant" in row]
    assert variants == ["optax float32", "jaxtrain bfloat16"]
    assert "== optimizer" in capsys.readouterr().out

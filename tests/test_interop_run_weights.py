"""Starting a run from the weights of another run, with the same or another optimizer."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import runs
from jaxtrain.interop import InteropError
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.interop.run_weights import find_run, is_imported
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.train import train
from jaxtrain.training.run import build_run, restore_run

pytestmark = pytest.mark.long  # every test needs the fixture's runs

# Muon orthogonalises matrices of one shape, in one iteration.
MODEL = {"model__L": 1, "model__H": 2, "model__G": 2, "model__K": 16, "model__F": 32}
SHARED = {"steps": 2, "sample__tokens": 0, "eval_tokens": 256, "optim__weight_decay": 0.1}
SHARED |= MODEL | {"optim__ns_steps": 1}
SOURCE = {"optim__name": "accelerated_lmo", "optim__strength": 0.5, "save_every": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def source(tmp_path_factory, text):
    """Folder of a run whose evaluated weights are not its parameters."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    cfg = runs.debug_config(workdir, text, **SHARED, **SOURCE)
    assert train(cfg, jax.devices()[:1], quiet=True) == 0
    return workdir


def config(workdir, text, source, **values):
    return runs.debug_config(workdir, text, weights=str(source), **(SHARED | values))


def start(cfg, devices=1):
    run = build_run(cfg, jax.devices()[:devices])
    return run, initial_state(run)[0]


def evaluated(workdir, step=None):
    _, state = restore_run(workdir, step)
    return eval_params(state.opt_state, state.params), state.params


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_another_optimizer_starts_from_the_evaluated_weights_on_any_mesh(source, text, tmp_path):
    want, params = evaluated(source)
    assert not jax.tree.all(jax.tree.map(np.array_equal, want, params))
    run, state = start(config(tmp_path / "run", text, source, optim__name="muon_h"), devices=2)
    assert run.mesh.size == 2
    assert_equal(state.params, want)
    # The optimizer's state is that of these weights: muon_h keeps the norms that it starts with.
    assert_equal(state.opt_state, jax.jit(run.optimizer.init)(state.params))
    assert int(state.step) == 0


def test_one_checkpoint_of_a_run_can_be_chosen(source, text, tmp_path):
    _, state = start(config(tmp_path / "run", text, source / "checkpoints" / "1"))
    assert_equal(state.params, evaluated(source, 1)[0])
    with pytest.raises(InteropError, match=r"--weights must name one of .*\[1, 2\].*step=7"):
        start(config(tmp_path / "run", text, source / "checkpoints" / "7"))


def test_a_run_resumes_without_the_run_that_its_weights_came_from(source, text, tmp_path, caplog):
    copy = shutil.copytree(source, tmp_path / "source")
    cfg = config(tmp_path / "run", text, copy, optim__name="adamw")
    with caplog.at_level("INFO", logger="absl"):
        assert train(cfg, jax.devices()[:1], quiet=True) == 0
    assert f"step 2 of {copy}, which accelerated_lmo trained; the iterate" in caplog.text
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["config"]["weights"] == str(copy / "checkpoints/2")
    assert not is_imported(str(copy)) and not is_imported(str(copy / "checkpoints" / "7"))
    shutil.rmtree(copy)
    assert is_imported(str(copy))  # it may have been
    assert train(dataclasses.replace(cfg, steps=3), jax.devices()[:1], quiet=True) == 0
    assert [step for step, _ in runs.losses(tmp_path / "run")] == [1, 2, 3]
    again = json.loads((tmp_path / "run/config.json").read_text())
    assert again["config"]["weights"] == stored["config"]["weights"]


def test_a_changed_optimizer_is_refused_with_the_way_to_start_it(source, text):
    cfg = runs.debug_config(source, text, **SHARED, optim__name="adamw")
    with pytest.raises(
        ValueError, match=f"Changed: optim.name 'adamw'.*--weights={source} and a new"
    ):
        train(dataclasses.replace(cfg, steps=3), jax.devices()[:1], quiet=True)


def test_weights_of_another_model_name_the_flags_to_set(source, text, tmp_path):
    with pytest.raises(
        InteropError, match=r"model.F=96, not 32.*Set --model.F, or another --weigh"
    ):
        start(config(tmp_path / "run", text, source, model__F=96))


def test_what_is_no_weights_is_refused_with_the_flag(source, text, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty", source / "checkpoints"):
        with pytest.raises(InteropError, match=f"--weights={path} must be a run or"):
            start(config(tmp_path / "run", text, path))
    monkeypatch.setattr("jaxtrain.train.open_data", None)  # refused before the data are read
    cfg = config(tmp_path / "run", text, source / "config.json")
    with pytest.raises(InteropError, match="--weights=.*config.json must be .*llm.c"):
        train(cfg, jax.devices()[:1], quiet=True)


def test_a_run_that_has_not_saved_yet_is_refused(source, text, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(source / "config.json", young)
    with pytest.raises(InteropError, match="with a checkpoint; got .*young, which has none yet"):
        start(config(tmp_path / "run", text, young))
    (young / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert find_run(young) is None

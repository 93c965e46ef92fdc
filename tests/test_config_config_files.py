import ast
import importlib
import re
from pathlib import Path

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import configs
from jaxtrain.config import train_config as config_lib
from jaxtrain.model.layer_parts import letter_sizes
from jaxtrain.model.layer_scan import CUDNN_FORWARD
from jaxtrain.model.transformer import build_model, count_params
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.ops.routes import choose_routes

FOLDER = Path(configs.__file__).parent
FAMILIES = {"__init__", "base", "gpt2", "llama"}  # not configs of a run
# tested in tests/test_study_plan.py
STUDIES = {"study", "study_quick", "study_scaling", "study_transferred", "track3"}
OTHERS = FAMILIES | STUDIES
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS)
CROSSCHECKS = {"crosscheck_gpt2", "crosscheck_llama"}
EXPECTED = {"gpt_124m", "gpt_350m", "gpt_774m", "gpt_1558m", "gpt_track3"}
EXPECTED |= {"llama_135m", "llama_1400m"}


def test_all_shipped_configs_exist():
    assert EXPECTED | CROSSCHECKS | {"quickstart", "debug"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_configs_docstring_states_its_parameter_count_and_command(name):
    module = importlib.import_module(f"configs.{name}")
    cfg, _ = resolve_dtype(config_lib.freeze(module.get_config()), jax.devices()[0])
    model = build_model(cfg.model, choose_routes(cfg.model, False, "cpu", False))
    stated = re.search(r"([\d,]+) parameters", module.__doc__).group(1)
    assert int(stated.replace(",", "")) == count_params(model.axes, letter_sizes(cfg.model))
    command = "crosscheck run" if name in CROSSCHECKS else "train"
    assert re.search(rf"^ *jaxtrain {command} {name}( |$)", module.__doc__, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_config_file_only_sets_values(path):
    branches = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.comprehension)
    assert not any(isinstance(node, branches) for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("name", ["gpt_124m", "gpt_track3", "llama_135m", "llama_1400m"])
def test_no_large_config_runs_attentions_forward_twice(name, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)  # tracing reads no more of it
    cfg = config_lib.freeze(importlib.import_module(f"configs.{name}").get_config())
    model = build_model(cfg.model, choose_routes(cfg.model, False, "gpu", False))
    tokens = jax.ShapeDtypeStruct((1, cfg.data.seq_len), "int32")
    traced = jax.make_jaxpr(jax.grad(lambda p, tokens: model.apply(p, tokens).sum()))
    assert str(traced(model.shapes, tokens)).count(f"{CUDNN_FORWARD}[") == 1

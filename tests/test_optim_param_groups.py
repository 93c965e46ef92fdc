"""Parameter groups of every shipped config, computed from axes without making an array."""

import functools
import importlib

import jax
import pytest
from test_config_config_files import NAMES

from jaxtrain.config import train_config as config_lib
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim.param_groups import MATRICES, group_table


@functools.cache
def rows_of(config_name, **optim):
    config = importlib.import_module(f"configs.{config_name}").get_config()
    config.optim.update(optim)
    cfg, _ = resolve_dtype(config_lib.freeze(config), jax.devices()[0])
    model = build_model(cfg.model, choose_routes(cfg.model, False, "cpu", False))
    rows = group_table(cfg.optim, model.axes, model.shapes)
    leaves = jax.tree.leaves(model.shapes)
    assert not any(isinstance(leaf, jax.Array) for leaf in leaves)
    return cfg.model, list(zip(rows, (leaf.size for leaf in leaves), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_muon_gets_every_hidden_matrix_and_nothing_else(name):
    m, rows = rows_of(name, name="muon")
    gates = {"swiglu": 3, "geglu": 3, "gelu": 2, "relu2": 2}[m.mlp]
    hidden = m.L * (2 * m.D * m.H * m.K + 2 * m.D * m.G * m.K + gates * m.D * m.F)
    assert sum(size for row, size in rows if row.group == MATRICES) == hidden


@pytest.mark.parametrize("name", NAMES)
def test_embedding_head_gains_and_biases_are_never_matrices(name):
    _, rows = rows_of(name, name="muon")
    for row, _ in rows:
        one_sided = "->" not in row.axes
        assert (row.group == MATRICES) == (not one_sided), row
        assert row.optimizer == ("adamw" if one_sided else "muon")


@pytest.mark.parametrize("name", NAMES)
def test_query_key_and_value_are_separate_matrices(name):
    m, rows = rows_of(name, name="muon")
    view = {row.name: row.view for row, _ in rows}
    assert view["blocks.attention.q.w"] == f"{m.L}x{m.D}x{m.H * m.K}"
    assert view["blocks.attention.k.w"] == f"{m.L}x{m.D}x{m.G * m.K}"
    assert view["blocks.attention.v.w"] == view["blocks.attention.k.w"]


@pytest.mark.parametrize("name", NAMES)
def test_with_rest_lmo_every_parameter_follows_a_norm(name):
    _, rows = rows_of(name, name="muon", rest="lmo")
    assert all(row.optimizer != "adamw" and row.geometry for row, _ in rows)


def test_a_role_with_its_own_rate_is_its_own_group_and_the_others_stay_together():
    _, rows = rows_of("quickstart", head_learning_rate=0.5, adam_weight_decay=0.25)
    groups = {row.group: (row.rate, row.decay) for row, _ in rows if "gain" not in row.name}
    assert groups == {"matrices": (0.02, 0.0), "head": (0.5, 0.25), "rest": (3e-3, 0.25)}
    assert {row.name for row, _ in rows if row.group == "head"} == {"head"}

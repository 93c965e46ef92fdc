"""Every shipped config's model can be exported."""

import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from jaxtrain.config import train_config as config_lib
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import write_folder
from jaxtrain.interop.verify import check_finite, check_reading, check_transformers
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.precision import resolve_dtype
from jaxtrain.ops.routes import choose_routes

SHARED = {"__init__", "base", "gpt2", "llama"}  # other files start from them
# The benchmark's model, which is no family of transformers: its export is refused.
TRACK_3 = {"gpt_track3", "track3"}
NAMES = sorted(
    p.stem for p in Path(configs.__file__).parent.glob("*.py") if p.stem not in SHARED | TRACK_3
)


def small(name):
    """Returns a shipped config's model with small sizes and all other fields unchanged."""
    values = importlib.import_module(f"configs.{name}").get_config()
    whole = config_lib.freeze(values.base if "base" in values else values)
    cfg = resolve_dtype(whole, jax.devices()[0])[0].model
    groups = cfg.H // cfg.G
    H = 2 * groups
    wide = cfg.D == cfg.H * cfg.K
    return dataclasses.replace(
        cfg, L=2, H=H, G=2, K=8, D=8 * H if wide else 24, F=48, V=96, positions=64
    )


# Configs that differ only in sizes are one model here: the last of them stands for all.
DISTINCT = sorted({small(name): name for name in NAMES}.values())


@pytest.mark.parametrize("name", DISTINCT)
def test_a_shipped_config_is_exported_and_transformers_computes_the_same(name, tmp_path):
    reason = "transformers is missing: install the crosscheck extra to compare with it"
    pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("torch", reason=reason)
    cfg = small(name)
    model = build_model(cfg, choose_routes(cfg, False, "cpu", False))
    rng = np.random.default_rng(1)
    draw = lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32)
    axes, params = named_leaves(model.axes), named_leaves(jax.tree.map(draw, model.shapes))
    checks = []

    def verify(folder):
        reference = check_reading(folder, cfg, axes, params, "float32")
        checks.append(check_transformers(folder, cfg, reference))

    write_folder(tmp_path / "out", cfg, axes, params, verify=verify)
    assert "computes the same logits" in checks[0]


@pytest.mark.parametrize("name", sorted(TRACK_3))
def test_the_export_of_a_model_of_no_family_is_refused(name, tmp_path):
    cfg = small(name)
    model = build_model(cfg, choose_routes(cfg, False, "cpu", False))
    params = named_leaves(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), model.shapes))
    with pytest.raises(InteropError, match="model.rope_fraction"):
        write_folder(tmp_path / "out", cfg, named_leaves(model.axes), params)


def test_the_comparison_with_transformers_notices_a_wrong_model(tmp_path):
    reason = "transformers is missing: install the crosscheck extra to compare with it"
    pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("torch", reason=reason)
    cfg = small("quickstart")
    model = build_model(cfg, choose_routes(cfg, False, "cpu", False))
    params = named_leaves(model.init(jax.random.key(0)))
    axes = named_leaves(model.axes)
    write_folder(tmp_path / "out", cfg, axes, params)
    reference = check_reading(tmp_path / "out", cfg, axes, params, "float32")
    with pytest.raises(InteropError, match="must compute the run's logits"):
        wrong = reference._replace(logits_BTV=reference.logits_BTV * 1.0001)
        check_transformers(tmp_path / "out", cfg, wrong)


@pytest.mark.parametrize("dtype, value", [("float16", 1e5), ("float32", np.nan)])
def test_weights_that_overflow_the_export_dtype_are_named(dtype, value):
    x = np.ones((2, 3), np.float32)
    bad = x.copy()
    bad[1, 1] = value
    check_finite({"head": x, "embed": x}, dtype)
    with pytest.raises(InteropError, match=f"finite in {dtype}; .* as in embed. Set --dtype"):
        check_finite({"head": x, "embed": bad}, dtype)

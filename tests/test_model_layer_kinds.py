"""Models whose layers differ: windows, layers without RoPE, and a second RoPE base."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxtrain.config.train_config import KernelsConfig, MeshConfig, ModelConfig
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.metrics.flops import forward_flops
from jaxtrain.model.attention import ATTENTION, Scoring
from jaxtrain.model.layer_kinds import kinds_by_layer, layer_kinds
from jaxtrain.model.layer_parts import LayerOps
from jaxtrain.model.layer_scan import scan_layers
from jaxtrain.model.rope import rope_tables
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import choose_routes
from pallas_kernels.flash_attention import flash_attention_reference

SMALL = dict(D=16, H=4, G=2, K=4, F=24, V=32, dtype="float32", attention="reference", unroll=1)
WINDOWED = SMALL | dict(L=2, window=4)
# One period of four layers and one layer more: window, all keys, window, all keys without RoPE.
MIXED = SMALL | dict(
    L=5, window=4, global_every=2, nope_every=4, rope_local_theta=100.0, attention_bias="qkv"
)
B, T = 4, 24
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 32)


def build(values, mesh=None, document_mask=False):
    cfg = ModelConfig(**values)
    return build_model(cfg, choose_routes(cfg, False, "cpu", False), mesh, document_mask)


@functools.cache
def reference(masked=False):
    """Returns MIXED's model, random weights and a compiled apply."""
    model = build(MIXED, document_mask=masked)
    rng = np.random.default_rng(0)  # biases too
    draw = lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), jnp.float32)
    return model, jax.tree.map(draw, model.shapes), jax.jit(model.apply)


def close(a, b, tolerance=2e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_layers_have_the_kinds_that_their_numbers_say():
    kinds = kinds_by_layer(ModelConfig(**MIXED))
    assert [kind.scoring.window for kind in kinds] == [4, 0, 4, 0, 4]
    assert [kind.rope for kind in kinds] == ["local", "global", "local", "none", "local"]


@pytest.mark.parametrize(
    ("values", "period"),
    [
        ({}, 1),
        ({"window": 8}, 1),
        ({"window": 8, "global_every": 5}, 1),  # there is no layer 5
        ({"nope_every": 2}, 2),
        ({"nope_every": 4}, 4),
        ({"L": 6, "window": 8, "global_every": 2, "nope_every": 3}, 6),
    ],
)
def test_the_period_of_layers_is_the_shortest(values, period):
    assert len(layer_kinds(ModelConfig(**values))) == period


@pytest.mark.parametrize(("L", "P", "unroll"), [(6, 2, 1), (7, 3, 6), (5, 4, 1), (3, 3, 1)])
def test_a_scan_of_several_kinds_runs_the_layers_in_order(L, P, unroll):
    def body(kind, h, x):
        return 2 * h + x + kind, h

    h, ys = scan_layers(range(P), body, jnp.int32(1), jnp.arange(L, dtype=jnp.int32), unroll)
    want = [1]
    for i in range(L):
        want.append(2 * want[-1] + i + i % P)
    assert [*ys.tolist(), int(h)] == want


def test_a_window_limits_how_far_a_token_reaches():
    model = build(WINDOWED)
    params, apply = model.init(jax.random.key(0)), jax.jit(model.apply)
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 32)
    same = np.all(np.asarray(apply(params, TOKENS) == apply(params, changed)), (0, 2))
    assert np.flatnonzero(~same).tolist() == list(range(5, 5 + 1 + 2 * 3))  # 3 more in each layer


@pytest.mark.parametrize("name", ["reference", "blocked"])
@pytest.mark.parametrize(("T", "window", "masked"), [(7, 3, False), (64, 9, True), (64, 40, False)])
def test_windowed_attention_and_its_gradient_equal_the_kernels_reference(name, T, window, masked):
    """The reference of the kernels computes all scores, and masks them."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, T, 6, 8), (2, T, 3, 8), (2, T, 3, 8), (2, T, 6, 8)]
    qkv_do = [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]
    docs = jnp.cumsum(jnp.arange(T) % 25 == 24)[None].repeat(2, 0) if masked else None

    @functools.partial(jax.jit, static_argnums=0)
    def attend_and_differentiate(function, q, k, v, do):
        o, pullback = jax.vjp(lambda *qkv: function(*qkv, docs), q, k, v)
        return o, *pullback(do)

    attend = functools.partial(ATTENTION[name], scoring=Scoring(window))
    reference = lambda *qkv_docs: flash_attention_reference(*qkv_docs, docs, window)
    got, want = (attend_and_differentiate(f, *qkv_do) for f in (attend, reference))
    assert all(close(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_most_scores_outside_a_short_window_are_not_computed(name):
    """Blocks of 16 queries see 31 keys; all 256 x 256 scores would be 8.3 times as many."""
    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 8), "float32") for heads in (2, 1))

    def flops(window):
        attend = jax.jit(functools.partial(ATTENTION[name], scoring=Scoring(window)))
        return attend.lower(q, k, k).cost_analysis()["flops"]

    all_scores = 256 / (256 if name == "reference" else 160)  # four blocks compute 5/8 of them
    assert flops(16) < 1.1 * flops(0) * all_scores * 31 / 256


def test_a_window_of_the_whole_sequence_adds_no_operation():
    trace = lambda window: str(
        jax.make_jaxpr(build(WINDOWED | {"window": window}).apply)(build(WINDOWED).shapes, TOKENS)
    )
    assert trace(T) == trace(0) != trace(T - 1)


def test_cudnn_gets_the_window(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)  # tracing reads no more of it
    cfg = ModelConfig(**WINDOWED | dict(K=8, dtype="bfloat16", attention="auto"))
    model = build_model(cfg, choose_routes(cfg, False, "gpu", True, seq_len=T))
    text = str(jax.make_jaxpr(model.apply)(model.shapes, TOKENS))
    assert "sliding_window_length=4" in text


def test_a_layer_without_rope_needs_no_kernel_for_it():
    cfg = ModelConfig(**SMALL | dict(L=2, qk_norm=True, nope_every=2))
    routes = choose_routes(cfg, False, "cpu", False, KernelsConfig(interpret=True), seq_len=T)
    assert routes["qk_rope"].is_fused and "XLA's norm where no RoPE is" in routes["qk_rope"].reason
    halve = lambda x, normalise: x / 2
    x_BTHK = jnp.ones((1, 2, 4, 4))
    assert jnp.array_equal(LayerOps(cfg, routes).norm_and_rotate(halve, x_BTHK, None), x_BTHK / 2)


def test_decoding_with_a_cache_gives_the_training_states():
    model, params, apply = reference()
    cache = model.init_cache(B, 32)  # longer than the text
    parts, extend = [], jax.jit(model.extend)
    for t in range(0, T, 3):
        hidden, cache = extend(params, cache, TOKENS[:, t : t + 3], t)
        parts.append(hidden)
    assert close(jnp.concatenate(parts, 1), apply(params, TOKENS), 1e-5)


def test_packed_documents_do_not_see_each_other():
    model, params, apply = reference(masked=True)
    docs = (jnp.arange(T) >= 10).astype(jnp.int32)[None].repeat(B, 0)
    packed = apply(params, TOKENS, docs)
    first = reference()[2](params, jnp.pad(TOKENS[:, :10], ((0, 0), (0, T - 10))))
    assert close(packed[:, :10], first[:, :10])
    other = apply(params, TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % 32), docs)
    assert jnp.array_equal(packed[:, 10:], other[:, 10:])
    assert not jnp.array_equal(packed[:, :10], other[:, :10])


def gradients(model, params):
    weights = jax.random.normal(jax.random.key(2), (B, T, 16))
    return jax.jit(jax.value_and_grad(lambda p: (model.apply(p, TOKENS) * weights).sum()))(params)


@pytest.mark.long
def test_remat_blocks_and_a_mesh_together_change_no_gradient():
    values = MIXED | {"L": 3}  # one period of two layers, and one layer more
    params = reference()[1]
    params = params | {"blocks": jax.tree.map(lambda x: x[:3], params["blocks"])}
    want = gradients(build(values), params)
    mesh = build_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    got = gradients(build(values | {"remat": "full", "attention": "blocked"}, mesh), params)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    # Softmax ignores a bias of all keys, unless RoPE rotates it: its gradient is rounding.
    assert all(close(a, b, 1e-5) or np.abs(b).max() < 1e-7 for a, b in pairs)


def test_each_layers_state_is_that_of_a_shallower_model():
    model, params, apply = reference()
    states, hidden = jax.jit(model.hidden_states)(params, TOKENS)
    assert len(states) == 6 and close(hidden, apply(params, TOKENS))
    shallow = build(MIXED | {"L": 2})
    cut = params | {"blocks": jax.tree.map(lambda x: x[:2], params["blocks"])}
    shallow_states, _ = jax.jit(shallow.hidden_states)(cut, TOKENS)
    assert close(states[:3], shallow_states)


def test_a_windows_flops_are_those_of_the_pairs_that_it_shows():
    cfg = ModelConfig(L=3, window=4, global_every=3)
    per_pair = forward_flops(ModelConfig(L=1), 1).attention
    visible = 2 * sum(min(t + 1, 4) for t in range(7)) + sum(t + 1 for t in range(7))
    assert forward_flops(cfg, 7, causal=True).attention * 7 == pytest.approx(per_pair * visible)
    assert forward_flops(cfg, 7).attention * 7 == pytest.approx(per_pair * 7 * (4 + 4 + 7))
    assert forward_flops(cfg, 4) == forward_flops(ModelConfig(L=3), 4)


def test_linear_scaling_equals_smaller_positions_and_llama3_leaves_short_wavelengths():
    tables = lambda positions, **values: np.stack(
        rope_tables(ModelConfig(K=32, rope_theta=1e4, **values), "global", positions)
    )
    positions = jnp.arange(0, 64, 4)
    linear = tables(positions, rope_scaling="linear", rope_factor=4.0)
    assert np.allclose(linear, tables(positions // 4), atol=1e-5)
    llama3 = tables(
        positions, rope_scaling="llama3", rope_factor=4.0, rope_original_positions=1_000
    )
    plain, wavelengths = tables(positions), 2 * np.pi * 1e4 ** (np.arange(0, 32, 2) / 32)
    wavelengths = np.tile(wavelengths, 2)
    same = np.abs(llama3 - plain).max((0, 1)) < 1e-6
    scaled = np.abs(llama3 - linear).max((0, 1)) < 1e-6
    assert same[wavelengths < 250].all() and scaled[wavelengths > 1_000].all()
    between = (wavelengths > 260) & (wavelengths < 990)
    assert between.any() and not (same | scaled)[between].any()


def test_a_local_theta_is_never_scaled():
    cfg = ModelConfig(window=8, rope_local_theta=500.0, rope_scaling="linear", rope_factor=8.0)
    plain = ModelConfig(rope_theta=500.0)
    pairs = itertools.product([jnp.arange(9)], [(cfg, "local"), (plain, "global")])
    local, expected = (rope_tables(c, kind, positions) for positions, (c, kind) in pairs)
    assert np.array_equal(local, expected)

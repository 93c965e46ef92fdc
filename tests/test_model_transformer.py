import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxtrain.config.train_config import MeshConfig, ModelConfig
from jaxtrain.distributed.mesh import build_mesh, param_sharding
from jaxtrain.model.attention import ATTENTION, CUDNN_FORWARD, attention_reference
from jaxtrain.model.dense import DENSE, dense_plain
from jaxtrain.model.layer_parts import LayerOps
from jaxtrain.model.layers import look_up_embedding
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import choose_routes
from jaxtrain.training.batch_arrays import target_weights

SMALL = dict(L=2, D=32, H=4, G=2, K=8, F=48, V=64, dtype="float32", unroll=1)
GPT2 = SMALL | dict(
    G=4, norm="layer", position="learned", mlp="gelu", bias=True, tied=True, positions=64
)
FORMS = [
    SMALL,
    SMALL
    | dict(qk_norm=True, qk_norm_gain=False, mlp="relu2", rope_fraction=0.5, head_bias=True)
    | dict(logit_softcap=15.0, logit_softcap_form="sqrt"),
    GPT2,
    SMALL | dict(G=1, tied=True),
    SMALL | dict(norm_place="post", qk_norm=True, qk_norm_over="all", embed_scale=8.0, tied=True),
    SMALL
    | dict(norm_place="both", mlp="geglu", norm_gain=False, embed_norm=True, tied=True)
    | dict(attention_scale=0.5, attention_softcap=1.0),
]


@functools.cache  # which compiles a model once for all tests of it
def build(document_mask=False, mesh=None, **values):
    cfg = ModelConfig(**(SMALL | values))
    routes = choose_routes(cfg, document_mask, "cpu", False)
    model = build_model(cfg, routes, mesh, document_mask)
    # Faster than compiling every operation.
    return model._replace(apply=jax.jit(model.apply), init=jax.jit(model.init))


def draw_tokens(B=4, T=24, V=64, seed=1):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, V)


def close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


# Faster than compiling every operation. The reference is compiled once for all that are compared.
@functools.partial(jax.jit, static_argnums=0)
def attend_and_differentiate(function, docs, q, k, v, do):
    o, pullback = jax.vjp(lambda *qkv: function(*qkv, docs), q, k, v)
    return o, pullback(do)


@pytest.mark.parametrize("name", sorted(set(ATTENTION) - {"reference", "cudnn"}))
@pytest.mark.parametrize(
    ("dtype", "T", "masked"),
    [
        (jnp.float32, 1, False),
        (jnp.float32, 7, True),
        (jnp.float32, 64, True),
        (jnp.bfloat16, 7, False),
        (jnp.bfloat16, 64, True),
    ],
)
def test_attention_and_its_gradient_equal_the_reference(name, dtype, T, masked):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, T, 6, 8), (2, T, 3, 8), (2, T, 3, 8), (2, T, 6, 8)]
    q, k, v, do = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True))
    docs = jnp.cumsum(jnp.arange(T) % 5 == 4)[None].repeat(2, 0) if masked else None
    o, grads = attend_and_differentiate(ATTENTION[name], docs, q, k, v, do)
    wide = [x.astype(jnp.float32) for x in (q, k, v, do)]
    o_reference, grads_reference = attend_and_differentiate(attention_reference, docs, *wide)
    tolerance = 2e-6 if dtype == jnp.float32 else 1e-2
    assert o.dtype == dtype
    assert close(o, o_reference, tolerance)
    for got, want in zip(grads, grads_reference, strict=True):
        assert close(got, want, tolerance) or jnp.abs(want).max() < 1e-6  # T=1: no gradient


def test_documents_do_not_attend_to_each_other():
    model = build(document_mask=True)
    params, tokens = model.init(jax.random.key(0)), draw_tokens()
    docs = (jnp.arange(24) >= 10).astype(jnp.int32)[None].repeat(4, 0)
    other = tokens.at[:, :10].set((tokens[:, :10] + 1) % 64)
    a, b = model.apply(params, tokens, docs), model.apply(params, other, docs)
    assert jnp.array_equal(a[:, 10:], b[:, 10:])
    assert not jnp.array_equal(a[:, :10], b[:, :10])


@pytest.mark.parametrize("name", sorted(set(DENSE) - {"plain"}))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_and_its_gradient_equal_the_plain_product(name, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, 5, 16), (16, 24), (2, 5, 24)]
    x, w, g = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True))
    y, pullback = jax.vjp(DENSE[name], x, w)
    wide = x.astype(jnp.float32), w.astype(jnp.float32)
    y_plain, pullback_plain = jax.vjp(dense_plain, *wide)
    tolerance = 1e-6 if dtype == jnp.float32 else 4e-3  # half an ulp of bf16 a product
    assert y.dtype == dtype
    assert close(y, y_plain, tolerance)
    for got, want in zip(pullback(g), pullback_plain(g.astype(jnp.float32)), strict=True):
        assert got.dtype == dtype
        assert close(got, want, tolerance)


@pytest.mark.parametrize("values", FORMS)
def test_a_later_token_changes_no_earlier_output(values):
    model = build(**values)
    params, tokens = model.init(jax.random.key(0)), draw_tokens()
    changed = tokens.at[:, 17].set((tokens[:, 17] + 1) % 64)
    a, b = model.apply(params, tokens), model.apply(params, changed)
    assert jnp.array_equal(a[:, :17], b[:, :17])
    assert not jnp.array_equal(a[:, 17:], b[:, 17:])


@pytest.mark.parametrize("values", FORMS)
def test_decoding_with_a_cache_gives_the_training_logits(values):
    model = build(**values)
    params, tokens = model.init(jax.random.key(0)), draw_tokens()
    want = model.logits(params, model.apply(params, tokens))
    cache = model.init_cache(4, 32)  # longer than the text
    step = jax.jit(model.extend)
    hidden, cache = step(params, cache, tokens[:, :9], 0)
    parts = [hidden]
    for t in range(9, 24):
        hidden, cache = step(params, cache, tokens[:, t : t + 1], t)
        parts.append(hidden)
    got = model.logits(params, jnp.concatenate(parts, 1))
    assert jnp.abs(got - want).max() < 1e-5


def gradients(model, params, tokens, docs=None):
    weights = np.random.default_rng(2).normal(size=(*tokens.shape, 32)).astype(np.float32)
    objective = lambda params: (model.apply(params, tokens, docs) * weights).sum()
    return jax.jit(jax.value_and_grad(objective))(params)


def test_unroll_and_remat_change_no_gradient():
    tokens, params, want = draw_tokens(), build().init(jax.random.key(0)), None
    for unroll, remat in ((2, "none"), (1, "dots"), (1, "attention"), (1, "full")):
        got = gradients(build(unroll=unroll, remat=remat), params, tokens)
        want = want or got
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        assert all(close(a, b, 1e-5) for a, b in pairs), (unroll, remat)


def test_a_mesh_changes_no_gradient_of_packed_rows():
    gemma = dict(norm_place="both", mlp="geglu", attention_scale=0.5, attention_softcap=1.0)
    values = gemma | dict(L=1, qk_norm=True, qk_norm_over="all", embed_norm=True)
    docs = (jnp.arange(24) >= 10).astype(jnp.int32)[None].repeat(4, 0)
    mesh = build_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    split, whole = build(True, mesh, **values), build(True, **values)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), whole.shapes)
    place = lambda axes, x: jax.device_put(x, param_sharding(axes, x.shape, mesh))
    got = gradients(split, jax.tree.map(place, split.axes, params), draw_tokens(), docs)
    want = gradients(whole, params, draw_tokens(), docs)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    assert all(close(a, b, 1e-5) for a, b in pairs)


def test_the_joint_product_of_gate_and_up_equals_two_products_with_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    x, *weights = map(jax.random.normal, keys, [(2, 5, 16), (16, 24), (16, 24)])
    cfg = ModelConfig(**SMALL)
    ops = LayerOps(cfg, choose_routes(cfg, False, "gpu", False))
    gate_and_up = lambda x, *weights: ops.gate_and_up(*(SimpleNamespace(w=w) for w in weights), x)
    separate = lambda x, *weights: tuple(dense_plain(x, w) for w in weights)
    got, pullback = jax.vjp(gate_and_up, x, *weights)
    want, pullback_separate = jax.vjp(separate, x, *weights)
    pairs = zip((*got, *pullback(got)), (*want, *pullback_separate(want)), strict=True)
    assert all(close(a, b, 1e-6) for a, b in pairs)


def test_gate_and_up_are_one_product_on_one_gpu_and_two_on_more():
    cfg = ModelConfig(**SMALL)
    routes = choose_routes(cfg, False, "gpu", False)
    products = lambda mesh: str(
        jax.make_jaxpr(build_model(cfg, routes, mesh).apply)(build().shapes, draw_tokens())
    ).count("dot_general[")
    assert products(build_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])) == products(None) + 1


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("remat, times", [("none", 1), ("attention", 1), ("full", 2)])
def test_the_backward_reruns_cudnns_forward_only_with_full_remat(
    remat, times, devices, monkeypatch
):
    # Tracing reads nothing of the cuDNN library but its version.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    cfg = ModelConfig(**SMALL | dict(remat=remat, dtype="bfloat16"))
    mesh = None if devices == 1 else build_mesh(MeshConfig(1, devices, 1), jax.devices()[:devices])
    model = build_model(cfg, choose_routes(cfg, False, "gpu", False), mesh)
    traced = jax.make_jaxpr(jax.grad(lambda p: model.apply(p, draw_tokens()).sum()))
    assert str(traced(model.shapes)).count(f"{CUDNN_FORWARD}[") == times


def test_full_remat_needs_less_memory_than_none():
    def temporaries(remat):
        model = build(L=8, remat=remat, unroll=1)
        loss = lambda p: model.apply(p, draw_tokens()).astype(jnp.float32).sum()
        return (
            jax.jit(jax.grad(loss))
            .lower(model.shapes)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporaries("full") < 0.7 * temporaries("none")


DEEP = GPT2 | dict(L=12, D=64, K=16, F=256, V=512, unroll=1)
WIDE = SMALL | dict(L=1, D=512, tied=True)


@pytest.mark.parametrize(
    "values", [*FORMS, DEEP, WIDE | dict(embed_norm=True), WIDE | dict(embed_scale=512**0.5)]
)
def test_the_first_loss_is_ln_v(values):
    model = build(**values)
    V = model.shapes["embed"].shape[0]
    tokens = draw_tokens(4, 25, V)
    params = model.init(jax.random.key(3))
    logits = np.asarray(model.logits(params, model.apply(params, tokens[:, :-1])), np.float64)
    picked = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], -1)
    nats = np.mean(np.log(np.exp(logits).sum(-1, keepdims=True)) - picked)
    assert abs(nats / np.log(V) - 1) < 0.02


def test_a_parameters_initial_values_do_not_depend_on_other_parameters():
    plain, normed = (build(**values).init(jax.random.key(0)) for values in FORMS[:2])
    assert jnp.array_equal(plain["blocks"]["mlp"]["up"]["w"], normed["blocks"]["mlp"]["up"]["w"])
    assert jnp.array_equal(plain["embed"], normed["embed"])


def test_initialisation_does_not_depend_on_the_mesh():
    mesh = build_mesh(MeshConfig(2, 2, 2))
    model = build(mesh=mesh)
    place = lambda axes, x: param_sharding(axes, x.shape, mesh)
    shardings = jax.tree.map(place, model.axes, model.shapes)
    split = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    unsplit = build().init(jax.random.key(0))
    pairs = zip(jax.tree.leaves(split), jax.tree.leaves(unsplit), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_bf16_compute_is_close_to_float32_and_parameters_are_float32():
    tokens = draw_tokens()
    wide, half = build(), build(dtype="bfloat16")
    params = wide.init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(half.shapes)} == {jnp.dtype("float32")}
    got, want = half.apply(params, tokens), wide.apply(params, tokens)
    assert got.dtype == jnp.bfloat16
    assert close(got, want, 2e-2)


def test_float64_and_float32_agree_up_to_float32_rounding():
    tokens = draw_tokens()
    want = build().apply(build().init(jax.random.key(0)), tokens)
    params = build().init(jax.random.key(0))
    with jax.enable_x64(True):
        exact = build(dtype="float64")
        got = exact.apply(jax.tree.map(lambda x: x.astype(jnp.float64), params), tokens)
        assert got.dtype == jnp.float64
    assert close(want, got, 2e-6)


def test_under_fsdp_one_layer_is_gathered_at_a_time():
    mesh = build_mesh(MeshConfig(1, 8, 1))
    model = build(L=4, D=64, unroll=1, mesh=mesh)
    place = lambda axes, x: param_sharding(axes, x.shape, mesh)
    shardings = jax.tree.map(place, model.axes, model.shapes)
    apply = jax.jit(lambda p, t: model.apply(p, t), in_shardings=(shardings, None))
    text = apply.lower(model.shapes, draw_tokens(8)).compile().as_text()
    gathers = re.findall(r"= \w+\[([\d,]+)\][^\n]* all-gather\(", text)
    stacked = [dims for dims in gathers if dims.startswith("4,") and dims.count(",") > 2]
    assert gathers and not stacked


@pytest.mark.parametrize("dense", sorted(DENSE))
def test_sums_over_many_tokens_keep_their_precision_in_bfloat16(dense):
    """Checks gradients with 16,384 terms, of a bias and a frequent token; bf16 counts to 256."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = (
        jax.random.normal(key, s, jnp.bfloat16)
        for key, s in zip(keys, [(64, 256, 4), (4, 8)], strict=False)
    )
    g = 1 + 0.1 * jax.random.normal(keys[2], (64, 256, 8))
    tokens = jax.random.randint(keys[3], (64, 256), 0, 2)
    narrow = g.astype(jnp.bfloat16)
    _, pull_bias = jax.vjp(lambda b: DENSE[dense](x, w, b), jnp.zeros(8))
    assert close(pull_bias(narrow)[0], g.sum((0, 1)), 1e-3)
    read = lambda table: look_up_embedding(table, tokens, jnp.bfloat16, lambda x: x)
    _, pull_table = jax.vjp(read, jnp.zeros((4, 8)))
    assert close(pull_table(narrow)[0], jnp.zeros((4, 8)).at[tokens].add(g), 1e-3)


def test_a_float64_model_weights_its_targets_in_float64():
    with jax.enable_x64(True):
        weights = target_weights({"tokens": jnp.zeros((2, 4), jnp.int32)})
        assert weights.dtype == jnp.float64  # 1/6 in float32 is off by 2e-9

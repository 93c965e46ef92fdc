import jax
import jax.numpy as jnp
import pytest

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.metrics.flops import forward_flops, matrix_weights, training_flops
from jaxtrain.model.layer_parts import letter_sizes
from jaxtrain.model.transformer import build_model, count_params
from jaxtrain.ops.routes import choose_routes

LLAMA = dict(L=3, D=128, H=4, G=2, K=32, F=320, V=512, dtype="float32", unroll=3)
GPT2 = LLAMA | dict(
    G=4, norm="layer", position="learned", mlp="gelu", bias=True, tied=True, positions=256
)


def build(values):
    cfg = ModelConfig(**values | dict(attention="reference"))
    return cfg, build_model(cfg, choose_routes(cfg, False, "cpu", False))


def test_flops_of_a_small_model_equal_a_count_by_hand():
    cfg = ModelConfig(L=2, D=8, H=2, G=1, K=4, F=16, V=32)
    q, k, v, o = 8 * 8, 8 * 4, 8 * 4, 8 * 8
    gate, up, down, head = 8 * 16, 8 * 16, 16 * 8, 32 * 8
    weights = 2 * (q + k + v + o + gate + up + down) + head
    scores_and_values = 2 * (2 * 8 * 10 + 2 * 8 * 10)  # layers; 10 keys
    assert training_flops(cfg, 10) == (6 * weights, 3 * scores_and_values)
    assert training_flops(cfg, 10).total == 6 * weights + 12 * 2 * 2 * 4 * 10


def test_causal_attention_counts_each_query_and_key_pair_once():
    cfg, T = ModelConfig(), 7
    per_pair = forward_flops(cfg, 1).attention
    pairs = sum(t + 1 for t in range(T))
    assert forward_flops(cfg, T, causal=True).attention * T == per_pair * pairs
    assert forward_flops(cfg, T).attention * T == per_pair * T**2


@pytest.mark.parametrize("values", [LLAMA, GPT2])
def test_counted_weights_are_the_matrices_of_the_model_and_its_head(values):
    cfg, model = build(values)
    matrices = [a for a in jax.tree.leaves(model.axes) if a.is_matrix]
    assert matrix_weights(cfg) == count_params(matrices, letter_sizes(cfg)) + cfg.V * cfg.D


@pytest.mark.parametrize("values", [LLAMA, GPT2])
def test_forward_flops_agree_with_xlas_cost_analysis(values):
    cfg, model = build(values)
    B, T = 2, 256
    forward = lambda params, tokens: model.logits(params, model.apply(params, tokens))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    cost = jax.jit(forward).lower(model.shapes, tokens).cost_analysis()
    assert cost["flops"] == pytest.approx(B * T * forward_flops(cfg, T).total, rel=0.04)

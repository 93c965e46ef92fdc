"""What the policies of model.remat save for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.model.layer_scan import scan_layers
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.tiles import default_tiles

# model.remat -> how often attention's kernel is called, and how many products run a second time
CALLS = {"none": (1, 0), "dots": (1, 0), "attention": (1, 2), "full": (2, 2)}


def trace_gradient(remat):
    """Returns the gradient's program, as text, of three layers of two products and attention."""
    tiles = default_tiles("attention", "sm_86")

    def layer(kind, h_BTD, w_DHK):
        q = jnp.einsum("BTD,DHK->BTHK", h_BTD, w_DHK)
        o = flash_attention(q, q, q, None, None, tiles, True)
        return h_BTD + jnp.tanh(jnp.einsum("BTHK,DHK->BTD", o, w_DHK)), None

    def loss(h_BTD, w_LDHK):
        return scan_layers(["only"], layer, h_BTD, w_LDHK, remat=remat)[0].sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 32, 16), (3, 16, 2, 16))]
    return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*shapes))


@pytest.mark.parametrize("remat", CALLS)
def test_attention_and_products_run_again_only_where_their_results_are_not_saved(remat):
    text, once = trace_gradient(remat), trace_gradient("none").count("dot_general[")
    attention, products = CALLS[remat]
    assert text.count("name=flash_attention_forward") == attention
    assert text.count("dot_general[") == once + products
    assert text.count("= tanh") == (1 if remat == "none" else 2)


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("kinds", [["only"], ["one", "other", "third"]])
def test_recomputation_is_not_merged_with_the_original(kinds, unroll):
    """Counts tanh in the compiled program: with `full` the backward computes it again."""
    body = lambda kind, h, w: (jnp.tanh(h @ w), None)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (3, 16, 16))]

    def count(remat):
        loss = lambda h, w: scan_layers(kinds, body, h, w, unroll, remat)[0].sum()
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
        return program.count(" tanh(")

    assert count("full") > count("none")

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

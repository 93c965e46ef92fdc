"""The kernels refuse arguments that they would read out of bounds, naming them and their values."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.ops.routes import choose_routes
from pallas_kernels.add_norm import add_norm
from pallas_kernels.attention_arguments import tiles_for_device
from pallas_kernels.devices import chip_name
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.gelu import gelu
from pallas_kernels.head_scores import head_scores
from pallas_kernels.qk_rope import qk_rope
from pallas_kernels.symmetric import symmetric
from pallas_kernels.tiles import (
    GELU_TILES,
    AttentionTiles,
    BlockTiles,
    DqProductTiles,
    FlashAttentionTiles,
    MosaicAttentionTiles,
    MosaicProductTiles,
    ProductTiles,
    body_of,
    default_tiles,
)

BLOCKS = FlashAttentionTiles(*(AttentionTiles(16, 16, 4, 1),) * 3)
TILES = ProductTiles(16, 16, 16, 4, 1)
PRODUCT = DqProductTiles(16, 16, 4, 1)


def bf16(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


def f32(*shape):
    return jnp.zeros(shape, jnp.float32)


def int32(*shape):
    return jnp.zeros(shape, jnp.int32)


# kernel -> valid arguments; each case below replaces some of them
KERNELS: dict[Any, dict[str, Any]] = {
    flash_attention: {
        "q_BTHK": bf16(2, 32, 4, 16),
        "k_BSGK": bf16(2, 48, 2, 16),
        "v_BSGK": bf16(2, 48, 2, 16),
        "docs_BT": int32(2, 32),
        "docs_BS": int32(2, 48),
        "blocks": BLOCKS,
        "window": 8,
    },
    head_scores: {
        "h_ND": bf16(8, 16),
        "w_VD": bf16(32, 16),
        "reference_N": f32(8),
        "tiles": TILES,
        "softcap": 0.0,
        "keep": "exponentials",
    },
    symmetric: {
        "x_XMN": bf16(2, 16, 24),
        "y_XMN": bf16(2, 16, 24),
        "c_XMM": bf16(2, 16, 16),
        "scales": (1.0, 1.0),
        "tiles": TILES,
    },
    add_norm: {
        "h_XD": bf16(2, 3, 16),
        "y_XD": bf16(2, 3, 16),
        "gain_D": f32(16),
        "bias_D": f32(16),
        "form": "rms",
        "eps": 1e-6,
    },
    gelu: {"x_XF": bf16(2, 3, 16), "bias_F": f32(16), "tiles": GELU_TILES},
    qk_rope: {
        "x_BTHK": bf16(2, 8, 2, 16),
        "gain_K": f32(16),
        "cos_TK": f32(8, 16),
        "sin_TK": f32(8, 16),
        "eps": 1e-6,
    },
}
NARROW, WIDE = MosaicAttentionTiles(64, 64, 2), MosaicAttentionTiles(128, 64, 2)
STORED = WIDE._replace(variant="stored")
HALVES = {name: jax.ShapeDtypeStruct((8, 16), jnp.float16) for name in ("h_ND", "w_VD")}
WRONG = [  # kernel, changed arguments, the start of the error, the value in it
    (flash_attention, {"q_BTHK": bf16(2, 32, 3, 16)}, "the heads H of q_BTHK", "H=3, G=2"),
    (flash_attention, {"q_BTHK": bf16(2, 32, 64)}, "q_BTHK must", "bfloat16[2, 32, 64]"),
    (flash_attention, {"q_BTHK": bf16(2, 0, 4, 16)}, "q_BTHK must", "bfloat16[2, 0, 4, 16]"),
    (flash_attention, {"q_BTHK": [0.0]}, "q_BTHK must", "list [0.0]"),
    (flash_attention, {"q_BTHK": int32(2, 32, 4, 16)}, "q_BTHK must", "int32[2, 32, 4, 16]"),
    (flash_attention, {"k_BSGK": bf16(2, 0, 2, 16)}, "k_BSGK must", "bfloat16[2, 0, 2, 16]"),
    (flash_attention, {"k_BSGK": bf16(1, 48, 2, 16)}, "k_BSGK must", "bfloat16[1, 48, 2, 16]"),
    (flash_attention, {"k_BSGK": bf16(2, 48, 2, 32)}, "k_BSGK must", "bfloat16[2, 48, 2, 32]"),
    (flash_attention, {"k_BSGK": f32(2, 48, 2, 16)}, "k_BSGK must", "float32[2, 48, 2, 16]"),
    (flash_attention, {"v_BSGK": bf16(2, 47, 2, 16)}, "v_BSGK must", "bfloat16[2, 47, 2, 16]"),
    (flash_attention, {"v_BSGK": bf16(2, 48, 1, 16)}, "v_BSGK must", "bfloat16[2, 48, 1, 16]"),
    (flash_attention, {"v_BSGK": f32(2, 48, 2, 16)}, "v_BSGK must", "float32[2, 48, 2, 16]"),
    (flash_attention, {"docs_BS": None}, "docs_BT and docs_BS must", "docs_BS=None"),
    (flash_attention, {"docs_BT": None}, "docs_BT and docs_BS must", "docs_BT=None"),
    (flash_attention, {"docs_BT": int32(2, 48)}, "docs_BT must", "int32[2, 48]"),
    (flash_attention, {"docs_BS": int32(2, 32)}, "docs_BS must", "int32[2, 32]"),
    (flash_attention, {"docs_BS": f32(2, 48)}, "docs_BS must", "float32[2, 48]"),
    (flash_attention, {"window": 0}, "window must be", "0. Set window=None for all"),
    (flash_attention, {"window": 1.5}, "window must be", "1.5"),
    (flash_attention, {"blocks": TILES}, "blocks must", "ProductTiles(rows=16"),
    (flash_attention, {"blocks": 128}, "blocks must be FlashAttentionTiles, or None", "128"),
    (flash_attention, {"q_BTHK": bf16(2, 49, 4, 16)}, "q_BTHK must not have more", "T=49, S=48."),
    (flash_attention, {"interpret": "gpu"}, "interpret must", "'gpu'"),
    (flash_attention, {"blocks": BLOCKS._replace(dq=TILES)}, "blocks.dq must", "ProductTiles("),
    (
        flash_attention,
        {"blocks": BLOCKS._replace(dkv=AttentionTiles(16, 24, 4, 1))},
        "blocks.dkv.keys must be a power of two",
        "24",
    ),
    (flash_attention, {"blocks": BLOCKS._replace(dkv=NARROW)}, "blocks.dkv.keys must", "64"),
    (
        flash_attention,
        {"blocks": BLOCKS._replace(forward=WIDE._replace(variant="turns"))},
        "blocks.forward.variant must",
        "'turns'",
    ),
    (
        flash_attention,
        {"blocks": BLOCKS._replace(dq=WIDE._replace(queries=192, groups=3))},
        "blocks.dq.groups must be 2",
        "3",
    ),
    (flash_attention, {"blocks": BLOCKS._replace(dq=STORED)}, "blocks.dkv must", "AttentionTiles("),
    (
        flash_attention,
        {"blocks": BLOCKS._replace(dq=STORED, dkv=MosaicAttentionTiles(128, 128, 2))},
        "half of blocks.dq.queries=128 must",
        "128",
    ),
    (
        flash_attention,
        {"blocks": BLOCKS._replace(dq=AttentionTiles(16, 16, 3, 1))},
        "blocks.dq.warps must",
        "3",
    ),
    (
        flash_attention,
        {"blocks": BLOCKS._replace(dkv=MosaicAttentionTiles(64, 128, 2), dq=PRODUCT)},
        "blocks.dkv must be AttentionTiles where",
        "MosaicAttentionTiles(",
    ),
    (flash_attention, {"blocks": BLOCKS._replace(dkv=PRODUCT)}, "blocks.dkv must be", "DqProduct"),
    (head_scores, {"keep": True}, "keep must be in", "True"),
    (head_scores, {"h_ND": bf16(8, 4, 4)}, "h_ND must", "bfloat16[8, 4, 4]"),
    (head_scores, {"h_ND": bf16(0, 16)}, "h_ND must", "bfloat16[0, 16]"),
    (head_scores, {"w_VD": bf16(32, 24)}, "w_VD must", "bfloat16[32, 24]"),
    (head_scores, {"w_VD": f32(32, 16)}, "w_VD must", "float32[32, 16]"),
    (head_scores, {"reference_N": f32(7)}, "reference_N must", "float32[7]"),
    (head_scores, {"reference_N": int32(8)}, "reference_N must", "int32[8]"),
    (head_scores, {"tiles": BLOCKS}, "tiles must", "FlashAttentionTiles("),
    (head_scores, {"tiles": TILES._replace(depth=8)}, "tiles.depth must", "8"),
    (head_scores, {"tiles": TILES._replace(stages=0)}, "tiles.stages must", "0"),
    (head_scores, HALVES, "keep must", "'exponentials'"),
    (head_scores, {"tiles": MosaicProductTiles(128, 64, 64, 2, cluster=3)}, "tiles.cluster", "3"),
    (symmetric, {"tiles": MosaicProductTiles(128, 64, 64, 2, cluster=2)}, "tiles.cluster", "2"),
    (head_scores, {"tiles": MosaicProductTiles(128, 32, 64, 2)}, "tiles.columns must", "32"),
    (head_scores, {"softcap": -1.0}, "softcap must", "-1.0"),
    (symmetric, {"x_XMN": bf16(16, 24)}, "x_XMN must", "bfloat16[16, 24]"),
    (symmetric, {"x_XMN": bf16(2, 16, 0)}, "x_XMN must", "bfloat16[2, 16, 0]"),
    (symmetric, {"y_XMN": bf16(2, 16, 16)}, "y_XMN must", "bfloat16[2, 16, 16]"),
    (symmetric, {"y_XMN": f32(2, 16, 24)}, "y_XMN must", "float32[2, 16, 24]"),
    (symmetric, {"c_XMM": bf16(2, 16, 24)}, "c_XMM must", "bfloat16[2, 16, 24]"),
    (symmetric, {"scales": (1.0,)}, "scales must", "[()]"),
    (symmetric, {"tiles": TILES._replace(columns=32)}, "tiles.columns must", "32"),
    (symmetric, {"tiles": MosaicProductTiles(256, 64, 64, 2)}, "tiles.columns must", "64"),
    (add_norm, {"h_XD": int32(2, 16)}, "h_XD must", "int32[2, 16]"),
    (add_norm, {"h_XD": bf16(0, 16)}, "h_XD must", "bfloat16[0, 16]"),
    (add_norm, {"h_XD": bf16()}, "h_XD must", "bfloat16[]"),
    (add_norm, {"h_XD": np.zeros((2, 16))}, "h_XD must have at most 32 bits", "float64[2, 16]"),
    (add_norm, {"y_XD": bf16(2, 3, 8)}, "y_XD must", "bfloat16[2, 3, 8]"),
    (add_norm, {"y_XD": f32(2, 3, 16)}, "y_XD must", "float32[2, 3, 16]"),
    (add_norm, {"gain_D": f32(1)}, "gain_D must", "float32[1]"),
    (add_norm, {"gain_D": bf16(16)}, "gain_D must", "bfloat16[16]"),
    (add_norm, {"bias_D": f32(17)}, "bias_D must", "float32[17]"),
    (add_norm, {"y_bias_D": bf16(16)}, "y_bias_D must", "bfloat16[16]"),
    (add_norm, {"y_XD": None, "y_bias_D": f32(16)}, "y_bias_D must be None", "float32[16]"),
    (add_norm, {"tiles": GELU_TILES}, "tiles must have the keys norm, norm_backward", "gelu"),
    (add_norm, {"form": "batch"}, "form must be one of rms, layer", "'batch'"),
    (add_norm, {"eps": -1.0}, "eps must", "-1.0"),
    (qk_rope, {"x_BTHK": bf16(2, 8, 2, 15)}, "the head width K of x_BTHK", "K=15"),
    (qk_rope, {"x_BTHK": int32(2, 8, 2, 16)}, "x_BTHK must", "int32[2, 8, 2, 16]"),
    (qk_rope, {"gain_K": f32(8)}, "gain_K must", "float32[8]"),
    (qk_rope, {"cos_TK": f32(8, 8)}, "cos_TK must", "float32[8, 8]"),
    (qk_rope, {"sin_TK": f32(9, 16)}, "sin_TK must", "float32[9, 16]"),
    (qk_rope, {"eps": -1.0}, "eps must", "-1.0"),
    (gelu, {"x_XF": int32(2, 16)}, "x_XF must", "int32[2, 16]"),
    (gelu, {"x_XF": bf16(0, 16)}, "x_XF must", "bfloat16[0, 16]"),
    (gelu, {"x_XF": np.zeros((2, 16))}, "x_XF must have at most 32 bits", "float64[2, 16]"),
    (gelu, {"bias_F": bf16(16)}, "bias_F must", "bfloat16[16]"),
    (gelu, {"bias_F": f32(1)}, "bias_F must", "float32[1]"),
    (gelu, {"tiles": GELU_TILES["gelu"]}, "tiles must have the keys gelu,", "BlockTiles("),
    (gelu, {"tiles": GELU_TILES | {"gelu": TILES}}, "tiles['gelu'] must", "ProductTiles("),
    (
        gelu,
        {"tiles": GELU_TILES | {"gelu_backward": BlockTiles(3, 1_024, 4)}},
        "tiles['gelu_backward'].rows must be a power of two",
        "3.",
    ),
    (
        gelu,
        {"tiles": GELU_TILES | {"gelu_backward": BlockTiles(4, 1_024, 4, -1)}},
        "tiles['gelu_backward'].programs must",
        "-1.",
    ),
]


def test_valid_arguments_are_accepted():
    for kernel, arguments in KERNELS.items():
        jax.eval_shape(lambda kernel=kernel, args=arguments: kernel(**args, interpret=True))


@pytest.mark.parametrize("K, interpret", [(8, False), (24, False), (24, True)])
def test_attention_refuses_heads_that_its_products_do_not_support(K, interpret):
    """The interpreter also multiplies narrower heads."""
    arguments: dict[str, Any] = KERNELS[flash_attention] | {"q_BTHK": bf16(2, 32, 4, K)}
    arguments |= {"k_BSGK": bf16(2, 48, 2, K), "v_BSGK": bf16(2, 48, 2, K)}
    with pytest.raises(ValueError, match=rf"a power of two of at least (1|16); got K={K}\."):
        flash_attention(**arguments, interpret=interpret)


@pytest.mark.parametrize("kernel, changes, start, value", WRONG)
def test_an_argument_that_does_not_fit_is_an_error_with_its_name_and_value(
    kernel, changes, start, value
):
    with pytest.raises(ValueError) as error:
        kernel(**{"interpret": True} | KERNELS[kernel] | changes)
    text = str(error.value)
    assert text.startswith(start) and value in text.partition("; got ")[2]


def test_the_reference_refuses_documents_of_one_side_and_more_queries_than_keys():
    q, k, docs = f32(1, 8, 2, 4), f32(1, 8, 2, 4), int32(1, 8)
    for given in ((docs, None), (None, docs)):
        with pytest.raises(ValueError, match="docs_BT and docs_BS must both be arrays or both"):
            flash_attention_reference(q, k, k, *given)
    heads_first = q.swapaxes(1, 2), f32(1, 1, 8, 4)
    with pytest.raises(ValueError, match=r"got T=2, S=1\. Arrays are \[batch, time, heads, width"):
        flash_attention_reference(*heads_first, heads_first[1])


def test_by_default_attention_has_no_documents_and_the_tiles_of_the_device():
    q, k = (jax.random.normal(jax.random.key(0), (1, 32, heads, 16)) for heads in (2, 1))
    o = flash_attention(q, k, k, interpret=True)
    assert jnp.allclose(o, flash_attention_reference(q, k, k), atol=1e-5)


@pytest.mark.parametrize("window", [0, 256])
@pytest.mark.parametrize("kind, capability", [("NVIDIA H100 80GB HBM3", "9.0"), ("A40", "8.6")])
def test_the_tiles_of_a_device_are_those_of_the_trainers_route(kind, capability, window):
    q, k = (jax.ShapeDtypeStruct((8, 1_024, heads, 64), jnp.bfloat16) for heads in (9, 3))
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    tiles = tiles_for_device(q, k, False, False, window or None, device)
    model = ModelConfig(attention="flash", H=9, G=3, K=64, window=window, dtype="bfloat16")
    where = {"arch": f"sm_{capability.replace('.', '')}", "chip": chip_name(device)}
    assert tiles == choose_routes(model, False, "gpu", False, **where)["attention"].tiles
    odd = jax.ShapeDtypeStruct((8, 1_031, 3, 64), jnp.bfloat16)  # no Mosaic body takes 1,031 keys
    assert body_of(tiles_for_device(q, odd, False, False, None, device).dq) != "mosaic"


def test_an_architecture_without_tiles_is_refused_with_those_that_have_some():
    with pytest.raises(ValueError, match="must be one of sm_86, sm_90; got 'cpu'"):
        default_tiles("attention", "cpu")
    a100 = SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB", compute_capability="8.0")
    with pytest.raises(ValueError, match="needs a GPU of sm_86 or sm_90; got NVIDIA A100"):
        tiles_for_device(f32(1, 8, 1, 16), f32(1, 8, 1, 16), False, False, None, a100)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the GPU would run the kernel")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_without_a_gpu_the_error_names_interpret_and_the_reference(wrap):
    attend = lambda q: flash_attention(q, q, q)
    with pytest.raises(
        ValueError, match=r"GPU of sm_.*; got cpu\. Pass interpret=True.*_reference"
    ):
        wrap(attend)(f32(1, 32, 1, 16))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the GPU would run the kernel")
@pytest.mark.parametrize("kernel", [flash_attention, add_norm, gelu])
def test_without_a_gpu_a_kernel_called_outside_of_jit_says_so(kernel):
    with pytest.raises(ValueError, match=r"needs a GPU; got cpu\. Pass interpret=True"):
        kernel(**KERNELS[kernel])


@pytest.mark.parametrize(
    "traced, name",
    [
        ({"blocks": BLOCKS, "interpret": True}, "interpret must be True or False"),
        ({"blocks": BLOCKS}, "blocks.forward.queries must be a positive integer"),
        ({"window": 4}, "window must be the number of keys"),
    ],
)
def test_a_setting_that_jit_traces_is_refused_with_what_makes_it_static(traced, name):
    bound = name.partition(" ")[0].partition(".")[0]
    q, static = f32(1, 32, 1, 16), {} if "interpret" in traced else {"interpret": True}
    with pytest.raises(ValueError, match=rf"{name}.*bind {bound} before with functools\.partial"):
        jax.jit(functools.partial(flash_attention, **static))(q, q, q, **traced)


def sum_of(kernel, name):
    """Returns a function of one argument of a kernel that sums all the kernel's results."""
    arguments = KERNELS[kernel]

    def total(x):
        results = jax.tree.leaves(kernel(**arguments | {name: x}, interpret=True))
        return sum(result.astype(jnp.float32).sum() for result in results)

    return total, arguments[name]


DIFFERENTIABLE = [(flash_attention, "v_BSGK"), (add_norm, "h_XD"), (qk_rope, "x_BTHK")]
DIFFERENTIABLE += [(gelu, "x_XF"), (gelu, "bias_F")]


@pytest.mark.parametrize("kernel, name", DIFFERENTIABLE)
def test_derivatives_of_second_order_and_in_forward_mode_are_refused_with_the_reason(kernel, name):
    total, x = sum_of(kernel, name)
    gradient_sum = lambda x: jax.grad(total)(x).astype(jnp.float32).sum()
    jax.eval_shape(jax.grad(total), x)
    with pytest.raises(ValueError, match="must be of first order and in reverse mode"):
        jax.eval_shape(jax.grad(gradient_sum), x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(total, (x,), (x,))


@pytest.mark.parametrize("kernel, name", [(head_scores, "h_ND"), (symmetric, "x_XMN")])
def test_a_kernel_without_a_gradient_says_so(kernel, name):
    total, x = sum_of(kernel, name)
    with pytest.raises(ValueError, match="got a derivative of the kernel"):
        jax.eval_shape(jax.grad(total), x)

"""The default rule for axes, on names that common libraries give, and axes that users declare."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.default_axes import default_axes_of, resolve_axes
from jaxtrain.optim.recipes import muon, scale_by_muon

MATRICES = """
params.Dense_0.kernel layers.0.mlp.up.kernel layers_0.attention.out.kernel blocks.3.w1 w
mlp/~/linear_0.w transformer/~/attention/query.w encoder.multi_head.w_o multi_head_attention.q.w
attention_head.key.w position_wise_ffn.w1 overhead.w normal_form.w ahead.kernel remember.w
"""
OUTPUTS_FIRST = """
layers.0.weight mlp.c_fc.weight model.layers.0.self_attn.q_proj.weight h.0.attn.c_attn.weight
"""
EMBEDDINGS = """
embed.embedding params.Embed_0.embedding params.TokenEmbedder.embedding embed embeddings.0
wte.weight transformer/~/embed.embeddings model.embed_tokens.weight tok_embeddings.weight
token_emb tok_embed.w
"""
POSITIONS = """
wpe.weight pos_embed position_embeddings.weight params.PosEmb_0.table positional_embedding positions
pos
"""
HEADS = "lm_head.kernel head params.head.kernel params.LMHead_0.kernel head.w logits.w readout.w"
HEADS += " params.Classifier_0.kernel unembed.w Unembedding_0.kernel to_logits.kernel"
HEADS_OUTPUTS_FIRST = "lm_head.weight classifier.weight unembed.weight"
VECTORS = """
bias attention.q.bias ln_1.weight params.LayerNorm_0.scale blocks.layer_norm.w norm.weight rmsnorm.w
model.layers.input_layernorm.weight layers.b layers.gamma relative_position.bias post_attn_norm.gain
"""
CASES = {
    "|I->O": MATRICES,
    "|O<-I": OUTPUTS_FIRST,
    "V|D": EMBEDDINGS,
    "T|D": POSITIONS,
    "|I->V": HEADS,
    "|V<-I": HEADS_OUTPUTS_FIRST,
    "L|D": VECTORS,
}


@pytest.mark.parametrize("axes", CASES)
def test_the_rule_reads_two_dims_by_name(axes):
    found = {name: str(default_axes_of(name, 2)) for name in CASES[axes].split()}
    assert {name: a for name, a in found.items() if a != axes} == {}


def test_one_dim_or_none_is_a_vector_whatever_its_name():
    for name in ("w", "embed", "head.kernel", ""):
        assert str(default_axes_of(name, 1)) == "|D" and str(default_axes_of(name, 0)) == "|"


def test_three_dims_or_more_must_be_declared_and_the_error_says_how():
    params = {"a": jnp.ones((2, 3, 4)), "b": [jnp.ones((2, 3, 4, 5))], "w": jnp.ones((2, 3))}
    with pytest.raises(ValueError) as error:
        resolve_axes({"w": "|D->F"}, params)
    parts = "a of shape (2, 3, 4), b.0 of shape (2, 3, 4, 5)", "'|HWI->O'", "arrow AdamW"
    assert [part for part in parts if part not in str(error.value)] == []


def test_axes_are_declared_by_name_or_as_a_tree_in_any_notation():
    params = {"a": jnp.ones((2, 3, 4)), "layers": [(jnp.ones((3, 5)), jnp.ones(5)), None]}
    names = (("layers",), ("in",), ("out",))
    by_name = {"a": names, "layers.0.0": "|D->F"}
    tree = {"a": Axes(*names), "layers": [("|D->F", "|D"), None]}
    tuples = {"a": names, "layers": ((Axes.parse("|D->F"), ((), ("D",))), None)}
    found = [resolve_axes(axes, params) for axes in (by_name, tree, tuples)]
    assert found[0] == found[1] == found[2]
    assert jax.tree.structure(found[0]) == jax.tree.structure(params)
    assert [str(a) for a in jax.tree.leaves(found[0])] == ["(layers)|(in)->(out)", "|D->F", "|D"]
    nested = ((jnp.ones((3, 5)), jnp.ones(5)), (jnp.ones((5, 3)), jnp.ones(3)))
    strings = (("|D->F", "|F"), ("|F->D", "|D"))  # tuples of strings, but not of names
    assert jax.tree.map(str, resolve_axes(strings, nested)) == strings


def test_axes_that_name_no_parameter_are_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match="of blocks.w, gain; got block.w"):
        resolve_axes({"block": {"w": "|D->F"}}, {"blocks": {"w": jnp.ones((2, 3))}, "gain": 1.0})

    with pytest.raises(ValueError, match=r"of w; got \|D->F for the whole tree"):
        resolve_axes("|D->F", {"w": jnp.ones((2, 3))})


def test_a_matrix_without_entries_is_refused_and_a_vector_is_not():
    with pytest.raises(ValueError, match=r"must have entries; got w of shape \(0, 4\) .*'L\|D'"):
        resolve_axes(None, {"w": jnp.ones((0, 4))})
    params = {"w": jnp.ones((0, 4)), "bias": jnp.ones(0)}
    optimizer = muon(axes={"w": "L|D"})
    step = lambda p: optimizer.update(p, optimizer.init(p), p)[0]
    assert jax.eval_shape(step, params)["w"].shape == (0, 4)


NOT_FLOATING = {
    "int32": jnp.arange(3),
    "bool": jnp.ones((2, 3), bool),
    "complex64": jnp.ones((2, 3), jnp.complex64),
    "float8_e4m3fn": jnp.ones(3, jnp.float8_e4m3fn),
    "key<fry>": jax.random.key(0),
    "float": 1.0,
    "function": lambda x: x,
}


@pytest.mark.parametrize("dtype", NOT_FLOATING)
def test_parameters_without_a_real_floating_type_are_refused_by_name(dtype):
    params = {"w": jnp.ones((2, 3)), "blocks": [NOT_FLOATING[dtype]]}
    message = re.escape(f"got blocks.0 of type {dtype}.")
    axes = {"w": Axes.parse("|I->O"), "blocks": [Axes.parse("|D")]}
    for optimizer in (muon(), scale_by_muon(), build_optimizer(OptimConfig(), axes)):
        with pytest.raises(ValueError, match=message):
            optimizer.init(params)


def test_gradients_of_other_shapes_or_names_are_refused_by_name():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    optimizer = muon()
    state = optimizer.init(params)
    for grads, got in (
        (params | {"w": jnp.ones((3, 2))}, "w of (3, 2), not (2, 3)"),
        (params | {"w": None}, "w of None, not (2, 3)"),
        ({"w": params["w"]}, "b of None, not (3,)"),
        (params | {"c": 1.0}, "c of (), not None"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"got {got}.")):
            optimizer.update(grads, state, params)


@pytest.mark.parametrize("value", [None, 3])
def test_axes_without_a_meaning_name_their_parameter(value):
    with pytest.raises(ValueError, match="for blocks.w"):
        resolve_axes({"blocks": {"w": value}}, {"blocks": {"w": jnp.ones((2, 3))}})


def test_axes_may_be_a_state_or_a_module_like_the_parameters():
    declare = lambda x: "|D->F" if x.ndim == 2 else "|F"
    linear = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    for params in (linear, nnx.as_pure(linear), {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}):
        found = jax.tree.leaves(resolve_axes(jax.tree.map(declare, linear), params))
        assert [str(a) for a in found] == ["|F", "|D->F"]
    mlp = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    found = resolve_axes(jax.tree.map(declare, mlp), mlp)
    assert [str(a) for a in jax.tree.leaves(found)] == ["|D->F", "|F"] * 2


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_one_array_may_be_the_whole_tree(shape):
    optimizer, x = muon(), jnp.ones(shape)
    updates, _ = jax.eval_shape(optimizer.update, x, jax.eval_shape(optimizer.init, x), x)
    assert updates.shape == shape


@pytest.mark.parametrize(
    "axes, message",
    [
        ("I->O", "layer.w: axes must contain one '|' between stack and dims; got 'I->O'"),
        ("L|I->", "layer.w: axes must have dims after the '|'"),
        ("|I=>O", "layer.w: axes must name dims"),
        (
            ["|", "I", "O"],
            "layer.w: axes must be tuples of names: stack, inputs and outputs; got [",
        ),
        (("layers", "in", "out"), "layer.w: axes must be tuples of names"),
        ((("L",), "I", ("O",)), "layer.w: axes must be tuples of names"),
    ],
)
def test_malformed_axes_name_their_parameter_when_an_optimizer_is_built(axes, message):
    for tree in ({"layer.w": axes}, {"layer": {"w": axes}}):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            muon(axes=tree)


def test_axes_may_have_spaces():
    found = resolve_axes({"w": " L | I -> O ", "b": "L | D"}, {"w": X_LIO, "b": jnp.ones((2, 3))})
    assert jax.tree.map(str, found) == {"w": "L|I->O", "b": "L|D"}


X_LIO = jnp.ones((2, 3, 4))
BLOCKS = {f"attn_{i}": {"query": {"kernel": X_LIO}, "out": {"kernel": X_LIO}} for i in range(6)}


def test_a_long_list_of_names_is_cut_after_five():
    with pytest.raises(ValueError, match=r"attn_2.out.kernel of shape \(2, 3, 4\), and 7 more"):
        resolve_axes(None, BLOCKS)
    wrong = {"attn_5.value.kernel": "|D->HK"}
    with pytest.raises(ValueError, match="of attn_5.*, and 7 more; got attn_5.value.kernel"):
        resolve_axes(wrong, BLOCKS)


def test_a_star_in_a_name_stands_for_any_characters_and_a_full_name_comes_first():
    axes = {"*.query.kernel": "|D->HK", "attn_*.out.kernel": "|HK->D", "attn_0.out.kernel": "L|DF"}
    found = resolve_axes(axes, BLOCKS)
    assert str(found["attn_5"]["query"]["kernel"]) == "|D->HK"
    assert str(found["attn_5"]["out"]["kernel"]) == "|HK->D"
    assert str(found["attn_0"]["out"]["kernel"]) == "L|DF"


def test_a_star_that_matches_nothing_or_is_ambiguous_is_an_error():
    with pytest.raises(ValueError, match=r"axes must name parameters.*got \*.value.kernel"):
        resolve_axes({"*.kernel": "|D->HK", "*.value.kernel": "|D->HK"}, BLOCKS)
    axes = {"*.kernel": "|D->HK", "*.out.kernel": "|HK->D"}
    with pytest.raises(ValueError, match=r"attn_0.out.kernel from '\*.kernel' and '\*.out"):
        resolve_axes(axes, BLOCKS)
    resolve_axes({"*.kernel": "|D->HK", "*.query.kernel": "|D->HK"}, BLOCKS)


def test_a_star_may_match_only_parameters_that_are_masked():
    part = {"attn": optax.MaskedNode(), "w": jnp.ones((2, 3))}
    assert str(resolve_axes({"*.query.kernel": "|D->HK"}, part)["w"]) == "|I->O"


def test_the_stars_of_the_page_declare_the_attention_of_flax():
    page = Path(__file__).parent.parent / "docs" / "own_loop.md"
    [code] = re.findall(r"```python\n(inward, .*?)```", page.read_text(), re.DOTALL)
    names = {}
    exec(code, names)

    class Blocks(linen.Module):
        @linen.compact
        def __call__(self, x):
            return [linen.MultiHeadDotProductAttention(2)(x) for _ in range(2)]

    params = jax.eval_shape(Blocks().init, jax.random.key(0), jnp.ones((1, 3, 8)))
    assert len(jax.tree.leaves(params)) == 16
    found = jax.tree.leaves(jax.tree.map(str, resolve_axes(names["axes"], params)))
    assert sorted(found) == sorted(2 * (3 * ["|D->HK"] + ["|HK->D"] + 3 * ["L|D"] + ["|D"]))

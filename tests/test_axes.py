import numpy as np
import pytest

from jaxtrain.axes import Axes

SIZES = {"L": 3, "D": 8, "H": 4, "K": 2, "F": 16, "V": 32}


@pytest.mark.parametrize("text", ["L|D->HK", "V|D", "|D", "L|F->D", "L|HK->D", "|V<-D"])
def test_axes_print_as_the_text_that_they_were_parsed_from(text):
    assert str(Axes.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["D->F", "L|D|F", "L|D->", "L|", "L|Q->D", "L|D->D", "x", "|V<-", "|<-D"]
)
def test_malformed_axes_are_refused(text):
    with pytest.raises(ValueError, match="axes must"):
        Axes.parse(text)


@pytest.mark.parametrize(
    "text, role",
    [
        ("L|D->HK", "matrix"),
        ("V|D", "embedding"),
        ("T|D", "embedding"),
        ("|V<-D", "head"),
        ("|D->V", "head"),
        ("L|D", "vector"),
        ("|D", "vector"),
    ],
)
def test_the_letters_decide_the_role_of_a_parameter(text, role):
    assert Axes.parse(text).role == role
    assert Axes.parse(text).is_matrix == (role == "matrix")


@pytest.mark.parametrize(
    "text, view",
    [("V|D", (1, 32, 8)), ("|V<-D", (1, 8, 32)), ("L|D", (3, 1, 8)), ("|D", (1, 1, 8))],
)
def test_embeddings_heads_and_vectors_have_a_matrix_shape_too(text, view):
    axes = Axes.parse(text)
    assert axes.matrix_shape(axes.shape(SIZES)) == view


def test_the_matrix_of_a_head_has_its_inputs_first():
    x = np.arange(32 * 8).reshape(32, 8)
    seen = []
    same = Axes.parse("|V<-D").on_matrices(lambda m: seen.append(m) or m, x)
    np.testing.assert_array_equal(seen[0][0], x.T)
    np.testing.assert_array_equal(same, x)


def test_shape_and_fan_in_are_products_of_the_letters_sizes():
    axes = Axes.parse("L|HK->D")
    assert axes.shape(SIZES) == (3, 4, 2, 8)
    assert axes.fan_in(SIZES) == 8
    assert Axes.parse("V|D").fan_in(SIZES) == 1


def test_on_matrices_flattens_inputs_and_outputs_and_restores_the_shape():
    x = np.arange(3 * 8 * 4 * 2).reshape(3, 8, 4, 2)
    seen = []
    same = Axes.parse("L|D->HK").on_matrices(lambda m: seen.append(m.shape) or m, x)
    assert seen == [(3, 8, 8)]
    np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("text, view", [("L|D->HK", "LH|D->K"), ("L|HK->D", "LH|K->D")])
def test_splitting_heads_makes_each_a_matrix_and_merging_undoes_it(text, view):
    axes = Axes.parse(text)
    x = np.arange(np.prod(axes.shape(SIZES))).reshape(axes.shape(SIZES))
    by_head, y = axes.split_heads(x)
    assert str(by_head) == view and y.shape == by_head.shape(SIZES)
    np.testing.assert_array_equal(axes.merge_heads(y), x)


def test_splitting_heads_leaves_a_matrix_without_heads_as_it_is():
    axes = Axes.parse("L|D->F")
    x = np.zeros(axes.shape(SIZES))
    by_head, y = axes.split_heads(x)
    assert by_head == axes and y is x and axes.merge_heads(x) is x

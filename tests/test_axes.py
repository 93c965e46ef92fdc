import numpy as np
import pytest

from jaxtrain.axes import Axes

SIZES = {"L": 3, "D": 8, "H": 4, "K": 2, "F": 16, "V": 32}


@pytest.mark.parametrize("text", ["L|D->HK", "V|D", "|D", "L|F->D", "L|HK->D", "|V<-D"])
def test_axes_print_as_they_were_read(text):
    assert str(Axes.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["D->F", "L|D|F", "L|D->", "L|", "L|Q->D", "L|D->D", "x", "|V<-", "|<-D"]
)
def test_malformed_axes_are_refused_by_name(text):
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
def test_the_string_alone_says_what_a_parameter_does(text, role):
    assert Axes.parse(text).role == role
    assert Axes.parse(text).is_matrix == (role == "matrix")


@pytest.mark.parametrize(
    "text, view",
    [("V|D", (1, 32, 8)), ("|V<-D", (1, 8, 32)), ("L|D", (3, 1, 8)), ("|D", (1, 1, 8))],
)
def test_what_is_no_matrix_has_a_view_of_inputs_and_outputs_too(text, view):
    axes = Axes.parse(text)
    assert axes.matrix_shape(axes.shape(SIZES)) == view


def test_a_head_is_seen_with_its_inputs_first():
    x = np.arange(32 * 8).reshape(32, 8)
    seen = []
    same = Axes.parse("|V<-D").on_matrices(lambda m: seen.append(m) or m, x)
    np.testing.assert_array_equal(seen[0][0], x.T)
    np.testing.assert_array_equal(same, x)


def test_shape_and_fan_in_follow_the_letters():
    axes = Axes.parse("L|HK->D")
    assert axes.shape(SIZES) == (3, 4, 2, 8)
    assert axes.fan_in(SIZES) == 8
    assert Axes.parse("V|D").fan_in(SIZES) == 1


def test_the_matrix_view_flattens_inputs_and_outputs_and_is_undone():
    x = np.arange(3 * 8 * 4 * 2).reshape(3, 8, 4, 2)
    seen = []
    same = Axes.parse("L|D->HK").on_matrices(lambda m: seen.append(m.shape) or m, x)
    assert seen == [(3, 8, 8)]
    np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("text, view", [("L|D->HK", "LH|D->K"), ("L|HK->D", "LH|K->D")])
def test_heads_become_matrices_of_their_own_and_back(text, view):
    axes = Axes.parse(text)
    x = np.arange(np.prod(axes.shape(SIZES))).reshape(axes.shape(SIZES))
    apart, y = axes.split_heads(x)
    assert str(apart) == view and y.shape == apart.shape(SIZES)
    np.testing.assert_array_equal(axes.merge_heads(y), x)


def test_a_matrix_without_heads_is_its_own_view_by_head():
    axes = Axes.parse("L|D->F")
    x = np.zeros(axes.shape(SIZES))
    apart, y = axes.split_heads(x)
    assert apart == axes and y is x
    assert axes.merge_heads(x) is x

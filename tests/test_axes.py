import numpy as np
import pytest

from jaxtrain.axes import Axes

SIZES = {"L": 3, "D": 8, "H": 4, "K": 2, "F": 16, "V": 32}


@pytest.mark.parametrize("text", ["L|D->HK", "V|D", "|D", "L|F->D", "L|HK->D"])
def test_axes_print_as_they_were_read(text):
    assert str(Axes.parse(text)) == text


@pytest.mark.parametrize("text", ["D->F", "L|D|F", "L|D->", "L|", "L|Q->D", "L|D->D", "x"])
def test_malformed_axes_are_refused_by_name(text):
    with pytest.raises(ValueError, match="axes must"):
        Axes.parse(text)


def test_only_an_arrow_makes_a_matrix():
    assert Axes.parse("L|D->HK").is_matrix
    assert not Axes.parse("V|D").is_matrix


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

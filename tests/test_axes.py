import numpy as np
import pytest

from jaxtrain.axes import Axes

SIZES = {"L": 3, "D": 8, "H": 4, "K": 2, "F": 16, "V": 32}


TEXTS = ["L|D->HK", "V|D", "|D", "L|F->D", "L|HK->D", "|V<-D", "|D->D", "|HWI->O", "|"]


@pytest.mark.parametrize("text", [*TEXTS, "(layers)|(height)(width)D->(out)"])
def test_axes_print_as_the_text_that_they_were_parsed_from(text):
    assert str(Axes.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("D->F", "L|D|F", "L|D->", "L|", "x", "|V<-", "|<-D", "|D-F", "|D F", "|(in->D", "|2->D"),
        *((("L",), "D", ("F",)), (("L",),), ("L", "D", "F"), ((), (), ("F",)), ((), ("a b",)), 3),
    ],
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
        ("|D->D", "matrix"),
        ("|", "vector"),
        ("|D->(V)", "head"),
        ((("V",), ("in",)), "embedding"),
        ((("vocabulary",), ("in",)), "vector"),
        ((("HT",), ("in",), ("VT",)), "matrix"),
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


def test_a_tuple_of_names_is_the_same_as_letters():
    names = (("layers",), ("height", "width", "in"), ("out",))
    axes, x = Axes.parse(names), np.arange(2 * 3 * 3 * 4 * 5).reshape(2, 3, 3, 4, 5)
    assert axes == Axes.parse(axes) == Axes.parse(str(axes)) and axes.letters == sum(names, ())
    np.testing.assert_array_equal(axes.to_matrices(x), Axes.parse("L|HWI->O").to_matrices(x))
    assert Axes.parse(((), ("in",))) == Axes.parse("|(in)")


@pytest.mark.parametrize(
    "text, shape, problem",
    [
        ("L|D->F", (4, 6), "which name 3"),
        ("|D->F", (2, 4, 6), "which name 2"),
        ("|D->D", (4, 6), "D is both 4 and 6"),
        ("|", (1,), "which name 0"),
    ],
)
def test_an_array_that_does_not_fit_its_axes_is_named(text, shape, problem):
    with pytest.raises(ValueError) as error:
        Axes.parse(text).check_shape("blocks.w", shape)
    parts = "blocks.w", str(shape), text, problem
    assert [part for part in parts if part not in str(error.value)] == []
    Axes.parse(text).check_shape("blocks.w", [4] * len(Axes.parse(text).letters))


def test_a_name_without_a_size_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"L, D, H.*'\|Q->D' with Q"):
        Axes.parse("|Q->D").shape(SIZES)


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


@pytest.mark.parametrize(
    "text, view", [("L|D->HK", "LH|D->K"), ("L|HK->D", "LH|K->D"), ("L|HK<-D", "LH|K<-D")]
)
def test_splitting_heads_makes_each_a_matrix_and_merging_undoes_it(text, view):
    axes = Axes.parse(text)
    x = np.arange(np.prod(axes.shape(SIZES))).reshape(axes.shape(SIZES))
    by_head, y = axes.split_heads(x)
    assert str(by_head) == view and y.shape == by_head.shape(SIZES)
    np.testing.assert_array_equal(axes.merge_heads(y), x)


@pytest.mark.parametrize("text", ["L|D->F", "H|D->F", "|D->H", "H|D"])
def test_splitting_heads_leaves_what_has_no_heads_as_it_is(text):
    axes = Axes.parse(text)
    x = np.zeros(axes.shape(SIZES))
    by_head, y = axes.split_heads(x)
    assert by_head == axes and y is x and axes.merge_heads(x) is x

import jax
import pytest

from configs import gpt_124m
from jaxtrain.config import train_config as config_lib
from jaxtrain.optim.newton_schulz_cost import FLOPS_BY_FORM, matrix_stacks, newton_schulz_flops
from jaxtrain.study.overhead import overhead_table
from jaxtrain.training.run import build_run


@pytest.fixture(scope="module")
def gpt():
    cfg = config_lib.freeze(gpt_124m.get_config())
    return cfg, build_run(cfg, jax.devices()[:1]).model


def product(rows, inner, columns):
    return 2 * rows * inner * columns


def test_the_standard_form_is_three_products_an_iteration():
    m, n, k = 6, 40, 5
    iteration = product(m, n, m) + product(m, m, m) + product(m, m, n)
    assert newton_schulz_flops([(3, n, m)], k) == 3 * k * iteration


def test_a_segment_of_the_gram_form_squares_and_applies_once():
    m, n, k = 6, 40, 5
    total = 0
    for iterations in (2, 3):  # one restart
        total += product(m, n, m) + product(m, m, n)
        for i in range(iterations):
            first, last = i == 0, i == iterations - 1
            total += product(m, m, m)  # the square of the Gram matrix
            total += 0 if first else product(m, m, m)  # multiplies the factors before it
            total += 0 if last else 2 * product(m, m, m)  # the next Gram matrix
    assert newton_schulz_flops([(1, m, n)], k, "best") == total


def test_the_standard_form_is_best_for_square_matrices_and_the_gram_form_for_long_ones():
    cost = lambda n, form: newton_schulz_flops([(1, 64, n)], 5, form)
    assert cost(64, "best") == cost(64, "standard")
    assert cost(128, "best") < cost(128, "standard")


def test_only_matrices_count(gpt):
    _, model = gpt
    stacks = matrix_stacks(model.axes, model.shapes)
    assert sum(X * I * O for X, I, O in stacks) == 12 * 12 * 768**2  # noqa: E741


def test_gpt2_small_needs_the_published_gigaflops(gpt):
    _, model = gpt
    stacks = matrix_stacks(model.axes, model.shapes)
    flops = {form: newton_schulz_flops(stacks, 5, form) / 1e9 for form in FLOPS_BY_FORM}
    assert flops["standard"] == pytest.approx(1_631, abs=1)
    assert flops["standard, symmetric"] == pytest.approx(1_142, abs=1)
    assert flops["best, symmetric"] == pytest.approx(848, abs=1)


def test_the_share_falls_with_tokens_and_grows_with_devices_that_repeat_the_work(gpt):
    text = overhead_table(*gpt, tokens=(32_768, 524_288), devices=8)
    rows = {line.split()[0]: line.split()[1:] for line in text.split("\n") if line}
    assert rows["32,768"][:3] == ["6.24", "|", "49.9"]
    assert rows["524,288"][:3] == ["0.39", "|", "3.12"]


def test_a_given_peak_gives_the_time_of_that_device_only(gpt):
    text = overhead_table(*gpt, peak_flops=1e12, efficiency=0.5)
    [line] = [line for line in text.split("\n") if line.startswith("standard  ")]
    assert line.split()[-1] == "3.26e+03" and "h100" not in text

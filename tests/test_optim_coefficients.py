import math

import numpy as np
import pytest

from jaxtrain.optim.coefficients import COEFFICIENTS, CoefficientTable, coefficient_table

# (table, steps) -> smallest and largest result for singular values between two edges.
EDGES = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
BANDS = {
    ("jordan", 5): ((0.048, 0.471), (0.471, 1.110), (0.682, 1.202), (0.682, 1.134), (0.682, 1.134)),
    ("quintic", 5): (
        (0.049, 0.475),
        (0.475, 1.075),
        (0.978, 1.145),
        (0.978, 1.032),
        (0.978, 1.032),
    ),
    ("polar_express", 5): (
        (0.097, 0.840),
        (0.840, 1.124),
        (0.876, 1.086),
        (0.870, 1.124),
        (0.870, 1.124),
    ),
}


def apply_polynomials(table, sigma):
    """Returns singular values after all iterations of a table, in float64."""
    for a, b, c in table.rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("name, steps", BANDS)
def test_singular_values_end_in_the_bands_of_the_publication(name, steps):
    table = coefficient_table(name, steps)
    for low, high, band in zip(EDGES[:-1], EDGES[1:], BANDS[name, steps], strict=True):
        ends = apply_polynomials(table, np.geomspace(low, high, 20_001) / table.safety)
        np.testing.assert_allclose((ends.min(), ends.max()), band, atol=1.1e-3)


@pytest.mark.parametrize(
    "name, steps, slope",
    [("jordan", 5, 485), ("quintic", 5, 493), ("convergent", 12, 4096), ("polar_express", 5, 967)]
    + [("polar_express", steps, slope) for steps, slope in ((6, 1810), (7, 3360), (8, 6300))],
)
def test_small_singular_values_grow_by_the_product_of_the_first_coefficients(name, steps, slope):
    table = coefficient_table(name, steps)
    assert math.prod(a for a, _, _ in table.rows) / table.safety == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("name, steps", [("polar_express", 8), ("convergent", 12)])
def test_enough_steps_end_at_one(name, steps):
    table = coefficient_table(name, steps)
    ends = apply_polynomials(table, np.geomspace(1e-2, 1, 1001) / table.safety)
    assert np.abs(ends - 1).max() < 1e-6


def test_no_table_makes_a_singular_value_negative_even_slightly_above_one():
    for name in COEFFICIENTS:
        ends = apply_polynomials(coefficient_table(name), np.linspace(0.02, 1.01, 10_001))
        assert 0.67 < ends.min() <= ends.max() < 1.21, name


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_fewer_steps_take_the_first_rows_and_more_repeat_the_last(name):
    rows = COEFFICIENTS[name].rows
    assert coefficient_table(name, 1).rows == rows[:1]
    assert coefficient_table(name, len(rows) + 3).rows == rows + rows[-1:] * 3
    default = coefficient_table(name)
    assert len(default.rows) == default.steps == {"aol4": 4, "convergent": 12}.get(name, 5)


def test_custom_rows_and_tables_are_used_unchanged():
    rows = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
    assert coefficient_table(rows) == CoefficientTable(rows, steps=2)
    assert coefficient_table([list(row) for row in rows], 3).rows == (*rows, rows[1])
    table = coefficient_table(CoefficientTable(rows, steps=4, safety=1.02))
    assert table.rows == (*rows, rows[1], rows[1])


@pytest.mark.parametrize("wrong", ["euler", (), ((1.0, 2.0),), ((1, 2, math.nan),), (1, 2, 3), 7])
def test_an_invalid_table_names_its_flag(wrong):
    with pytest.raises(ValueError, match="--optim.ns_coefficients"):
        coefficient_table(wrong)


def test_an_unknown_table_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="jordan, quintic, convergent, polar_express, aol4; got 'euler'"
    ):
        coefficient_table("euler")


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_names_its_flag(steps):
    with pytest.raises(ValueError, match="--optim.ns_steps"):
        coefficient_table("jordan", steps)

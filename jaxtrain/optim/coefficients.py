"""Coefficients of the Newton-Schulz iteration X <- aX + (bA + cA^2)X with A = XX^T.

Each singular value s becomes as + bs^3 + cs^5, again and again, until it is about 1.
"""

import math
from typing import NamedTuple

from jaxtrain.optim import pick


class Table(NamedTuple):
    """The rows of a run and how its matrices are first made no longer than 1."""

    rows: tuple[tuple[float, float, float], ...]  # (a, b, c) an iteration; the last one repeats
    steps: int  # iterations, where none are asked for
    safety: float = 1.0  # what the Frobenius norm is multiplied by before it divides
    aol: bool = False  # rows divided by the roots of their Gram matrix's absolute row sums instead


def _damped(rows, safety):
    """Rows for singular values that rounding left above 1, up to safety; the last stays exact."""
    damped = [(a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1]]
    return (*damped, rows[-1])


COEFFICIENTS = {
    # Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    "jordan": Table(((3.4445, -4.7750, 2.0315),), steps=5),
    # Source: You 2024, as in https://github.com/microsoft/dion
    "quintic": Table(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        steps=5,
    ),
    # Source: Amsel et al. 2025, https://arxiv.org/abs/2505.16932, Algorithm 1; 8 steps are exact
    "polar_express": Table(
        _damped(
            (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                (1.875, -1.25, 0.375),
            ),
            safety=1.01,
        ),
        steps=5,
        safety=1.01,
    ),
    # Source: Boissin et al. 2025, https://arxiv.org/abs/2512.04632 (Turbo-Muon), rows as in
    # https://github.com/microsoft/dion. Another set of rows in use, from (4.0098, -7.0585, 2.4635)
    # on, is negative above 0.884: it turns a gradient of rank one, whose value is 1, around.
    "aol4": Table(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        steps=4,
        aol=True,
    ),
}


def _is_row(row) -> bool:
    numbers = isinstance(row, (tuple, list)) and all(isinstance(v, (int, float)) for v in row)
    return numbers and len(row) == 3 and all(math.isfinite(v) for v in row)


def coefficient_table(coefficients="jordan", steps: int | None = None) -> Table:
    """The table with as many rows as the run has iterations.

    Args:
        coefficients: a key of COEFFICIENTS, a Table, or rows ((a, b, c), ...) of one's own.
        steps: iterations; None is the table's own number. Fewer take the first rows, more repeat
            the last.

    Raises:
        ValueError: no such table, an own row is not three finite numbers, or steps is below 1.
    """
    if isinstance(coefficients, str):
        table = pick(COEFFICIENTS, coefficients, "optim.ns_coefficients")
    elif isinstance(coefficients, Table):
        table = coefficients
    else:
        rows = coefficients if isinstance(coefficients, (tuple, list)) else ()
        if not rows or not all(map(_is_row, rows)):
            raise ValueError(
                "optim.ns_coefficients must name a table or be rows of three finite numbers; got "
                f"{coefficients!r}. Set --optim.ns_coefficients."
            )
        table = Table(tuple(map(tuple, rows)), steps=len(rows))
    steps = table.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"optim.ns_steps must be at least 1; got {steps}. Set --optim.ns_steps.")
    rows = table.rows[:steps] + table.rows[-1:] * (steps - len(table.rows))
    return table._replace(rows=rows, steps=steps)

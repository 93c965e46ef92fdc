"""Coefficients of the Newton-Schulz iteration X <- aX + (bA + cA^2)X with A = XX^T.

Each iteration maps every singular value s to as + bs^3 + cs^5; after the last it is about 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtrain.optim import how_to_set, select_option


class CoefficientTable(NamedTuple):
    """Coefficients of each iteration, and how singular values are first brought below 1."""

    rows: tuple[tuple[float, float, float], ...]  # (a, b, c) of each iteration; the last repeats
    steps: int  # default number of iterations
    safety: float = 1.0  # factor of the Frobenius norm that the matrix is divided by
    # Divide row i by the root of sum_j |(XX^T)_ij| instead ("almost-orthogonal layers"). It bounds
    # the largest singular value by 1 too and leaves the others larger, which saves one iteration.
    aol: bool = False


def _damped(rows, safety):
    """Rescales rows so that singular values up to `safety` converge; the last row is unchanged.

    Rounding may leave a value above 1, where the published polynomials diverge.
    """
    damped = [(a / safety, b / safety**3, c / safety**5) for a, b, c in rows[:-1]]
    return (*damped, rows[-1])


COEFFICIENTS = {
    # Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    "jordan": CoefficientTable(((3.4445, -4.7750, 2.0315),), steps=5),
    # Source: You 2024, as in https://github.com/microsoft/dion
    "quintic": CoefficientTable(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        steps=5,
    ),
    # Singular values converge to 1. Source: https://github.com/KellerJordan/modded-nanogpt, track 3
    "convergent": CoefficientTable(((2.0, -1.5, 0.5),), steps=12),
    # Source: Amsel et al. 2025, https://arxiv.org/abs/2505.16932, Algorithm 1; 8 steps end at 1
    "polar_express": CoefficientTable(
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
    # https://github.com/microsoft/dion. Another published set, whose first row is
    # (4.0098, -7.0585, 2.4635), is negative above 0.884: it reverses the sign of a gradient of rank
    # one, whose singular value is 1.
    "aol4": CoefficientTable(
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


def _is_coefficient_row(row) -> bool:
    numbers = isinstance(row, (tuple, list)) and all(isinstance(v, (int, float)) for v in row)
    return numbers and len(row) == 3 and all(math.isfinite(v) for v in row)


def coefficient_table(
    coefficients: str | CoefficientTable | Sequence = "jordan", steps: int | None = None
) -> CoefficientTable:
    """Returns a table with one row for each iteration.

    Args:
        coefficients: a key of COEFFICIENTS, a CoefficientTable, or rows ((a, b, c), ...).
        steps: iterations; None is the table's default. Fewer take the first rows, more repeat
            the last.

    Raises:
        ValueError: no such table, a row is not three finite numbers, or steps is below 1.
    """
    if isinstance(coefficients, str):
        table = select_option(COEFFICIENTS, coefficients, "optim.ns_coefficients", "newton_schulz")
    elif isinstance(coefficients, CoefficientTable):
        table = coefficients
    else:
        rows = coefficients if isinstance(coefficients, (tuple, list)) else ()
        if not rows or not all(map(_is_coefficient_row, rows)):
            hint = how_to_set("newton_schulz", "optim.ns_coefficients")
            raise ValueError(
                "newton_schulz must name a table of coefficients or be rows of three finite "
                f"numbers; got {coefficients!r}. {hint}"
            )
        table = CoefficientTable(tuple(map(tuple, rows)), steps=len(rows))
    steps = table.steps if steps is None else steps
    if steps < 1:
        hint = how_to_set("steps", "optim.ns_steps")
        raise ValueError(f"steps must be at least 1; got {steps}. {hint}")
    rows = table.rows[:steps] + table.rows[-1:] * (steps - len(table.rows))
    return table._replace(rows=rows, steps=steps)

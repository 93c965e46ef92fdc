"""FLOPs of Newton-Schulz, by formula.

For a matrix of m x n entries, m <= n, and k iterations, with multiply-adds counted as 2:

    standard   k (4 m^2 n + 2 m^3)
    Gram       4 s m^2 n + 2 (4k - 3s) m^3, with s segments

The Gram form computes XX^T once per segment and iterates on m x m matrices; `best` takes the
cheaper form for each matrix. A kernel that computes only half of each symmetric product needs
k (3 m^2 n + m^3) and 3 s m^2 n + (4k - 3s) m^3.

Source: Gram Newton-Schulz 2026, https://dao-lab.ai/blog/2026/gram-newton-schulz
"""

from collections.abc import Iterable

import jax

from jaxtrain.model.trees import ArrayTree, AxesTree

SEGMENTS = 2  # as newton_schulz.py splits 5 iterations


def _standard(m, n, k):
    return k * (4 * m**2 * n + 2 * m**3)


def _standard_symmetric(m, n, k):
    return k * (3 * m**2 * n + m**3)


def _gram(m, n, k):
    return 4 * SEGMENTS * m**2 * n + 2 * (4 * k - 3 * SEGMENTS) * m**3


def _gram_symmetric(m, n, k):
    return 3 * SEGMENTS * m**2 * n + (4 * k - 3 * SEGMENTS) * m**3


# form -> formulas, of which the cheapest is taken for each matrix
FLOPS_BY_FORM = {
    "standard": (_standard,),
    "best": (_standard, _gram),
    "standard, symmetric": (_standard_symmetric,),
    "best, symmetric": (_standard_symmetric, _gram_symmetric),
}


def newton_schulz_flops(
    stacks: Iterable[tuple[int, int, int]], steps: int, form: str = "standard"
) -> float:
    """Returns the FLOPs of one optimizer step on all matrices, over all devices.

    Args:
        stacks: (X, I, O) of each stack of X matrices.
        form: a key of FLOPS_BY_FORM.
    """
    total = 0
    for X, I, O in stacks:  # noqa: E741
        m, n = min(I, O), max(I, O)
        total += X * min(cost(m, n, steps) for cost in FLOPS_BY_FORM[form])
    return float(total)


def matrix_stacks(axes: AxesTree, shapes: ArrayTree) -> list[tuple[int, int, int]]:
    """Returns (X, I, O) of every parameter that is a matrix by its axes."""
    pairs = zip(jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True)
    return [a.matrix_shape(s.shape) for a, s in pairs if a.is_matrix]

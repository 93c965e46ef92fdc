"""FLOPs of SOAP's products and decompositions, by formula.

For a matrix of I x O entries, with multiply-adds counted as 2 and a refresh of the bases every
`every` steps:

    factors        2 I O (I + O)
    rotations      2 I O (I + O) each: SOAP rotates gradient, momentum and step (3), SOAP-Muon
                   momentum and step (2)
    refresh        (2 + 8/3) (I^3 + O^3) / every: a product, and a QR decomposition with its Q

The full decomposition of the first step is not counted. A side that has no factor drops out: its
square or cube, and its term in I + O.
"""

from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from jaxtrain.model.trees import ArrayTree, AxesTree
from jaxtrain.optim.newton_schulz_cost import matrix_stacks
from jaxtrain.optim.owners import ownership
from jaxtrain.optim.preconditioner import MAX_SIDE

ROTATIONS = {"soap": 3, "soap_muon": 2}  # by optim.name


def preconditioner_flops(
    stacks: Iterable[tuple[int, int, int]], name: str, every: int, max_side: int = MAX_SIDE
) -> float:
    """Returns the FLOPs of one average step on all matrices, over all devices.

    Args:
        stacks: (X, I, O) of each stack of X matrices.
        name: a key of ROTATIONS.
        every, max_side: see `precondition`.
    """
    total = 0.0
    for X, I, O in stacks:  # noqa: E741
        sides = [N for N in (I, O) if N <= max_side]
        total += X * (1 + ROTATIONS[name]) * 2 * I * O * sum(sides)
        total += X * (2 + 8 / 3) * sum(N**3 for N in sides) / every
    return total


def owner_imbalance(axes: AxesTree, shapes: ArrayTree, mesh: Mesh) -> float:
    """Returns a device's FLOPs over an even share; 1 if the devices divide every stack.

    Args:
        axes: pytree of Axes; only matrices count.
        shapes: like axes.
    """
    busiest = even = 0.0
    for a, x in zip(jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True):
        if a.is_matrix:
            flops = preconditioner_flops(matrix_stacks(a, x), "soap", 1)
            busiest += flops / ownership(a, x.shape, mesh).owners
            even += flops / mesh.size
    return busiest / even

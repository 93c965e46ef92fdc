"""Explains JAX's error about matrices that are split over explicit axes of a mesh.

The axes of jax.make_mesh are explicit by default: the type of an array then has its sharding, and
JAX refuses a product whose sharding does not follow from its operands'. Newton-Schulz multiplies a
matrix by its own transpose, which is such a product wherever a side is split.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxtrain.axes import Axes
from jaxtrain.distributed.mesh import names_in


@contextlib.contextmanager
def explain_split_matrices(
    named: Sequence[tuple[str, Any]], axes: Sequence[Axes]
) -> Iterator[None]:
    """Turns a ShardingTypeError in the context into an error that names the matrix and two cures.

    Args:
        named: (name, gradient) of each parameter.
        axes: of each parameter.

    Raises:
        ValueError: the context raised a ShardingTypeError, and a matrix is split over an explicit
            axis.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":  # JAX does not export the class
            raise
        specs = [(name, jax.typeof(x).sharding.spec) for name, x in named]  # of explicit axes only
        pairs = zip(specs, axes, strict=True)
        split = [
            f"{name or 'one'} of {spec}" for (name, spec), a in pairs if a.is_matrix and any(spec)
        ]
        if not split:
            raise
        from_mesh = [axis for _, spec in specs for entry in spec for axis in names_in(entry)]
        over = tuple(dict.fromkeys(from_mesh))
        more = f" and {len(split) - 1} more" if len(split) > 1 else ""
        raise ValueError(
            "matrices must not be split over explicit axes of a mesh, as JAX cannot decide how "
            f"their products are split; got {split[0]}{more}. Build the mesh by jax.make_mesh("
            "sizes, names, axis_types=(AxisType.Auto,) * len(names)), or update within "
            f"jax.set_mesh(mesh) by jax.sharding.auto_axes(optimizer.update, axes={over}, "
            "out_sharding=specs)(grads, state, params) with specs = jax.tree.map(lambda x: "
            "jax.typeof(x).sharding.spec, (grads, state))."
        ) from error

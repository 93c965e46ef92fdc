"""Types of an optimizer's arithmetic: averages never narrow, whatever the gradient's type.

An average in bfloat16, which has 8 significant bits, stops up to 2^-9 / (1 - decay) short of its
limit: 4 % with decay 0.95. Optimizers therefore compute in `widest` of their operands, and store
each average in the type that its buffer has from the start, so that no step is recompiled.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def widest(*arrays: Any) -> jnp.dtype:
    """Returns the widest type of some arrays, float32 at least."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def zero_buffers(params: Any, dtype: DTypeLike | None = None) -> Any:
    """Returns zeros like params; dtype None is each parameter's own type, float32 at least.

    Raises:
        ValueError: dtype is not a floating type.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"buffer_dtype must be a floating type; got {dtype}. Set buffer_dtype.")
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or widest(p)), params)


def average(decay: Any, mean: jax.Array, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Computes decay * mean + (1 - decay) * x in a type."""
    return decay * mean.astype(dtype) + (1 - decay) * x.astype(dtype)

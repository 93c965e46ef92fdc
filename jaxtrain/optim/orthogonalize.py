"""Newton-Schulz: matrices pulled towards the nearest semi-orthogonal ones by products alone.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxtrain.kernels import cpu_multiplies_bf16

# X <- aX + (bA + cA^2)X with A = XX^T: one row (a, b, c) an iteration, the last row repeats.
COEFFICIENTS = {"jordan": ((3.4445, -4.7750, 2.0315),)}

CHUNK_BYTES = 2**30


def whole(x_XIO):
    """The placement of matrices that no other device shares."""
    return x_XIO


def _dot(equation, a, b, wide):
    """einsum with products and sums in `wide`: bf16 in, float32 out is also the fast CPU kernel."""
    native = functools.partial(jnp.einsum, equation, preferred_element_type=wide)
    if a.dtype != jnp.bfloat16:
        return native(a, b, precision="highest")
    if cpu_multiplies_bf16():
        return native(a, b)

    def widened(a, b):  # the same products: 1.7 times faster than XLA's bf16 dot on an AVX2 CPU
        return native(a.astype(wide), b.astype(wide), precision="highest")

    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)


def _iterate(x_XIO, abc_N3, dtype, eps, place):
    """orthogonalize of one chunk, in `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    tall = x_XIO.shape[-2] > x_XIO.shape[-1]
    # Cast before it travels: half the bytes. Halved, as the largest float32 would round to inf.
    x_XMN = place((0.5 * x_XIO).astype(dtype))
    x_XMN = x_XMN.swapaxes(-2, -1) if tall else x_XMN  # M, the smaller side, is the one squared

    x_XMN = x_XMN.astype(wide)
    largest_X11 = jnp.max(jnp.abs(x_XMN), (-2, -1), keepdims=True)
    x_XMN /= jnp.maximum(largest_X11, jnp.finfo(wide).tiny)  # squares neither overflow nor vanish
    norm_X11 = jnp.sqrt(jnp.sum(x_XMN**2, (-2, -1), keepdims=True))
    x_XMN = place((x_XMN / jnp.maximum(norm_X11, eps)).astype(dtype))

    def dot(equation, a, b):  # placed too, or the partitioner splits it over idle mesh axes
        return place(_dot(equation, a, b, wide))

    def iteration(x_XMN, abc_3):
        a, b, c = abc_3
        x_XMN = place(x_XMN)  # the carry has no placement of its own
        gram_XMM = place(dot("xmn,xkn->xmk", x_XMN, x_XMN).astype(dtype))
        square_XMM = dot("xmk,xkj->xmj", gram_XMM, gram_XMM)
        factor_XMM = place((b * gram_XMM.astype(wide) + c * square_XMM).astype(dtype))
        product_XMN = dot("xmk,xkn->xmn", factor_XMM, x_XMN)
        return place((a * x_XMN.astype(wide) + product_XMN).astype(dtype)), None

    x_XMN, _ = jax.lax.scan(iteration, x_XMN, abc_N3.astype(wide))
    x_XMN = place(x_XMN)  # or the layout wanted by what follows would enter the loop
    return x_XMN.swapaxes(-2, -1) if tall else x_XMN


def _chunk(shape, chunk_bytes) -> int:
    """Matrices iterated at once: the largest divisor of X whose float32 temporaries fit."""
    X, I, O = shape  # noqa: E741
    M, N = min(I, O), max(I, O)
    fits = chunk_bytes // (4 * (2 * M * N + 3 * M * M))
    return max(size for size in range(1, X + 1) if X % size == 0 and size <= max(fits, 1))


def orthogonalize(
    x_XIO,
    *,
    steps=5,
    coefficients="jordan",
    dtype=jnp.bfloat16,
    eps=1e-7,
    place=whole,
    chunk_bytes=CHUNK_BYTES,
):
    """Each matrix with its singular values moved to about 1; any scale of it gives the same.

    Args:
        x_XIO: [...,I,O], any leading dims; entries from 1e-30 to 1e30. Zeros give zeros.
        steps: iterations; past the table's end its last row repeats.
        coefficients: a key of COEFFICIENTS.
        dtype: of the products' operands; sums and epilogues are at least float32.
        eps: floor of the Frobenius norm, relative to the largest entry.
        place: constrains the sharding of [X,.,.]. It holds inside the loop: said only outside, it
            is lost in the scan's carry and every iteration gathers.
        chunk_bytes: bound on the float32 temporaries; 0 takes all matrices at once, which a
            `place` that splits X needs.

    Returns:
        [...,I,O] in dtype.

    Raises:
        ValueError: coefficients is not in the table, or steps is less than 1.
    """
    if coefficients not in COEFFICIENTS or steps < 1:
        raise ValueError(
            f"coefficients must be one of {', '.join(COEFFICIENTS)} and steps positive; got "
            f"coefficients={coefficients!r}, steps={steps}. Set --config.optim.ns_steps."
        )
    table = COEFFICIENTS[coefficients]
    abc_N3 = jnp.array([table[min(i, len(table) - 1)] for i in range(steps)], dtype=float)
    I, O = x_XIO.shape[-2:]  # noqa: E741
    x = x_XIO.reshape(math.prod(x_XIO.shape[:-2]), I, O)
    iterate = functools.partial(_iterate, abc_N3=abc_N3, dtype=dtype, eps=eps, place=place)
    size = _chunk(x.shape, chunk_bytes) if chunk_bytes else len(x)
    if size < len(x):
        y = jax.lax.map(iterate, x.reshape(-1, size, I, O))
    else:
        y = iterate(x)
    return y.reshape(x_XIO.shape)

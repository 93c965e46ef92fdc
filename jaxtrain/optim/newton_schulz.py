"""Newton-Schulz: matrices pulled towards the nearest semi-orthogonal ones by products alone.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.distributed.mesh import platform
from jaxtrain.ops.routes import cpu_multiplies_bf16
from jaxtrain.optim.coefficients import coefficient_table

LEAST_CHUNK_BYTES = 2**28  # on a GPU, whose products want many matrices at once


def whole(x_XIO):
    """The placement of matrices that no other device shares."""
    return x_XIO


def _dot(equation, a, b, wide):
    """einsum with products and sums in `wide`: bf16 in, float32 out is also the fast CPU kernel."""
    native = functools.partial(jnp.einsum, equation, preferred_element_type=wide)
    if a.dtype not in (jnp.bfloat16, jnp.float16):
        return native(a, b, precision="highest")
    if a.dtype == jnp.bfloat16 and cpu_multiplies_bf16():
        return native(a, b)

    def widened(a, b):  # the same products: 1.7 times faster than XLA's bf16 dot on an AVX2 CPU
        return native(a.astype(wide), b.astype(wide), precision="highest")

    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)


class _Tools(NamedTuple):
    """Products and casts of one dtype of operands, all placed.

    Products are placed too, or the partitioner splits them over idle mesh axes.
    """

    dot: Callable  # (equation, a, b), wide
    narrow: Callable
    square: Callable  # as symmetric_reference: (x, y=x, c=None, scales), wide or narrow


def _tools(dtype, place, square):
    wide = jnp.promote_types(dtype, jnp.float32)
    dot = lambda equation, a, b: place(_dot(equation, a, b, wide))

    def plain(x_XMN, y_XMN=None, c_XMM=None, scales=(1.0, 0.0)):
        if y_XMN is None:
            return dot("xmn,xkn->xmk", x_XMN, x_XMN)
        out_XMM = dot("xmk,xkj->xmj", x_XMN, y_XMN)  # y is symmetric, but for rounding
        return out_XMM if c_XMM is None else scales[1] * c_XMM.astype(wide) + scales[0] * out_XMM

    return _Tools(dot, lambda x: place(x.astype(dtype)), square or plain)


def _scaled(x_XMN, table, eps, tools):
    """(x with no singular value above 1, its Gram matrix or None); wide in, narrow out."""
    largest_X11 = jnp.max(jnp.abs(x_XMN), (-2, -1), keepdims=True)
    x_XMN /= jnp.maximum(largest_X11, jnp.finfo(x_XMN.dtype).tiny)  # squares stay in range
    if not table.aol:
        norm_X11 = jnp.sqrt(jnp.sum(x_XMN**2, (-2, -1), keepdims=True))
        return tools.narrow(x_XMN / jnp.maximum(table.safety * norm_X11, eps)), None
    gram_XMM = tools.square(tools.narrow(x_XMN)).astype(x_XMN.dtype)
    norm_XM1 = jnp.sqrt(jnp.sum(jnp.abs(gram_XMM), -1, keepdims=True))
    root_XM1 = 1 / jnp.maximum(table.safety * norm_XM1, eps)
    return tools.narrow(root_XM1 * x_XMN), tools.narrow(root_XM1 * gram_XMM * root_XM1.mT)


def _iteration(x_XMN, abc_3, gram_XMM, tools):
    """X <- aX + (bA + cA^2)X."""
    a, b, c = abc_3
    shift_XMM = tools.narrow(tools.square(gram_XMM, gram_XMM, gram_XMM, (c, b)))
    return tools.narrow(a * x_XMN.astype(a.dtype) + tools.dot("xmk,xkn->xmn", shift_XMM, x_XMN))


def _segment(x_XMN, abc_N3, gram_XMM, tools):
    """N iterations as one product: the factors Z = aI + bA + cA^2, gathered while A <- ZAZ."""
    dtype, narrow, one = abc_N3.dtype, tools.narrow, jnp.ones((), abc_N3.dtype)

    def added(a, b, c, scale):  # scale c + a b, of matrices that commute
        return narrow(tools.square(a, b, c, (one, scale)))

    def shift(gram_XMM, abc_3):  # Z - aI
        return narrow(tools.square(gram_XMM, gram_XMM, gram_XMM, (abc_3[2], abc_3[1])))

    def advance(carry, abc_3):
        gram_XMM, shift_XMM, product_XMM, a = carry
        gram_XMM, shift_XMM, product_XMM = map(narrow, (gram_XMM, shift_XMM, product_XMM))
        half_XMM = added(shift_XMM, gram_XMM, gram_XMM, a)
        gram_XMM = added(half_XMM, shift_XMM, half_XMM, a)
        shift_XMM = shift(gram_XMM, abc_3)
        longer_XMM = added(shift_XMM, product_XMM, product_XMM, abc_3[0])
        return (gram_XMM, shift_XMM, longer_XMM, abc_3[0]), None

    a, shift_XMM = abc_N3[0, 0], shift(gram_XMM, abc_N3[0])
    factor_XMM = a * jnp.eye(x_XMN.shape[-2], dtype=dtype) + shift_XMM.astype(dtype)
    carry = (gram_XMM, shift_XMM, narrow(factor_XMM), a)
    (*_, product_XMM, _), _ = jax.lax.scan(advance, carry, abc_N3[1:])
    return narrow(tools.dot("xmk,xkn->xmn", narrow(product_XMM), x_XMN))


def _standard(x_XMN, abc_N3, gram_XMM, tools):
    if gram_XMM is not None:
        x_XMN = _iteration(x_XMN, abc_N3[0], gram_XMM, tools)
        abc_N3 = abc_N3[1:]

    def iteration(x_XMN, abc_3):
        x_XMN = tools.narrow(x_XMN)  # placed: the carry has no placement of its own
        return _iteration(x_XMN, abc_3, tools.narrow(tools.square(x_XMN)), tools), None

    return jax.lax.scan(iteration, x_XMN, abc_N3)[0]


def _lengths(steps: int) -> list[int]:
    """Iterations between two Gram matrices made anew: 5 are 2 and 3.

    Rounding makes small eigenvalues of A negative and an iteration multiplies them by a^2, which
    is 67 and 17 in the first two rows of Polar Express.
    """
    rest = max(steps - 2, 0)
    return [min(steps, 2)] + [3] * (rest // 3) + [rest % 3] * (rest % 3 > 0)


def _on_gram(x_XMN, abc_N3, gram_XMM, tools):
    start = 0
    for length in _lengths(len(abc_N3)):
        gram_XMM = tools.narrow(tools.square(x_XMN)) if gram_XMM is None else gram_XMM
        x_XMN = _segment(x_XMN, abc_N3[start : start + length], gram_XMM, tools)
        start, gram_XMM = start + length, None
    return x_XMN


FORMS = {"standard": _standard, "gram": _on_gram}


def _iterate(x_XIO, table, dtype, eps, place, form, square):
    """orthogonalize of one chunk; form is a key of FORMS."""
    tall = x_XIO.shape[-2] > x_XIO.shape[-1]
    x_XMN = place(x_XIO)
    barrier = jax.lax.optimization_barrier  # transposed dots sum in another order
    x_XMN = barrier(x_XMN.swapaxes(-2, -1)) if tall else x_XMN  # M, the smaller side, is squared
    # Where the standard form is 1 off in bf16, the Gram form is up to 2.1 in bf16, 1.1 in float16.
    operands = jnp.float16 if form == "gram" and dtype == jnp.bfloat16 else dtype
    tools = _tools(operands, place, square)
    wide = jnp.promote_types(operands, jnp.float32)
    x_XMN, gram_XMM = _scaled(x_XMN.astype(wide), table, eps, tools)
    x_XMN = FORMS[form](x_XMN, jnp.array(table.rows, dtype=wide), gram_XMM, tools)
    x_XMN = place(x_XMN.astype(dtype))  # or the layout that follows would enter the loop
    return barrier(x_XMN).swapaxes(-2, -1) if tall else x_XMN


def _chunk_bytes(x_XIO) -> int:
    """Half of what the stack would take in float32: less saves little, more costs memory."""
    least = 0 if platform() == "cpu" else LEAST_CHUNK_BYTES
    return max(2 * x_XIO.size, least)


def _in_chunks(iterate, x_XIO, size):
    """iterate of `size` matrices at a time, each result in the place of what it is made from."""

    def step(i, x_XIO):
        chunk = jax.lax.dynamic_slice_in_dim(x_XIO, i * size, size)
        return jax.lax.dynamic_update_slice_in_dim(x_XIO, iterate(chunk), i * size, 0)

    return jax.lax.fori_loop(0, len(x_XIO) // size, step, x_XIO)


def _chunk(shape, form, chunk_bytes) -> int:
    """Matrices iterated at once: the largest divisor of X whose float32 temporaries fit."""
    X, I, O = shape  # noqa: E741
    M, N = min(I, O), max(I, O)
    numbers = 2 * M * N + 3 * M * M
    if form == "gram":  # five [M,M] live beside x where the standard form has its next x
        numbers = max(numbers, M * N + 7 * M * M)
    fits = chunk_bytes // (4 * numbers)
    return max(size for size in range(1, X + 1) if X % size == 0 and size <= max(fits, 1))


def orthogonalize(
    x_XIO,
    *,
    steps=None,
    coefficients="jordan",
    dtype=jnp.bfloat16,
    eps=1e-7,
    form="auto",
    place=whole,
    chunk_bytes=None,
    square=None,
):
    """Each matrix with its singular values moved to about 1; any scale of it gives the same.

    With M <= N the two sides, k iterations and r Gram matrices made, the standard form costs
    k (4 M^2 N + 2 M^3) FLOPs and the Gram form r 4 M^2 N + (8 k - 6 r) M^3: 20 and 10 against 8 and
    28 for k = 5, r = 2. It is the same function.

    Args:
        x_XIO: [...,I,O], any leading dims; entries from 1e-30 to 1e30. Zeros give zeros.
        steps, coefficients: see `coefficient_table`.
        dtype: bfloat16, float32 or float64, of the products' operands; sums and epilogues are at
            least float32. In the Gram form bfloat16 means operands of float16, which GPUs multiply
            as fast: rounding there is absolute, and bfloat16 loses small singular values.
        eps: floor of the norm that x is divided by, relative to the largest entry.
        form: a key of FORMS, or "auto": "gram" from N = 2 M on.
        place: constrains the sharding of [X,.,.]. It holds inside the loops: said only outside, it
            is lost in the scan's carry and every iteration gathers.
        chunk_bytes: bound on the float32 temporaries; None takes half of the stack's size, on a GPU
            256 MiB or more; 0 takes all matrices at once, which a `place` that splits X needs.
        square: makes the products that are symmetric, as symmetric_reference; None is XLA's.

    Returns:
        [...,I,O] in dtype.

    Raises:
        ValueError: form is unknown, or `coefficient_table` refuses coefficients or steps.

    Source: of the Gram form, Zhang et al. 2026, https://dao-lab.ai/blog/2026/gram-newton-schulz
    """
    I, O = x_XIO.shape[-2:]  # noqa: E741
    if form == "auto":
        form = "gram" if max(I, O) >= 2 * min(I, O) else "standard"
    elif form not in FORMS:
        raise ValueError(f"form must be auto, {', '.join(FORMS)}; got form={form!r}. Set form.")
    # Cast before it travels: half the bytes. Halved, as the largest float32 would round to inf.
    x = (0.5 * x_XIO).astype(dtype).reshape(math.prod(x_XIO.shape[:-2]), I, O)
    iterate = functools.partial(
        _iterate,
        table=coefficient_table(coefficients, steps),
        dtype=dtype,
        eps=eps,
        place=place,
        form=form,
        square=square,
    )
    chunk_bytes = _chunk_bytes(x) if chunk_bytes is None else chunk_bytes
    size = _chunk(x.shape, form, chunk_bytes) if chunk_bytes else len(x)
    y = _in_chunks(iterate, x, size) if size < len(x) else iterate(x)
    return y.reshape(x_XIO.shape)

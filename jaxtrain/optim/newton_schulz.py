"""Newton-Schulz: replaces a matrix by the nearest semi-orthogonal one, using products only.

With X = U S V^T, an odd polynomial acts on the singular values and keeps the singular vectors:

    aX + b(XX^T)X + c(XX^T)^2 X = U (aS + bS^3 + cS^5) V^T

Even powers of X would lose V. Polynomials that pull (0, 1] towards 1, applied a few times, turn X
into about U V^T without a decomposition, which accelerators compute slowly.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxtrain.ops.devices import cpu_multiplies_bf16
from jaxtrain.optim.chunks import chunk_size, map_chunks
from jaxtrain.optim.coefficients import CoefficientTable, coefficient_table


def unplaced(x_XIO: jax.Array) -> jax.Array:
    """Returns x unchanged: the `place` function of matrices on one device."""
    return x_XIO


class _Products(NamedTuple):
    """Matrix products with operands of one dtype and float32 (or wider) results.

    `place` constrains every result, or the partitioner would split products over idle mesh axes.
    """

    dtype: DTypeLike
    place: Callable[[jax.Array], jax.Array]
    kernel: Callable[..., jax.Array] | None  # computes symmetric products; None means XLA

    @property
    def wide(self) -> DTypeLike:
        return jnp.promote_types(self.dtype, jnp.float32)

    def narrow(self, x: jax.Array) -> jax.Array:
        """Casts x to the operands' dtype."""
        return self.place(x.astype(self.dtype))

    def dot(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """Computes an einsum of narrow operands; the result is wide."""
        return self.place(_einsum(equation, a, b, self.wide))

    def symmetric(self, x_XMN, y_XMN=None, c_XMM=None, scales=(1.0, 0.0)) -> jax.Array:
        """Computes scales[0] * x y^T + scales[1] * c, which the caller knows to be symmetric.

        y defaults to x and c to zero. The sum is computed in float32 and rounded once: rounding the
        product first would triple the error of the whole iteration in bfloat16.
        """
        if self.kernel is not None:
            return self.kernel(x_XMN, y_XMN, c_XMM, scales)
        if y_XMN is None:
            return self.dot("xmn,xkn->xmk", x_XMN, x_XMN)
        out_XMM = self.dot("xmk,xkj->xmj", x_XMN, y_XMN)  # y is symmetric up to rounding
        if c_XMM is None:
            return out_XMM
        return scales[1] * c_XMM.astype(self.wide) + scales[0] * out_XMM

    def polynomial(self, gram_XMM, b, c) -> jax.Array:
        """Computes bA + cA^2 of a Gram matrix A, narrow."""
        return self.narrow(self.symmetric(gram_XMM, gram_XMM, gram_XMM, (c, b)))


def _einsum(equation, a, b, wide):
    """Computes an einsum with the result in `wide`, by the fastest kernel of a CPU."""
    native = functools.partial(jnp.einsum, equation, preferred_element_type=wide)
    if a.dtype not in (jnp.bfloat16, jnp.float16):
        return native(a, b, precision="highest")
    if a.dtype == jnp.bfloat16 and cpu_multiplies_bf16():
        return native(a, b)

    def widened(a, b):  # same products, but 1.7 times faster than XLA's bf16 dot on an AVX2 CPU
        return native(a.astype(wide), b.astype(wide), precision="highest")

    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)


def _normalize_as_torch(x_XMN, eps, products):
    """Returns what `_normalize` does, rounded as in torch.optim.Muon; wide in, narrow out.

    The norm is rounded to the operands' type. In bfloat16 that scales x by up to 0.4 %, which
    changes the result by 2 to 10 %. Squares of entries beyond about 1e19 overflow, as in torch.
    """
    norm_X11 = jnp.sqrt(jnp.sum(x_XMN**2, (-2, -1), keepdims=True))
    floored_X11 = jnp.maximum(products.narrow(norm_X11), jnp.asarray(eps, products.dtype))
    return products.narrow(x_XMN / floored_X11.astype(x_XMN.dtype)), None


def _normalize(x_XMN, table, eps, products):
    """Returns (x with no singular value above 1, its Gram matrix or None); wide in, narrow out."""
    largest_X11 = jnp.max(jnp.abs(x_XMN), (-2, -1), keepdims=True)
    x_XMN /= jnp.maximum(largest_X11, jnp.finfo(x_XMN.dtype).tiny)  # squares stay in range
    if not table.aol:  # the Frobenius norm bounds the largest singular value
        norm_X11 = jnp.sqrt(jnp.sum(x_XMN**2, (-2, -1), keepdims=True))
        return products.narrow(x_XMN / jnp.maximum(table.safety * norm_X11, eps)), None
    gram_XMM = products.symmetric(products.narrow(x_XMN)).astype(x_XMN.dtype)
    norm_XM1 = jnp.sqrt(jnp.sum(jnp.abs(gram_XMM), -1, keepdims=True))
    root_XM1 = 1 / jnp.maximum(table.safety * norm_XM1, eps)
    return products.narrow(root_XM1 * x_XMN), products.narrow(root_XM1 * gram_XMM * root_XM1.mT)


def _iteration(x_XMN, abc_3, gram_XMM, products):
    """Computes aX + (bA + cA^2)X with A = XX^T; the sum is wide and rounded once."""
    a, b, c = abc_3
    factor_XMM = products.polynomial(gram_XMM, b, c)
    correction_XMN = products.dot("xmk,xkn->xmn", factor_XMM, x_XMN)
    return products.narrow(a * x_XMN.astype(a.dtype) + correction_XMN)


def _standard(x_XMN, abc_N3, gram_XMM, products):
    """Iterates on X. Each iteration computes its Gram matrix, except the first if it is given."""
    if gram_XMM is not None:
        x_XMN = _iteration(x_XMN, abc_N3[0], gram_XMM, products)
        abc_N3 = abc_N3[1:]

    def iteration(x_XMN, abc_3):
        x_XMN = products.narrow(x_XMN)  # also constrains the sharding, which a scan's carry loses
        gram_XMM = products.narrow(products.symmetric(x_XMN))
        return _iteration(x_XMN, abc_3, gram_XMM, products), None

    return jax.lax.scan(iteration, x_XMN, abc_N3)[0]


def _gram_segment(x_XMN, abc_N3, gram_XMM, products):
    """Applies several iterations as one product with X.

    An iteration multiplies X by Z = aI + bA + cA^2 from the left, and the next Gram matrix is ZAZ.
    All of these are polynomials of the first Gram matrix: they are symmetric and M x M, and they
    commute. So only A = XX^T and the last product touch the long side N. Below, `shift` is Z - aI;
    Z times a matrix is shift times the matrix plus a times the matrix, added in float32.
    """
    narrow, one = products.narrow, jnp.ones((), abc_N3.dtype)

    def times_plus(p_XMM, q_XMM, a, r_XMM):  # p q + a r, of matrices that commute
        return narrow(products.symmetric(p_XMM, q_XMM, r_XMM, (one, a)))

    def advance(carry, abc_3):
        gram_XMM, shift_XMM, product_XMM, a = carry
        gram_XMM, shift_XMM, product_XMM = map(narrow, (gram_XMM, shift_XMM, product_XMM))
        half_XMM = times_plus(shift_XMM, gram_XMM, a, gram_XMM)  # Z A
        gram_XMM = times_plus(half_XMM, shift_XMM, a, half_XMM)  # Z A Z
        shift_XMM = products.polynomial(gram_XMM, abc_3[1], abc_3[2])
        product_XMM = times_plus(shift_XMM, product_XMM, abc_3[0], product_XMM)
        return (gram_XMM, shift_XMM, product_XMM, abc_3[0]), None

    a, b, c = abc_N3[0]
    shift_XMM = products.polynomial(gram_XMM, b, c)
    factor_XMM = a * jnp.eye(x_XMN.shape[-2], dtype=abc_N3.dtype) + shift_XMM.astype(abc_N3.dtype)
    carry = (gram_XMM, shift_XMM, narrow(factor_XMM), a)
    (*_, product_XMM, _), _ = jax.lax.scan(advance, carry, abc_N3[1:])
    return narrow(products.dot("xmk,xkn->xmn", narrow(product_XMM), x_XMN))


def _segment_lengths(steps: int) -> list[int]:
    """Returns the number of iterations in each segment, for example [2, 3] for 5.

    Each segment computes A from X once. Rounding then makes small eigenvalues of A negative, and
    every iteration multiplies those by a^2: by 67 and 17 in the first two rows of Polar Express. So
    segments must be short, the first one most of all.
    """
    rest = max(steps - 2, 0)
    return [min(steps, 2)] + [3] * (rest // 3) + [rest % 3] * (rest % 3 > 0)


def _gram(x_XMN, abc_N3, gram_XMM, products):
    """Iterates on Gram matrices, in segments."""
    start = 0
    for length in _segment_lengths(len(abc_N3)):
        if gram_XMM is None:
            gram_XMM = products.narrow(products.symmetric(x_XMN))
        x_XMN = _gram_segment(x_XMN, abc_N3[start : start + length], gram_XMM, products)
        start, gram_XMM = start + length, None
    return x_XMN


FORMS = {"standard": _standard, "gram": _gram, "torch": _standard}


@dataclass(frozen=True)
class NewtonSchulz:
    """Moves the singular values of matrices to about 1; a call maps [...,I,O] to [...,I,O].

    The scale of the input does not matter. Entries may be from 1e-30 to 1e30; zeros give zeros.

    For sides M <= N, k iterations and r segments, the standard form costs k (4 M^2 N + 2 M^3) FLOPs
    and the Gram form r 4 M^2 N + (8 k - 6 r) M^3. With k = 5 and r = 2 that is 20 M^2 N + 10 M^3
    against 8 M^2 N + 28 M^3. Both compute the same function.

    Args:
        coefficients, steps: see `coefficient_table`.
        dtype: bfloat16, float32 or float64, of the products' operands and of the result; None means
            the input's. Sums and epilogues are at least float32. The Gram form replaces bfloat16
            operands by float16, which GPUs multiply as fast: in this form rounding errors do not
            shrink with the singular value, and those of bfloat16 would hide small ones.
        eps: floor of the norm that x is divided by, relative to the largest entry; absolute in the
            form "torch".
        form: a key of FORMS, or "auto", which is "gram" if N >= 2 M. "torch" is the standard form
            with the operations and roundings of torch.optim.Muon, which differ only in bfloat16:
            the norm is rounded, and square matrices are iterated on as [outputs, inputs].
        place: constrains the sharding of [X,.,.]. It is applied inside the loops: a constraint
            outside is lost in the scan's carry, and every iteration would gather.
        chunk_bytes: bound on the float32 temporaries; None takes half of the stack's size, on a GPU
            256 MiB or more; 0 takes all matrices at once, which a `place` that splits X needs.
        kernel: computes symmetric products, like pallas_kernels.symmetric; None means XLA.

    Raises:
        ValueError: form is unknown or does not fit the coefficients, or `coefficient_table` rejects
            coefficients or steps.

    Source of the Gram form: Zhang et al. 2026, https://dao-lab.ai/blog/2026/gram-newton-schulz
    Source of the form "torch": PyTorch 2.13, torch/optim/_muon.py
    """

    coefficients: str | CoefficientTable | Sequence = "jordan"
    steps: int | None = None
    dtype: DTypeLike | None = None
    eps: float = 1e-7
    form: str = "auto"
    place: Callable[[jax.Array], jax.Array] = unplaced
    chunk_bytes: int | None = None
    kernel: Callable[..., jax.Array] | None = None

    def __post_init__(self):
        table = coefficient_table(self.coefficients, self.steps)
        if self.form == "torch" and (table.aol or table.safety != 1):
            raise ValueError(
                "form=torch needs coefficients that start from the Frobenius norm, such as jordan; "
                f"got {self.coefficients!r}. Set coefficients."
            )
        if self.form != "auto" and self.form not in FORMS:
            raise ValueError(
                f"form must be auto, {', '.join(FORMS)}; got form={self.form!r}. Set form."
            )

    def __call__(self, x_XIO: jax.Array) -> jax.Array:
        I, O = x_XIO.shape[-2:]  # noqa: E741
        form = self.form
        if form == "auto":
            form = "gram" if max(I, O) >= 2 * min(I, O) else "standard"
        dtype = x_XIO.dtype if self.dtype is None else self.dtype
        # Cast before any communication, which halves its bytes. The factor 0.5 keeps the largest
        # float32 from rounding to inf.
        x = (0.5 * x_XIO).astype(dtype).reshape(math.prod(x_XIO.shape[:-2]), I, O)
        size = chunk_size(x.shape, form == "gram", self.chunk_bytes)
        iterate = functools.partial(self._iterate, dtype=dtype, form=form)
        y = map_chunks(iterate, x, size) if size < len(x) else iterate(x)
        return y.reshape(x_XIO.shape)

    def _iterate(self, x_XIO, dtype, form):
        """Orthogonalises one chunk."""
        I, O = x_XIO.shape[-2:]  # noqa: E741
        # torch iterates on [O,I], and transposes it if O > I.
        tall = I > O or (I == O and form == "torch")
        x_XMN = self.place(x_XIO)
        barrier = jax.lax.optimization_barrier  # a dot fused with a transpose adds in another order
        # The smaller side is M, so that Gram matrices are small.
        x_XMN = barrier(x_XMN.swapaxes(-2, -1)) if tall else x_XMN
        # The Gram form's error is up to 2.1 times the standard form's in bf16, 1.1 in float16.
        operands = jnp.float16 if form == "gram" and dtype == jnp.bfloat16 else dtype
        products = _Products(operands, self.place, self.kernel)
        table = coefficient_table(self.coefficients, self.steps)
        x_XMN = x_XMN.astype(products.wide)
        if form == "torch":
            x_XMN, gram_XMM = _normalize_as_torch(x_XMN, 0.5 * self.eps, products)
        else:
            x_XMN, gram_XMM = _normalize(x_XMN, table, self.eps, products)
        abc_N3 = jnp.array(table.rows, dtype=products.wide)
        x_XMN = FORMS[form](x_XMN, abc_N3, gram_XMM, products)
        x_XMN = self.place(x_XMN.astype(dtype))  # so that a later sharding does not enter the loop
        return barrier(x_XMN).swapaxes(-2, -1) if tall else x_XMN

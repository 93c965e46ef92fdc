"""QK-norm and RoPE of queries or keys (rms_norm(x) * gain, rotated), with a fused backward.

Bound: memory. For B*T*H heads of K elements of b bytes, backward moves 3*B*T*H*K*b (reads dy, x;
writes dx) and the tables. XLA moves 2.4 times that (python -m pallas_kernels.traffic), because it
sums the gain's gradient in separate passes. XLA already moves only the minimum in the forward, and
in both directions of RoPE without a norm, so these have no kernel.

Source: Henry et al. 2020, https://arxiv.org/abs/2010.04245; Su et al. 2021,
https://arxiv.org/abs/2104.09864
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.validation import check_qk_rope

PROGRAMS = 512  # of the backward; each sums the gain's gradient over its share of the heads
ELEMENTS = 1_024  # per block of heads: 8 for each thread of 4 warps
WARPS = 4


def qk_rope_reference(
    x_BTHK: jax.Array, gain_K: jax.Array, cos_TK: jax.Array, sin_TK: jax.Array, eps: float
) -> jax.Array:
    """Reference implementation: computes in at least float32 and rotates halves, as in Llama."""
    x = x_BTHK.astype(jnp.promote_types(x_BTHK.dtype, jnp.float32))
    n_BTHK = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * gain_K
    first, second = jnp.split(n_BTHK, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (n_BTHK * cos_TK[:, None] + rotated * sin_TK[:, None]).astype(x_BTHK.dtype)


class _Heads:
    """Reads, writes and normalizes blocks of heads, as two halves per head, padded with zeros.

    Args:
        N: rows, one per head and token; row r is head r % H of token (r // H) % T.
    """

    def __init__(self, N, T, H, K, eps):
        self.N, self.T, self.H, self.K, self.eps = N, T, H, K, eps
        self.rows = max(ELEMENTS // pl.next_power_of_2(K), 1)
        self.column = jnp.arange(pl.next_power_of_2(K // 2))[None]  # Triton tiles are powers of two

    def locate(self, block):
        """Returns the rows of a block and the mask of its elements that exist."""
        row = (block * self.rows + jnp.arange(self.rows))[:, None]
        return row, (row < self.N) & (self.column < self.K // 2)

    def read(self, ref, row, mask):
        halves = (ref.at[row, self.column + start] for start in (0, self.K // 2))
        return [triton.load(x, mask=mask, other=0.0).astype(jnp.float32) for x in halves]

    def write(self, ref, row, mask, halves):
        for start, x in zip((0, self.K // 2), halves, strict=True):
            triton.store(ref.at[row, self.column + start], x.astype(ref.dtype), mask=mask)

    def read_gain(self, ref):
        """Returns the two halves of the gain, [1, K/2] each."""
        mask = self.column < self.K // 2
        starts = (0, self.K // 2)
        return [triton.load(ref.at[self.column + at], mask=mask, other=0.0) for at in starts]

    def read_tables(self, cos_ref, sin_ref, row, mask):
        """Returns the first half of the cosines and sines, which the second half repeats."""
        token = jax.lax.rem(
            jax.lax.div(row, jnp.full_like(row, self.H)), jnp.full_like(row, self.T)
        )
        read = lambda ref: triton.load(ref.at[token, self.column], mask=mask, other=0.0)
        return read(cos_ref), read(sin_ref)

    def mean(self, first, second):
        return jnp.sum(first + second, axis=1, keepdims=True) / self.K

    def normalize(self, first, second):
        """Returns the normalized heads, before the gain, and their factor 1/rms."""
        rstd = jax.lax.rsqrt(self.mean(first * first, second * second) + self.eps)
        return (first * rstd, second * rstd), rstd


def _backward_kernel(dy_ref, x_ref, gain_ref, cos_ref, sin_ref, dx_ref, sum_ref, *, T, H, eps):
    (N, K), program, programs = x_ref.shape, pl.program_id(0), sum_ref.shape[0]
    heads = _Heads(N, T, H, K, eps)
    gains = heads.read_gain(gain_ref)

    def add_block(step, sums):
        """Writes the gradient of one block and adds to the sums of the gain's gradient."""
        rows = heads.locate(program + step * programs)
        first, second = heads.read(dy_ref, *rows)
        cos, sin = heads.read_tables(cos_ref, sin_ref, *rows)
        dn = first * cos + second * sin, second * cos - first * sin  # rotated back
        units, rstd = heads.normalize(*heads.read(x_ref, *rows))
        g = [d * gain for d, gain in zip(dn, gains, strict=True)]
        projection = heads.mean(g[0] * units[0], g[1] * units[1])
        dx = [rstd * (d - u * projection) for d, u in zip(g, units, strict=True)]
        heads.write(dx_ref, *rows, dx)
        # With eps = 0, a row of padding would add 0 * inf.
        parts = (jnp.where(rows[1], d * u, 0.0) for d, u in zip(dn, units, strict=True))
        return tuple(total + part for total, part in zip(sums, parts, strict=True))

    zeros = (jnp.zeros((heads.rows, heads.column.shape[1]), jnp.float32),) * 2
    blocks = pl.cdiv(N, heads.rows)
    sums = jax.lax.fori_loop(0, pl.cdiv(blocks, programs), add_block, zeros)
    mask = heads.column[0] < K // 2
    for start, total in zip((0, K // 2), sums, strict=True):
        half = sum_ref.at[program, heads.column[0] + start]
        triton.store(half, jnp.sum(total, axis=0), mask=mask)


def qk_rope(
    x_BTHK: jax.Array,
    gain_K: jax.Array,
    cos_TK: jax.Array,
    sin_TK: jax.Array,
    eps: float = 1e-6,
    interpret: bool = False,
) -> jax.Array:
    """Computes qk_rope_reference with a fused backward, on one device's part, inside shard_map.

    Args:
        x_BTHK: queries or keys, of any floating type.
        gain_K: float32.
        cos_TK, sin_TK: float32, where the second half of K repeats the first; they get no gradient.
        interpret: runs without a GPU, for tests.

    Returns:
        [B,T,H,K] in x.dtype. It has first-order gradients.

    Raises:
        ValueError: check_qk_rope refuses the arguments.
    """
    check_qk_rope(x_BTHK, gain_K, cos_TK, sin_TK, eps)
    return _qk_rope(x_BTHK, gain_K, cos_TK, sin_TK, eps, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _qk_rope(x_BTHK, gain_K, cos_TK, sin_TK, eps, interpret):
    return _forward(x_BTHK, gain_K, cos_TK, sin_TK, eps, interpret)[0]


def _forward(x_BTHK, gain_K, cos_TK, sin_TK, eps, interpret):
    del interpret
    arguments = x_BTHK, gain_K, cos_TK, sin_TK
    return qk_rope_reference(*arguments, eps), arguments


def _backward(eps, interpret, residuals, dy_BTHK):
    x_BTHK, *tables = residuals
    _, T, H, K = x_BTHK.shape
    dy_NK, x_NK = (x.reshape(-1, K) for x in (dy_BTHK, x_BTHK))
    rows = _Heads(len(x_NK), T, H, K, eps).rows
    programs = min(PROGRAMS, pl.cdiv(len(x_NK), rows))
    dx_NK, partial_PK = triton.call(
        functools.partial(_backward_kernel, T=T, H=H, eps=eps),
        name="qk_rope_backward",
        grid=(programs,),
        out_shape=[triton.like(x_NK), triton.like(x_NK, jnp.float32, (programs, K))],
        warps=WARPS,
        interpret=interpret,
    )(dy_NK, x_NK, *tables)
    # Summed in a fixed order, without atomics: the result has the same bits every time.
    dgain_K = partial_PK.sum(0)
    return dx_NK.reshape(x_BTHK.shape), dgain_K, None, None


_qk_rope.defvjp(_forward, _backward)

"""Residual add and norm in one pass: s = h + y, n = norm(s) * gain + bias, and their gradients.

The norm is RMS or layer norm. Bound: memory. For N rows of D elements of b bytes, forward moves
4*N*D*b (reads h, y; writes s, n), or 2*N*D*b without y. Backward moves 4*N*D*b (reads ds, dn, s;
writes one gradient, shared by h and y) and recomputes each row's statistics in registers. XLA moves
1.25 to 1.5 times as much (python -m pallas_kernels.traffic): its forward reads each row twice, and
its backward sums the gain's gradient in a separate pass.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467; Ba et al. 2016,
https://arxiv.org/abs/1607.06450
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.validation import check_add_norm

PROGRAMS = 512  # of the backward; each sums the gain's gradient over its share of the rows
ELEMENTS_PER_WARP = 256  # 8 per thread; with 16, jax 0.11.2 spills on sm_90 (audit)


def add_norm_reference(
    h_XD: jax.Array,
    y_XD: jax.Array | None,
    gain_D: jax.Array,
    bias_D: jax.Array | None,
    form: str,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """Reference implementation: adds in h.dtype, normalizes in at least float32, returns (s, n)."""
    s_XD = h_XD if y_XD is None else h_XD + y_XD
    wide = s_XD.astype(jnp.promote_types(s_XD.dtype, jnp.float32))
    if form == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    n_XD = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps) * gain_D
    return s_XD, (n_XD if bias_D is None else n_XD + bias_D).astype(s_XD.dtype)


class _Row:
    """Reads, writes and normalizes rows of D elements, one at a time, padded with zeros."""

    def __init__(self, D, form, eps):
        self.column = jnp.arange(pl.next_power_of_2(D))  # Triton's tiles are powers of two
        self.inside, self.D, self.form, self.eps = self.column < D, D, form, eps

    def read(self, ref, *row):
        x = triton.load(ref.at[*row, self.column], mask=self.inside, other=0.0)
        return x.astype(jnp.float32)

    def write(self, ref, row, x):
        triton.store(ref.at[row, self.column], x.astype(ref.dtype), mask=self.inside)

    def mean(self, x):
        return jnp.sum(x) / self.D

    def normalize(self, s):
        """Returns the normalized row, before the gain, and its factor 1/rms."""
        if self.form == "layer":
            s = jnp.where(self.inside, s - self.mean(s), 0.0)
        rstd = jax.lax.rsqrt(self.mean(s * s) + self.eps)
        return s * rstd, rstd


def _forward_kernel(*refs, adds, biased, form, eps):
    h_ref, *refs = refs
    y_ref, *refs = refs if adds else (None, *refs)
    gain_ref, *refs = refs
    bias_ref, *refs = refs if biased else (None, *refs)
    row, index = _Row(h_ref.shape[1], form, eps), pl.program_id(0)
    s = row.read(h_ref, index)
    if adds:
        s = (s + row.read(y_ref, index)).astype(h_ref.dtype)  # the norm reads the rounded sum
        row.write(refs[0], index, s)
    n = row.normalize(s.astype(jnp.float32))[0] * row.read(gain_ref)
    row.write(refs[-1], index, n + row.read(bias_ref) if biased else n)


def _backward_kernel(ds_ref, dn_ref, s_ref, gain_ref, dx_ref, *sum_refs, form, eps):
    (N, D), program, programs = s_ref.shape, pl.program_id(0), sum_refs[0].shape[0]
    row = _Row(D, form, eps)
    gain = row.read(gain_ref)

    def add_row(step, sums):
        """Writes one row's gradient and adds to the sums of the gain's and the bias's gradients.

        With unit = (s - mean) * rstd and g = dn * gain, the gradient of the norm is
        rstd * (g - mean(g) - unit * mean(g * unit)); RMS norm has no mean(g).
        """
        index = program + step * programs
        dn, (unit, rstd) = row.read(dn_ref, index), row.normalize(row.read(s_ref, index))
        g = dn * gain
        projected = g - unit * row.mean(g * unit)
        if form == "layer":
            projected = projected - row.mean(g)
        row.write(dx_ref, index, row.read(ds_ref, index) + rstd * projected)
        return tuple(total + x for total, x in zip(sums, (dn * unit, dn), strict=False))

    zeros = tuple(jnp.zeros(row.column.shape, jnp.float32) for _ in sum_refs)
    # Every step has a row: with eps = 0, a row of padding would add 0 * inf to the sums.
    sums = jax.lax.fori_loop(0, -((program - N) // programs), add_row, zeros)
    for ref, total in zip(sum_refs, sums, strict=True):
        row.write(ref, program, total)


def _warps(D):
    return min(max(pl.next_power_of_2(D) // ELEMENTS_PER_WARP, 1), 16)


def add_norm(
    h_XD: jax.Array,
    y_XD: jax.Array | None,
    gain_D: jax.Array,
    bias_D: jax.Array | None,
    form: str = "rms",
    eps: float = 1e-6,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes add_norm_reference in one kernel; call it inside shard_map, on one device's rows.

    Args:
        h_XD: the residual stream, of any floating type.
        y_XD: what a layer adds to it, of the same type, or None.
        gain_D, bias_D: float32; the bias may be None.
        form: one of validation.FORMS.
        interpret: runs without a GPU, for tests.

    Returns:
        (s_XD, n_XD) in h.dtype. They have first-order gradients.

    Raises:
        ValueError: check_add_norm refuses the arguments.
    """
    check_add_norm(h_XD, y_XD, gain_D, bias_D, form, eps)
    return _add_norm(h_XD, y_XD, gain_D, bias_D, form, eps, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _add_norm(h_XD, y_XD, gain_D, bias_D, form, eps, interpret):
    return _forward(h_XD, y_XD, gain_D, bias_D, form, eps, interpret)[0]


def _forward(h_XD, y_XD, gain_D, bias_D, form, eps, interpret):
    D, adds, biased = h_XD.shape[-1], y_XD is not None, bias_D is not None
    rows = [x.reshape(-1, D) for x in (h_XD, y_XD) if x is not None]
    vectors = [x for x in (gain_D, bias_D) if x is not None]
    out = triton.call(
        functools.partial(_forward_kernel, adds=adds, biased=biased, form=form, eps=eps),
        name="add_norm_forward",
        grid=(len(rows[0]),),
        out_shape=[triton.like(rows[0])] * (1 + adds),
        warps=_warps(D),
        interpret=interpret,
    )(*rows, *vectors)
    s_XD = out[0].reshape(h_XD.shape) if adds else h_XD
    return (s_XD, out[-1].reshape(h_XD.shape)), (s_XD, gain_D, adds, biased)


def _backward(form, eps, interpret, residuals, cotangents):
    s_XD, gain_D, adds, biased = residuals
    D = s_XD.shape[-1]
    ds_ND, dn_ND, s_ND = (x.reshape(-1, D) for x in (*cotangents, s_XD))
    programs = min(PROGRAMS, len(s_ND))
    partial_sums = [triton.like(s_ND, jnp.float32, (programs, D))] * (1 + biased)
    dx_ND, *partial_PD = triton.call(
        functools.partial(_backward_kernel, form=form, eps=eps),
        name="add_norm_backward",
        grid=(programs,),
        out_shape=[triton.like(s_ND), *partial_sums],
        warps=_warps(D),
        interpret=interpret,
    )(ds_ND, dn_ND, s_ND, gain_D)
    dx_XD = dx_ND.reshape(s_XD.shape)
    # Summed in a fixed order, without atomics: the result has the same bits every time.
    sums = [x.sum(0) for x in partial_PD]
    return dx_XD, dx_XD if adds else None, sums[0], sums[1] if biased else None


_add_norm.defvjp(_forward, _backward)

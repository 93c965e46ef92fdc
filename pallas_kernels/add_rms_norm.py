"""Residual add and RMSNorm in one pass: s = h + y, n = rms_norm(s) * gain, and the way back.

Bound: memory. Of N rows of D elements of b bytes, forward moves 4*N*D*b (reads h, y; writes s, n),
backward 4*N*D*b (reads ds, dn, s; writes one gradient, of h and y alike), and 4*N bytes of 1/rms
each way. XLA's forward is at the roof by itself; its backward, which sums the gain's gradient
over all rows in another pass, reaches about half of it (990-1504 of 3352 GB/s on an H100,
tokamax 0.0.17's published timings).

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from pallas_kernels import triton

PROGRAMS = 512  # of the backward: each sums the gain's gradient over its share of the rows
ELEMENTS_PER_WARP = 256  # of a row: 8 a thread; with 16 jax 0.11.2 spills on sm_90 (audit)


def add_rms_norm_reference(h_XD, y_XD, gain_D, eps):
    """The law: the sum in h.dtype, the norm inside in at least float32. -> (s_XD, n_XD)"""
    s_XD = h_XD + y_XD
    wide = s_XD.astype(jnp.promote_types(s_XD.dtype, jnp.float32))
    rstd_X1 = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return s_XD, (wide * rstd_X1 * gain_D).astype(s_XD.dtype)


def _warps(D):
    return min(max(pl.next_power_of_2(D) // ELEMENTS_PER_WARP, 1), 16)


def _columns(D):
    col = jnp.arange(pl.next_power_of_2(D))  # Triton's tiles are powers of two
    return col, col < D


def _forward_kernel(h_ref, y_ref, gain_ref, s_ref, n_ref, rstd_ref, *, eps):
    row, D = pl.program_id(0), h_ref.shape[1]
    col, mask = _columns(D)
    read = lambda ref: triton.load(ref.at[row, col], mask=mask, other=0.0).astype(jnp.float32)
    s = (read(h_ref) + read(y_ref)).astype(s_ref.dtype)
    wide = s.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.sum(wide * wide) / D + eps)
    gain = triton.load(gain_ref.at[col], mask=mask, other=0.0)
    triton.store(s_ref.at[row, col], s, mask=mask)
    triton.store(n_ref.at[row, col], (wide * rstd * gain).astype(n_ref.dtype), mask=mask)
    triton.store(rstd_ref.at[row], rstd)


def _backward_kernel(ds_ref, dn_ref, s_ref, rstd_ref, gain_ref, dx_ref, partial_ref):
    (N, D), program, programs = s_ref.shape, pl.program_id(0), partial_ref.shape[0]
    col, mask = _columns(D)
    gain = triton.load(gain_ref.at[col], mask=mask, other=0.0)

    def one(turn, sum_D):
        row = program + turn * programs
        seen = mask & (row < N)
        read = lambda ref: triton.load(ref.at[row, col], mask=seen, other=0.0).astype(jnp.float32)
        rstd = triton.load(rstd_ref.at[row], mask=row < N, other=0.0)
        dn, unit = read(dn_ref), read(s_ref) * rstd
        g = dn * gain
        dx = read(ds_ref) + rstd * (g - unit * (jnp.sum(g * unit) / D))
        triton.store(dx_ref.at[row, col], dx.astype(dx_ref.dtype), mask=seen)
        return sum_D + dn * unit

    turns = -(-N // programs)
    sum_D = jax.lax.fori_loop(0, turns, one, jnp.zeros(col.shape, jnp.float32))
    triton.store(partial_ref.at[program, col], sum_D, mask=mask)


def _run_forward(h_ND, y_ND, gain_D, eps, interpret):
    N, D = h_ND.shape
    shapes = (triton.like(h_ND), triton.like(h_ND), triton.like(h_ND, jnp.float32, (N,)))
    return triton.call(
        functools.partial(_forward_kernel, eps=eps),
        name="add_rms_norm_forward",
        grid=(N,),
        out_shape=shapes,
        warps=_warps(D),
        interpret=interpret,
    )(h_ND, y_ND, gain_D)


def _run_backward(ds_ND, dn_ND, s_ND, rstd_N, gain_D, interpret):
    D, programs = s_ND.shape[1], min(PROGRAMS, s_ND.shape[0])
    shapes = (triton.like(s_ND), triton.like(s_ND, jnp.float32, (programs, D)))
    dx_ND, partial_PD = triton.call(
        _backward_kernel,
        name="add_rms_norm_backward",
        grid=(programs,),
        out_shape=shapes,
        warps=_warps(D),
        interpret=interpret,
    )(ds_ND, dn_ND, s_ND, rstd_N, gain_D)
    return dx_ND, partial_PD.sum(0)  # in one order: the same bits every time


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def add_rms_norm(h_XD, y_XD, gain_D, eps=1e-6, interpret=False):
    """add_rms_norm_reference, fused; call it inside shard_map, on one device's rows.

    Args:
        h_XD, y_XD: of one floating type; the residual stream and what a layer adds to it.
        gain_D: float32.
        interpret: runs without a GPU, for tests.

    Returns:
        (s_XD, n_XD) in h.dtype; 1/rms is named "rstd" for remat policies.
    """
    return _forward(h_XD, y_XD, gain_D, eps, interpret)[0]


def _forward(h_XD, y_XD, gain_D, eps, interpret):
    D = h_XD.shape[-1]
    s_ND, n_ND, rstd_N = _run_forward(
        h_XD.reshape(-1, D), y_XD.reshape(-1, D), gain_D, eps, interpret
    )
    rstd_N = checkpoint_name(rstd_N, "rstd")
    return (s_ND.reshape(h_XD.shape), n_ND.reshape(h_XD.shape)), (s_ND, rstd_N, gain_D)


def _backward(eps, interpret, residuals, cotangents):
    del eps
    s_ND, rstd_N, gain_D = residuals
    ds_ND, dn_ND = (x.reshape(s_ND.shape) for x in cotangents)
    dx_ND, dgain_D = _run_backward(ds_ND, dn_ND, s_ND, rstd_N, gain_D, interpret)
    dx_XD = dx_ND.reshape(cotangents[0].shape)
    return dx_XD, dx_XD, dgain_D


add_rms_norm.defvjp(_forward, _backward)

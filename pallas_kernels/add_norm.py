"""Residual add and norm in one pass: s = h + y, n = norm(s) * gain + bias, and their gradients.

The norm is RMS or layer norm. y may lack the bias of the product that computed it; then the kernel
adds it, s = h + (y + y_bias), and the backward sums its gradient. Bound: memory. For N rows of D
elements of b bytes, forward moves 4*N*D*b (reads h, y; writes s, n), or 2*N*D*b without y. Backward
moves 4*N*D*b (reads ds, dn, s; writes one gradient, shared by h and y) and recomputes each row's
statistics in registers. XLA moves 1.25 to 1.5 times as much (python -m pallas_kernels.traffic): its
forward reads each row twice, and its backward sums the gain's gradient in a separate pass.

A program computes blocks of several rows. A row is cut into parts of 256 columns, or of a power of
two times as many: 16 bytes for each thread of a warp, or of several warps. So rows of 768 columns
need no padding, and where a part belongs to one warp, no sum over a row needs shared memory.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467; Ba et al. 2016,
https://arxiv.org/abs/1607.06450
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.block_tiles import BlockTiles, norm_tiles
from pallas_kernels.validation import check_add_norm

VECTORS = "y_bias", "gain", "bias"  # the kernels' arguments of D elements


def add_norm_reference(
    h_XD: jax.Array,
    y_XD: jax.Array | None,
    gain_D: jax.Array,
    bias_D: jax.Array | None,
    form: str,
    eps: float,
    y_bias_D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reference implementation: normalizes in at least float32, returns (s, n) in h.dtype."""
    s_XD = h_XD if y_XD is None else h_XD + y_XD
    if y_XD is not None and y_bias_D is not None:  # rounded once
        s_XD = (h_XD + (y_XD.astype(y_bias_D.dtype) + y_bias_D)).astype(h_XD.dtype)
    wide = s_XD.astype(jnp.promote_types(s_XD.dtype, jnp.float32))
    if form == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    n_XD = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps) * gain_D
    return s_XD, (n_XD if bias_D is None else n_XD + bias_D).astype(s_XD.dtype)


class _Rows:
    """The blocks of rows of [N,D] that a program computes one after another.

    Values are lists of parts [rows,columns] in float32. The last part may end in padding.
    """

    def __init__(self, shape: Any, tiles: BlockTiles, interpret: bool, program: Any = 0):
        N, D = shape
        self.N, self.D, self.rows, self.interpret = N, D, tiles.rows, interpret
        self.columns = min(tiles.columns, pl.next_power_of_2(D))
        self.parts = pl.cdiv(D, self.columns)
        self.blocks = pl.cdiv(N, self.rows)
        self.program, self.programs = program, min(tiles.programs or self.blocks, self.blocks)

    def locate(self, step):
        """Returns the rows [rows,1] of a block, and the mask of those that exist or None."""
        block = self.program + step * self.programs
        row = (block * self.rows + jnp.arange(self.rows))[:, None]
        return row, row < self.N if self.N % self.rows else None

    def loop(self, body, carry):
        """Runs body(step, carry) for each block of this program."""
        return triton.loop_over_blocks(self.program, self.programs, self.blocks, body, carry)

    def column(self, part):
        """Returns the columns [1,columns] of a part, and the mask of those that exist or None."""
        column = (part * self.columns + jnp.arange(self.columns))[None, :]
        return column, column < self.D if (part + 1) * self.columns > self.D else None

    def _locate_part(self, ref, place, part):
        (row, row_mask), (column, column_mask) = place, self.column(part)
        mask = triton.join_masks((self.rows, self.columns), row_mask, column_mask)
        return ref.at[row, column], mask

    def read(self, ref, place):
        """Returns the parts of a block; what is outside of the array reads as zeros."""
        parts = []
        for part in range(self.parts):
            block, mask = self._locate_part(ref, place, part)
            parts.append(triton.load_inside(block, mask).astype(jnp.float32))
        return parts

    def read_vector(self, ref):
        """Returns the parts of a vector [1,D], which each row reads for itself.

        So they lie in the registers of the same threads as the rows, without an exchange.
        """
        return self.read(ref, (jnp.zeros((self.rows, 1), jnp.int32), None))

    def write(self, ref, place, part, x):
        """Rounds and writes a part of a block; returns it rounded, in float32."""
        block, mask = self._locate_part(ref, place, part)
        x = triton.narrow(x, ref.dtype, self.interpret)
        triton.store(block, x, mask=mask)
        return x.astype(jnp.float32)

    def mean(self, parts):
        """Returns each row's mean, [rows,1]."""
        return jnp.sum(functools.reduce(jnp.add, parts), axis=1, keepdims=True) / self.D

    def mean_of_products(self, a, b):
        """Returns the mean of each row's products, [rows,1]."""
        total = a[0] * b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            total = self.fma(x, y, total)
        return self.mean([total])

    def fma(self, a, b, c):
        return triton.fma(a, b, c, self.interpret)

    def center(self, parts):
        """Subtracts each row's mean; padding remains zero."""
        mean, centered = self.mean(parts), []
        for part, x in enumerate(parts):
            mask = self.column(part)[1]
            centered.append(x - mean if mask is None else jnp.where(mask, x - mean, 0.0))
        return centered


def _forward_kernel(*refs, names, tiles, form, eps, interpret):
    ref = dict(zip(names, refs, strict=True))
    rows = _Rows(ref["h"].shape, tiles, interpret, pl.program_id(0))
    vectors = {name: rows.read_vector(ref[name]) for name in VECTORS if name in ref}

    def compute_block(step, carry):
        place = rows.locate(step)
        s = rows.read(ref["h"], place)
        if "y" in ref:
            for part, y in enumerate(rows.read(ref["y"], place)):
                y = y + vectors["y_bias"][part] if "y_bias" in ref else y
                s[part] = rows.write(
                    ref["s"], place, part, s[part] + y
                )  # the norm reads it rounded
        s = rows.center(s) if form == "layer" else s
        rstd = jax.lax.rsqrt(rows.mean_of_products(s, s) + eps)
        for part, gain in enumerate(vectors["gain"]):
            unit = s[part] * rstd
            bias = vectors["bias"][part] if "bias" in ref else None
            n = unit * gain if bias is None else rows.fma(unit, gain, bias)
            rows.write(ref["n"], place, part, n)
        return carry

    rows.loop(compute_block, 0)


def _backward_kernel(
    ds_ref, dn_ref, s_ref, gain_ref, dx_ref, sums_ref, *, names, tiles, form, eps, interpret
):
    """Writes dx, and each program's sums of the gradients of the vectors `names`, [names,P,D].

    With c = s - mean(s), unit = c * rstd and g = dn * gain, the gradient of the norm is
    rstd * (g - mean(g) - unit * mean(g * unit)); RMS norm has no mean(s) and no mean(g).
    """
    rows = _Rows(s_ref.shape, tiles, interpret, pl.program_id(0))

    def compute_block(step, sums):
        place = rows.locate(step)
        s, dn, ds = (rows.read(ref, place) for ref in (s_ref, dn_ref, ds_ref))
        gain = rows.read_vector(gain_ref)  # again for each block, to need fewer registers
        g = [x * y for x, y in zip(dn, gain, strict=True)]
        mean_g = rows.mean(g) if form == "layer" else 0.0
        s = rows.center(s) if form == "layer" else s
        mean_g_s = rows.mean_of_products(g, s)
        rstd = jax.lax.rsqrt(rows.mean_of_products(s, s) + eps)
        mean_g_unit, new_sums = mean_g_s * rstd, []
        for part, totals in enumerate(sums):  # part by part, to keep fewer numbers in registers
            unit = s[part] * rstd
            projected = rows.fma(unit, -mean_g_unit, g[part] - mean_g)
            dx = rows.write(dx_ref, place, part, rows.fma(projected, rstd, ds[part]))
            if place[1] is not None:  # with eps = 0, a row of padding would add 0 * inf
                unit, dx = (jnp.where(place[1], x, 0.0) for x in (unit, dx))
            total = dict(zip(names, totals, strict=True))
            total["gain"] = rows.fma(dn[part], unit, total["gain"])
            if "bias" in names:
                total["bias"] += dn[part]
            if "y_bias" in names:  # its gradient is the sum of what the products before read
                total["y_bias"] += dx
            new_sums.append(list(total.values()))
        return new_sums

    zeros = jnp.zeros((rows.rows, rows.columns), jnp.float32)
    sums = rows.loop(compute_block, [[zeros] * len(names)] * rows.parts)
    for part, totals in enumerate(sums):
        column, mask = (None if x is None else x[0] for x in rows.column(part))
        for i, total in enumerate(totals):
            sum_ref = sums_ref.at[i, rows.program, column]
            triton.store(sum_ref, jnp.sum(total, axis=0), mask=mask)


def add_norm(
    h_XD: jax.Array,
    y_XD: jax.Array | None,
    gain_D: jax.Array,
    bias_D: jax.Array | None,
    form: str = "rms",
    eps: float = 1e-6,
    interpret: bool = False,
    y_bias_D: jax.Array | None = None,
    tiles: dict[str, BlockTiles] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes add_norm_reference in one kernel; call it inside shard_map, on one device's rows.

    Args:
        h_XD: the residual stream, of any floating type; the kernels compute in float32.
        y_XD: what a layer adds to it, of the same type, or None.
        gain_D, bias_D: float32; the bias may be None.
        form: one of validation.FORMS.
        interpret: runs without a GPU, for tests.
        y_bias_D: added to y, float32, or None; it needs y.
        tiles: of the two kernels, "norm" and "norm_backward"; None: those of norm_tiles.

    Returns:
        (s_XD, n_XD) in h.dtype. They have first-order gradients.

    Raises:
        ValueError: check_add_norm refuses the arguments.
    """
    tiles = norm_tiles(h_XD.shape[-1] if h_XD.ndim else 1) if tiles is None else tiles
    check_add_norm(h_XD, y_XD, gain_D, bias_D, form, eps, y_bias_D, tiles)
    static = form, eps, tiles["norm"], tiles["norm_backward"], interpret
    return _add_norm(h_XD, y_XD, gain_D, bias_D, y_bias_D, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _add_norm(h_XD, y_XD, gain_D, bias_D, y_bias_D, static):
    return _forward(h_XD, y_XD, gain_D, bias_D, y_bias_D, static)[0]


def _forward(h_XD, y_XD, gain_D, bias_D, y_bias_D, static):
    form, eps, tiles, _, interpret = static
    D, adds = h_XD.shape[-1], y_XD is not None
    given = {"h": h_XD, "y": y_XD, "y_bias": y_bias_D, "gain": gain_D, "bias": bias_D}
    given = {name: x.reshape(-1, D) for name, x in given.items() if x is not None}
    names = *given, *["s"] * adds, "n"
    out = triton.call(
        functools.partial(
            _forward_kernel, names=names, tiles=tiles, form=form, eps=eps, interpret=interpret
        ),
        name="add_norm_forward",
        grid=(_Rows(given["h"].shape, tiles, interpret).programs,),
        out_shape=[triton.like(given["h"])] * (1 + adds),
        warps=tiles.warps,
        interpret=interpret,
    )(*given.values())
    s_XD = out[0].reshape(h_XD.shape) if adds else h_XD
    present = adds, bias_D is not None, y_bias_D is not None
    return (s_XD, out[-1].reshape(h_XD.shape)), (s_XD, gain_D, present)


def _backward(static, residuals, cotangents):
    form, eps, _, tiles, interpret = static
    s_XD, gain_D, (adds, biased, y_biased) = residuals
    names = "gain", *["bias"] * biased, *["y_bias"] * y_biased
    D = s_XD.shape[-1]
    ds_ND, dn_ND, s_ND, gain_1D = (x.reshape(-1, D) for x in (*cotangents, s_XD, gain_D))
    programs = _Rows(s_ND.shape, tiles, interpret).programs
    dx_ND, partial_CPD = triton.call(
        functools.partial(
            _backward_kernel, names=names, tiles=tiles, form=form, eps=eps, interpret=interpret
        ),
        name="add_norm_backward",
        grid=(programs,),
        out_shape=[triton.like(s_ND), triton.like(s_ND, jnp.float32, (len(names), programs, D))],
        warps=tiles.warps,
        interpret=interpret,
    )(ds_ND, dn_ND, s_ND, gain_1D)
    dx_XD = dx_ND.reshape(s_XD.shape)
    # Summed in a fixed order, without atomics: the result has the same bits every time.
    sums = dict(zip(names, partial_CPD.sum(1), strict=True))
    return dx_XD, dx_XD if adds else None, sums["gain"], sums.get("bias"), sums.get("y_bias")


_add_norm.defvjp(_forward, _backward)

"""GELU of a sum, y = gelu(x + bias) in its form with tanh, and its gradients, each in one pass.

GELU is u * s with s = sigmoid(RATE * (u + CUBIC * u^3)), and its derivative is
s * (1 + (u - u * s) * slope) with slope = RATE + 3 * RATE * CUBIC * u^2. Bound: memory. For N rows
of F elements of b bytes, forward moves 2*N*F*b (reads x, writes y) and backward 3*N*F*b (reads dy
and x, writes dx, and sums the bias' gradient). XLA moves the same bytes, but loads 8 bytes a thread
at a time, where these kernels load 16, and computes with 26 instructions an element, where the
forward has about 11 and the backward's loop about 17 (python -m pallas_kernels.audit).

Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.block_tiles import GELU_TILES, BlockTiles
from pallas_kernels.gelu_xla import CUBIC, RATE
from pallas_kernels.validation import check_gelu

NARROWEST = 256  # columns that are worth a block without padding; fewer leave lanes of a warp idle

EXPONENT = -RATE * CUBIC / math.log(2), -RATE / math.log(2)  # 2**(u * (a * u^2 + b)) = exp(-...)
SLOPE = 3 * RATE * CUBIC, RATE

# PTX of the forward, $0 = f(u = $1), and of the backward, $0 = f(u = $1, dy = $2). Both begin with
# the sigmoid s. ex2 and rcp are accurate to 22 bits and take infinities and NaN as their exact
# functions do; subnormal results become zero.
# Source: NVIDIA's PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution
_SIGMOID_PTX = f"""
    mul.f32 u2, $1, $1;
    fma.rn.f32 e, u2, {triton.ptx_float(EXPONENT[0])}, {triton.ptx_float(EXPONENT[1])};
    mul.f32 e, e, $1;
    ex2.approx.ftz.f32 e, e;
    add.f32 e, e, {triton.ptx_float(1)};
    rcp.approx.ftz.f32 s, e;
"""
FORWARD_PTX = "{ .reg .f32 u2, e, s;" + _SIGMOID_PTX + "mul.f32 $0, $1, s; }"
BACKWARD_PTX = f"""{{ .reg .f32 u2, e, s, w, d; {_SIGMOID_PTX}
    neg.f32 w, s;
    fma.rn.f32 w, $1, w, $1;
    fma.rn.f32 d, u2, {triton.ptx_float(SLOPE[0])}, {triton.ptx_float(SLOPE[1])};
    fma.rn.f32 w, w, d, {triton.ptx_float(1)};
    mul.f32 s, s, $2;
    mul.f32 $0, s, w; }}"""


def gelu_reference(x_XF: jax.Array, bias_F: jax.Array | None) -> jax.Array:
    """Reference implementation: computes in at least float32, returns x.dtype."""
    u = x_XF.astype(jnp.promote_types(x_XF.dtype, jnp.float32))
    u = u if bias_F is None else u + bias_F
    return jax.nn.gelu(u, approximate=True).astype(x_XF.dtype)


def _sigmoid(u, u2):
    return 1 / (1 + jnp.exp2(u * (EXPONENT[0] * u2 + EXPONENT[1])))


def _gelu(u, interpret):
    if not interpret:
        return triton.inline_assembly(FORWARD_PTX, u)
    return u * _sigmoid(u, u * u)


def _gelu_gradient(u, dy, interpret):
    """Returns dy * s * (1 + (u - u * s) * slope)."""
    if not interpret:
        return triton.inline_assembly(BACKWARD_PTX, u, dy)
    u2 = u * u
    sigmoid = _sigmoid(u, u2)
    return dy * sigmoid * (1 + (u - u * sigmoid) * (SLOPE[0] * u2 + SLOPE[1]))


class Blocks:
    """The blocks of [N,F] that a program computes one after another, all of the same columns.

    Where F is not a multiple of the tiles' columns, blocks are narrower and have more rows, or, if
    they would be too narrow, end in padding.
    """

    def __init__(self, shape: tuple[int, ...], tiles: BlockTiles):
        N, F = shape
        columns = math.gcd(F, tiles.columns)  # a power of two
        if columns < min(NARROWEST, tiles.columns):
            columns = min(tiles.columns, pl.next_power_of_2(F))
        self.N, self.F, self.columns = N, F, columns
        self.rows = max(tiles.rows * tiles.columns // columns, 1)
        self.row_blocks = pl.cdiv(N, self.rows)
        self.programs = min(tiles.programs or self.row_blocks, self.row_blocks)  # along the rows
        self.column_blocks = pl.cdiv(F, columns)
        # Of one dimension, because CUDA limits the second one to 65,535. Neighbours in the grid are
        # neighbours in memory.
        self.grid = (self.programs * self.column_blocks,)

    def start(self):
        """Locates the columns and the first block of this program."""
        index, count = pl.program_id(0), jnp.int32(self.column_blocks)
        self.program = jax.lax.div(index, count)  # along the rows
        self.column = jax.lax.rem(index, count) * self.columns + jnp.arange(self.columns)
        self.column_mask = None if self.F % self.columns == 0 else self.column < self.F

    def read_bias(self, ref):
        """Returns the bias of the columns, [1,columns], or 0."""
        if ref is None:
            return 0.0
        bias = triton.load_inside(ref.at[self.column], self.column_mask)
        return bias[None, :].astype(jnp.float32)

    def locate(self, step):
        """Returns the index of a block's elements, and the mask of those that exist or None."""
        block = self.program + step * self.programs
        row = (block * self.rows + jnp.arange(self.rows))[:, None]
        column_mask = None if self.column_mask is None else self.column_mask[None, :]
        row_mask = row < self.N if self.N % self.rows else None
        mask = triton.join_masks((self.rows, self.columns), column_mask, row_mask)
        return (row, self.column[None, :]), mask

    def loop(self, body, carry):
        """Runs body(step, carry) for each block of this program."""
        return triton.loop_over_blocks(self.program, self.programs, self.row_blocks, body, carry)


def _forward_kernel(x_ref, *refs, tiles, interpret):
    *bias_ref, y_ref = refs
    blocks = Blocks(x_ref.shape, tiles)
    blocks.start()
    bias = blocks.read_bias(*bias_ref) if bias_ref else 0.0

    def compute_block(step, carry):
        index, mask = blocks.locate(step)
        u = triton.load_inside(x_ref.at[index], mask).astype(jnp.float32) + bias
        triton.store(y_ref.at[index], _gelu(u, interpret).astype(y_ref.dtype), mask=mask)
        return carry

    blocks.loop(compute_block, 0)


def _backward_kernel(dy_ref, x_ref, *refs, tiles, interpret):
    bias_ref, dx_ref, sum_ref = refs if len(refs) == 3 else (None, *refs, None)
    blocks = Blocks(x_ref.shape, tiles)
    blocks.start()
    bias = blocks.read_bias(bias_ref)

    def compute_block(step, total):
        index, mask = blocks.locate(step)
        x = triton.load_inside(x_ref.at[index], mask).astype(jnp.float32)
        dy = triton.load_inside(dy_ref.at[index], mask).astype(jnp.float32)
        dx = _gelu_gradient(x + bias, dy, interpret)
        dx = triton.narrow(dx, dx_ref.dtype, interpret)
        triton.store(dx_ref.at[index], dx, mask=mask)
        # The sum is of what the products before also read: the rounded gradient. Padding adds 0
        # where the bias is finite, and else what all rows of the column add.
        return total if sum_ref is None else total + dx.astype(jnp.float32)

    shape = (blocks.rows, blocks.columns)
    total = blocks.loop(compute_block, 0 if sum_ref is None else jnp.zeros(shape, jnp.float32))
    if sum_ref is not None:
        part = sum_ref.at[blocks.program, blocks.column]
        triton.store(part, jnp.sum(total, axis=0), mask=blocks.column_mask)


def gelu(
    x_XF: jax.Array,
    bias_F: jax.Array | None = None,
    tiles: dict[str, BlockTiles] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes gelu_reference in one kernel; call it inside shard_map, on one device's part.

    Args:
        x_XF: of any floating type; the kernels compute in float32.
        bias_F: float32, or None.
        tiles: of the two kernels, "gelu" and "gelu_backward"; None: GELU_TILES.
        interpret: runs without a GPU, for tests.

    Returns:
        [X,F] in x.dtype. It has first-order gradients, which need only x and the bias; that of the
        bias is the sum of x's.

    Raises:
        ValueError: check_gelu refuses the arguments.
    """
    tiles = GELU_TILES if tiles is None else tiles
    check_gelu(x_XF, bias_F, tiles)
    return _fused(x_XF, bias_F, tiles["gelu"], tiles["gelu_backward"], interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fused(x_XF, bias_F, tiles, backward_tiles, interpret):
    return _forward(x_XF, bias_F, tiles, backward_tiles, interpret)[0]


def _forward(x_XF, bias_F, tiles, backward_tiles, interpret):
    del backward_tiles
    x_NF = x_XF.reshape(-1, x_XF.shape[-1])
    y_NF = triton.call(
        functools.partial(_forward_kernel, tiles=tiles, interpret=interpret),
        name="bias_gelu_forward",
        grid=Blocks(x_NF.shape, tiles).grid,
        out_shape=triton.like(x_NF),
        warps=tiles.warps,
        interpret=interpret,
    )(x_NF, *([] if bias_F is None else [bias_F]))
    return y_NF.reshape(x_XF.shape), (x_XF, bias_F)


def _backward(tiles, backward_tiles, interpret, residuals, dy_XF):
    del tiles
    x_XF, bias_F = residuals
    F = x_XF.shape[-1]
    dy_NF, x_NF = (x.reshape(-1, F) for x in (dy_XF, x_XF))
    blocks, biased = Blocks(x_NF.shape, backward_tiles), bias_F is not None
    partial_sums = [triton.like(x_NF, jnp.float32, (blocks.programs, F))] * biased
    dx_NF, *partial_PF = triton.call(
        functools.partial(_backward_kernel, tiles=backward_tiles, interpret=interpret),
        name="bias_gelu_backward",
        grid=blocks.grid,
        out_shape=[triton.like(x_NF), *partial_sums],
        warps=backward_tiles.warps,
        interpret=interpret,
    )(dy_NF, x_NF, *([bias_F] if biased else []))
    # Summed in a fixed order, without atomics: the result has the same bits every time.
    return dx_NF.reshape(x_XF.shape), partial_PF[0].sum(0) if biased else None


_fused.defvjp(_forward, _backward)

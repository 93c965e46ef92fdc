"""Products and copies of the Mosaic GPU bodies for sm_80 to sm_89 (Ampere and Ada).

These GPUs have neither Hopper's products of warp groups nor its memory accelerator. A program here
is one warp group: 128 threads, which multiply 16x8x16 tiles in registers (mma) and copy 16 bytes
each from HBM to shared memory while they multiply (cp.async). Several programs fit on a
multiprocessor, so one multiplies while another waits. JAX deprecates its Triton backend, which
these bodies are to replace. There are two, of attention's forward and of symmetric.

cp.async has no bounds check: a copy must lie inside its array.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu


class Layouts:
    """The places in registers of a product's sum and its operands x and y.

    Args:
        warps_along_rows: of the four warps, those that share the rows of a tile; the others share
            its columns. Each warp loads all operands of its part of the tile.
    """

    def __init__(self, dtype: Any, warps_along_rows: int):
        layout, where = plgpu.Layout, {"m_warps": warps_along_rows}
        self.sum = layout.MMA_ACC(dtype, **where)
        self.x, self.y = layout.MMA_LHS(dtype, **where), layout.MMA_RHS(dtype, **where)
        self.row = self.sum.reduce(1)  # one number for each row of the sum
        self.column = self.sum.reduce(0)


def multiply(sum_RC: jax.Array, x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """Returns sum + x y; the interpreter of jax 0.11.2 does not implement mma."""
    if interpret:
        return sum_RC + jnp.dot(x, y, preferred_element_type=jnp.float32)
    return plgpu.mma(sum_RC, x, y)


def as_operand(x: jax.Array, layouts: Layouts, interpret: bool) -> jax.Array:
    """Returns x, in the layout of a product's sum, as the operand x of another product.

    Each warp must have entire rows. The same registers then have the same elements in both layouts,
    which layout_cast of jax 0.11.2 does not know.
    """
    if interpret:
        return x
    from jax.experimental.mosaic.gpu import FragmentedArray

    @plgpu.inline_mgpu(
        arg_types=(layouts.sum,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layouts.x),
    )
    def rename(context, registers):
        del context
        layout = layouts.x.to_mgpu()
        return FragmentedArray(
            _registers=registers.registers.reshape(layout.registers_shape(registers.shape)),
            _layout=layout,
            _is_signed=registers.is_signed,
        )

    return rename(x)


def barrier(interpret: bool) -> None:
    """Waits for all threads of the program, and for its copies to shared memory."""
    if not interpret:
        plgpu.wait_gmem_to_smem(0)  # has such a barrier; commit_smem would need sm_90


def copy_now(source: Any, smem: Any, interpret: bool) -> None:
    """Copies a part of an array to shared memory and waits for it."""
    if interpret:
        smem[...] = source[...]
    else:
        plgpu.copy_gmem_to_smem(source, smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
        plgpu.wait_gmem_to_smem(0)


class Ring:
    """Slots of shared memory that are filled in turn, `slots - 1` steps before they are read.

    Step t reads slot t % slots, belongs to stream t % len(streams), and has there the index
    t // len(streams). Callers carry the slot through their loop, since a remainder would take many
    instructions.

    Args:
        slots: at least 2.
        count: the number of indices; it may be traced.
        streams: functions (index, slot) -> pairs (part of an array, shared memory of the slot).
        copies: pairs of a step, the same in all streams.
        interpret: the interpreter of jax 0.11.2 does not implement cp.async. Each copy then happens
            as late as the waits allow, and the slot is nan from when the copy would start, so that
            a wrong count, or a slot that is filled too early, shows in the results.
    """

    def __init__(
        self,
        slots: int,
        count: Any,
        streams: Sequence[Callable[[Any, Any], Iterable[tuple[Any, Any]]]],
        copies: int,
        interpret: bool,
    ):
        self.slots, self.count, self.streams = slots, count, streams
        self.copies, self.interpret = copies, interpret

    def start(self) -> jax.Array:
        """Starts the copies of the first steps; returns the slot of the first one."""
        for step in range(self.slots - 1):
            index, stream = divmod(step, len(self.streams))
            fill = functools.partial(self._fill, index, stream, step)
            pl.when(index < self.count)(fill)
        return jnp.int32(0)

    def next(self, slot: Any) -> Any:
        """Returns the slot of the step after the one that reads `slot`."""
        return jnp.where(slot == self.slots - 1, 0, slot + 1)

    def turn(self, index: Any, slot: Any, stream: int = 0) -> None:
        """Waits for the copies of the step that reads `slot`, and starts those of a later step.

        The wait is also a barrier, so all threads have read the slot that is filled now: that of
        the step before.
        """
        ahead, later_stream = divmod(stream + self.slots - 1, len(self.streams))
        more = index + ahead < self.count

        @pl.when(more)
        def _():
            self._wait(index, stream, slot, self.slots - 2)
            before = jnp.where(slot == 0, self.slots - 1, slot - 1)
            self._fill(index + ahead, later_stream, before)

        pl.when(jnp.logical_not(more))(lambda: self._wait(index, stream, slot, 0))

    def _fill(self, index, stream, slot):
        for source, smem in self.streams[stream](index, slot):
            if self.interpret:
                smem[...] = jnp.full(smem.shape, jnp.nan, smem.dtype)
            else:
                mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                plgpu.copy_gmem_to_smem(source, smem, oob_mode=mode)

    def _wait(self, index, stream, slot, steps_in_flight):
        """Waits until at most the copies of the last `steps_in_flight` started steps are left."""
        if not self.interpret:
            plgpu.wait_gmem_to_smem(self.copies * steps_in_flight)
            return
        step, total = index * len(self.streams) + stream, self.count * len(self.streams)
        arrived = jnp.minimum(step + self.slots - 1, total) - steps_in_flight
        for ahead in range(self.slots - 1):
            later, later_stream = divmod(stream + ahead, len(self.streams))
            pairs = functools.partial(self.streams[later_stream], index + later, slot)
            pl.when(step + ahead < arrived)(functools.partial(_copy_pairs, pairs))
            slot = self.next(slot)


def _copy_pairs(pairs):
    for source, smem in pairs():
        smem[...] = source[...]


def call(kernel: Callable, **options: Any) -> Callable:
    """Returns mosaic.call with programs of one warp group, for Ampere.

    Args:
        options: name, grid, out_shape, scratch, approximate and interpret, as of mosaic.call.
    """
    # Without automatic barriers around every access: the bodies call `barrier` where one is needed.
    # Sums and maxima of rows stay within a warp and need no shared memory.
    return mosaic.call(
        kernel,
        consumers=0,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        **options,
    )

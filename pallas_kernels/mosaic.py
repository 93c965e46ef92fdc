"""The one door to Pallas' Mosaic GPU backend: Hopper's own instructions, and what they ask for.

The tensor core's warp-group products read shared memory that the tensor memory accelerator (TMA)
fills; a warp group of its own drives it, the others multiply. Copies past an array's end read
zeros and write nothing, so tiles need not divide sizes. Mosaic is young: what a body here needs of
it is that of jax 0.11.2, so on older versions there is none (REASON says so).

"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

OLDEST = (0, 11, 2)
USABLE = tuple(int(part) for part in jax.__version__.split(".")[:3]) >= OLDEST
REASON = "" if USABLE else f"Mosaic bodies need jax 0.11.2 or later; this is {jax.__version__}"

if USABLE:
    from jax.experimental.pallas import mosaic_gpu as plgpu
else:
    plgpu = None

CONSUMERS = 2  # warp groups that multiply; one more copies
COPYING_REGISTERS, MULTIPLYING_REGISTERS = 40, 232  # a thread: 40 + 2 * 232 of 3 * 168
ROW_BYTES = 128  # of a row of shared memory as products read it, swizzled
TYPES = (jnp.bfloat16, jnp.float16)
SUFFIX = "_mosaic_gpu_kernel"  # of a kernel's name in machine code
INTERPRETED_PROGRAMS = 2  # fewer than tiles, so that tests see a program go on to its next


def check(*written, **operands) -> None:
    """That warp-group products can take operands, and TMA them and what is written.

    Raises:
        ValueError: jax is too old, an operand's type is not of TYPES, or some array's rows are of
            no multiple of 8 elements.
    """
    if not USABLE:
        raise ValueError(f"{REASON}. Give the kernel tiles of Triton's body.")
    for name, x in operands.items():
        if x.dtype not in TYPES or x.shape[-1] % 8:
            raise ValueError(
                "a Mosaic body takes bfloat16 or float16, in rows of a multiple of 8; got "
                f"{name}={x.dtype}{list(x.shape)}. Give the kernel tiles of Triton's body."
            )
    for x in written:
        if x.shape[-1] % 8:
            raise ValueError(
                f"a Mosaic body writes rows of a multiple of 8; got {x.dtype}{list(x.shape)}. Give "
                "the kernel tiles of Triton's body."
            )


def shared(shape, dtype):
    """Shared memory for arrays [...,M,N], swizzled as products and copies both take it."""
    row = min(shape[-1] * jnp.dtype(dtype).itemsize, ROW_BYTES)
    tiling = plgpu.TilingTransform((8, row // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row)))


def programs(most, interpret) -> int:
    """One for each multiprocessor, or for each piece of work where those are fewer."""
    if interpret:
        return min(most, INTERPRETED_PROGRAMS)
    return min(most, jax.extend.backend.get_default_device().core_count)


def call(kernel, *, name, grid, out_shape, scratch, approximate=False, interpret=False):
    """plgpu.kernel of CONSUMERS + 1 warp groups, its axis "group".

    Args:
        grid: {axis name: programs}.
        approximate: exponentials and the like by the chip's own, of 22 bits; not what interprets.
        scratch: {keyword of the kernel: shared memory or barriers}.
        interpret: runs on CPU, thread by thread, and prints RACE DETECTED where two threads or
            copies may meet in memory: for tests alone.
    """
    return plgpu.kernel(
        kernel,
        out_type=out_shape,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=approximate),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )


def copy_steps(count, stages, streams) -> None:
    """What the copying warp group does: each stream's slots filled in turn, once all freed them.

    Args:
        streams: (copies, full, free) each: step -> ((part of an array, its shared memory
            [stages,...]), ...), and its barriers, one a slot.
    """

    @pl.loop(0, count)
    def _step(j):
        slot = lax.rem(j, stages)
        for copies, full, free in streams:

            @pl.when(j >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])  # noqa: B023 - traced at once

            for source, smem in copies(j):
                plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

    @pl.loop(0, jnp.minimum(count, stages))
    def _to_the_end(slot):
        for _, _, free in streams:
            plgpu.barrier_wait(free.at[slot])


def accumulate(products, start, interpret) -> list:
    """What products(*accumulators) makes of accumulators that begin as the arrays of `start`.

    Interpreted they begin as zeros and `start` is added at the end: the interpreter of jax 0.11.2
    knows no run_state.
    """
    if interpret:

        def from_zero(*refs):
            products(*refs)
            return [ref[...] for ref in refs]

        sums = pl.run_scoped(from_zero, *(plgpu.ACC(x.shape, x.dtype) for x in start))
        return [x + y for x, y in zip(start, sums, strict=True)]
    refs = tuple(plgpu.ACC.init(x) for x in start)
    return pl.run_state(lambda refs: products(*refs))(refs)


def multiply_registers(sum_ref, x, y_ref, staging=None) -> None:
    """wgmma of x, an array in registers.

    Args:
        staging: shared memory that x goes through where it is interpreted: the interpreter of jax
            0.11.2 multiplies shared memory alone.
    """
    if staging is not None:
        staging[...] = x
        plgpu.commit_smem()
        x = staging
    plgpu.wgmma(sum_ref, x, y_ref)


def launches(lowered) -> dict:
    """{kernel: (threads, blocks, shared bytes)} of the Mosaic kernels in a jax.stages.Lowered.

    XLA's dumps do not have these: they stand in the module that each custom call carries.
    """
    found = {}
    if USABLE:
        for call_op in _operations(lowered.compiler_ir().operation, "stablehlo.custom_call"):
            if call_op.attributes["call_target_name"].value == "mosaic_gpu_v2":
                module = call_op.attributes["mhlo.backend_config"]["module"].value_bytes
                found |= _launch(module)
    return found


def _launch(module_bytes) -> dict:
    from jax.experimental.mosaic.gpu import dialect
    from jax.extend.mlir import ir
    from jax.interpreters import mlir

    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    context.allow_unregistered_dialects = True  # those that keep a module's form between versions
    module = ir.Module.parse(module_bytes, context=context).operation
    (launch,) = _operations(module, "stable_mosaic_gpu.gpu.launch")
    numbers = [operand.owner.attributes["value"].value for operand in list(launch.operands)[1:8]]
    name = f"{module.attributes['sym_name'].value}{SUFFIX}"
    return {name: (math.prod(numbers[3:6]), math.prod(numbers[:3]), numbers[6])}


def _operations(inside, name):
    for region in inside.regions:
        for block in region.blocks:
            for op in block.operations:
                if op.operation.name == name:
                    yield op.operation
                yield from _operations(op.operation, name)

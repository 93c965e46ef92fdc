"""All Mosaic GPU API calls live here, so that a JAX upgrade touches one file.

Kernels for sm_90 (Hopper) use Mosaic GPU because it exposes Hopper's warp-group products (wgmma)
and tensor memory accelerator (TMA), which Pallas' Triton backend does not. The kernels are
warp-specialised: one warp group (128 threads) only starts TMA copies from HBM to shared memory, and
the others, two to four, multiply the copied data. The copying group needs few registers and gives
the rest to the others.

Barriers synchronise the groups. For each slot of shared memory, "full" completes when the TMA has
written the slot, and "free" when all multiplying groups have read it, so that it can be refilled.

Shared memory is swizzled: the 16-byte pieces of a row are permuted by the row's number, so that a
column of a tile lies in different banks. TMA writes and wgmma reads the same permutation.

TMA copies past an array's end read zeros and write nothing, so tiles need not divide the sizes.
Only groups of SWIZZLED_ROWS rows must be whole in an array with more (see check_rows).
Mosaic GPU changes with every JAX release: the bodies need jax 0.11.2 (see REASON).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.backend import get_default_device

from pallas_kernels.kernel_call import without_derivative
from pallas_kernels.ptxas import explain_missing_mosaic

REASON = explain_missing_mosaic()
USABLE = not REASON

plgpu: Any = None  # Any: on an older JAX it is missing or has other functions
if USABLE:
    from jax.experimental.pallas import mosaic_gpu as plgpu

CONSUMERS = 2  # default number of warp groups that multiply; one more copies
# Registers per thread. The launch gives 168 to each of three groups; setmaxnreg moves them.
COPYING_REGISTERS, MULTIPLYING_REGISTERS = 40, 232  # 40 + 2 * 232 <= 3 * 168
# Number of multiplying groups -> registers; 3 launch with 128 for each group, 4 with 96.
REGISTERS = {2: (COPYING_REGISTERS, MULTIPLYING_REGISTERS), 3: (32, 160), 4: (24, 112)}
SWIZZLE_BYTES = 128  # the widest swizzle; wgmma reads rows of this length
SWIZZLED_ROWS = 8  # the rows after which the swizzle repeats; shared memory is tiled by them
TYPES = (jnp.bfloat16, jnp.float16)
SUFFIX = "_mosaic_gpu_kernel"  # is appended to a kernel's name in machine code
INTERPRETED_PROGRAMS = 2  # fewer than a test has tiles, so that a program computes several


def row_multiple(dtype: Any) -> int:
    """Returns what the length of an array's rows must be a multiple of: the swizzle's width."""
    return SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def check(*written: jax.ShapeDtypeStruct, **operands: jax.Array) -> None:
    """Checks that wgmma can multiply the operands, and that TMA can copy them and the outputs.

    Raises:
        ValueError: jax is too old or ptxas miscompiles (see REASON), an operand's type is not in
            TYPES, or the length of an array's rows is not a multiple of row_multiple. The
            interpreter would accept other lengths, but Mosaic GPU refuses to compile copies of them
            into swizzled memory.
    """
    if not USABLE:
        raise ValueError(f"{REASON}. Give the kernel tiles of its Triton body.")
    for name, x in operands.items():
        if x.dtype not in TYPES or x.shape[-1] % row_multiple(x.dtype):
            raise ValueError(
                "a Mosaic body takes bfloat16 or float16, in rows of a multiple of 64; got "
                f"{name}={x.dtype}{list(x.shape)}. Give the kernel tiles of its Triton body."
            )
    for x in written:
        if x.shape[-1] % row_multiple(x.dtype):
            raise ValueError(
                f"a Mosaic body writes rows of a multiple of {row_multiple(x.dtype)}; got "
                f"{x.dtype}{list(x.shape)}. Give the kernel tiles of its Triton body."
            )


def check_rows(**lengths: int) -> None:
    """Checks that TMA can copy blocks of arrays with so many rows into swizzled memory.

    Raises:
        ValueError: there are more than SWIZZLED_ROWS, and not a multiple of them. The interpreter
            would accept such arrays, but Mosaic GPU refuses to compile their copies.
    """
    for name, rows in lengths.items():
        if rows > SWIZZLED_ROWS and rows % SWIZZLED_ROWS:
            raise ValueError(
                f"a Mosaic body takes up to {SWIZZLED_ROWS} rows or a multiple of them; got "
                f"{name}={rows}. Give the kernel tiles of its Triton body."
            )


def swizzled_shared_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory for arrays [...,M,N] in the layout that both wgmma and TMA accept."""
    row_bytes = min(shape[-1] * jnp.dtype(dtype).itemsize, SWIZZLE_BYTES)
    tiling = plgpu.TilingTransform((SWIZZLED_ROWS, row_bytes // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row_bytes)))


def pad_last(x: jax.Array, multiple: int, value: float) -> jax.Array:
    """Pads the last dimension to a multiple, as accesses without TMA have no bounds check."""
    padding = ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % multiple),)
    return jnp.pad(x, padding, constant_values=value)


def persistent_programs(tiles: int, interpret: bool, cluster: int = 1) -> int:
    """Returns the number of clusters: one program per multiprocessor, but one cluster per tile.

    Each cluster computes several tiles, and loads the next one while it finishes one.
    """
    if interpret:
        return min(tiles, INTERPRETED_PROGRAMS)
    return min(tiles, get_default_device().core_count // cluster)


def shared_barrier(cluster: int, arrivals: int, count: int) -> Any:
    """Returns barriers that wait for `arrivals` in each program of a cluster."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
    return plgpu.ClusterBarrier(
        collective_axes=("cluster",), num_arrivals=arrivals, num_barriers=count
    )


def copy_to_cluster(cluster: int, source: Any, smem: Any, full: Any) -> None:
    """Starts a TMA copy to all programs of a cluster; each of them starts it and reads a part."""
    axes = {"collective_axes": "cluster"} if cluster > 1 else {}
    plgpu.copy_gmem_to_smem(source, smem, full, **axes)


def call(
    kernel: Callable,
    *,
    name: str,
    grid: dict[str, int],
    out_shape: Any,
    scratch: dict[str, Any],
    cluster: int = 1,
    consumers: int = CONSUMERS,
    approximate: bool = False,
    interpret: bool = False,
    **params: Any,
) -> Callable:
    """Returns plgpu.kernel, without a derivative, with consumers + 1 warp groups on axis "group".

    With consumers=0 there is one warp group, and no such axis.

    Args:
        grid: {axis name: programs}; clusters of them if `cluster` is not 1.
        scratch: {keyword of the kernel: shared memory or barriers}.
        cluster: programs that share copies, on axis "cluster"; with 1 there is no such axis.
        approximate: computes exponentials with the GPU's fast instruction, which is accurate to 22
            bits. The interpreter ignores it.
        interpret: runs on CPU, thread by thread, and prints RACE DETECTED where two threads or
            copies may access the same memory at once; only for tests.
        params: further ones for the compiler.
    """
    threads = {"num_threads": consumers + 1, "thread_name": "group"} if consumers else {}
    if cluster > 1:
        threads |= {"cluster": (cluster,), "cluster_names": ("cluster",)}
    program = plgpu.kernel(
        kernel,
        out_type=out_shape,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=approximate, **params),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        **threads,
    )
    return without_derivative(program, name)


def copy_steps(
    count: Any,
    stages: int,
    streams: Sequence[tuple[Callable, Any, Any]],
    finish: Callable[[Any], None] = lambda step: None,
) -> None:
    """Runs the copying warp group: fills the slots of each stream in turn, as they become free.

    Args:
        count: the number of steps, traced.
        streams: triples (copies, full, free). `copies` is a function of the step that returns
            pairs (part of an array, shared memory [stages,...]). A barrier has one slot a stage.
        finish: called with each step when a stream's slot is free, before it is filled again.
    """

    @pl.loop(0, count)
    def _copy_step(j):
        slot = lax.rem(j, stages)
        for copies, full, free in streams:

            @pl.when(j >= stages)  # before that the slot has never been filled
            def _():
                plgpu.barrier_wait(free.at[slot])  # noqa: B023 - traced before the next iteration
                finish(j - stages)

            for source, smem in copies(j):
                plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

    # When a program ends, every arrival at a barrier must have been waited for.
    @pl.loop(0, jnp.minimum(count, stages))
    def _wait_for_the_last_reads(slot):
        for _, _, free in streams:
            plgpu.barrier_wait(free.at[slot])
            finish(slot + lax.div(count - 1 - slot, stages) * stages)


def accumulate(
    products: Callable[..., None], start: Sequence[jax.Array], interpret: bool
) -> list[jax.Array]:
    """Returns accumulators that start at `start`, after products(*accumulators) has added to them.

    The interpreter of jax 0.11.2 does not implement run_state. Interpreted accumulators therefore
    start from zero, and `start` is added at the end.
    """
    if interpret:

        def from_zero(*refs):
            products(*refs)
            return [ref[...] for ref in refs]

        sums = pl.run_scoped(from_zero, *(plgpu.ACC(x.shape, x.dtype) for x in start))
        return [x + y for x, y in zip(start, sums, strict=True)]
    refs = tuple(plgpu.ACC.init(x) for x in start)
    return list(pl.run_state(lambda refs: products(*refs))(refs))


def multiply_registers(sum_ref: Any, x: jax.Array, y_ref: Any, staging: Any = None) -> None:
    """Adds x y to sum_ref by wgmma, where x is an array in registers.

    Args:
        staging: shared memory for a copy of x, passed only when interpreted: the interpreter of jax
            0.11.2 multiplies only operands in shared memory.
    """
    if staging is not None:
        staging[...] = x
        plgpu.commit_smem()
        x = staging
    plgpu.wgmma(sum_ref, x, y_ref)


def load_along_rows(ref: Any) -> jax.Array:
    """Loads one number for each row of a product from HBM."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def load_along_columns(ref: Any) -> jax.Array:
    """Loads one number for each column of a product from shared memory."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def launch_sizes(lowered: jax.stages.Lowered) -> dict[str, tuple[int, int, int]]:
    """Returns {kernel: (threads, blocks, shared bytes)} of the Mosaic kernels in a lowered program.

    XLA's dumps do not contain these numbers; the MLIR module in each custom call does.
    """
    sizes = {}
    if USABLE:
        program: Any = lowered.compiler_ir()
        for call_op in _operations(program.operation, "stablehlo.custom_call"):
            if call_op.attributes["call_target_name"].value == "mosaic_gpu_v2":
                module = call_op.attributes["mhlo.backend_config"]["module"].value_bytes
                sizes |= _launch_size(module)
    return sizes


def _launch_size(module_bytes):
    from jax.experimental.mosaic.gpu import dialect  # pyright: ignore[reportPrivateImportUsage]
    from jax.extend.mlir import ir
    from jax.interpreters import mlir

    context = mlir.make_ir_context()
    dialect.register_dialect(context)
    context.allow_unregistered_dialects = True  # the ones that give the format's version
    module = ir.Module.parse(module_bytes, context=context).operation
    (launch,) = _operations(module, "stable_mosaic_gpu.gpu.launch")
    # Grid x y z, block x y z, cluster x y z if there are clusters, and shared bytes.
    operands: Any = list(launch.operands)[1:]
    numbers = [operand.owner.attributes["value"].value for operand in operands]
    symbol: Any = module.attributes["sym_name"]
    blocks, threads = math.prod(numbers[:3]), math.prod(numbers[3:6])
    return {f"{symbol.value}{SUFFIX}": (threads, blocks, numbers[-1])}


def _operations(parent, name):
    """Yields the operations called `name` inside another, at any depth."""
    for region in parent.regions:
        for block in region.blocks:
            for op in block.operations:
                if op.operation.name == name:
                    yield op.operation
                yield from _operations(op.operation, name)

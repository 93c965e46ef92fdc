"""What the compiler makes of every kernel on a chip that is not there: registers to roofline.

    JAX_PLATFORMS=cpu python -m pallas_kernels.audit --chip=a40
    JAX_PLATFORMS=cpu python -m pallas_kernels.audit            # a40 and h100
    JAX_PLATFORMS=cpu python -m pallas_kernels.audit --sweep    # all tiles of the search space

Exit status 1 where a kernel spills, wants more shared memory than the chip has, lacks the
tensor-core instructions that its products need or, of a Mosaic body, the copies of the tensor
memory accelerator, or fits fewer times on a multiprocessor than its floor below. Needs the extra
`offline`, and no GPU. Nothing here is a measurement.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.add_norm import add_norm
from pallas_kernels.arguments import Parser
from pallas_kernels.chip import CHIPS, find_chip
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.head_scores import head_scores
from pallas_kernels.offline import compile_for
from pallas_kernels.qk_rope import qk_rope
from pallas_kernels.search_space import candidates, default_bodies
from pallas_kernels.symmetric import symmetric
from pallas_kernels.tiles import MOSAIC, TILES, body_of, kernel_tiles

AUDITED = tuple(name for name, chip in CHIPS.items() if chip.arch in TILES)


class Case(NamedTuple):
    """One kernel at one shape, and what it must keep."""

    name: str  # of the kernel in the compiled program
    shape: str
    build: Callable  # (Chip, tiles) -> (function, abstract arguments)
    hbm_bytes: float
    flops: float
    floor: int  # blocks on a multiprocessor, at least
    tensor_core: bool = False
    op: str = "norm"
    part: str = ""  # whose tiles are this kernel's
    only: str = ""  # the one body that is compiled at this shape
    why: str = ""


def _norm_case(backward, N, D, floor):
    """The backward of a layer norm with a bias, which holds the most registers."""

    def build(chip, tiles):
        del chip, tiles
        x, vector = (
            jax.ShapeDtypeStruct((N, D), jnp.bfloat16),
            jax.ShapeDtypeStruct((D,), "float32"),
        )
        if not backward:
            return lambda h, y, gain: add_norm(h, y, gain, None), (x, x, vector)

        def run(h, y, gain, bias, ds, dn):
            return jax.vjp(lambda *given: add_norm(*given, "layer"), h, y, gain, bias)[1]((ds, dn))

        return run, (x, x, vector, vector, x, x)

    name = f"add_norm_{'backward' if backward else 'forward'}"
    return Case(name, f"{N}x{D} bf16", build, 4 * N * D * 2, 0.0, floor)


def _qk_rope_case(B, T, H, K, floor):
    def build(chip, tiles):
        del chip, tiles
        x = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)
        gain, table = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((K,), (T, K)))

        def run(x, gain, cos, sin, dy):
            return jax.vjp(lambda *given: qk_rope(*given, cos, sin), x, gain)[1](dy)

        return run, (x, gain, table, table, x)

    shape, moved = f"{B}x{T}x{H}x{K} bf16", 6 * B * T * H * K + 4 * T * K
    return Case("qk_rope_backward", shape, build, moved, 0.0, floor, op="qk_rope")


def _symmetric_case(X, M, N, floor, adds=False):
    part = "square_sum" if adds else "square"

    def build(chip, tiles):
        del chip
        tile = tiles[part]
        x, c = (jax.ShapeDtypeStruct((X, M, size), jnp.bfloat16) for size in (N, M))
        if not adds:
            return lambda x: symmetric(x, tiles=tile), (x,)
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        run = lambda x, c, a, b: symmetric(x, x, c, (a, b), tiles=tile)
        return run, (x, c, scale, scale)

    size, flops = 2 * X * (M * N + M * M * (1 + adds)), X * M * (M + 128) * N
    name = "symmetric_sum" if adds else "symmetric"
    return Case(name, f"{X}x{M}x{N} bf16", build, size, flops, floor, True, "square", part)


def _head_case(N, D, V, keep, softcap=0.0):
    def build(chip, tiles):
        del chip
        h, w = (jax.ShapeDtypeStruct((rows, D), jnp.bfloat16) for rows in (N, V))
        run = lambda h, w, targets: head_scores(h, w, targets, tiles["head"], softcap, keep)
        return run, (h, w, jax.ShapeDtypeStruct((N,), jnp.int32))

    size = 2 * (N + V) * D + 4 * N * V * keep
    shape = f"{N}x{D}x{V} bf16"
    only = ("triton", "its logits' rows are no multiple of 8 long") if keep and V % 8 else ()
    return Case("head_scores", shape, build, size, 2 * N * D * V, 1, True, "head", "head", *only)


ATTENTION_WORK = {"forward": 1.0, "dkv": 2.0, "dq": 1.5}  # in FLOPs of the forward pass


def _attention_case(name, B, T, H, G, K, documents=True):
    """Triton's with documents, the harder case: more registers than without. Mosaic's do more
    where they mask some steps alone, so that they are compiled without documents too."""

    def build(chip, blocks):
        del chip
        q, k = (jax.ShapeDtypeStruct((B, T, heads, K), jnp.bfloat16) for heads in (H, G))
        docs = jax.ShapeDtypeStruct((B, T), jnp.int32) if documents else None
        run = lambda q, k, v, docs: flash_attention(q, k, v, docs, docs, blocks)
        if name == "forward":
            return run, (q, k, k, docs)

        def backward(q, k, v, do, docs):
            dq, dk, dv = jax.vjp(lambda *x: run(*x, docs), q, k, v)[1](do)
            return dq if name == "dq" else (dk, dv)

        return backward, (q, k, k, q, docs)

    flops = ATTENTION_WORK[name] * 2 * B * H * K * T * (T + 1)
    size = 2 * B * T * K * (2 * H + 2 * G) * (2 if name == "dkv" else 1)
    shape = f"{B}x{T}x{H}:{G}x{K} bf16{' docs' * documents}"
    kernel = f"flash_attention_{name}"
    only = () if documents else ("mosaic", "no documents: Triton's needs less than with them")
    return Case(kernel, shape, build, size, flops, 1, True, "attention", name, *only)


CASES = [
    *(_attention_case(name, 4, 2_048, 16, 4, 128) for name in ATTENTION_WORK),
    *(_attention_case(name, 4, 2_048, 16, 4, 128, documents=False) for name in ATTENTION_WORK),
    *(_attention_case(name, 8, 1_024, 12, 12, 64) for name in ATTENTION_WORK),
    *(_norm_case(False, 8_192, D, floor) for D, floor in ((768, 10), (2_048, 5), (8_192, 1))),
    *(_norm_case(True, 8_192, D, floor) for D, floor in ((768, 8), (2_048, 3), (8_192, 1))),
    _qk_rope_case(4, 2_048, 16, 128, floor=8),
    _qk_rope_case(8, 1_024, 12, 64, floor=8),
    _head_case(1_024, 2_048, 50_304, keep=True),
    _head_case(1_024, 768, 50_257, keep=True),
    _head_case(1_024, 2_048, 50_304, keep=False, softcap=15.0),
    _symmetric_case(26, 2_048, 2_048, floor=2),
    _symmetric_case(12, 768, 3_072, floor=2),
    _symmetric_case(26, 2_048, 2_048, floor=1, adds=True),
]


def faults(case, report, chip, body="triton") -> list[str]:
    """What of a compiled kernel is not as it must be."""
    floor = case.floor if body == "triton" else 1  # Mosaic's have three warp groups: one fits
    resources, found = report.resources, []
    if resources.stack_bytes or resources.spills:
        found.append(
            f"spills: {resources.stack_bytes} bytes of stack, {resources.spills} instructions"
        )
    if report.shared_bytes > chip.shared_bytes_per_block:
        found.append(
            f"{report.shared_bytes} bytes of shared memory, of which a block has "
            f"{chip.shared_bytes_per_block}"
        )
    if case.tensor_core and not resources.tensor_products:
        found.append("no tensor-core instruction")
    if body == "mosaic" and not (resources.instructions["HGMMA"] and resources.tma_copies):
        found.append("no product of warp groups, or no copy by the tensor memory accelerator")
    if report.blocks_per_sm(chip) < floor:
        found.append(f"{report.blocks_per_sm(chip)} blocks a multiprocessor, at least {floor}")
    return found


HEAD = (
    f"{'kernel':23} {'body':6} {'shape':25} {'registers':>9} {'spills':>6} {'shared':>7} "
    f"{'threads':>7} {'blocks/SM':>9} {'tensor':>6} {'async':>5} {'roofline':>11}"
)


def line(case, report, chip, body) -> str:
    found = report.resources
    best = chip.seconds(case.hbm_bytes, case.flops) * 1e6
    return (
        f"{case.name:23} {body:6} {case.shape:25} {found.registers:9} {found.spills:6} "
        f"{report.shared_bytes:7} {report.threads:7} {report.blocks_per_sm(chip):9} "
        f"{found.tensor_products:6} {found.async_copies:5} {best:8.1f} us"
    )


UNCOMPILED = jax.errors.JaxRuntimeError, ValueError  # Mosaic's: more shared memory than there is


def compile_case(case, chip, tiles):
    """Its KernelReport. Raises as compile_for."""
    function, abstract = case.build(chip, tiles)
    return compile_for(chip, function, *abstract)[1][case.name]


def sweep(chip, show=print) -> None:
    """Compiles all tiles of the search space at one shape a kernel; shows those that may run.

    Raises:
        RuntimeError: the compiler for GPUs is not installed.
    """
    show(f"{chip.name}: all tiles that neither spill nor want more shared memory than there is")
    show(HEAD)
    for case in {case.part: case for case in reversed(CASES) if case.part}.values():
        tried = [t for part, t in candidates(case.op, chip.arch) if part == case.part]
        good = 0
        for tiles in tried:
            try:
                report = compile_case(case, chip, tiles)
            except UNCOMPILED:
                continue
            mine = kernel_tiles(tiles, case.part)
            if not faults(case._replace(floor=1), report, chip, body_of(mine)):
                good += 1
                sizes = "x".join(str(size) for size in mine if size != "mosaic")
                show(f"{line(case, report, chip, body_of(mine))}  {sizes}")
        show(f"{case.name}: {good} of {len(tried)} tiles compile without fault")


def audited(chip, cases=CASES) -> list[tuple]:
    """(case, its op's tiles, body) of every body that a case has on a chip."""
    found = []
    for case in cases:
        by_body = {}
        for tiles in default_bodies(case.op, chip.arch):
            body = body_of(kernel_tiles(tiles, case.part)) if case.part else "triton"
            if case.only in ("", body):
                by_body.setdefault(body, tiles)
        found += [(case, tiles, body) for body, tiles in by_body.items()]
    return found


def audit(chip, cases=CASES, show=print) -> list[str]:
    """Compiles every case for a chip and shows a table; the faults found, a sentence each.

    Raises:
        RuntimeError: the compiler for GPUs is not installed.
    """
    show(f"{chip.name}: {chip.kind}, {chip.arch}, compiled by jax {jax.__version__}; no GPU")
    show(HEAD)
    if chip.arch in MOSAIC and not mosaic.USABLE:
        show(f"{mosaic.REASON}; Triton's alone are audited")
    elif chip.arch in MOSAIC:
        for case in cases:
            if case.only:
                show(f"{case.name} {case.shape}: {case.only} alone, {case.why}")
    wrong = []
    for case, tiles, body in audited(chip, cases):
        where = f"{chip.name}: {case.name} ({body}) {case.shape}"
        try:
            report = compile_case(case, chip, tiles)
        except UNCOMPILED as error:
            wrong.append(f"{where}: {str(error).splitlines()[0]}")
            continue
        show(line(case, report, chip, body))
        wrong += [f"{where}: {fault}" for fault in faults(case, report, chip, body)]
    return wrong


def main(argv=None) -> None:
    parser = Parser("python -m pallas_kernels.audit", __doc__)
    parser.add_argument(
        "--chip", action="append", choices=AUDITED, help="may be repeated; default: a40, h100"
    )
    parser.add_argument("--sweep", action="store_true", help="the whole search space: minutes")
    args, wrong = parser.parse_args(argv), []
    try:
        for name in args.chip or ("a40", "h100"):
            wrong += audit(find_chip(name))
            if args.sweep:
                sweep(find_chip(name))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print("\n".join(wrong) if wrong else "audit passed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

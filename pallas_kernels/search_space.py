"""The tiles that `audit --sweep` compiles without a GPU, and those that bench --tune tries.

Time on a GPU is scarce, so bench tries a short list: at most eight tiles an op, which differ in
what changes the speed. They compiled without spills (2026-11-26, jax 0.11.2); of the variants of
attention's Mosaic bodies, only those that docs/speed_log.md names were compiled. A forward in four
groups of warps spills with heads of 128, so it is tried only with heads of 64. A test compiles only
the first tiles of attention on an A40, since all take minutes.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from pallas_kernels import mosaic
from pallas_kernels.tiles import (
    GELU_TILES,
    MOSAIC,
    AmpereAttentionTiles,
    AmpereProductTiles,
    AttentionTiles,
    BlockTiles,
    DqProductTiles,
    FlashAttentionTiles,
    KernelTiles,
    MosaicAttentionTiles,
    MosaicProductTiles,
    OpTiles,
    ProductTiles,
    body_of,
    default_tiles,
    has_mask_registers,
    is_triton,
    kernel_tiles,
    mosaic_tiles,
    replace_tiles,
)


def _attention(kernel):
    del kernel
    sizes = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    return itertools.starmap(AttentionTiles, sizes)


def _mosaic_attention(kernel):
    """Yields tiles whose accumulators fit in the registers of a multiplying warp group."""
    queries, keys = {
        "forward": ((128, 256), (64, 128)),
        "dkv": ((64,), (128,)),
        "dq": ((128,), (64, 128)),
    }[kernel]
    yield from itertools.starmap(MosaicAttentionTiles, itertools.product(queries, keys, (2, 3, 4)))


def _ampere_attention(kernel):
    if kernel == "forward":
        sizes = itertools.product((64, 128), (32, 64, 128), (2, 3, 4))
        yield from itertools.starmap(AmpereAttentionTiles, sizes)


def _products(kernel):
    square = kernel.startswith("square")  # its tiles must be square
    for rows, columns, depth, warps, stages in itertools.product(
        (64, 128), (64, 128) if square else (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)
    ):
        if rows == columns or not square:
            yield ProductTiles(rows, columns, depth, warps, stages)


def _mosaic_products(kernel):
    """Yields tiles whose float32 accumulators take at most 128 registers per thread."""
    square = kernel.startswith("square")
    for rows, columns, depth, stages in itertools.product(
        (128, 256), (64, 128, 256), (64, 128), (2, 3, 4, 5, 6)
    ):
        allowed = columns in (rows // 2, rows) or not square
        if allowed and rows // 2 * columns <= 128 * 128:
            yield MosaicProductTiles(rows, columns, depth, stages)


def _ampere_products(kernel):
    """Yields tiles whose float32 accumulators take at most 128 registers per thread."""
    del kernel
    sizes = itertools.product((64, 128), (32, 64), (2, 3, 4))
    yield from itertools.starmap(AmpereProductTiles, sizes)


def _blocks(kernel):
    """Yields blocks of 8 to 32 numbers a thread; only the forward has a program for each block."""
    programs = (128, 512) if kernel == "gelu_backward" else (0, 512)
    sizes = itertools.product((2, 4, 8, 16), (512, 1_024), (4, 8, 16), programs)
    for rows, columns, warps, programs in sizes:
        if 8 <= rows * columns // (32 * warps) <= 32:
            yield BlockTiles(rows, columns, warps, programs)


def _parts_of_rows(kernel):
    """Yields tiles of the norm's kernels for D=768, of one row or two for each of a row's warps."""
    for columns, warps, more in itertools.product((256, 512, 1_024), (4, 8), (1, 2)):
        rows = 256 * warps * more // columns
        programs = 528 if kernel == "norm_backward" else 0
        yield BlockTiles(rows, columns, warps, programs)


# op -> ({body: function of a kernel's name that yields its tiles}, names of its kernels). The tiles
# of qk_rope follow from K, so there is nothing to search.
SPACES: dict[str, tuple[dict, tuple[str, ...]]] = {
    "attention": (
        {"triton": _attention, "mosaic": _mosaic_attention, "ampere": _ampere_attention},
        FlashAttentionTiles._fields,
    ),
    "norm": ({"triton": _parts_of_rows}, ("norm", "norm_backward")),
    "qk_rope": ({}, ()),
    "gelu": ({"triton": _blocks}, tuple(GELU_TILES)),
    "head": ({"triton": _products, "mosaic": _mosaic_products}, ("head",)),
    "square": (
        {"triton": _products, "mosaic": _mosaic_products, "ampere": _ampere_products},
        ("square", "square_sum"),
    ),
}


def default_bodies(op: str, arch: str, shape: tuple[float, ...] = ()) -> list[Any]:
    """Returns the op's default tiles for each body that this JAX can compile for this GPU.

    The arguments are those of default_tiles.
    """
    usable = mosaic.USABLE and op in MOSAIC.get(arch, {})
    return [default_tiles(op, arch, shape)] + ([mosaic_tiles(op, arch)] if usable else [])


def _bodies(op, arch, kernel):
    """Returns the bodies of one kernel that this JAX can compile for this GPU."""
    return {body_of(kernel_tiles(tiles, kernel)) for tiles in default_bodies(op, arch)}


def candidates(op: str, arch: str) -> Iterator[tuple[str, OpTiles]]:
    """Yields (kernel, the op's default tiles with that kernel's replaced) for each candidate.

    Kernels are searched one at a time, since trying all combinations would take too long.
    """
    spaces, kernels = SPACES[op]
    for body, space in spaces.items():
        for kernel in kernels:
            if body not in _bodies(op, arch, kernel):
                continue
            for tiles in space(kernel):
                yield kernel, replace_tiles(default_tiles(op, arch), kernel, tiles)


# The first of each kernel are its defaults; the others load less or more before they compute.
GELU_SHORTLIST: dict[str, tuple[KernelTiles, ...]] = {
    "gelu": (
        GELU_TILES["gelu"],
        BlockTiles(8, 1_024, 8),
        BlockTiles(4, 1_024, 8),
        BlockTiles(8, 1_024, 8, 512),
    ),
    "gelu_backward": (
        GELU_TILES["gelu_backward"],
        BlockTiles(2, 1_024, 4, 256),
        BlockTiles(8, 1_024, 16, 64),
        BlockTiles(4, 1_024, 8, 128),
    ),
}

# arch -> op -> kernel -> tiles that bench --tune tries, the most promising first. "attention_64" is
# for heads of up to 64, as in TILES; an H100's forwards there are in the order of their times on an
# H200 (docs/h200_kernels.json).
SHORTLIST: dict[str, dict[str, dict[str, tuple[KernelTiles, ...]]]] = {
    "sm_86": {
        "attention": {
            "forward": (AttentionTiles(128, 64, 8, 3), AttentionTiles(64, 64, 4, 2)),
            "dkv": (AttentionTiles(32, 64, 4, 2), AttentionTiles(64, 64, 8, 2)),
            "dq": (
                DqProductTiles(64, 64, 4, 3),
                AttentionTiles(64, 32, 4, 2),
                AttentionTiles(128, 32, 8, 2),
            ),
        },
        "head": {
            "head": (
                ProductTiles(128, 128, 32, 8, 3),
                ProductTiles(128, 128, 32, 4, 4),
                ProductTiles(128, 64, 32, 4, 4),
                ProductTiles(64, 128, 64, 4, 3),
                ProductTiles(64, 256, 32, 4, 3),
            )
        },
        "square": {
            "square": (
                ProductTiles(128, 128, 32, 8, 3),
                ProductTiles(128, 128, 32, 4, 4),
                ProductTiles(64, 64, 64, 4, 3),
                AmpereProductTiles(64, 32, 4),
            ),
            "square_sum": (
                ProductTiles(128, 128, 32, 8, 4),
                ProductTiles(64, 64, 64, 4, 3),
                AmpereProductTiles(128, 32, 3),
                AmpereProductTiles(64, 32, 4),
            ),
        },
        "gelu": GELU_SHORTLIST,
    },
    "sm_90": {
        "attention": {
            "forward": (
                MosaicAttentionTiles(128, 128, 2, variant="folded"),
                MosaicAttentionTiles(192, 64, 3, variant="folded", groups=3),
                MosaicAttentionTiles(128, 64, 4),
            ),
            "dkv": (MosaicAttentionTiles(64, 128, 3, variant="turns"),),
            "dq": (
                MosaicAttentionTiles(256, 64, 3, variant="stored"),
                MosaicAttentionTiles(128, 64, 3, variant="turns"),
            ),
        },
        "attention_64": {
            "forward": (
                MosaicAttentionTiles(256, 64, 4, variant="folded", groups=4),
                MosaicAttentionTiles(128, 128, 2, variant="folded"),
                MosaicAttentionTiles(192, 64, 3, variant="folded", groups=3),
                MosaicAttentionTiles(128, 64, 4),
            ),
            "dkv": (MosaicAttentionTiles(64, 128, 3, variant="turns"),),
            "dq": (
                MosaicAttentionTiles(256, 64, 3, variant="stored"),
                MosaicAttentionTiles(128, 64, 3, variant="turns"),
                AttentionTiles(64, 64, 8, 2),  # two blocks a multiprocessor, jax 0.10.2
            ),
        },
        "head": {
            "head": (
                MosaicProductTiles(128, 256, 64, 3),
                MosaicProductTiles(128, 128, 64, 6),
                MosaicProductTiles(128, 256, 128, 2),
                ProductTiles(128, 128, 64, 4, 3),
            )
        },
        "square": {
            "square": (
                MosaicProductTiles(128, 128, 64, 5),
                MosaicProductTiles(128, 128, 128, 3),
                ProductTiles(128, 128, 64, 4, 3),
            ),
            "square_sum": (
                MosaicProductTiles(256, 128, 64, 2),
                MosaicProductTiles(128, 128, 64, 4),
                MosaicProductTiles(128, 128, 128, 2),
            ),
        },
        "gelu": GELU_SHORTLIST,
    },
}


def shortlist(
    op: str, arch: str, shape: tuple[float, ...] = (), masked: bool = False
) -> Iterator[tuple[str, KernelTiles]]:
    """Yields (kernel, tiles) that bench --tune tries: first each kernel's most promising tiles.

    Args:
        op, arch, shape: as in default_tiles.
        masked: whether attention masks documents or a window, to leave out tiles that spill
            registers there.
    """
    table = SHORTLIST[arch]
    narrow = op == "attention" and shape and shape[-1] <= 64
    kernels = table.get("attention_64" if narrow else op, table.get(op, {}))
    for turn in itertools.zip_longest(*kernels.values()):
        for kernel, tiles in zip(kernels, turn, strict=True):
            if tiles is None or not (mosaic.USABLE or is_triton(tiles)):
                continue
            if not masked or has_mask_registers(kernel, tiles, int(shape[-1])):
                yield kernel, tiles

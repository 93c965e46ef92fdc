"""Types of tile sizes, and each kernel's defaults by compute capability.

The defaults were chosen without a GPU, from the tiles that do not spill registers in
`python -m pallas_kernels.audit --sweep`. Where `python -m pallas_kernels.bench --tune --save` has
measured better ones on a chip, kernel_choice.py uses those. This file does not import Pallas,
which would add 0.1 s to every start.
"""

from typing import Any, NamedTuple

from pallas_kernels.block_tiles import GELU_TILES, BlockTiles, norm_tiles


class AttentionTiles(NamedTuple):
    """Tile sizes of one of attention's Triton kernels."""

    queries: int  # per block
    keys: int  # per block
    warps: int  # per program
    stages: int  # loads in flight in the software pipeline


class DqProductTiles(NamedTuple):
    """Tile sizes of attention's Triton kernel for dq that multiplies a stored gradient.

    The kernel for dk and dv then stores the scores' gradient, so the backward makes five products
    instead of seven, for 2*B*H*S*T bytes of memory in 16 bits. It must be Triton's.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    body: str = "dq_product"


class ProductTiles(NamedTuple):
    """Tile sizes of a matrix product's Triton kernel."""

    rows: int  # per tile of the result
    columns: int
    depth: int  # columns of both operands that one iteration multiplies
    warps: int
    stages: int
    group: int = 8  # row blocks that walk the columns together, sharing them in cache


class MosaicProductTiles(NamedTuple):
    """Tile sizes of a matrix product's Mosaic GPU kernel."""

    rows: int  # per tile of the result
    columns: int
    depth: int  # columns of both operands that one iteration multiplies
    stages: int  # slices in flight
    group: int = 8
    body: str = "mosaic"  # marks the type where tiles are stored as JSON lists
    cluster: int = 1  # programs with other rows that share the copies of the columns' operand


class MosaicAttentionTiles(NamedTuple):
    """Tile sizes of one of attention's Mosaic GPU kernels."""

    queries: int
    keys: int
    stages: int  # blocks in flight
    body: str = "mosaic"
    variant: str = ""  # one of the kernel's MOSAIC_VARIANTS
    groups: int = 2  # warp groups that multiply, each for a part of the queries; dkv and dq have 2


class AmpereProductTiles(NamedTuple):
    """Tile sizes of a matrix product's Mosaic GPU kernel for Ampere and Ada."""

    size: int  # rows and columns per tile of the result
    depth: int  # columns of both operands that one iteration multiplies
    stages: int  # slices in shared memory
    body: str = "ampere"

    @property
    def rows(self) -> int:
        return self.size

    @property
    def columns(self) -> int:
        return self.size


class AmpereAttentionTiles(NamedTuple):
    """Tile sizes of attention's forward Mosaic GPU kernel for Ampere and Ada."""

    queries: int
    keys: int
    stages: int  # blocks of keys or of values in shared memory
    body: str = "ampere"


ATTENTION_KINDS = AttentionTiles, MosaicAttentionTiles, AmpereAttentionTiles, DqProductTiles
PRODUCT_KINDS = ProductTiles, MosaicProductTiles, AmpereProductTiles
KernelTiles = (
    AttentionTiles
    | MosaicAttentionTiles
    | AmpereAttentionTiles
    | DqProductTiles
    | ProductTiles
    | MosaicProductTiles
    | AmpereProductTiles
    | BlockTiles
)


class FlashAttentionTiles(NamedTuple):
    """Tile sizes of attention's three kernels; the type of each selects the kernel's body."""

    forward: AttentionTiles | MosaicAttentionTiles | AmpereAttentionTiles
    dkv: AttentionTiles | MosaicAttentionTiles
    dq: AttentionTiles | MosaicAttentionTiles | DqProductTiles


# The tiles of all kernels of one op. Values are KernelTiles: Any, because each caller knows which.
OpTiles = FlashAttentionTiles | dict[str, Any]

# "attention" is for heads of more than 64. On sm_86, which has little shared memory,
# FlashAttention-2's backward of such heads uses tiles of 64x64 and 8 warps too.
TILES: dict[str, dict[str, Any]] = {
    "sm_86": {
        "attention": FlashAttentionTiles(
            AttentionTiles(128, 64, 8, 2),
            AttentionTiles(64, 64, 8, 2),
            AttentionTiles(128, 32, 8, 2),
        ),
        "attention_64": FlashAttentionTiles(
            AttentionTiles(128, 64, 8, 2),
            AttentionTiles(32, 64, 4, 2),
            AttentionTiles(64, 64, 4, 2),
        ),
        "head": ProductTiles(128, 128, 32, 4, 3),
        "square": ProductTiles(128, 128, 32, 4, 3),
        "square_sum": ProductTiles(128, 128, 32, 8, 3),
        **GELU_TILES,
    },
    "sm_90": {
        "attention": FlashAttentionTiles(
            AttentionTiles(128, 128, 8, 2),
            AttentionTiles(64, 64, 8, 2),
            AttentionTiles(128, 64, 8, 2),
        ),
        "head": ProductTiles(128, 128, 64, 8, 3),
        "square": ProductTiles(128, 128, 64, 8, 3),
        "square_sum": ProductTiles(128, 128, 64, 8, 3),
        **GELU_TILES,
    },
}

# What Mosaic's bodies take; the ops whose Mosaic body runs first where no measurement decides
MOSAIC_TYPES, MOSAIC_HEADS = ("bfloat16", "float16"), (64, 128)
MOSAIC_FIRST = {"sm_90": ("attention", "head", "square")}

# kernel of attention -> what its Mosaic body may do otherwise than the one that "" selects:
# folded: the scores' scale and maximum are one FMA, and a group stops at its own last key;
# turns: the groups issue the products of scores in turns, as the forward's do;
# stored: reads the scores' gradients, which dkv then stores (flash_attention_mosaic_stored.py).
MOSAIC_VARIANTS = {"forward": ("", "folded"), "dkv": ("", "turns"), "dq": ("", "turns", "stored")}

# arch -> op -> kernel -> tiles of its Mosaic body, with as many stages as fit in shared memory. On
# sm_86 two programs fit on a multiprocessor.
MOSAIC: dict[str, dict[str, dict[str, KernelTiles]]] = {
    "sm_86": {
        "attention": {"forward": AmpereAttentionTiles(64, 64, 3)},
        "square": {
            "square": AmpereProductTiles(128, 32, 3),
            "square_sum": AmpereProductTiles(128, 32, 3),
        },
    },
    "sm_90": {
        "attention": {
            "forward": MosaicAttentionTiles(128, 128, 2),
            "dkv": MosaicAttentionTiles(64, 128, 3),
            "dq": MosaicAttentionTiles(128, 64, 3),
        },
        "head": {"head": MosaicProductTiles(128, 256, 64, 4)},
        "square": {
            "square": MosaicProductTiles(256, 128, 64, 3),
            "square_sum": MosaicProductTiles(256, 128, 64, 3),
        },
    },
}


def kinds_of(op: str) -> tuple[type, ...]:
    """Returns the types that the tiles of an op's kernels may have."""
    if op in ("norm", "gelu"):
        return (BlockTiles,)
    return ATTENTION_KINDS if op == "attention" else PRODUCT_KINDS


def body_of(tiles: KernelTiles | None) -> str:
    """Returns the body that these tiles select: "triton", "mosaic", "ampere" or "dq_product"."""
    return getattr(tiles, "body", "triton")


def is_triton(tiles: KernelTiles | None) -> bool:
    """Returns whether the kernel that these tiles select is compiled by Pallas' Triton backend."""
    return body_of(tiles) in ("triton", "dq_product")


def describe_tiles(tiles: KernelTiles) -> str:
    """Returns the sizes, such as "128x64x2", and what a Mosaic body does otherwise."""
    fields = tiles._asdict()
    variant, groups = fields.pop("variant", ""), fields.pop("groups", 2)
    text = "x".join(str(size) for field, size in fields.items() if field != "body")
    return " ".join([text, *filter(None, [variant, f"{groups} groups" * (groups != 2)])])


def kernel_tiles(tiles: OpTiles, kernel: str) -> Any:
    """Returns the tiles of one kernel of an op."""
    return tiles[kernel] if isinstance(tiles, dict) else getattr(tiles, kernel)


def replace_tiles(tiles: OpTiles, kernel: str, value: KernelTiles) -> OpTiles:
    """Returns an op's tiles with those of one kernel replaced."""
    if isinstance(tiles, dict):
        return tiles | {kernel: value}
    return tiles._replace(**{kernel: value})


def has_mask_registers(kernel: str, tiles: KernelTiles, K: int) -> bool:
    """Returns whether a kernel of attention masks documents and windows without spilling registers.

    With K=64 the forward with four groups, whose threads have 112 registers, spills 104 bytes with
    documents, 32 with a window and 136 with both. With K=128 and documents, the forward's "folded"
    spills 8 bytes and dkv's "turns" 72 (compiled by jax 0.11.2, 2026-11-27).

    Args:
        K: the width of attention's heads.
    """
    if K > 64:
        return (kernel, getattr(tiles, "variant", "")) not in (
            ("forward", "folded"),
            ("dkv", "turns"),
        )
    return getattr(tiles, "groups", 2) <= 3


def default_tiles(op: str, arch: str, shape: tuple[float, ...] = ()) -> Any:
    """Returns the default tiles of an op's Triton kernels; None for an op without tiles.

    Args:
        shape: the op's sizes, as in kernel_choice.BenchRow. Attention's tiles depend on the width
            of its heads, and the norm's on D; by default heads are wide and D is 768.

    Raises:
        ValueError: there are no tiles for this architecture.
    """
    if arch not in TILES:
        raise ValueError(f"a GPU's architecture must be one of {', '.join(TILES)}; got {arch!r}.")
    table = TILES[arch]
    if op == "attention":
        return table.get("attention_64" if shape and shape[-1] <= 64 else op, table[op])
    if op == "norm":
        return norm_tiles(int(shape[-1]) if shape else 768, arch)
    return {name: tiles for name, tiles in table.items() if name.startswith(op)} or None


def mosaic_tiles(op: str, arch: str) -> OpTiles:
    """Returns an op's default tiles, using Mosaic bodies where the kernels have them."""
    tiles = default_tiles(op, arch)
    for kernel, value in MOSAIC.get(arch, {}).get(op, {}).items():
        tiles = replace_tiles(tiles, kernel, value)
    return tiles

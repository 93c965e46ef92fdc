"""Checks the arguments of attention, and chooses its tiles where none are given."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.backend import get_default_device

from pallas_kernels.devices import chip_name, gpu_architecture
from pallas_kernels.kernel_call import needs_gpu
from pallas_kernels.kernel_choice import choose_body
from pallas_kernels.tiles import (
    MOSAIC_VARIANTS,
    TILES,
    AmpereAttentionTiles,
    AttentionTiles,
    DqProductTiles,
    FlashAttentionTiles,
    MosaicAttentionTiles,
    body_of,
    default_tiles,
)
from pallas_kernels.validation import (
    PRODUCT_TYPES,
    SMALLEST_TILE,
    Sizes,
    check_slots,
    check_tiles,
    describe,
    explain_traced,
    is_power_of_two,
)


def check_documents(docs_BT: Any, docs_BS: Any) -> None:
    """Raises ValueError if only the queries or only the keys have documents."""
    if (docs_BT is None) != (docs_BS is None):
        got = ", ".join(
            f"{name}={x if x is None else describe(x)}"
            for name, x in (("docs_BT", docs_BT), ("docs_BS", docs_BS))
        )
        raise ValueError(f"docs_BT and docs_BS must both be arrays or both be None; got {got}.")


def check_positions(T: int, S: int) -> None:
    """Raises ValueError if attention has more queries than keys, as with [batch,heads,time,width].

    The queries are the last of the keys' positions, so the first ones would see no key.
    """
    if T > S:
        raise ValueError(
            "q_BTHK must not have more positions than k_BSGK, because the queries are at the last "
            f"of the keys' positions; got T={T}, S={S}. Arrays are [batch, time, heads, width]."
        )


def check_attention(
    q_BTHK: Any,
    k_BSGK: Any,
    v_BSGK: Any,
    docs_BT: Any,
    docs_BS: Any,
    interpret: bool,
    window: Any,
) -> None:
    """Raises ValueError if flash_attention does not support these arguments."""
    if not isinstance(interpret, bool):
        hint = explain_traced(interpret, "interpret")
        raise ValueError(f"interpret must be True or False; got {interpret!r}.{hint}")
    sizes = Sizes()
    sizes.check("q_BTHK", q_BTHK, "BTHK", PRODUCT_TYPES)
    sizes.check("k_BSGK", k_BSGK, "BSGK", [q_BTHK.dtype])
    sizes.check("v_BSGK", v_BSGK, "BSGK", [q_BTHK.dtype])
    H, G, K = (sizes[letter] for letter in "HGK")
    if H % G:
        raise ValueError(
            f"the heads H of q_BTHK must be a multiple of the heads G of k_BSGK; got H={H}, G={G}."
        )
    narrowest = 1 if interpret else SMALLEST_TILE
    if K < narrowest or not is_power_of_two(K):
        raise ValueError(
            f"the head width K of q_BTHK must be a power of two of at least {narrowest}; got K={K}."
        )
    check_positions(sizes["T"], sizes["S"])
    check_documents(docs_BT, docs_BS)
    if docs_BT is not None:
        sizes.check("docs_BT", docs_BT, "BT", [jnp.int32])
        sizes.check("docs_BS", docs_BS, "BS", [jnp.int32])
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(
            "window must be the number of keys that a query sees, at least 1, or None for all; got "
            f"{window!r}. Set window=None for all (--model.window=0)."
            f"{explain_traced(window, 'window')}"
        )


def check_attention_tiles(blocks: Any) -> None:
    """Raises ValueError if attention's kernels do not support these tiles."""
    if not isinstance(blocks, FlashAttentionTiles):
        raise ValueError(
            "blocks must be FlashAttentionTiles, or None for those that suit the device; got "
            f"{blocks!r}."
        )
    for kernel, tiles in blocks._asdict().items():
        queries, keys = (64, 128) if kernel == "dkv" else (64 * getattr(tiles, "groups", 2), 64)
        kinds = AttentionTiles, MosaicAttentionTiles
        if kernel == "dq":
            kinds += (DqProductTiles,)
        if kernel == "forward":  # the only one that has a body for Ampere
            kinds += (AmpereAttentionTiles,)
            queries, keys = (64, 16) if body_of(tiles) == "ampere" else (queries, keys)
        check_tiles(f"blocks.{kernel}", tiles, kinds, {"queries": queries, "keys": keys})
        check_slots(f"blocks.{kernel}", tiles)
        variant, known = getattr(tiles, "variant", ""), MOSAIC_VARIANTS[kernel]
        if variant not in known:
            raise ValueError(f"blocks.{kernel}.variant must be in {known}; got {variant!r}.")
        groups = getattr(tiles, "groups", 2)
        if groups not in ((2, 3, 4) if variant == "folded" else (2,)):
            raise ValueError(
                f"blocks.{kernel}.groups must be 2, or 3 or 4 with the variant 'folded'; got "
                f"{groups}."
            )
    if getattr(blocks.dq, "variant", "") == "stored":
        if not isinstance(blocks.dkv, MosaicAttentionTiles):
            raise ValueError(
                "blocks.dkv must be MosaicAttentionTiles where blocks.dq.variant is 'stored'; got "
                f"{blocks.dkv!r}."
            )
        group = blocks.dq.queries // 2  # dkv stores what a warp group of dq reads
        if group % blocks.dkv.queries:
            raise ValueError(
                f"half of blocks.dq.queries={blocks.dq.queries} must be a multiple of "
                f"blocks.dkv.queries; got {blocks.dkv.queries}."
            )
    if isinstance(blocks.dq, DqProductTiles) and not isinstance(blocks.dkv, AttentionTiles):
        raise ValueError(
            "blocks.dkv must be AttentionTiles where blocks.dq are DqProductTiles, which multiply "
            f"what Triton's kernel stores; got blocks.dkv={blocks.dkv!r}."
        )


def tiles_for_device(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    documents: bool,
    interpret: bool,
    window: int | None,
    device: Any = None,
) -> FlashAttentionTiles:
    """Returns the tiles with which the trainer runs attention of these arrays on a device.

    Args:
        device: a jax.Device; None: the default one.

    Raises:
        ValueError: the device is not a GPU that the kernels are compiled for.
    """
    if interpret:
        return default_tiles("attention", "sm_86")
    device = device or get_default_device()
    arch = gpu_architecture(device)
    if arch not in TILES:
        wanted = f"a GPU of {' or '.join(TILES)}"
        raise needs_gpu("flash_attention", device.device_kind, wanted)
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    # Mosaic's bodies take lengths of up to 8 or a multiple of 8, and choose_body knows only one.
    length = next((n for n in (T, S) if n > 8 and n % 8), S)
    choice = choose_body(
        "attention",
        arch,
        chip_name(device),
        str(q_BTHK.dtype),
        (B, length, H, G, K),
        documents=documents,
        window=window or 0,
    )
    assert isinstance(choice.tiles, FlashAttentionTiles)  # attention's tiles always are
    return choice.tiles

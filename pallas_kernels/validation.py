"""Checks the arguments of the kernels.

On a GPU a kernel reads and writes without bounds checks, so wrong sizes would corrupt memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.tiles import (
    GELU_TILES,
    AmpereProductTiles,
    BlockTiles,
    MosaicProductTiles,
    ProductTiles,
    body_of,
    is_triton,
)

PRODUCT_TYPES = ("bfloat16", "float16", "float32")  # of the operands of the tensor cores
FORMS = ("rms", "layer")  # of add_norm
KEPT = ("", "logits", "exponentials")  # what head_scores keeps for a gradient
SMALLEST_TILE = 16  # rows, columns and depth of the smallest product of a tensor core


def describe(x: Any) -> str:
    """Returns an array's dtype and shape, or the type and value of anything else."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        return f"{type(x).__name__} {x!r}"
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def explain_traced(x: Any, name: str) -> str:
    """Returns what to do if jax.jit has traced an argument that is no array; "" if it has not."""
    if not isinstance(x, Tracer):
        return ""
    return (
        f" jax.jit has traced it: bind {name} before with functools.partial, or name it in "
        "static_argnames."
    )


class Sizes(dict):
    """The size of each letter, taken from the first array that has it."""

    def check(self, name: str, x: Any, dims: Sequence[str | int], dtypes: Sequence[Any]) -> None:
        """Raises ValueError unless x has these dims, without one of size 0, and one of the dtypes.

        Args:
            dims: a letter or a size for each dim.
        """
        is_array = isinstance(x, (jax.Array, np.ndarray))
        wanted = [self.get(dim, dim) for dim in dims]
        good = is_array and x.ndim == len(wanted) and x.dtype in [jnp.dtype(t) for t in dtypes]
        if good:
            good = all(
                size > 0 and (isinstance(want, str) or size == want)
                for size, want in zip(x.shape, wanted, strict=True)
            )
        if not good:
            types = " or ".join(str(jnp.dtype(t)) for t in dtypes)
            raise ValueError(
                f"{name} must be {types} [{', '.join(map(str, wanted))}] without an empty dimension"
                f"; got {describe(x)}."
            )
        self.update((d, n) for d, n in zip(dims, x.shape, strict=True) if isinstance(d, str))


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def check_tiles(name: str, tiles: Any, kinds: Any, multiples: dict[str, int]) -> None:
    """Raises ValueError unless the tiles have one of the types, and sizes that its body supports.

    Args:
        multiples: {dimension of a block: the number that it must be a multiple of in Mosaic}.
    """
    if not isinstance(tiles, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {names}; got {tiles!r}.")
    sizes = {k: size for k, size in tiles._asdict().items() if k not in ("body", "variant")}
    for field, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            argument = name.partition(".")[0]
            got = f"{size!r}.{explain_traced(size, argument)}"
            raise ValueError(f"{name}.{field} must be a positive integer; got {got}")
        if not is_triton(tiles):
            multiple = multiples.get(field, 1)
            if size % multiple:
                raise ValueError(f"{name}.{field} must be a multiple of {multiple}; got {size}.")
        elif field in multiples and (size < SMALLEST_TILE or not is_power_of_two(size)):
            raise ValueError(
                f"{name}.{field} must be a power of two of at least {SMALLEST_TILE}; got {size}."
            )
        elif field == "warps" and not (is_power_of_two(size) and size <= 32):
            raise ValueError(f"{name}.warps must be a power of two of at most 32; got {size}.")


def check_slots(name: str, tiles: Any) -> None:
    """Raises ValueError unless a body for Ampere can fill one slot while it reads another."""
    if body_of(tiles) == "ampere" and tiles.stages < 2:
        raise ValueError(f"{name}.stages must be at least 2; got {tiles.stages}.")


def _check_product_tiles(tiles, *other_kinds):
    multiples = {"rows": 128, "columns": 32, "depth": 16, "size": 64}
    check_tiles("tiles", tiles, (ProductTiles, MosaicProductTiles, *other_kinds), multiples)


def check_head_scores(
    h_ND: Any, w_VD: Any, reference_N: Any, tiles: Any, softcap: float, keep: str
) -> None:
    """Raises ValueError if head_scores does not support these arguments."""
    sizes = Sizes()
    sizes.check("h_ND", h_ND, "ND", PRODUCT_TYPES)
    sizes.check("w_VD", w_VD, "VD", [h_ND.dtype])
    sizes.check("reference_N", reference_N, "N", [jnp.float32])
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be 0 (none) or a positive number; got {softcap}.")
    if keep not in KEPT:
        raise ValueError(f"keep must be in {KEPT}; got {keep!r}.")
    if keep == "exponentials" and h_ND.dtype == jnp.float16:
        raise ValueError(
            "keep must be 'logits' or '' with float16, which has too few exponents for "
            f"exponentials; got {keep!r}."
        )
    _check_product_tiles(tiles)
    # The body for Hopper stores what is kept in strips of up to 64 columns.
    if body_of(tiles) == "mosaic" and tiles.columns < 64:
        raise ValueError(
            f"tiles.columns must be at least 64 for the Mosaic body; got {tiles.columns}."
        )
    if body_of(tiles) == "mosaic" and tiles.cluster > 2:
        raise ValueError(f"tiles.cluster must be 1 or 2; got {tiles.cluster}.")


def check_symmetric(x_XMN: Any, y_XMN: Any, c_XMM: Any, scales: Sequence[Any], tiles: Any) -> None:
    """Raises ValueError if symmetric does not support these arguments; y and c may be None."""
    sizes = Sizes()
    sizes.check("x_XMN", x_XMN, "XMN", PRODUCT_TYPES)
    if y_XMN is not None:
        sizes.check("y_XMN", y_XMN, "XMN", [x_XMN.dtype])
    if c_XMM is not None:
        sizes.check("c_XMM", c_XMM, "XMM", [x_XMN.dtype])
    shapes = [jnp.shape(x) for x in scales]
    if shapes != [(), ()]:
        raise ValueError(
            f"scales must be two scalars, the factors of the product and of c; got shapes {shapes}."
        )
    _check_product_tiles(tiles, AmpereProductTiles)
    if body_of(tiles) == "mosaic" and tiles.cluster != 1:
        raise ValueError(f"tiles.cluster must be 1 for a symmetric product; got {tiles.cluster}.")
    if isinstance(tiles, AmpereProductTiles):
        if tiles.depth not in (32, 64):
            raise ValueError(f"tiles.depth must be 32 or 64; got {tiles.depth}.")
        check_slots("tiles", tiles)
    if isinstance(tiles, ProductTiles) and tiles.columns != tiles.rows:
        raise ValueError(f"tiles.columns must equal tiles.rows={tiles.rows}; got {tiles.columns}.")
    if isinstance(tiles, MosaicProductTiles) and tiles.columns not in (tiles.rows // 2, tiles.rows):
        raise ValueError(
            f"tiles.columns must equal tiles.rows={tiles.rows} or half of it; got {tiles.columns}."
        )


def _check_floating(name, x):
    """Raises ValueError unless x is an array of a floating type with at least one dim."""
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be an array of a floating type; got {describe(x)}.")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension; got {describe(x)}.")


def _check_readable(name, x):
    """Raises ValueError unless a kernel with BlockTiles can read an array."""
    _check_floating(name, x)
    if jnp.dtype(x.dtype).itemsize > 4:
        raise ValueError(f"{name} must have at most 32 bits; got {describe(x)}.")
    if x.size >= 2**31:  # the kernels count elements in int32
        raise ValueError(f"{name} must have fewer than 2**31 elements; got {describe(x)}.")


def _check_eps(eps):
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be 0 or a positive number; got {eps}.")


def check_add_norm(
    h_XD: Any,
    y_XD: Any,
    gain_D: Any,
    bias_D: Any,
    form: str,
    eps: float,
    y_bias_D: Any,
    tiles: Any,
) -> None:
    """Raises ValueError if add_norm does not support these arguments; y and biases may be None."""
    _check_readable("h_XD", h_XD)
    check = Sizes().check
    check("h_XD", h_XD, h_XD.shape, [h_XD.dtype])
    if y_XD is not None:
        check("y_XD", y_XD, h_XD.shape, [h_XD.dtype])
    check("gain_D", gain_D, h_XD.shape[-1:], [jnp.float32])
    for name, x_D in (("bias_D", bias_D), ("y_bias_D", y_bias_D)):
        if x_D is not None:
            check(name, x_D, h_XD.shape[-1:], [jnp.float32])
    if y_XD is None and y_bias_D is not None:
        raise ValueError(f"y_bias_D must be None without y_XD; got {describe(y_bias_D)}.")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.")
    _check_eps(eps)
    _check_blocks(tiles, ("norm", "norm_backward"))


def check_qk_rope(x_BTHK: Any, gain_K: Any, cos_TK: Any, sin_TK: Any, eps: float) -> None:
    """Raises ValueError if qk_rope does not support these arguments."""
    _check_floating("x_BTHK", x_BTHK)
    sizes = Sizes()
    sizes.check("x_BTHK", x_BTHK, "BTHK", [x_BTHK.dtype])
    if sizes["K"] % 2:
        raise ValueError(f"the head width K of x_BTHK must be even; got K={sizes['K']}.")
    sizes.check("gain_K", gain_K, "K", [jnp.float32])
    sizes.check("cos_TK", cos_TK, "TK", [jnp.float32])
    sizes.check("sin_TK", sin_TK, "TK", [jnp.float32])
    _check_eps(eps)


def check_gelu(x_XF: Any, bias_F: Any, tiles: Any) -> None:
    """Raises ValueError if gelu does not support these arguments; the bias may be None."""
    _check_readable("x_XF", x_XF)
    check = Sizes().check
    check("x_XF", x_XF, x_XF.shape, [x_XF.dtype])
    if bias_F is not None:
        check("bias_F", bias_F, x_XF.shape[-1:], [jnp.float32])
    _check_blocks(tiles, GELU_TILES)


def _check_blocks(tiles, kernels):
    """Raises ValueError unless `tiles` has BlockTiles for each of these kernels, and no others."""
    if not isinstance(tiles, dict) or tiles.keys() != {*kernels}:
        raise ValueError(f"tiles must have the keys {', '.join(kernels)}; got {tiles!r}.")
    for kernel, value in tiles.items():
        _check_block(f"tiles[{kernel!r}]", value)


def _check_block(name, tiles):
    """Raises ValueError unless Triton can compile a kernel with these BlockTiles."""
    if not isinstance(tiles, BlockTiles):
        raise ValueError(f"{name} must be BlockTiles; got {tiles!r}.")
    for field in ("rows", "columns", "warps"):
        size = getattr(tiles, field)
        if not isinstance(size, int) or size < 1 or not is_power_of_two(size):
            raise ValueError(f"{name}.{field} must be a power of two; got {size!r}.")
    if not isinstance(tiles.programs, int) or tiles.programs < 0:
        raise ValueError(
            f"{name}.programs must be 0 or a positive integer; got {tiles.programs!r}."
        )

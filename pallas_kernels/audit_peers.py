"""Compiles tokamax's attention for a GPU that is not present, to compare its inner loops with ours.

tokamax (https://github.com/openxla/tokamax) needs Python 3.12 and jax 0.11.1 or later; it is
optional.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.audit_report import format_loop
from pallas_kernels.chip import Chip
from pallas_kernels.loop_model import bound_loop
from pallas_kernels.offline import compile_for

SIZES = ((4, 2_048, 16, 4, 128), (8, 1_024, 12, 12, 64))  # B, T, H, G, K
BODIES = ("mosaic", "triton")  # tokamax's names of its implementations


def _attention(attend, sizes, backward):
    """Returns (function, abstract arrays) of causal attention, forward or both ways."""
    B, T, H, G, K = sizes
    q, k = (jax.ShapeDtypeStruct((B, T, heads, K), jnp.bfloat16) for heads in (H, G))
    if not backward:
        return attend, (q, k, k)

    def both_ways(q, k, v, do):
        o, pullback = jax.vjp(attend, q, k, v)
        return o, pullback(do)

    return both_ways, (q, k, k, q)


def survey_peers(chip: Chip, show: Callable[[str], None] = print) -> None:
    """Shows the inner loops of tokamax's attention on a chip, or why there are none.

    A body that its authors do not support on the chip, or that does not compile with this JAX, is
    shown with the reason: it is no fault of ours. Of kernels with the same name one is shown.
    """
    if importlib.util.find_spec("tokamax") is None:
        show("tokamax is not installed, so its kernels are not compared")
        return
    tokamax: Any = importlib.import_module("tokamax")
    for sizes in SIZES:
        for body in BODIES:
            attend = lambda q, k, v, body=body: tokamax.dot_product_attention(
                q, k, v, is_causal=True, implementation=body
            )
            B, T, H, G, K = sizes
            shown = set()
            for backward in (False, True):
                where = f"tokamax {body}, {B}x{T}x{H}:{G}x{K} bf16"
                try:
                    function, arrays = _attention(attend, sizes, backward)
                    reports = compile_for(chip, function, *arrays)[1]
                except Exception as error:  # of any type: tokamax's own checks, Pallas' or XLA's
                    direction = "both ways" if backward else "forward"
                    reason = str(error).splitlines()[0] if str(error) else ""
                    show(f"{where}, {direction}: {type(error).__name__} {reason}")
                    continue
                for name, report in reports.items():
                    loops = [bound_loop(loop, chip) for loop in report.resources.loops]
                    if loops and name not in shown:  # both ways contain the forward again
                        shown.add(name)
                        show(f"{where}: {name}, {report.resources.registers} registers")
                        show("\n".join(map(format_loop, loops)))

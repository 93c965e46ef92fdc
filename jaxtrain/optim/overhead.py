"""What Newton-Schulz will cost: its FLOPs as a share of the model's, before anything runs.

Forms, for a matrix of m <= n entries a side, k iterations, multiply-adds counted as 2:

    standard   k (4 m^2 n + 2 m^3)
    Gram       4 s m^2 n + 2 (4k - 3s) m^3, s segments: one restart makes two

The Gram form squares once a segment and iterates on m x m matrices; `best` takes the cheaper one
of the two, matrix by matrix. A kernel that computes symmetric products by half needs
k (3 m^2 n + m^3) and 3 s m^2 n + (4k - 3s) m^3.

Source: Gram Newton-Schulz 2026, https://dao-lab.ai/blog/2026/gram-newton-schulz
"""

from collections.abc import Iterable

import jax

from jaxtrain.model.flops import training_flops
from jaxtrain.optim.coefficients import table_of

SEGMENTS = 2
TOKENS = (32_768, 131_072, 524_288, 1_048_576)
# Dense bf16 FLOP/s, from NVIDIA's data sheets.
PEAKS = {"A40": 149.7e12, "A100": 312e12, "H100": 989e12}


def _standard(m, n, k):
    return k * (4 * m**2 * n + 2 * m**3)


def _standard_symmetric(m, n, k):
    return k * (3 * m**2 * n + m**3)


def _gram(m, n, k):
    return 4 * SEGMENTS * m**2 * n + 2 * (4 * k - 3 * SEGMENTS) * m**3


def _gram_symmetric(m, n, k):
    return 3 * SEGMENTS * m**2 * n + (4 * k - 3 * SEGMENTS) * m**3


# form -> the ways to compute one matrix, the cheapest of which is taken
FORMS = {
    "standard": (_standard,),
    "best": (_standard, _gram),
    "standard, symmetric": (_standard_symmetric,),
    "best, symmetric": (_standard_symmetric, _gram_symmetric),
}
PLAIN = ("standard", "best")  # without kernels of our own


def newton_schulz_flops(stacks: Iterable, steps: int, form: str = "standard") -> float:
    """FLOPs of one optimizer step on all matrices, over all devices.

    Args:
        stacks: (X, I, O) of each stack of X matrices.
        form: a key of FORMS.
    """
    total = 0
    for X, I, O in stacks:  # noqa: E741
        m, n = min(I, O), max(I, O)
        total += X * min(cost(m, n, steps) for cost in FORMS[form])
    return float(total)


def matrix_stacks(axes, shapes) -> list[tuple[int, int, int]]:
    """(X, I, O) of every parameter that its axes call a matrix."""
    pairs = zip(jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True)
    return [a.matrix_shape(s.shape) for a, s in pairs if a.is_matrix]


def overhead_table(cfg, model, tokens=TOKENS, devices=8, peak_flops=0.0, efficiency=0.6) -> str:
    """The table as text.

    Args:
        cfg: a TrainConfig.
        model: a Model, for its axes and shapes.
        tokens: tokens a step, a row each.
        devices: of the redundant columns, where each device iterates on all matrices.
        peak_flops: FLOP/s of a device; 0 shows the chips of PEAKS.
        efficiency: share of the peak that Newton-Schulz reaches.
    """
    stacks = matrix_stacks(model.axes, model.shapes)
    steps = len(table_of(cfg.optim.ns_coefficients, cfg.optim.ns_steps or None).rows)
    a_token = training_flops(cfg.model, cfg.data.seq_len, causal=True).total
    cost = {form: newton_schulz_flops(stacks, steps, form) for form in FORMS}
    weights = sum(X * I * O for X, I, O in stacks)  # noqa: E741
    lines = [
        f"Newton-Schulz of {weights:,} weights in {sum(s[0] for s in stacks)} matrices, {steps} "
        f"iterations; the model: {a_token / 1e6:,.0f} MFLOP a token, causal, T {cfg.data.seq_len}",
        "",
    ]
    chips = {"this chip": peak_flops} if peak_flops else PEAKS
    lines.append(_row("GFLOP a step", "total", *(f"{name} ms" for name in chips)))
    for form, flops in cost.items():
        times = (f"{1e3 * flops / (efficiency * peak):.3g}" for peak in chips.values())
        lines.append(_row(form, f"{flops / 1e9:,.1f}", *times))
    lines += [
        f"ms: one device, all matrices, at {efficiency:.0%} of its peak. `best` takes the Gram",
        "form where it is cheaper; `symmetric` needs a kernel for symmetric products.",
        "",
        "% of the model's FLOPs: split over the devices | each of "
        f"{devices} devices repeating all of it",
        _row("tokens a step", *(f"{form}" for form in PLAIN)),
    ]
    for count in tokens:
        shares = [100 * cost[form] / (a_token * count) for form in PLAIN]
        cells = (f"{share:.3g} | {devices * share:.3g}" for share in shares)
        lines.append(_row(f"{count:,}", *cells))
    lines.append("At equal efficiency; multiply by MFU of the model / that of Newton-Schulz.")
    return "\n".join(lines)


def _row(name, *cells) -> str:
    return f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells)

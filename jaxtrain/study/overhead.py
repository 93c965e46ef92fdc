"""Predicts the cost of Newton-Schulz relative to the model's, as a table."""

from collections.abc import Sequence

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.metrics.flops import training_flops
from jaxtrain.model.transformer import Model
from jaxtrain.optim.coefficients import coefficient_table
from jaxtrain.optim.newton_schulz_cost import FLOPS_BY_FORM, matrix_stacks, newton_schulz_flops
from jaxtrain.reporting.table import format_table
from pallas_kernels.chip import CHIPS

TOKENS = (32_768, 131_072, 524_288, 1_048_576)
CHIP_NAMES = ("a40", "a100_80gb", "h100")
XLA_FORMS = ("standard", "best")  # forms that need no kernel for symmetric products


def overhead_table(
    cfg: TrainConfig,
    model: Model,
    tokens: Sequence[int] = TOKENS,
    devices: int = 8,
    peak_flops: float = 0.0,
    efficiency: float = 0.6,
) -> str:
    """Returns the FLOPs and time of Newton-Schulz, and its share of the model's FLOPs, as text.

    Args:
        tokens: tokens per step, one row each.
        devices: number for the second share, in which each device repeats all of the work.
        peak_flops: FLOP/s of one device; 0 shows the chips of CHIP_NAMES.
        efficiency: share of the peak that Newton-Schulz reaches.
    """
    stacks = matrix_stacks(model.axes, model.shapes)
    iterations = len(coefficient_table(cfg.optim.ns_coefficients, cfg.optim.ns_steps or None).rows)
    token_flops = training_flops(cfg.model, cfg.data.seq_len, causal=True).total
    flops = {form: newton_schulz_flops(stacks, iterations, form) for form in FLOPS_BY_FORM}
    weights = sum(X * I * O for X, I, O in stacks)  # noqa: E741
    matrices = sum(X for X, _, _ in stacks)
    chips = {name: CHIPS[name].peak_flops["bfloat16"] for name in CHIP_NAMES}
    if peak_flops:
        chips = {"this chip": peak_flops}
    times = [
        [
            form,
            f"{cost / 1e9:,.1f}",
            *(f"{1e3 * cost / (efficiency * peak):.3g}" for peak in chips.values()),
        ]
        for form, cost in flops.items()
    ]
    shares = []
    for count in tokens:
        percent = [100 * flops[form] / (token_flops * count) for form in XLA_FORMS]
        shares.append([f"{count:,}", *(f"{p:.3g} | {devices * p:.3g}" for p in percent)])
    return "\n".join(
        [
            f"Newton-Schulz on {weights:,} weights in {matrices} matrices, {iterations} "
            f"iterations; the model: {token_flops / 1e6:,.0f} MFLOP per token, causal attention, "
            f"T {cfg.data.seq_len}",
            "",
            format_table(times, ["form", "GFLOP per step", *(f"{name} ms" for name in chips)]),
            "",
            f"ms: time of one device for all matrices, at {efficiency:.0%} of its peak. `best` "
            "takes the Gram",
            "form where it is cheaper; `symmetric` needs a kernel for symmetric products.",
            "",
            "Share of the model's FLOPs in %: work split over the devices | each of "
            f"{devices} devices repeating all of it",
            format_table(shares, ["tokens per step", *XLA_FORMS]),
            "At equal efficiency; multiply shares by the model's MFU / Newton-Schulz's efficiency.",
        ]
    )

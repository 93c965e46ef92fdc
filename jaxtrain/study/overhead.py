"""The FLOPs of Newton-Schulz as a share of the model's, as a table, before anything runs."""

from jaxtrain.metrics.flops import training_flops
from jaxtrain.optim.coefficients import coefficient_table
from jaxtrain.optim.newton_schulz_cost import FLOPS_BY_FORM, matrix_stacks, newton_schulz_flops

TOKENS = (32_768, 131_072, 524_288, 1_048_576)


# Dense bf16 FLOP/s, from NVIDIA's data sheets.
PEAKS = {"A40": 149.7e12, "A100": 312e12, "H100": 989e12}


PLAIN = ("standard", "best")  # without kernels of our own


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
    steps = len(coefficient_table(cfg.optim.ns_coefficients, cfg.optim.ns_steps or None).rows)
    a_token = training_flops(cfg.model, cfg.data.seq_len, causal=True).total
    cost = {form: newton_schulz_flops(stacks, steps, form) for form in FLOPS_BY_FORM}
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

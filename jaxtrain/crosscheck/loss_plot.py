"""Plots both loss curves of a comparison and the difference between them."""

import io

import numpy as np

from jaxtrain.crosscheck.comparison import Comparison

COLORS = "#1f5fa8", "#d1495b"


def plot_losses(comparison: Comparison) -> bytes:
    """Returns a PNG: the losses above, their difference below on a logarithmic scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6.4), dpi=160, facecolor="white", layout="constrained")
    upper, lower = FigureCanvasAgg(figure).figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]}
    )
    steps, losses = np.array(comparison.steps), comparison.losses
    marker = "o" if len(steps) == 1 else ""
    for i, style in enumerate(({"linewidth": 4, "alpha": 0.5}, {"linewidth": 1.6})):
        upper.plot(
            steps, losses[:, i], color=COLORS[i], label=comparison.names[i], marker=marker, **style
        )
    upper.set_ylabel("loss (nats/token)", fontsize=13)
    upper.legend(fontsize=13, frameon=False)
    difference = np.abs(losses[:, 0] - losses[:, 1])
    visible = np.where(difference > 0, difference, np.nan)  # a logarithmic scale has no zero
    lower.semilogy(steps, visible, "o", color="#555555", markersize=3, label="difference")
    tolerances = [
        next(d.tolerance for d in comparison.differences[step] if d.quantity == "loss")
        for step in comparison.steps
    ]
    lower.semilogy(steps, tolerances, color="#999999", linestyle="--", label="tolerance")
    lower.set_ylabel("difference (nats)", fontsize=13)
    lower.set_xlabel("step", fontsize=13)
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    lower.legend(fontsize=13, frameon=False)
    divergence = comparison.divergence
    for axes in (upper, lower):
        axes.tick_params(labelsize=12, length=0)
        axes.grid(color="#e4e4e4", linewidth=1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if divergence:
            axes.axvline(divergence.first.step, color="#999999", linewidth=1)
    outcome = "agree"
    if divergence:
        outcome = f"differ at step {divergence.first.step}: {divergence.stage}"
    upper.set_title(f"{' and '.join(comparison.names)} {outcome}", loc="left", fontsize=16)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()

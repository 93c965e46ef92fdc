"""Both loss curves of a comparison, and the distance between them."""

import io

import numpy as np

COLORS = "#1f5fa8", "#d1495b"


def draw(comparison) -> bytes:
    """PNG bytes: the losses above, their difference below on a logarithmic scale."""
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
    apart = np.abs(losses[:, 0] - losses[:, 1])
    allowed = [_limit(comparison, step) for step in comparison.steps]
    seen = np.where(apart > 0, apart, np.nan)  # equal losses have no place on this scale
    lower.semilogy(steps, seen, "o", color="#555555", markersize=3, label="apart")
    lower.semilogy(steps, allowed, color="#999999", linestyle="--", label="tolerance")
    lower.set_ylabel("difference (nats)", fontsize=13)
    lower.set_xlabel("step", fontsize=13)
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    lower.legend(fontsize=13, frameon=False)
    found = comparison.divergence
    for axes in (upper, lower):
        axes.tick_params(labelsize=12, length=0)
        axes.grid(color="#e4e4e4", linewidth=1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if found:
            axes.axvline(found.gap.step, color="#999999", linewidth=1)
    verdict = f"part at step {found.gap.step}: {found.stage}" if found else "agree"
    upper.set_title(f"{' and '.join(comparison.names)} {verdict}", loc="left", fontsize=16)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _limit(comparison, step) -> float:
    return next(gap.tolerance for gap in comparison.gaps[step] if gap.quantity == "loss")

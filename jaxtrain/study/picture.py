"""The loss of every contender against steps and against time, as a PNG."""

import io

import numpy as np

from jaxtrain.reporting.loss_curve import smooth

COLORS = ("#1f5fa8", "#d1495b", "#2a9d6f", "#e08e1b", "#7a4fa3", "#4d4d4d", "#17a2b8", "#9c6b30")


def study_curves(title: str, results: dict) -> bytes:
    """PNG bytes: smoothed training loss of each run, held-out loss averaged over its runs.

    Args:
        results: contender -> its Results, the baseline first.

    Raises:
        ValueError: no run has a finite loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 1-2 s, and only at the end
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=150, facecolor="white", layout="constrained")
    both = FigureCanvasAgg(figure).figure.subplots(1, 2, sharey=True)
    drawn = []
    for i, (contender, runs) in enumerate(results.items()):
        color = COLORS[i % len(COLORS)]
        for axes, column in zip(both, (0, 1), strict=True):
            drawn += _draw(axes, contender, runs, column, color)
    if not drawn:
        raise ValueError("a picture of the study needs a finite loss; got none.")
    losses = np.concatenate(drawn)
    low, high = losses.min(), losses.max()
    high = min(high, low + 2.5 * (np.percentile(losses, 75) - low)) if high > low else high
    margin = 0.06 * (high - low) or 0.1
    for axes, name in zip(both, ("step", "seconds in steps"), strict=True):
        axes.set_xlabel(name, fontsize=14)
        axes.set_xlim(left=0)
        axes.set_ylim(low - margin, high + margin)
        axes.grid(color="#e4e4e4", linewidth=1)
        axes.tick_params(labelsize=12, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    both[0].set_ylabel("loss (nats/token)", fontsize=14)
    both[0].legend(fontsize=13, frameon=False, loc="upper right")
    both[0].set_title(title, loc="left", fontsize=16, fontweight="bold", parse_math=False)
    both[1].set_title(
        "thin: training, smoothed, a line a seed; points: held out, mean", fontsize=12
    )
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw(axes, contender, runs, column, color) -> list:
    """Draws a contender's runs over steps (column 0) or seconds (1); the losses drawn."""
    drawn = []
    for result in runs:
        rows = np.array(result.train, float).reshape(-1, 3)
        rows = rows[np.isfinite(rows[:, 2])]
        if len(rows):
            at, trend = smooth(rows[:, 0], rows[:, 2])
            x = at if column == 0 else np.interp(at, rows[:, 0], rows[:, 1])
            axes.plot(x, trend, color=color, linewidth=0.8, alpha=0.55)
            drawn.append(trend)
    held_out = [np.array(result.held_out, float).reshape(-1, 3) for result in runs]
    shared = min(map(len, held_out))
    if shared:
        mean = np.mean([rows[:shared] for rows in held_out], axis=0)
        mean = mean[np.isfinite(mean[:, 2])]
        style = {"markersize": 6, "markeredgecolor": "white", "linewidth": 2.2, "zorder": 5}
        last = f"{mean[-1, 2]:.3f}" if len(mean) else "diverged"
        axes.plot(
            mean[:, column], mean[:, 2], "o-", color=color, label=f"{contender}: {last}", **style
        )
        drawn.append(mean[:, 2])
    return [losses for losses in drawn if len(losses)]

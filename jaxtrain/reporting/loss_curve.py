"""The loss curve of a run as a PNG, legible at the width of a phone."""

import io
import warnings

import numpy as np

TRAIN_RAW, TRAIN, EVAL = "#a9c3e2", "#1f5fa8", "#d1495b"
SMOOTH_FROM = 40  # points; fewer show the trend by themselves


def smooth(steps, losses, most: int = 800) -> tuple[np.ndarray, np.ndarray]:
    """Trend at up to `most` of the steps: a straight line fitted to each one's neighbourhood.

    A line, since a mean lags behind a falling loss; the neighbourhood is 1/8 of the points before,
    at most 1/40 of all, to either side, so that the fall at the start is not smeared.
    """
    count = len(losses)
    at = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    trend = np.empty(len(at))
    for k, i in enumerate(at):
        half = min(i // 8, count // 40)
        near = slice(i - half, i + half + 1)
        x, y = steps[near] - steps[i], losses[near]
        slope = np.dot(x - x.mean(), y) / max(np.dot(x - x.mean(), x - x.mean()), 1e-30)
        trend[k] = y.mean() - slope * x.mean()
    return steps[at], trend


def loss_curve(train, evals, title: str) -> bytes:
    """PNG bytes of training and validation loss; points whose loss is not finite are left out.

    Args:
        train: (step, nats/token) of each logged step, in order.
        evals: (step, nats/token) of each evaluation; may be empty.
        title: first line names the run, further lines stand smaller below it.

    Raises:
        ValueError: no loss in `train` and `evals` is finite.
    """
    train, evals = (np.array(list(points), float).reshape(-1, 2) for points in (train, evals))
    points = len(train) + len(evals)
    train, evals = (both[np.isfinite(both[:, 1])] for both in (train, evals))
    if not len(train) + len(evals):
        raise ValueError(f"a loss curve needs a finite loss; got {points} points, none finite.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 1-2 s, and only at the end
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=200, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    _draw_train(axes, *train.T)
    _draw_evals(axes, *evals.T)
    _set_limits(axes, np.concatenate([train[:, 1], evals[:, 1]]))
    _set_text(axes, title)
    png = io.BytesIO()
    with warnings.catch_warnings():
        # A folder's name may have characters that the font lacks: they are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(png, format="png")
    return png.getvalue()


def _draw_train(axes, steps, losses):
    if not len(steps):
        return
    style = {"color": TRAIN, "linewidth": 2.6, "marker": "o" if len(steps) == 1 else ""}
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, losses, label=f"training: {losses[-1]:.3f}", **style)
        return
    axes.plot(steps, losses, color=TRAIN_RAW, linewidth=1)
    trend_steps, trend = smooth(steps, losses)
    axes.plot(trend_steps, trend, label=f"training, smoothed: {trend[-1]:.3f}", **style)


def _draw_evals(axes, steps, losses):
    if len(steps):
        style = {"markersize": 9, "linewidth": 1.6, "markeredgecolor": "white", "zorder": 5}
        axes.plot(steps, losses, "o-", color=EVAL, label=f"validation: {losses[-1]:.3f}", **style)


def _set_limits(axes, losses):
    """Cuts the first steps' fall where it would flatten all the rest."""
    low, high = losses.min(), losses.max()
    if len(losses) >= SMOOTH_FROM:
        high = min(high, low + 2.5 * (np.percentile(losses, 90) - low))
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)


def _set_text(axes, title):
    from matplotlib.ticker import MaxNLocator

    name, *subtitle = title.splitlines() or [""]
    style = {"fontsize": 20, "fontweight": "bold", "pad": 14 + 19 * len(subtitle)}
    axes.set_title(name, loc="left", parse_math=False, **style)  # a folder's name may hold a $
    below = {"fontsize": 14, "color": "#555555", "transform": axes.transAxes}
    axes.text(0, 1.03, "\n".join(subtitle), **below)
    axes.set_xlabel("step", fontsize=16)
    axes.set_ylabel("loss (nats/token)", fontsize=16)
    axes.tick_params(labelsize=14, length=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}".replace(",", " "))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(color="#e4e4e4", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(fontsize=15, frameon=False, loc="upper right")

"""Draws the loss curve of a run as a PNG, legible at the width of a phone."""

import io
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_RAW, TRAIN, EVAL = "#a9c3e2", "#1f5fa8", "#d1495b"
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are


def smooth(
    steps: np.ndarray, losses: np.ndarray, max_points: int = 800
) -> tuple[np.ndarray, np.ndarray]:
    """Returns up to `max_points` of the steps, and the trend of the losses at them.

    The trend at a step is the value of a straight line fitted to its neighbourhood: a moving mean
    would lag behind a falling loss. On either side the neighbourhood spans 1/8 of the points before
    the step, but at most 1/40 of all points, so that the fall at the start stays sharp.
    """
    count = len(losses)
    chosen = np.unique(np.linspace(0, count - 1, min(count, max_points)).round().astype(int))
    trend = np.empty(len(chosen))
    for k, i in enumerate(chosen):
        half = min(i // 8, count // 40)
        near = slice(i - half, i + half + 1)
        x, y = steps[near] - steps[i], losses[near]
        centred = x - x.mean()
        slope = np.dot(centred, y) / max(np.dot(centred, centred), 1e-30)
        trend[k] = y.mean() - slope * x.mean()  # the line's value at x = 0
    return steps[chosen], trend


def style_loss_axes(axes: "Axes", losses: np.ndarray, percentile: float, label_size: int) -> None:
    """Sets grid and limits; high losses of the first steps are cut off at the top.

    Args:
        losses: all losses that are drawn.
        percentile: the y axis ends at 2.5 times the height of this percentile over the lowest loss.
    """
    low, high = losses.min(), losses.max()
    high = min(high, low + 2.5 * (np.percentile(losses, percentile) - low))
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=0)
    axes.grid(color="#e4e4e4", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=label_size, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def loss_curve(
    train: Iterable[tuple[float, float]], evals: Iterable[tuple[float, float]], title: str
) -> bytes:
    """Returns a PNG of training and validation loss; losses that are not finite are left out.

    Args:
        train: (step, nats/token) of each logged step, in order.
        evals: (step, nats/token) of each evaluation; may be empty.
        title: the first line names the run, further lines are set smaller below it.

    Raises:
        ValueError: no loss in `train` and `evals` is finite.
    """
    train_points, eval_points = (
        np.array(list(points), float).reshape(-1, 2) for points in (train, evals)
    )
    count = len(train_points) + len(eval_points)
    train_points, eval_points = (
        points[np.isfinite(points[:, 1])] for points in (train_points, eval_points)
    )
    if not len(train_points) + len(eval_points):
        raise ValueError(f"a loss curve needs a finite loss; got {count} points, none finite.")
    # Imported here: matplotlib takes 1-2 s, and a run draws only at its end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(8, 5.4), dpi=200, facecolor="white", layout=layout)
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    _draw_train(axes, *train_points.T)
    _draw_evals(axes, *eval_points.T)
    losses = np.concatenate([train_points[:, 1], eval_points[:, 1]])
    axes.margins(x=0.02)
    style_loss_axes(axes, losses, 90 if len(losses) >= SMOOTH_FROM else 100, label_size=14)
    _set_text(axes, title)
    png = io.BytesIO()
    with warnings.catch_warnings():
        # Characters of a folder's name that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(png, format="png")
    return png.getvalue()


def _draw_train(axes: "Axes", steps: np.ndarray, losses: np.ndarray) -> None:
    if not len(steps):
        return
    style = {"color": TRAIN, "linewidth": 2.6, "marker": "o" if len(steps) == 1 else ""}
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, losses, label=f"training: {losses[-1]:.3f}", **style)
        return
    axes.plot(steps, losses, color=TRAIN_RAW, linewidth=1)
    trend_steps, trend = smooth(steps, losses)
    axes.plot(trend_steps, trend, label=f"training, smoothed: {trend[-1]:.3f}", **style)


def _draw_evals(axes: "Axes", steps: np.ndarray, losses: np.ndarray) -> None:
    if len(steps):
        style = {"markersize": 9, "linewidth": 1.6, "markeredgecolor": "white", "zorder": 5}
        axes.plot(steps, losses, "o-", color=EVAL, label=f"validation: {losses[-1]:.3f}", **style)


def _set_text(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    name, *subtitle = title.splitlines() or [""]
    pad = 14 + 19 * len(subtitle)
    # A folder's name may contain a $, which matplotlib would read as a formula.
    axes.set_title(name, loc="left", parse_math=False, fontsize=20, fontweight="bold", pad=pad)
    style = {"fontsize": 14, "color": "#555555", "transform": axes.transAxes}
    axes.text(0, 1.03, "\n".join(subtitle), **style)
    axes.set_xlabel("step", fontsize=16)
    axes.set_ylabel("loss (nats/token)", fontsize=16)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}".replace(",", " "))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.legend(fontsize=15, frameon=False, loc="upper right")

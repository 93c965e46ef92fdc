"""Draws the losses of all contenders over steps, time and the length of the run, as PNGs."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxtrain.reporting.loss_curve import smooth, style_loss_axes
from jaxtrain.study.result import ConditionResult
from jaxtrain.study.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f5fa8", "#d1495b", "#2a9d6f", "#e08e1b", "#7a4fa3", "#4d4d4d", "#17a2b8", "#9c6b30")
MARKERS = "os^Dv"  # of the first 8 contenders, the next 8, ...


def _look(i: int) -> tuple[str, str]:
    """Returns the colour and the marker of the i-th contender."""
    return COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]


def study_curves(title: str, results: Mapping[str, Sequence[Result]]) -> bytes:
    """Returns a PNG of each run's smoothed training loss and each contender's mean held-out loss.

    Args:
        results: contender -> its results, the baseline first.

    Raises:
        ValueError: no run has a finite loss.
    """
    # Imported here: matplotlib takes 1-2 s, and a study draws only at its end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=150, facecolor="white", layout="constrained")
    over_steps, over_time = FigureCanvasAgg(figure).figure.subplots(1, 2, sharey=True)
    drawn = []
    for i, (contender, runs) in enumerate(results.items()):
        drawn += _draw_contender(over_steps, contender, runs, 0, *_look(i))
        drawn += _draw_contender(over_time, contender, runs, 1, *_look(i))
    if not drawn:
        raise ValueError("a picture of the study needs a finite loss; got none.")
    for axes, label in ((over_steps, "step"), (over_time, "seconds in steps")):
        axes.set_xlabel(label, fontsize=14)
        style_loss_axes(axes, np.concatenate(drawn), percentile=75, label_size=12)
    over_steps.set_ylabel("loss (nats/token)", fontsize=14)
    over_steps.legend(fontsize=13, frameon=False, loc="upper right")
    over_steps.set_title(title, loc="left", fontsize=16, fontweight="bold", parse_math=False)
    explanation = "thin lines: smoothed training loss of each seed; points: mean held-out loss"
    over_time.set_title(explanation, fontsize=10, loc="right")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def horizon_curves(
    title: str, results: Sequence[ConditionResult], groups: Mapping[str, str], level: float
) -> bytes:
    """Returns a PNG of end-of-run losses over tokens, by contender, one panel for each group.

    Bars are intervals of the mean at 1 - level. Their standard error is that of the paired
    comparisons, so that effects of the seed, which all contenders share, are left out.

    Args:
        groups: cell -> its condition and size.
        level: 0.05 draws intervals of 95 %.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy import stats

    panels: dict[str, list[ConditionResult]] = {}
    for result in results:
        panels.setdefault(groups[result.condition], []).append(result)
    figure = Figure(
        figsize=(6.5 * len(panels), 6), dpi=150, facecolor="white", layout="constrained"
    )
    all_axes = FigureCanvasAgg(figure).figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (group, cells) in zip(all_axes, panels.items(), strict=True):
        tokens = np.array([cell.tokens for cell in cells])
        for i, contests in enumerate(zip(*(cell.contests for cell in cells), strict=True)):
            means = np.array([contest.mean for contest in contests])
            half = np.array(
                [
                    stats.t.isf(level / 2, max(c.paired.degrees, 1)) * c.paired.se / np.sqrt(2)
                    for c in contests
                ]
            )
            means[~np.isfinite(means)] = np.nan
            x = tokens * 1.012 ** (i - len(cells[0].contests) / 2)  # side by side
            style = {"capsize": 3, "linewidth": 1.8, "markersize": 5}
            color, marker = _look(i)
            name = contests[0].contender
            axes.errorbar(x, means, half, fmt=f"{marker}-", color=color, label=name, **style)
        axes.set_xscale("log")
        axes.set_xticks(tokens, [f"{t / 1e6:.3g}M" for t in tokens], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("tokens", fontsize=13)
        axes.set_title(f"{group}: {cells[0].parameters:,} parameters", fontsize=13)
        axes.grid(color="#e4e4e4", linewidth=1)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=12, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    all_axes[0].set_ylabel("held-out loss at the end (nats/token)", fontsize=13)
    all_axes[0].legend(fontsize=12, frameon=False)
    explanation = (
        f"mean over paired seeds; bars: {1 - level:.0%} intervals without the seeds' effects; "
        "contenders are drawn side by side"
    )
    figure.suptitle(f"{title}: {explanation}", fontsize=12)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_contender(
    axes: "Axes", contender: str, runs: Sequence[Result], column: int, color: str, marker: str
) -> list[np.ndarray]:
    """Draws a contender's runs over steps (column 0) or seconds (1); returns the drawn losses."""
    drawn = []
    for result in runs:
        rows = np.array(result.train, float).reshape(-1, 3)
        rows = rows[np.isfinite(rows[:, 2])]
        if len(rows):
            steps, trend = smooth(rows[:, 0], rows[:, 2])
            x = steps if column == 0 else np.interp(steps, rows[:, 0], rows[:, 1])
            axes.plot(x, trend, color=color, linewidth=0.8, alpha=0.55)
            drawn.append(trend)
    held_out = [np.array(result.held_out, float).reshape(-1, 3) for result in runs]
    shared = min(map(len, held_out))  # a run that diverged has fewer evaluations
    if shared:
        mean = np.mean([rows[:shared] for rows in held_out], axis=0)
        mean = mean[np.isfinite(mean[:, 2])]
        last = f"{mean[-1, 2]:.3f}" if len(mean) else "diverged"
        style = {"markersize": 6, "markeredgecolor": "white", "linewidth": 2.2, "zorder": 5}
        label = f"{contender}: {last}"
        axes.plot(mean[:, column], mean[:, 2], f"{marker}-", color=color, label=label, **style)
        drawn.append(mean[:, 2])
    return [losses for losses in drawn if len(losses)]

"""Writes what a ladder found: a table, the fit, the prediction and a picture."""

import csv
import io
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.files import strict_json, write_atomic
from jaxtrain.ladder.fit import NAMES, Fit, Point
from jaxtrain.ladder.plan import Cell, Plan
from jaxtrain.ladder.runs import Cost
from jaxtrain.study.picture import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, RESULT, PREDICTION, PICTURE = "ladder.csv", "ladder.json", "prediction.json", "ladder.png"
LEVEL = 0.9  # of the intervals


def write_table(plan: Plan, fit: Fit) -> None:
    """Writes ladder.csv: size, parameters, horizon, tokens, loss and the fitted loss."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Point._fields, "fitted"])
    for point in fit.points:
        writer.writerow([*point, fit.predict(point.parameters, point.tokens)])
    write_atomic(plan.folder / TABLE, text.getvalue())


def describe_fit(fit: Fit) -> dict[str, Any]:
    """Returns the fit for JSON."""
    return {
        "form": "L(N, D) = E + A / N^alpha + B / D^beta",
        "units": "nats/token; N: all parameters; D: training tokens",
        "interval": LEVEL,
        "redraws": len(fit.draws),
        "coefficients": fit.table(LEVEL),
        "worst_relative_residual": float(np.expm1(fit.worst_residual())),
        "warnings": fit.warnings(),
        "points": [point._asdict() for point in fit.points],
    }


def state_prediction(plan: Plan, cell: Cell, parameters: int, fit: Fit) -> dict[str, Any]:
    """Returns the prediction for a cell, which it writes to prediction.json.

    Args:
        parameters: of the cell's size.
    """
    tokens = plan.tokens(cell.horizon)
    low, high = fit.interval(parameters, tokens, LEVEL)
    prediction = {
        "cell": str(cell),
        "parameters": parameters,
        "tokens": tokens,
        "loss": fit.predict(parameters, tokens),
        "low": low,
        "high": high,
        "time": time.time(),
        "fit": describe_fit(fit),
    }
    write_atomic(plan.folder / PREDICTION, strict_json(prediction, indent=2) + "\n")
    return prediction


def write_result(
    plan: Plan, fit: Fit, cost: Cost, prediction: dict[str, Any] | None, measured: Point | None
) -> None:
    """Writes ladder.json."""
    result = describe_fit(fit) | {"steps": cost.steps, "separate_steps": cost.separate_steps}
    if prediction and measured:
        keys = ("cell", "parameters", "tokens", "loss", "low", "high", "time")
        result["prediction"] = {key: prediction[key] for key in keys}
        result["prediction"]["measured"] = measured.loss
    write_atomic(plan.folder / RESULT, strict_json(result, indent=2) + "\n")


def format_fit(fit: Fit) -> list[str]:
    """Returns the coefficients with their intervals, as lines."""
    rows = fit.table(LEVEL)
    lines = [f"L(N, D) = E + A / N^alpha + B / D^beta, {LEVEL:.0%} bootstrap intervals"]
    for name in NAMES:
        row = rows[name]
        lines.append(f"  {name:<5}  {row['value']:10.4g}  [{row['low']:.4g}, {row['high']:.4g}]")
    lines.append(f"largest residual {np.expm1(fit.worst_residual()):.2%} of the loss")
    return [*lines, *(f"note: {text}" for text in fit.warnings())]


def format_check(prediction: dict[str, Any], measured: Point) -> str:
    """Returns a line that compares the prediction with what was measured afterwards."""
    error = prediction["loss"] / measured.loss - 1
    inside = prediction["low"] <= measured.loss <= prediction["high"]
    return (
        f"{prediction['cell']}: predicted {prediction['loss']:.4f} "
        f"[{prediction['low']:.4f}, {prediction['high']:.4f}], measured {measured.loss:.4f}: "
        f"{error:+.2%}, {'inside' if inside else 'outside'} the interval"
    )


def draw(fit: Fit, prediction: dict[str, Any] | None, measured: Point | None) -> bytes:
    """Returns a PNG of the losses over tokens by size, the fitted curves and the prediction."""
    # Imported here: matplotlib takes 1-2 s, and a ladder draws only at its end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=150, facecolor="white", layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    tokens = [p.tokens for p in fit.points] + ([measured.tokens] if measured else [])
    grid = np.geomspace(0.8 * min(tokens), 1.25 * max(tokens), 100)
    sizes = dict.fromkeys((p.size, p.parameters) for p in fit.points)
    for (size, parameters), color in zip(sizes, COLORS * len(sizes), strict=False):
        own = [p for p in fit.points if p.size == size]
        axes.plot(grid, [fit.predict(parameters, d) for d in grid], color=color, linewidth=1)
        label = f"{size}, {parameters:,} parameters"
        axes.plot([p.tokens for p in own], [p.loss for p in own], "o", color=color, label=label)
    if prediction and measured:
        _draw_prediction(axes, fit, prediction, measured, grid)
    axes.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="held-out nats/token")
    axes.grid(color="#e4e4e4", which="both", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    axes.set_title("points: runs; lines: fit", loc="left", fontsize=11)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_prediction(
    axes: "Axes", fit: Fit, prediction: dict[str, Any], measured: Point, grid: np.ndarray
) -> None:
    curve = [fit.predict(measured.parameters, d) for d in grid]
    axes.plot(grid, curve, "--", color="black", linewidth=1)
    value = prediction["loss"]
    bars = [[value - prediction["low"]], [prediction["high"] - value]]
    # A quantile interval need not contain the estimate.
    bars = np.maximum(bars, 0)
    label = f"{prediction['cell']}: predicted"
    axes.errorbar([measured.tokens], [value], bars, fmt="_", color="black", label=label)
    axes.plot([measured.tokens], [measured.loss], "k*", markersize=11, label="measured afterwards")

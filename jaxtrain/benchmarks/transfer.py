"""Suite transfer: does the best learning rate of a small model stay the best in a larger one?

Each model trains on the same batches of text with all peak rates times 2**e: for whole exponents e
until the best is not at an end of the grid, then for the halves beside the best. Its loss is the
mean over the last tenth of steps and over the seeds. The best exponent is the vertex of a parabola
that is fitted to the losses within 1 of the lowest. The best rate transfers if it moves by at most
a factor of sqrt(2) over a series of models, whose smallest model is the same in both
parametrisations.
"""

import argparse
import functools
import io
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.config.train_config import TrainConfig, freeze
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.optim.build import peak_rates
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import init_state, place_rates

OPTIMIZERS = ("muon", "accelerated_lmo", "adamw")
PARAMETRISATIONS = ("standard", "spectral")
BASE_WIDTH, BASE_DEPTH = 64, 2
# series -> (width, depth) of its models, from the smallest to the largest
SERIES = {
    "width": tuple((width, BASE_DEPTH) for width in (64, 256, 512)),
    "depth": tuple((BASE_WIDTH, depth) for depth in (2, 4, 8)),
}
RATES = {"learning_rate": 0.02, "adam_learning_rate": 3e-3}
FIRST_EXPONENT = 1.0  # at the centre of the first model's grid
MOST_EXPONENT = 8.0  # the grid ends at this one and at its negative
STEPS, TINY_STEPS = 100, 3
MOST_MOVE = math.sqrt(2)  # factor between the best multiples of a series


def model_config(
    width: int, depth: int, name: str, parametrisation: str, steps: int
) -> TrainConfig:
    """Returns the config of one model: heads of 16, half as wide in attention and MLP as outside.

    The narrow layers make Newton-Schulz affordable on a processor: its cost is cubic in them.
    """
    heads = max(width // 32, 1)
    model = {"L": depth, "D": width, "H": heads, "G": heads, "K": 16, "F": width // 2, "V": 256}
    model |= {"mlp": "gelu", "dtype": "float32"}
    optim = {"name": name, "parametrisation": parametrisation, "ns_dtype": "float32", **RATES}
    optim |= {"base_width": BASE_WIDTH, "base_depth": BASE_DEPTH, "total_steps": steps}
    data = {"batch": 8, "seq_len": 128}
    return freeze({"steps": steps, "model": model, "optim": optim, "data": data})


@functools.cache
def _read_batches(steps: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Returns the batches of all runs with a seed, from Python's standard library as text."""
    cfg = model_config(*SERIES["width"][0], "adamw", "standard", steps)
    mesh = build_run(cfg, jax.devices()[:1]).mesh
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(cfg.data, "train", cfg.model.V, folder)
        with build_batches(cfg.data, corpus, mesh, seed) as batches:
            return [jax.tree.map(np.asarray, next(batches)) for _ in range(steps)]


class RateGrid:
    """One model, compiled once for all rates; `losses` is {exponent of two: final loss in nats}."""

    def __init__(self, cfg: TrainConfig, seeds: int):
        run = self.run = build_run(cfg, jax.devices()[:1])
        self.step = compile_step(run)
        self.init = jax.jit(lambda seed: init_state(run.model, run.optimizer, run.mesh, seed))
        self.seeds = range(seeds)
        self.losses: dict[float, float] = {}

    def train(self, exponent: float) -> float:
        """Trains with all peak rates times 2**exponent; returns inf if the loss diverges."""
        peaks = peak_rates(self.run.cfg.optim, self.run.model.axes)
        multiples = {name: rate * 2.0**exponent for name, rate in peaks.items()}
        rates, final = place_rates(multiples, self.run.mesh), []
        for seed in self.seeds:
            state, nats = self.init(seed), []
            for batch in _read_batches(self.run.cfg.steps, seed):
                state, scalars = self.step(state, batch, rates)
                nats.append(scalars["train/loss_nats"])
            final += jax.device_get(nats[-max(len(nats) // 10, 1) :])
        loss = float(np.mean(final))
        return loss if math.isfinite(loss) else math.inf

    def search(self, centre: float) -> None:
        """Fills `losses` around the lowest one, starting at an exponent."""
        wanted, spacing = [centre - 1, centre, centre + 1], 1.0
        while wanted:
            self.losses |= {exponent: self.train(exponent) for exponent in wanted}
            best = min(self.losses, key=self.losses.__getitem__)
            wanted = self._untried(best, spacing)
            if not wanted and spacing == 1:
                spacing = 0.5
                wanted = self._untried(best, spacing)

    def _untried(self, exponent: float, spacing: float) -> list[float]:
        """Returns the neighbours of an exponent that are in the grid but not in `losses`."""
        near = (exponent - spacing, exponent + spacing)
        return [e for e in near if abs(e) <= MOST_EXPONENT and e not in self.losses]


def best_exponent(losses: Mapping[float, float]) -> float | None:
    """Returns the vertex of the parabola that is fitted to the losses within 1 of the lowest.

    Returns None if the lowest loss is at an end of the grid, and the lowest loss's own exponent if
    a parabola does not fit, as beside a run that diverged.
    """
    best = min(losses, key=losses.__getitem__)
    if best in (min(losses), max(losses)):
        return None
    near = {e: y for e, y in losses.items() if abs(e - best) <= 1 and math.isfinite(y)}
    if len(near) < 3:
        return best
    curvature, slope, _ = np.polyfit([e - best for e in near], list(near.values()), 2)
    if curvature <= 0:
        return best
    return float(np.clip(best - slope / (2 * curvature), min(near), max(near)))


def excess_loss(losses: Mapping[float, float], exponent: float) -> float:
    """Returns by how much the loss at an exponent exceeds the lowest one, in nats.

    Between exponents that were tried, the loss is interpolated. Beyond them, it is taken to be that
    of the nearest one, and the result is a lower bound.
    """
    exponents = sorted(losses)
    at_exponent = np.interp(exponent, exponents, [losses[e] for e in exponents])
    return float(at_exponent) - min(losses.values())


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row on how far the best rate moves over the models of one series.

    `excess_nats` is what it costs the largest model to be trained at the smallest one's best rate.
    """
    best = [row["best_exponent"] for row in rows]
    move = excess = None
    if None not in best:
        move = 2 ** (max(best) - min(best))
        excess = excess_loss({float(e): y for e, y in rows[-1]["losses"].items()}, best[0])
    labels = {key: rows[0][key] for key in ("optimizer", "parametrisation", "series")}
    transfers = move is not None and move <= MOST_MOVE
    row = {"suite": "transfer", "case": "verdict", **labels, "move": move}
    return row | {"excess_nats": excess, "transfers": transfers}


def measure(args: argparse.Namespace, seeds: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each model, and one with the verdict for each series."""
    steps = TINY_STEPS if args.tiny else STEPS
    start_runtime(model_config(BASE_WIDTH, BASE_DEPTH, "adamw", "standard", steps))
    for name in args.optimizers:
        model = functools.partial(_measure_model, name=name, steps=steps, seeds=seeds)
        base = model(BASE_WIDTH, BASE_DEPTH, "standard", FIRST_EXPONENT)
        for series in args.sizes:
            models = SERIES[series][:2] if args.tiny else SERIES[series]
            for parametrisation in args.variants:
                labels = {"parametrisation": parametrisation, "series": series}
                rows = [base | labels]
                yield rows[0]
                for width, depth in models[1:]:
                    last = rows[-1]["best_exponent"]
                    centre = FIRST_EXPONENT if last is None else float(round(last))
                    rows.append(model(width, depth, parametrisation, centre) | labels)
                    yield rows[-1]
                yield verdict(rows)


def _measure_model(width, depth, parametrisation, centre, name, steps, seeds) -> dict[str, Any]:
    start_s = time.monotonic()
    grid = RateGrid(model_config(width, depth, name, parametrisation, steps), seeds)
    grid.search(centre)
    row: dict[str, Any] = {"suite": "transfer", "case": f"width {width}, depth {depth}"}
    row |= {"optimizer": name, "width": width, "depth": depth}
    row |= {"parameters": grid.run.parameters, "steps": steps, "seeds": seeds}
    row |= {"rates": RATES, "losses": {str(e): loss for e, loss in sorted(grid.losses.items())}}
    row |= {"best_exponent": best_exponent(grid.losses), "seconds": time.monotonic() - start_s}
    return row


def describe(row: dict[str, Any]) -> str:
    """Returns a row as one line of text."""
    who = f"{row['optimizer']:16} {row['parametrisation']:9} {row['series']:6}"
    if row["case"] == "verdict":
        if row["move"] is None:
            return f"{who} no verdict: the best rate of a model is beyond the grid"
        outcome = "transfers" if row["transfers"] else "does NOT transfer"
        return (
            f"{who} the best rate moves by a factor of {row['move']:.2f}: {outcome}; the smallest "
            f"model's best rate costs the largest {row['excess_nats']:.3f} nats"
        )
    best = row["best_exponent"]
    multiple = "beyond the grid" if best is None else f"{2**best:5.2f} x base rates"
    lowest = min(row["losses"].values())
    return f"{who} {row['case']:19} best {multiple}, {lowest:.3f} nats, {row['seconds']:.0f} s"


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """Returns a PNG: loss over the rate for each model; one row of panels for each optimizer."""
    # Imported here: matplotlib takes 1-2 s.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [row for row in rows if row["case"] != "verdict"]
    names = list(dict.fromkeys(row["optimizer"] for row in models))
    columns = list(dict.fromkeys((row["series"], row["parametrisation"]) for row in models))
    size = (4 * len(columns), 3.2 * len(names))
    figure = Figure(figsize=size, dpi=90, facecolor="white", layout="constrained")
    options = {"squeeze": False, "sharex": "row", "sharey": "row"}
    panels = FigureCanvasAgg(figure).figure.subplots(len(names), len(columns), **options)
    for i, name in enumerate(names):
        for j, (series, parametrisation) in enumerate(columns):
            axes, wanted = panels[i, j], (name, series, parametrisation)
            keys = "optimizer", "series", "parametrisation"
            drawn = [row for row in models if tuple(row[key] for key in keys) == wanted]
            for k, row in enumerate(drawn):
                color = colormaps["viridis"](0.85 * k / max(len(drawn) - 1, 1))
                points = [
                    (2.0 ** float(e), y) for e, y in row["losses"].items() if math.isfinite(y)
                ]
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=row[series])
                if row["best_exponent"] is not None:
                    axes.axvline(2 ** row["best_exponent"], color=color, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_title(f"{name}, {parametrisation}", fontsize=11)
            axes.set_xlabel("multiple of the base rates; dotted: best")
            axes.legend(title=series, frameon=False, fontsize=9)
        panels[i, 0].set_ylabel("final loss (nats/byte)")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()

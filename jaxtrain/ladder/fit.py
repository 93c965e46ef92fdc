"""Fits L(N, D) = E + A / N^alpha + B / D^beta to final losses, with bootstrap intervals.

As in Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556, section 3.3 and appendix D.3): the sum
of Huber losses of the residuals of log L is minimised from a grid of starting points, in the
coordinates a = log A, b = log B, e = log E. The source uses L-BFGS, which needs thousands of
steps along the valley of these sums. Here scipy's least_squares finds the minimum: first that of
the squares from every starting point, which is quick, then that of the Huber losses from the best.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

DELTA = 1e-3  # of the Huber loss, as in the source
LOW, HIGH = [-30.0, -30.0, -30.0, 0.0, 0.0], [60.0, 60.0, 5.0, 3.0, 3.0]  # of a, b, e, alpha, beta
NAMES = ("A", "B", "E", "alpha", "beta")
NEGLIGIBLE = 1e-3  # share of every loss below which a term says nothing
POLISHED = 3  # solutions for squares from which the Huber losses are minimised


class Point(NamedTuple):
    """The final loss of one run."""

    size: str
    parameters: int
    horizon: int  # steps
    tokens: int
    loss: float  # held-out nats/token


class Fit(NamedTuple):
    """Coefficients of the loss, and their values in every bootstrap draw."""

    coefficients: np.ndarray  # [5]: log A, log B, log E, alpha, beta
    draws: np.ndarray  # [R,5]
    points: list[Point]

    def predict(self, parameters: float, tokens: float) -> float:
        """Returns the loss in nats/token of a size and a number of tokens."""
        return float(np.exp(_log_loss(self.coefficients, _inputs(parameters, tokens)))[0])

    def interval(self, parameters: float, tokens: float, level: float = 0.9) -> tuple[float, float]:
        """Returns the interval that contains `level` of the draws' predictions."""
        inputs = _inputs(parameters, tokens)
        losses = [float(np.exp(_log_loss(draw, inputs))[0]) for draw in self.draws]
        return _quantiles(losses, level)

    def table(self, level: float = 0.9) -> dict[str, dict[str, float]]:
        """Returns {coefficient: {"value", "low", "high"}}."""
        rows = {}
        for i, name in enumerate(NAMES):
            natural = (lambda x: x) if name in ("alpha", "beta") else np.exp
            low, high = _quantiles(natural(self.draws[:, i]), level)
            value = float(natural(self.coefficients[i]))
            rows[name] = {"value": value, "low": low, "high": high}
        return rows

    def worst_residual(self) -> float:
        """Returns the largest |log(predicted / measured)| of the points."""
        logs = [math.log(self.predict(p.parameters, p.tokens) / p.loss) for p in self.points]
        return max(map(abs, logs))

    def warnings(self) -> list[str]:
        """Returns sentences about what these losses do not determine; [] if there are none."""
        inputs = _inputs([p.parameters for p in self.points], [p.tokens for p in self.points])
        terms = _terms(self.coefficients, inputs)
        shares = np.exp(terms - np.logaddexp.reduce(terms)).max(1)
        texts = (
            "the size explains none of the loss (A is 0), so alpha means nothing; use sizes "
            "that differ more",
            "the horizon explains none of the loss (B is 0), so beta means nothing; use "
            "horizons that differ more",
            "the best E is 0: these losses do not show where the loss ends; use larger sizes and "
            "longer horizons",
        )
        found = [text for text, share in zip(texts, shares, strict=True) if share < NEGLIGIBLE]
        rows = self.table()
        for i, name, other in ((3, "alpha", "sizes"), (4, "beta", "horizons")):
            for bound, end in ((LOW[i], "low"), (HIGH[i], "high")):
                at = [key for key in ("value", end) if abs(rows[name][key] - bound) < 1e-3]
                if at and shares[i - 3] >= NEGLIGIBLE:
                    what = name if "value" in at else f"the interval of {name}"
                    found.append(
                        f"{what} ends at the bound of the search, {bound:g}: these losses hardly "
                        f"determine {name}; use more {other}, or {other} that differ more"
                    )
        return found


def _quantiles(values: Any, level: float) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _inputs(parameters: Any, tokens: Any) -> np.ndarray:
    """Returns log N and log D as [2,P]."""
    return np.log(np.stack([np.atleast_1d(parameters), np.atleast_1d(tokens)]).astype(float))


def _log_loss(coefficients: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Returns log L [P] of inputs [2,P]."""
    return np.logaddexp.reduce(_terms(coefficients, inputs))


def _terms(coefficients: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the three terms, [3,P]."""
    a, b, e, alpha, beta = coefficients
    log_n, log_d = inputs
    return np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])


def _jacobian(coefficients: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Returns the derivatives of log L [P,5]."""
    terms = _terms(coefficients, inputs)
    shares = np.exp(terms - np.logaddexp.reduce(terms))  # of each term in the loss
    return np.concatenate([shares, -shares[:2] * inputs]).T


def _minimise(start: np.ndarray, inputs: np.ndarray, logs: np.ndarray, loss: str) -> Any:
    """Returns least_squares' result: `x`, and half the sum of losses, `huber` or `linear`."""
    return least_squares(
        lambda x: _log_loss(x, inputs) - logs,
        np.clip(start, np.add(LOW, 1e-6), np.subtract(HIGH, 1e-6)),  # strictly inside
        lambda x: _jacobian(x, inputs),  # pyright: ignore[reportArgumentType] wrong stub
        (LOW, HIGH),
        loss=loss,
        f_scale=DELTA,
        ftol=1e-9,
        xtol=1e-9,
        gtol=1e-15,
        max_nfev=300,  # 60 leave draws near their start, so that intervals come out too narrow
    )


def _starts(inputs: np.ndarray, logs: np.ndarray) -> list[np.ndarray]:
    """Returns starting points at which each term is a share of the lowest loss."""
    (n, d), low = inputs.mean(1), float(logs.min())
    starts = []
    for alpha, beta, share in itertools.product((0.2, 0.6, 1.2), (0.2, 0.6, 1.2), (1, 3)):
        e = low + math.log(share / (share + 2))
        term = low - math.log(share + 2)
        starts.append(np.array([term + alpha * n, term + beta * d, e, alpha, beta]))
    return starts


def fit_losses(points: Sequence[Point], redraws: int = 100, seed: int = 0) -> Fit:
    """Fits the losses of at least 6 points, of two or more sizes and horizons.

    A bootstrap draw takes as many points with replacement. One with fewer than 5 different points,
    or with only one size or horizon, is drawn again: it cannot determine the coefficients.

    Raises:
        ValueError: a loss is not finite and positive.
    """
    bad = [p for p in points if not (0 < p.loss < math.inf)]
    if bad:
        raise ValueError(f"a fit needs finite losses; got {bad[0].loss} of {bad[0].size}.")
    inputs = _inputs([p.parameters for p in points], [p.tokens for p in points])
    logs = np.log([p.loss for p in points])
    cost = lambda result: result.cost
    found = sorted((_minimise(x, inputs, logs, "linear") for x in _starts(inputs, logs)), key=cost)
    found = [_minimise(result.x, inputs, logs, "huber") for result in found[:POLISHED]]
    best = min(found, key=cost).x
    rng, draws = np.random.default_rng(seed), []
    while len(draws) < redraws:
        chosen = rng.integers(len(points), size=len(points))
        kept = [points[i] for i in set(chosen.tolist())]
        if len(kept) < 5 or min(len({p[i] for p in kept}) for i in (0, 2)) < 2:
            continue
        draws.append(_minimise(best, inputs[:, chosen], logs[chosen], "huber").x)
    return Fit(best, np.array(draws), list(points))

"""The suite transfer: search for the best rate, verdicts and picture, without training."""

import argparse
import itertools
import math
from typing import Any

import pytest

from jaxtrain.benchmarks import transfer


class FakeGrid(transfer.RateGrid):
    """A model whose loss is a parabola over the exponent, with the given vertex."""

    run: Any = argparse.Namespace(parameters=0)

    def __init__(self, vertex, diverges_from=math.inf):
        self.vertex, self.diverges_from, self.losses = vertex, diverges_from, {}

    def train(self, exponent):
        diverged = exponent >= self.diverges_from
        return math.inf if diverged else 2 + 0.1 * (exponent - self.vertex) ** 2


@pytest.mark.parametrize("vertex", [-5.3, 0.0, 0.4, 6.2])
def test_the_search_finds_a_best_rate_anywhere_in_the_grid(vertex):
    grid = FakeGrid(vertex)
    grid.search(centre=1.0)
    assert transfer.best_exponent(grid.losses) == pytest.approx(vertex)
    assert len(grid.losses) == len(set(grid.losses)) <= 5 + abs(round(vertex) - 1)


def test_a_best_rate_beyond_the_grid_gives_no_verdict():
    grid = FakeGrid(20.0)
    grid.search(centre=1.0)
    assert max(grid.losses) == transfer.MOST_EXPONENT
    assert transfer.best_exponent(grid.losses) is None


def test_a_run_that_diverges_is_never_the_best():
    grid = FakeGrid(1.3, diverges_from=2)
    grid.search(centre=1.0)
    assert transfer.best_exponent(grid.losses) == pytest.approx(1.3)
    assert transfer.excess_loss(grid.losses, 2.0) == math.inf


def test_the_excess_loss_is_interpolated_between_rates():
    losses = {0.0: 2.5, 1.0: 2.1, 2.0: 2.3}
    assert transfer.excess_loss(losses, 0.5) == pytest.approx(0.2)
    assert transfer.excess_loss(losses, 3.0) == pytest.approx(0.2)  # at least


def test_the_suite_yields_every_model_and_verdict_and_draws_them(monkeypatch):
    """With standard, the best exponent of these models falls by 1 for each doubling of a size."""

    def build(cfg, seeds):
        model, choice = cfg.model, cfg.optim.parametrisation
        return FakeGrid(1.2 - (choice == "standard") * math.log2(model.D * model.L / 128))

    monkeypatch.setattr(transfer, "RateGrid", build)
    chosen = {"optimizers": ["adamw"], "sizes": ["width", "depth"], "tiny": False}
    variants = list(transfer.PARAMETRISATIONS)
    rows = list(transfer.measure(argparse.Namespace(**chosen, variants=variants), seeds=1))
    verdicts = [row for row in rows if row["case"] == "verdict"]
    found = {(row["series"], row["parametrisation"]): row for row in verdicts}
    assert set(found) == set(itertools.product(["width", "depth"], variants))
    for series, move in (("width", 8), ("depth", 4)):
        assert found[series, "standard"]["move"] == pytest.approx(move)
        assert found[series, "standard"]["excess_nats"] > 0.1
        assert found[series, "spectral"]["move"] == pytest.approx(1)
        assert found[series, "spectral"]["transfers"] and not found[series, "standard"]["transfers"]
    assert "moves by a factor of 8.00: does NOT transfer" in transfer.describe(verdicts[0])
    assert transfer.draw(rows).startswith(b"\x89PNG")

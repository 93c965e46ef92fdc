"""The plan of a ladder, and the fit of its losses."""

import json
from pathlib import Path

import numpy as np
import pytest

import runs
from jaxtrain.ladder.__main__ import predict_first
from jaxtrain.ladder.fit import Point, _inputs, _jacobian, _log_loss, fit_losses
from jaxtrain.ladder.plan import Cell, build_plan, size_config
from jaxtrain.ladder.report import draw, write_result, write_table
from jaxtrain.ladder.runs import Cost, measure_cost

A, B, E, ALPHA, BETA = 400.0, 900.0, 1.7, 0.35, 0.37


def loss_of(parameters, tokens):
    return E + A / parameters**ALPHA + B / tokens**BETA


def points(noise=0.0):
    rng = np.random.default_rng(0)
    sizes = {"64x2": 3e5, "96x2": 1e6, "128x4": 3e6}
    return [
        Point(name, int(n), steps, steps * 4_096, loss_of(n, steps * 4_096) * np.exp(error))
        for name, n in sizes.items()
        for steps in (250, 1_000, 4_000)
        for error in [noise * rng.standard_normal()]
    ]


@pytest.fixture(scope="module")
def exact():
    """The fit of losses that follow the law exactly."""
    return fit_losses(points(), redraws=10)


def plan(folder, predict="", **values):
    base = runs.debug_config(folder, "text.txt", optim__warmup_steps=2)
    given = {"sizes": ["32x2", "64x2", "96x3"], "horizons": [12, 24, 60], "decay": 0.2} | values
    return build_plan(base, predict=predict, folder=folder, **given)


def test_the_fit_finds_the_law_that_losses_follow(exact):
    fit = exact
    got = [row["value"] for row in fit.table().values()]
    np.testing.assert_allclose(got, [A, B, E, ALPHA, BETA], rtol=0.02)
    assert fit.predict(1e7, 4e7) == pytest.approx(loss_of(1e7, 4e7), rel=1e-4)
    assert fit.worst_residual() < 1e-5


def test_one_wrong_loss_hardly_moves_the_fit():
    spoiled = points()
    spoiled[4] = spoiled[4]._replace(loss=1.2 * spoiled[4].loss)
    fit = fit_losses(spoiled, redraws=10)
    assert fit.predict(1e7, 4e7) == pytest.approx(loss_of(1e7, 4e7), rel=0.01)


def test_the_interval_of_noisy_losses_contains_the_true_loss():
    fit = fit_losses(points(noise=0.003), redraws=30)
    low, high = fit.interval(1e7, 4e7)
    assert low < loss_of(1e7, 4e7) < high
    assert 0 < high - low < 0.2 * loss_of(1e7, 4e7)


def test_the_jacobian_is_the_derivative_of_the_logarithm_of_the_loss():
    inputs = _inputs([p.parameters for p in points()], [p.tokens for p in points()])
    at = np.array([np.log(A), np.log(B), np.log(E), ALPHA, BETA])
    shifts = 1e-6 * np.eye(5)
    want = [(_log_loss(at + s, inputs) - _log_loss(at - s, inputs)) / 2e-6 for s in shifts]
    np.testing.assert_allclose(_jacobian(at, inputs), np.transpose(want), rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite losses; got inf of 64x2"):
        fit_losses([points()[0]._replace(loss=float("inf")), *points()[1:]])


def test_a_size_scales_heads_and_feed_forward_with_the_width(tmp_path):
    base = runs.debug_config(tmp_path, "text.txt")  # D=32, H=4, G=2, K=8, F=64
    cfg = size_config(base, "96x5", tmp_path / "run", 7)
    model = cfg.model
    assert (model.D, model.L, model.H, model.G, model.K, model.F) == (96, 5, 12, 6, 8, 192)
    assert (cfg.optim.schedule, cfg.steps) == ("constant", 7)


def test_horizons_from_branches_cost_less_than_separate_runs(tmp_path):
    found = plan(tmp_path)
    assert [found.branch_step(horizon) for horizon in found.horizons] == [10, 20, 50]
    assert measure_cost(found, "32x2", found.horizons) == Cost(50 + 2 + 4 + 10, 12 + 24 + 60)


def test_a_plan_that_cannot_be_fitted_is_refused(tmp_path):
    for match, values in (
        ("two or more different sizes", {"sizes": ["32x2", "32x2"]}),
        ("6 or more cells; got 2 sizes x 2", {"sizes": ["32x2", "64x2"], "horizons": [12, 24]}),
        ("WIDTHxDEPTH.*got '32'", {"sizes": ["32", "64x2", "96x2"]}),
        ("scale model.H=4 of model.D=32 to a whole number; got 33", {"sizes": ["33x2", "32x2"]}),
        ("after the warm-up.*start at 1", {"horizons": [1, 12, 24]}),
        (r"decay must be in \(0, 1\]; got 0", {"decay": 0.0}),
        ("SIZE@HORIZON.*got '96x3'", {"predict": "96x3"}),
        ("a cell that the fit does not use; got 64x2@24", {"predict": "64x2@24"}),
    ):
        with pytest.raises(ValueError, match=match):
            plan(tmp_path, **values)


def test_a_prediction_is_written_before_its_run_and_never_after(tmp_path, exact):
    found, cell, notes = plan(tmp_path, "128x4@90"), Cell("128x4", 90), []
    stated = predict_first(found, cell, 10**7, exact, notes.append)
    stored = json.loads((tmp_path / "prediction.json").read_text())
    assert stored["loss"] == stated["loss"] and "128x4@90: predicted" in notes[0]
    (tmp_path / "128x4@90").mkdir()  # its run has begun
    assert predict_first(found, cell, 10**7, exact, notes.append) == stored and len(notes) == 1
    other = exact._replace(points=points(noise=0.01))
    with pytest.raises(ValueError, match="128x4@90 was trained before this fit"):
        predict_first(found, cell, 10**7, other, notes.append)


def test_the_table_the_result_and_the_picture_contain_every_point(tmp_path, exact):
    found, fit = plan(tmp_path, "128x4@90"), exact
    stated = predict_first(found, Cell("128x4", 90), 10**7, fit, lambda line: None)
    measured = Point("128x4", 10**7, 90, stated["tokens"], stated["loss"] + 0.01)
    write_table(found, fit)
    lines = Path(tmp_path / "ladder.csv").read_text().splitlines()
    assert lines[0] == "size,parameters,horizon,tokens,loss,fitted" and len(lines) == 10
    write_result(found, fit, Cost(66, 96), stated, measured)
    result = json.loads((tmp_path / "ladder.json").read_text())
    assert result["prediction"]["measured"] == measured.loss and len(result["points"]) == 9
    assert draw(fit, stated, measured).startswith(b"\x89PNG")

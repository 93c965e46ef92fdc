"""The plan of a ladder, the fit of its losses, and one tiny ladder."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from jaxtrain.ladder.__main__ import predict_first
from jaxtrain.ladder.fit import Point, _inputs, _jacobian, _log_loss, fit_losses
from jaxtrain.ladder.plan import Cell, build_plan, size_config
from jaxtrain.ladder.report import draw, write_result, write_table
from jaxtrain.ladder.runs import Cost, check_folders, measure_cost, train_size
from jaxtrain.run_directory.lineage import read_lineage
from jaxtrain.study.runs import open_data

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
    """Returns a fit of losses that are computed from known coefficients, without noise."""
    return fit_losses(points(), redraws=2)


def plan(folder, predict="", config=(), **values):
    config = dict(config)
    base = runs.debug_config(folder, "text.txt", optim__warmup_steps=2, **config)
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
    fit = fit_losses(spoiled, redraws=2)
    assert fit.predict(1e7, 4e7) == pytest.approx(loss_of(1e7, 4e7), rel=0.01)


def test_the_interval_of_noisy_losses_contains_the_true_loss():
    fit = fit_losses(points(noise=0.003), redraws=12)
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
        ("a cell that the fit does not use.*got 64x2@24", {"predict": "64x2@24"}),
        ("or a horizon above 60; got 64x2@30", {"predict": "64x2@30"}),
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


def test_a_mixture_may_change_only_before_the_first_decay(tmp_path):
    mixed = lambda end: {
        "data__text": "",
        "data__mixture": "a=x b=y",
        "data__stages": f"a 0.9, b 0.1 until {end}; a 0.25, b 0.75",
    }
    found = plan(tmp_path, config=mixed("2_560"))  # 10 steps of 8 x 32 tokens
    assert found.loss_weights() == {"a": 0.25, "b": 0.75}
    for end, got in (("2_561", "2,561 tokens"), ("80%", "80%")):
        with pytest.raises(
            ValueError, match=f"first decay at 2,560 tokens.*got a stage until {got}"
        ):
            plan(tmp_path, config=mixed(end))


def test_a_fit_says_what_the_losses_do_not_determine():
    same = [p._replace(loss=loss_of(10**6, p.tokens)) for p in points()]  # size has no effect
    found = fit_losses(same, redraws=2).warnings()
    assert any("size explains none of the loss" in text or "alpha" in text for text in found)
    falling = [p._replace(loss=A / p.parameters**ALPHA + B / p.tokens**BETA) for p in points()]
    assert any("best E is 0" in text for text in fit_losses(falling, redraws=2).warnings())


def tiny(folder, **values):
    """Returns the plan of a ladder that trains in seconds."""
    text = folder / "text.txt"
    text = text if text.exists() else runs.write_text(folder)
    config = {"data__text": str(text), "optim__name": "adamw", "seed": 3}
    config |= {"eval_tokens": 256, "save_every": 100, "compile_cache": ""} | values
    given = {"sizes": ["16x1", "32x1", "48x1"], "horizons": [3, 6], "decay": 0.5}
    return plan(folder / "ladder", "16x2@4", config=config, **given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One size of a ladder, trained to both horizons, and its losses."""
    folder = tmp_path_factory.mktemp("ladder")
    found = tiny(folder)
    base, _ = open_data(found.base, found.folder)
    found = found._replace(base=base)
    devices = jax.devices()[:1]
    return found, train_size(found, "16x1", found.horizons, lambda line: None, devices)


@pytest.mark.long
def test_every_horizon_is_a_branch_of_one_stable_run_and_is_trained_once(trained):
    found, losses = trained
    for horizon in found.horizons:
        lineage = read_lineage(found.branch_folder(Cell("16x1", horizon)))
        assert lineage["parent"] == str(found.trunk_folder("16x1"))
        assert lineage["step"] == found.branch_step(horizon)
    notes = []
    assert train_size(found, "16x1", found.horizons, notes.append, jax.devices()[:1]) == losses
    assert not [note for note in notes if "stable run" in note or "decay from" in note]


@pytest.mark.long
def test_runs_of_another_ladder_are_refused_by_the_flag(trained):
    found, _ = trained
    check_folders(found)
    for match, other in (
        ("decay to 6 steps must start at step 5 .*16x1@6 starts at step 4.*Set --decay", 0.25),
        ("seed=3, now 4", dataclasses.replace(found.base, seed=4)),
    ):
        other = {"decay": other} if isinstance(other, float) else {"base": other}
        with pytest.raises(ValueError, match=match):
            check_folders(found._replace(**other))
    with pytest.raises(ValueError, match="starts at step 3, which the stable run .*it has kept"):
        check_folders(found._replace(horizons=[3, 5, 6]))

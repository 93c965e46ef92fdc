import copy
import dataclasses
import importlib
import math
import re

import numpy as np
import pytest

from configs import study_quick
from jaxtrain.config import train_config as config_lib
from jaxtrain.study.cells import flatten_overrides
from jaxtrain.study.plan import build_plan
from jaxtrain.study.result import compare, format_result
from jaxtrain.study.runs import Result, falling_curve
from jaxtrain.study.work import CellRuns

MUON = {"optim": {"learning_rate": (0.02, 0.06), "adam_learning_rate": (0.01, 0.03)}}
ADAMW = {"optim": {"adam_learning_rate": (0.001, 0.002, 0.003, 0.004)}}


def values(**study):
    given = {
        "workdir": "runs/x",
        "contenders": {"muon": {}, "adamw": {"optim": {"name": "adamw"}}},
        "grid": {"muon": MUON, "adamw": ADAMW},
    }
    return {"base": config_lib.to_dict(config_lib.TrainConfig()), "study": given | study}


def tuning(plan, cell, contender):
    return plan.tuning(cell, contender, plan.declared_settings(contender))


def test_a_run_differs_from_the_base_only_by_its_overrides():
    plan = build_plan(values(conditions={"short": {"steps": 50}}))
    trial = tuning(plan, "short", "adamw")[3]
    base, trained = (config_lib.flatten(cfg) for cfg in (plan.base, trial.config))
    assert {name: value for name, value in trained.items() if base[name] != value} == {
        "steps": 50,
        "optim.total_steps": 50,  # the schedule follows
        "optim.name": "adamw",
        "optim.adam_learning_rate": 0.004,
        "workdir": "runs/x/short/adamw/adam_learning_rate=0.004/seed0",
    }


def test_every_contender_has_the_same_number_of_runs_and_no_two_share_a_folder():
    plan = build_plan(values(conditions={"a": {}, "b": {}}, seeds=(5, 6, 7, 8)))
    trials = []
    for condition in ("a", "b"):
        chosen = {}
        for contender in ("muon", "adamw"):
            trained = tuning(plan, condition, contender)
            assert len(trained) == plan.budget(condition) == 4
            chosen[contender] = plan.declared_settings(contender)[0]
            trials += trained
        paired = plan.paired(condition, chosen)
        assert [trial.seed for trial in paired] == [5, 5, 6, 6, 7, 7, 8, 8]
        trials += paired
    folders = {trial.config.workdir for trial in trials}
    assert len(folders) == len(trials) == plan.runs == 2 * 2 * (4 + 4)


def test_paired_runs_with_one_seed_differ_only_in_the_contender():
    plan = build_plan(
        values(contenders={"muon": {}, "twin": {}}, grid={"muon": MUON, "twin": MUON})
    )
    setting = plan.declared_settings("muon")[0]
    muon, twin, *_ = plan.paired("plain", {"muon": setting, "twin": setting})
    assert config_lib.config_hash(muon.config) == config_lib.config_hash(twin.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": {"muon": MUON, "adamw": {"optim": {"adam_learning_rate": (0.1, 0.2)}}}},
            "same number of tuning runs; got muon 4, adamw 2",
        ),
        (
            {"grid": {"muon": {"optim": {"learning_rate": (1, 2, 3, 4)}}, "adamw": ADAMW}},
            "must tune optim.adam_learning_rate too.*study.grid.muon",
        ),
        ({"grid": {"muon": MUON}}, "an entry for each contender"),
        ({"grid": {"muon": {"optim": {"momentum": 0.9}}, "adamw": ADAMW}}, "distinct values"),
        ({"seeds": (1, 2)}, "3 or more fresh seeds"),
        ({"seeds": (1, 2, 2)}, "3 or more fresh seeds"),
        ({"seeds": (0, 1, 2)}, "not the tuning seed"),
        ({"baseline": "sgd"}, "must be one of at least 2 contenders"),
        ({"level": 0.9}, "study.level must be at most 0.5"),
        ({"seed": 3}, "study has no field seed"),
        ({"conditions": {}}, "names of folders"),
        ({"conditions": {"a/b": {}}}, "names of folders"),
        (
            {"contenders": {"muon": {"optim": {"momentun": 0.9}}, "adamw": {}}},
            "Did you mean optim.momentum",
        ),
        ({"conditions": {"a": {"optim": {"momentum": 2.0}}}}, "optim.momentum must be at most"),
    ],
)
def test_an_unfair_or_misspelt_plan_is_refused_before_any_run(change, message):
    with pytest.raises(ValueError, match=message):
        build_plan(values(**change))


def test_a_flag_allows_a_grid_without_the_auxiliary_learning_rate():
    grid = {name: {"optim": {"learning_rate": (1.0, 2.0)}} for name in ("muon", "adamw")}
    assert build_plan(values(grid=grid, tune_adam=False)).budget("plain") == 2


def curve(plan, held_out, train=()):
    trial = tuning(plan, "plain", "muon")[0]
    return Result(trial, held_out[-1][2], 9.0, 1.0, list(train), held_out)


def test_steps_to_the_baselines_loss_are_found_seed_by_seed():
    plan = build_plan(values())
    base = [curve(plan, [(10, 1.0, 3.0), (20, 2.0, end)]) for end in (2.0, 1.0, 2.5)]
    fast = [curve(plan, [(10, 2.0, 2.0), (20, 4.0, 1.0)]) for _ in base]
    choice = choose(plan, "muon", [1.0, 2.0, 3.0, 4.0])
    choices = {"muon": choice, "adamw": choice}
    [result] = compare(plan, [CellRuns("plain", choices, {"muon": base, "adamw": fast}, {})])
    muon, adamw = result.contests
    assert (muon.reached, muon.reach_steps, muon.reach_seconds) == (3, 20, 2.0)
    assert (adamw.reach_steps, adamw.reach_seconds) == ((10 + 20 + 10) / 3, (2 + 4 + 2) / 3)
    assert result.target == pytest.approx(5.5 / 3) and adamw.verdict == "ties"
    assert re.search(r"muon +20 of 200 ", format_result(plan, result))


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([1.0, 2.1, 3.05], r"adamw is better than muon: its held-out loss is 0.9500 \+- 0.0289"),
        ([3.0, 4.1, 5.05], r"adamw is worse than muon: .* \(standard error\) higher, p = 0.00"),
        ([2.0, 3.1, 3.9], r"do not differ significantly: \+0.0000 .* of at least 0.24"),
        ([2.0, math.inf, 3.0], r"adamw is worse than muon: 1 of its 3 runs diverged"),
    ],
)
def test_a_verdict_is_a_sentence_with_the_difference_and_its_error(losses, sentence):
    plan = build_plan(values())
    choice = choose(plan, "muon", [1.0, 2.0, 3.0, 4.0])
    paired = {
        name: [curve(plan, [(20, 2.0, loss)]) for loss in losses]
        for name, losses in {"muon": [2.0, 3.0, 4.0], "adamw": losses}.items()
    }
    choices = {"muon": choice, "adamw": choice}
    [result] = compare(plan, [CellRuns("plain", choices, paired, {})])
    assert re.search(sentence, format_result(plan, result).split("Verdict")[1])


def test_with_one_evaluation_the_curve_is_the_smoothed_training_loss():
    plan = build_plan(values())
    line = [(step, step / 10, 4.0 - step / 100) for step in range(1, 101)]
    rows = falling_curve(curve(plan, [(100, 10.0, 3.3)], line))
    steps, seconds, losses = map(np.array, zip(*rows, strict=True))
    np.testing.assert_allclose(losses, 4 - steps / 100, rtol=1e-9)
    np.testing.assert_allclose(seconds, steps / 10, rtol=1e-9)


def choose(plan, contender, losses):
    """Returns the setting that is chosen if a contender's tuning runs have these losses."""
    trials = tuning(plan, "plain", contender)
    settings = [trial.setting for trial in trials]
    return plan.tune("plain", contender, dict(zip(settings, losses, strict=True)), None)


def test_only_a_best_setting_at_the_edge_of_its_grid_is_reported_as_such():
    plan = build_plan(values())
    inside = choose(plan, "adamw", [3.0, 1.0, 2.0, 3.0])
    assert (inside.setting, inside.edges) == ("adam_learning_rate=0.002", {})
    least = choose(plan, "adamw", [1.0, 2.0, 2.0, float("inf")])
    assert least.edges == {"optim.adam_learning_rate": 0.001}
    both = choose(plan, "muon", [3.0, 3.0, 3.0, 1.0])
    assert both.edges == {"optim.learning_rate": 0.06, "optim.adam_learning_rate": 0.03}


def test_an_error_names_the_grid_of_a_contender_whose_settings_all_diverge():
    plan = build_plan(values())
    with pytest.raises(ValueError, match="all 4 of muon diverged.*study.grid.muon"):
        choose(plan, "muon", [float("inf")] * 4)


@pytest.mark.parametrize("name", ["study", "study_quick", "study_scaling", "study_transferred"])
def test_shipped_studies_are_fair_and_state_their_size_and_command(name):
    module = importlib.import_module(f"configs.{name}")
    plan = build_plan(module.get_config())
    assert plan.base.sample.tokens == 0 and plan.base.save_every >= plan.base.steps
    for cell in plan.cells.values():
        assert f"{cell.parameters:,}" in module.__doc__
    assert "parameters" in module.__doc__
    assert f"jaxtrain study {name}\n" in module.__doc__


def test_the_study_of_horizons_states_its_runs_and_compares_with_the_published_figures():
    module = importlib.import_module("configs.study_scaling")
    plan = build_plan(module.get_config())
    assert f"{plan.runs} runs" in module.__doc__
    assert set(plan.study.contenders) - set(plan.study.published) == {"muon_polar"}
    tuned = {name: len(grid) for name, grid in plan.grids.items()}
    assert len(set(tuned.values())) == 1, "every contender tunes the same number of fields"
    assert list(plan.cells) == ["100k-1x", "300k-1x", "300k-2x", "300k-4x", "500k-1x"]
    assert plan.cells["500k-1x"].starts_from == "300k-1x"


def test_a_change_of_the_base_reaches_every_run():
    config = study_quick.get_config()
    config.base.steps = 30
    plan = build_plan(copy.deepcopy(config))
    trial = tuning(plan, "plain", "muon")[0]
    assert trial.config.steps == trial.config.optim.total_steps == 30


def test_nested_overrides_are_named_like_flags():
    nested = {"seed": 1, "optim": {"name": "muon", "momentum": 0.9}}
    assert flatten_overrides(nested) == {"seed": 1, "optim.name": "muon", "optim.momentum": 0.9}
    default = config_lib.TrainConfig()
    assert flatten_overrides(dataclasses.asdict(default)) == config_lib.flatten(default)

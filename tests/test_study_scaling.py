"""Speed-ups in tokens and rank correlations, on invented losses of a study of three horizons."""

import csv
import io
import struct

import numpy as np
import pytest
from scipy import stats

from jaxtrain.config import train_config as config_lib
from jaxtrain.study import picture
from jaxtrain.study.picture import horizon_curves
from jaxtrain.study.plan import build_plan
from jaxtrain.study.runs import Result
from jaxtrain.study.scaling import kendall_tau, permutation_p, tokens_to_reach
from jaxtrain.study.summary import _format_csv, format_summary, summarise
from jaxtrain.study.work import CellRuns

NAMES = ("muon", "soap", "adamw", "twin")
PUBLISHED = {"muon": 3250, "soap": 2750, "adamw": 5625, "twin": 3250}


@pytest.fixture(scope="module")
def plan():
    base = config_lib.to_config_dict(config_lib.TrainConfig())
    base.model.update(L=1, D=16, H=2, G=2, K=8, F=32)
    base.data.update(batch=4, seq_len=32)
    study = {
        "contenders": {name: {} for name in NAMES},
        "grid": {name: {"optim": {"learning_rate": (0.01, 0.02, 0.04)}} for name in NAMES},
        "tune_adam": False,
        "search": "coordinates",
        "budget": (4, 2, 0, 2, 0, 0),
        "sizes": {"small": {}, "wide": {"model": {"D": 32, "F": 64}}},
        "horizons": (1, 2, 4),
        "published": PUBLISHED,
    }
    return build_plan({"base": base, "study": study})


def loss_of(contender, tokens, seed=0.0, noise=0.0):
    """Returns a loss that falls by 0.2 with each doubling; soap needs 0.8 of muon's tokens."""
    factor = {"muon": 1.0, "twin": 1.0, "soap": 1 / 0.8, "adamw": 0.6}[contender]
    return 5 - 0.2 * np.log2(tokens * factor / 1e5) + seed + noise


def invent(plan, sd=0.0):
    """Returns the runs of every cell; seeds differ by effects that all contenders share."""
    random, cells = np.random.default_rng(0), []
    for cell in plan.cells:
        grid = {"optim.learning_rate": 0.02}
        losses = {"learning_rate=0.02": 1.0, "learning_rate=0.01": 2.0, "learning_rate=0.04": 2.0}
        choices = {name: plan.tune(cell, name, losses, grid) for name in NAMES}
        paired = {name: [] for name in NAMES}
        for trial in plan.paired(cell, {name: grid for name in NAMES}):
            cfg = trial.config
            tokens = cfg.steps * cfg.data.batch * cfg.data.seq_len
            noise = random.normal(0, sd) if trial.contender != "twin" else 0.0
            loss = loss_of(trial.contender, tokens, 0.3 * trial.seed, noise)
            if trial.contender == "twin":
                loss = paired["muon"][-1].loss
            paired[trial.contender].append(Result(trial, loss, 1.0, 1.0, [], []))
        cells.append(CellRuns(cell, choices, paired, {}))
    return cells


def test_cells_have_20_tokens_for_each_parameter_times_their_horizon(plan):
    assert list(plan.cells) == [f"{s}-{h}x" for s in ("small", "wide") for h in (1, 2, 4)]
    for cell, horizon in zip(plan.cells.values(), (1, 2, 4) * 2, strict=True):
        cfg = plan.trial(cell.name, "muon", {}, 1).config
        tokens = cfg.steps * 4 * 32
        assert abs(tokens - 20 * horizon * cell.parameters) <= 64  # whole steps
        assert cfg.optim.total_steps == cfg.steps
    # Embedding and head, 4 matrices of attention, 3 of the MLP, and 3 gains.
    assert plan.cells["small-1x"].parameters == 2 * 256 * 16 + 4 * 16**2 + 3 * 16 * 32 + 3 * 16
    starts = [cell.starts_from for cell in plan.cells.values()]
    assert starts == ["", "small-1x", "small-2x", "small-1x", "wide-1x", "wide-2x"]
    assert [cell.budget for cell in plan.cells.values()] == [4, 2, 0, 2, 0, 0]
    assert plan.runs == 4 * (4 + 2 + 2 + 6 * 3)


def test_speedups_are_read_off_the_baselines_curve(plan):
    summary = summarise(plan, invent(plan))
    by_key = {(s.condition, s.contender): s for s in summary.speedups}
    assert len(by_key) == 6 * 3
    for (cell, contender), s in by_key.items():
        expected = {"soap": 1 / 0.8, "adamw": 0.6, "twin": 1.0}[contender]
        assert s.ratio == pytest.approx(expected, rel=1e-3), (cell, contender)
        assert s.low == pytest.approx(expected, rel=1e-3)  # without noise the interval is a point
        outside = {"soap": "4x", "adamw": "1x", "twin": "none"}[contender]
        assert s.extrapolated == cell.endswith(outside)


def test_intervals_cover_the_true_speedup_about_as_often_as_they_claim(plan):
    covered = []
    for seed in range(6):
        random = np.random.default_rng(seed)
        cells = invent(plan)
        for cell in cells:
            for name in NAMES:
                runs = cell.paired[name]
                noise = random.normal(0, 0.03, len(runs))
                runs[:] = [r._replace(loss=r.loss + e) for r, e in zip(runs, noise, strict=True)]
        for s in summarise(plan, cells).speedups:
            truth = {"soap": 1 / 0.8, "adamw": 0.6, "twin": 1.0}[s.contender]
            covered.append(s.low <= truth <= s.high)
    assert 0.9 <= np.mean(covered) <= 0.99  # of 108, not independent; 0.95 is claimed


def test_p_values_are_corrected_for_all_comparisons_of_all_cells(plan):
    summary = summarise(plan, invent(plan, sd=0.01))
    contests = [c for r in summary.results for c in r.contests[1:]]
    assert len(contests) == 18
    smallest = min(contests, key=lambda c: c.paired.p)
    assert smallest.p_corrected == pytest.approx(18 * smallest.paired.p)
    assert all(c.verdict == "wins" for c in contests if c.contender == "soap")


def test_the_rank_correlation_equals_scipys_and_its_p_that_of_all_permutations(plan):
    random = np.random.default_rng(0)
    x, y = random.permutation(6).astype(float), np.array([1.0, 2, 2, 3, 5, 4])
    assert kendall_tau(x[None], y)[0] == pytest.approx(stats.kendalltau(x, y).statistic)
    tau_of = lambda y: stats.kendalltau(x, y).statistic
    exact = stats.permutation_test((y,), tau_of, permutation_type="pairings", n_resamples=10**4)
    assert permutation_p(x, y) == pytest.approx(exact.pvalue, abs=1e-9)
    same = np.arange(4.0)
    assert permutation_p(same, same) == pytest.approx(2 / 24)  # the order and its reverse


def test_each_cell_and_all_together_have_a_tau_with_an_interval(plan):
    ranks = summarise(plan, invent(plan)).ranks
    assert [r.condition for r in ranks] == [*plan.cells, "all"]
    assert ranks[-1].tau == 1.0 and ranks[-1].contenders[0] == "soap"
    noisy = summarise(plan, invent(plan, sd=0.2)).ranks
    assert any(r.low < r.high for r in noisy) and all(r.low <= r.high <= 1 for r in noisy)


def test_loss_curves_that_do_not_fall_give_no_speedup():
    tokens = np.array([1.0, 2.0, 4.0])
    curves = np.array([[3.0, 2.0, 1.0], [3.0, 3.1, 1.0]])
    reached = tokens_to_reach(np.array([2.5, 2.0]), tokens, curves)
    assert reached[0] == pytest.approx(2**0.5) and np.isnan(reached[1])


def test_the_summary_states_verdicts_speedups_and_what_tau_cannot_show(plan):
    cells = invent(plan, sd=0.002)
    text = format_summary(plan, summarise(plan, cells[:4]))
    assert "soap against muon: better in 4 of 4 cells; speed-up in tokens 1.2" in text
    assert "n = 4 contenders" in text
    assert "at most 0.91 here, since 1 of 6 pairs of published figures are tied" in text
    assert "Verdict: over all cells, 4 contenders do not show whether the study ranks" in text
    assert "so far: 4 of 6 cells are finished" in text
    assert "no contender was tuned here" in text and "taken over from small-2x, not tuned" in text
    rows = list(csv.DictReader(io.StringIO(_format_csv(summarise(plan, cells)))))
    assert len(rows) == 6 * 4 and rows[1]["speedup"] and not rows[0]["speedup"]


def test_the_picture_has_a_panel_for_each_size(plan):
    results = summarise(plan, invent(plan, sd=0.01)[:4]).results
    png = horizon_curves("study", results, {c.name: c.group for c in plan.cells.values()}, 0.05)
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG") and width > 2 * height  # two panels of 6.5 x 6 inches


def test_contenders_of_one_picture_look_different():
    looks = [picture._look(i) for i in range(40)]
    assert len(set(looks)) == 40

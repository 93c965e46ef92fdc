"""The bench tries tiles in groups, saves each time, and continues where a call was cut."""

import json
import math
import time
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import contest_child, kernel_choice, search_space
from pallas_kernels.bench_plan import Job, is_done
from pallas_kernels.bench_results import OURS, join_results, mark_cut, mark_hung
from pallas_kernels.contest_child import (
    GROUP,
    TOGETHER,
    ContestJob,
    ContestRun,
    bodies,
    run_contest,
    tune,
)
from pallas_kernels.tiles import AttentionTiles, default_tiles, describe_tiles, is_triton
from tests.test_kernels_bench import ATTENTION, CONTESTS, NORM, run_fake, timed
from tests.test_kernels_shapes import fake_row

SHAPE = (8, 1_024, 12, 12, 64)
DEFAULT = default_tiles("attention", "sm_86", SHAPE)
BEST = timed(1.0, tiles=DEFAULT)
FOREVER = {"until": math.inf, "deadline": math.inf, "group_s": 0.0}


class FakeRun(ContestRun):
    """Compiles and times nothing: tiles take as many seconds as `seconds` says, others 2."""

    def __init__(self, seconds=None, tried=None, fail_in_group=math.inf):
        self.contest = CONTESTS[ATTENTION]._replace(shape=SHAPE, kernel=lambda tiles: tiles)
        self.results = {"tried": dict(tried or {})}
        self.groups, self.saved = [], {}
        self._seconds, self._fail_in_group = seconds or {}, fail_in_group

    def compile_all(self, functions):
        self.groups.append(list(functions))
        if len(self.groups) > self._fail_in_group:
            raise KeyboardInterrupt
        return functions

    def measure(self, compiled: Any, ours, samples=20):
        changed = [
            describe_tiles(tiles)
            for tiles, default in zip(compiled, DEFAULT, strict=True)
            if tiles != default
        ]
        assert ours and len(changed) == 1
        return timed(self._seconds.get(changed[0], 2.0))

    def save(self):
        self.saved = json.loads(json.dumps(self.results))


def test_a_group_of_tiles_is_timed_and_saved_before_the_next_is_compiled():
    run = FakeRun(fail_in_group=1)
    with pytest.raises(KeyboardInterrupt):
        tune(run, "sm_86", BEST, **FOREVER)
    first, second = run.groups
    assert len(first) == GROUP and list(run.saved["tried"]) == first
    assert run.saved["untried"][: len(second)] == second


def test_tiles_that_the_best_body_already_has_are_not_tried():
    run = FakeRun()
    tune(run, "sm_86", BEST, **FOREVER)
    assert f"dkv triton {describe_tiles(DEFAULT.dkv)}" not in run.results["tried"]
    assert len(run.results["tried"]) == 6 and run.results["untried"] == [TOGETHER]


def test_tuning_that_was_cut_continues_and_finds_the_same_tiles():
    seconds = {"128x64x8x3": 0.5, "128x32x8x2": 0.9, "64x32x4x2": 0.8}
    whole, cut = FakeRun(seconds), FakeRun(seconds, fail_in_group=1)
    found: Any = tune(whole, "sm_86", BEST, **FOREVER)
    assert [describe_tiles(tiles) for tiles in found] == ["128x64x8x3", "32x64x4x2", "64x32x4x2"]
    with pytest.raises(KeyboardInterrupt):
        tune(cut, "sm_86", BEST, **FOREVER)
    rest = FakeRun(seconds, tried=cut.saved["tried"])
    assert tune(rest, "sm_86", BEST, **FOREVER) == found
    assert rest.results["tried"] == whole.results["tried"]
    assert not set(cut.saved["tried"]).intersection(*rest.groups)


@pytest.mark.parametrize(
    "until_s, left_s, groups", [(-1.0, 1e3, 0), (60.0, 59.0, 0), (60.0, 61.0, 2)]
)
def test_no_group_starts_that_leaves_no_time_for_the_fastest_tiles(until_s, left_s, groups):
    run, now_s = FakeRun({"128x64x8x3": 0.5}), time.monotonic()
    times = {"until": now_s + until_s, "deadline": now_s + left_s, "group_s": 30.0}
    found = tune(run, "sm_86", BEST, **times)
    assert len(run.groups) == groups and (found == DEFAULT) == (not groups)
    assert (run.saved["untried"] == [TOGETHER]) == bool(groups)


def test_a_contest_with_untried_tiles_is_tuned_again():
    job = Job(CONTESTS[ATTENTION], tune=True)
    result = {"done": True, "tried": {"dq triton 64x64": 1.0}}
    assert is_done(job, result, again=False)
    assert is_done(job, result | {"untried": []}, again=False)
    assert not is_done(job, result | {"untried": ["dq triton 64x32"]}, again=False)
    assert not is_done(job, {"done": True}, again=False)


def test_what_was_tried_before_a_cut_or_a_hang_is_stored_with_the_contests_figures():
    before = {"done": True, "contestants": {"xla": timed(2.0)}, "date": "2026-01-01"}
    half = {"contestants": {"triton": timed(1.0)}, "tried": {"a": 1.0}, "untried": ["b"]}
    half |= {"date": "2026-02-02", "error": "killed after 9 s"}
    cut = join_results(before, mark_cut(half, 9.0), tune=True)
    text = "cut after 9 s, when the minutes were up"
    assert cut == before | {"tried": {"a": 1.0}, "untried": ["b"], "cut": text}
    hung = join_results(cut, mark_hung(half, 210.0, "abc"), tune=True)
    assert "cut" not in hung and hung["tried"] == {"a": 1.0} and "hung" in hung["tuning_error"]
    whole = half | {"done": True, "tried": {"a": 1.0, "b": 2.0}, "untried": []}
    done = join_results(hung, whole, tune=True)
    assert done["contestants"].keys() == {"xla", "triton"} and len(done["tried"]) == 2


def test_tiles_that_end_the_process_are_not_tried_again_and_again():
    before = {"done": True, "contestants": {"xla": timed(2.0)}}
    died = {"tried": {"a": 1.0}, "untried": ["b", "c", TOGETHER], "running": "b"}
    crashed = join_results(before, died | {"error": "exit status -11"}, tune=True)
    assert crashed["tried"] == {"a": 1.0, "b": "exit status -11"}
    assert crashed["untried"] == ["c", TOGETHER] and "running" not in crashed
    cut = join_results(before, mark_cut(died | {"error": "killed"}, 9.0), tune=True)
    assert cut["untried"] == died["untried"] and cut["tried"] == died["tried"]


def test_tuning_is_finished_once_the_fastest_tiles_were_measured_together(monkeypatch):
    contest = CONTESTS[ATTENTION]._replace(
        arrays=lambda key: [jnp.ones(4)],
        kernel=lambda tiles: lambda x: x + x,
        others={},
        exact=lambda x: 2 * x.astype(jnp.float64),
        tolerances=(1e-3,),
    )
    monkeypatch.setattr(contest_child, "contests_of", lambda tiny: [contest])
    saved, history = {}, []

    def save(results):
        saved.update(json.loads(json.dumps(results)))
        history.append(saved["untried"][-1:] if "untried" in saved else None)

    # The dq that was tried before was far faster, and no time is left for others.
    tried = {"dq triton 128x32x8x2": 1e-9}
    run_contest(ContestJob(contest.name, 60.0, True, tried), save, limit_s=0.0)
    assert saved["done"] and saved["contestants"]["tuned"]["tiles"][2] == [128, 32, 8, 2]
    assert history.count([TOGETHER]) > 1 and saved["untried"][-1] == TOGETHER

    tried |= dict.fromkeys(saved["untried"][:-1], 1.0)
    run_contest(ContestJob(contest.name, 60.0, True, tried), save)
    assert saved["untried"] == []


def test_a_child_that_tunes_gets_what_was_tried_before(monkeypatch, tmp_path):
    old = {"done": True, "contestants": {"triton": timed(9.0)}}
    old |= {"tried": {"forward a": 2.0}, "untried": ["forward b"]}
    results = {"device": "fake", "contests": {ATTENTION: old, NORM: old}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    contests = run_fake(monkeypatch, tmp_path, "--resume", "--tune", names=(ATTENTION,))
    assert contests[ATTENTION]["tried"] == {"forward a": 2.0, "forward b": 1e-3}
    assert contests[ATTENTION]["untried"] == []


def test_tuning_that_crashes_is_an_error_and_not_left_for_the_next_slice(monkeypatch, tmp_path):
    contest = CONTESTS[ATTENTION]._replace(name="attention abort")
    monkeypatch.setattr("tests.test_kernels_bench.CONTESTS", {"abort": contest})
    result = run_fake(monkeypatch, tmp_path, "--tune", names=("abort",))["attention abort"]
    assert result["done"] and "exit status -6" in result["tuning_error"]
    assert result["tried"] == {"forward b": 1e-3} and result["untried"] == ["forward c"]
    assert json.loads((tmp_path / "results.json").read_text())["left"] == []


def test_a_child_learns_the_seconds_that_it_has_when_its_turn_comes(monkeypatch, tmp_path):
    limits = []
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    job.write_text(json.dumps({"name": NORM, "tiny": True, "tune_s": 5.0}))  # without torch
    monkeypatch.setattr("sys.stdin", SimpleNamespace(readline=lambda: "12.5\n"))
    monkeypatch.setattr(
        contest_child, "run_contest", lambda job, save, limit_s: limits.append(limit_s)
    )
    contest_child.main(["", str(job), str(result)])
    assert limits == [12.5]


STORED = DEFAULT._replace(forward=AttentionTiles(64, 64, 4, 2))


def test_a_contest_also_times_the_tiles_that_the_table_has_for_its_shape(monkeypatch):
    contest = CONTESTS[ATTENTION]._replace(shape=SHAPE)
    row = fake_row("attention", "a40", SHAPE, tiles=STORED)
    rows = [row]
    monkeypatch.setattr(kernel_choice, "read_rows", lambda folder: rows)
    found = bodies(contest, "sm_86", "a40")
    assert found["stored"] == STORED and found["triton"] == DEFAULT and "stored" in OURS
    rows[0] = row._replace(tiles=DEFAULT)  # is timed once
    assert "stored" not in bodies(contest, "sm_86", "a40")
    rows[0] = row._replace(window=512)
    assert "stored" not in bodies(contest, "sm_86", "a40")
    rows.clear()
    assert "stored" not in bodies(contest, "sm_86", "a40")
    without_tiles = next(contest for contest in CONTESTS.values() if contest.op == "qk_rope")
    assert bodies(without_tiles, "sm_86", "a40") == {"triton": None}


def test_without_mosaic_only_tritons_tiles_are_tried(monkeypatch):
    monkeypatch.setattr(search_space.mosaic, "USABLE", False)
    for arch in search_space.SHORTLIST:
        for op in ("attention", "head", "square"):
            assert all(is_triton(tiles) for _, tiles in search_space.shortlist(op, arch))

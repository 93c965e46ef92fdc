"""The order in which bench measures: what is unknown first, an op after the other in turns."""

import pytest

from pallas_kernels import bench
from pallas_kernels.bench_plan import open_jobs, order_contests, plan_lines
from pallas_kernels.bench_results import row_key
from pallas_kernels.contest_sizes import TINY
from pallas_kernels.contests import build_contests
from tests.test_kernels_bench import ATTENTION, CONTESTS, HEAD, NORM, run_fake
from tests.test_kernels_shapes import fake_row

ALL = build_contests()
OPS = ["attention", "head", "square", "norm", "gelu", "qk_rope"]
TUNED_FIRST = [
    "attention both ways 8x1024x12:12x64",
    "attention both ways 4x2048x16:4x128",
    "head both ways 1024x768x50304",
    "square and quintic 12x768x768",
    "gelu both ways 16384x3072",
]


def test_each_op_has_its_turn_and_no_shipped_shape_comes_after_another():
    ordered = order_contests(ALL, known=())
    assert sorted(c.name for c in ordered) == sorted(c.name for c in ALL)
    assert [c.op for c in ordered[:12]] == OPS * 2
    assert [c.shipped for c in ordered] == [True] * 34 + [False] * 3
    assert all("4096" in c.name for c in ordered[-3:])
    attention = [c.name for c in ordered if c.op == "attention" and c.shipped]
    kinds = ["forward" if "forward" in n else "documents" in n for n in attention]
    assert kinds == [False] * 3 + [True] * 3 + ["forward"] * 3  # only pages have the forward


def test_contests_without_a_row_in_the_table_come_before_those_with_one():
    known = {("attention", (8, 1_024, 12, 12, 64), False, 0), ("head", (768, 50_304), False, 0)}
    known |= {("norm", (D,), False, 0) for D in (576, 768, 1_024, 1_280, 1_600, 2_048)}
    ordered = [c for c in order_contests(ALL, known) if c.shipped]
    found = [row_key(c) in known for c in ordered]
    assert sum(found) == 10 and found == sorted(found)
    assert [c.op for c in ordered[:5]] == ["attention", "head", "square", "gelu", "qk_rope"]
    assert ordered[0].name == "attention both ways 4x2048x16:4x128"
    assert {c.op for c in ordered if row_key(c) in known} == {"attention", "head", "norm"}
    documents = next(c for c in ALL if c.documents)
    assert row_key(documents) not in known


def test_with_tuning_one_contest_of_each_kind_is_tuned_before_the_rest_is_measured():
    known = {row_key(c) for c in ALL if c.op == "head"}
    jobs = open_jobs(ALL, {}, tune=True, again=False, known=known)
    first = [(job.contest.name, job.tune) for job in jobs[:10]]
    assert first == [(name, tuned) for name in TUNED_FIRST for tuned in (False, True)]
    rest = jobs[10:]
    assert [job.tune for job in rest] == [False] * 32 + [True] * 19
    assert [job.contest.op for job in rest[:2]] == ["norm", "qk_rope"]  # had no turn yet
    assert len({(job.contest.name, job.tune) for job in jobs}) == len(jobs)

    stored = {name: {"done": True, "tried": {}} for name in TUNED_FIRST[:2]}
    stored[TUNED_FIRST[2]] = {"done": True}
    resumed = open_jobs(ALL, stored, tune=True, again=False, known=known)
    assert [(job.contest.name, job.tune) for job in resumed[:5]] == first[5:]


def test_without_tuning_the_order_is_that_of_the_contests():
    names = [job.contest.name for job in open_jobs(ALL, {}, tune=False, again=False)]
    assert names == [contest.name for contest in order_contests(ALL, ())]


@pytest.mark.parametrize("jax_version, known", [("0.0.7", True), ("0.1.0", False)])
def test_the_table_of_this_chip_and_series_of_jax_decides(
    jax_version, known, monkeypatch, tmp_path, capsys
):
    shape = CONTESTS[ATTENTION].shape
    row = fake_row("attention", "h100", shape)._replace(jax=jax_version)
    other = fake_row("norm", "a40", CONTESTS[NORM].shape)._replace(jax=jax_version)
    monkeypatch.setattr(bench, "read_rows", lambda folder: [row, other])
    run_fake(monkeypatch, tmp_path, names=(ATTENTION, NORM))
    lines = capsys.readouterr().out.splitlines()
    assert (lines.index(NORM) < lines.index(ATTENTION)) == known


def test_a_trial_runs_every_kind_of_contest():
    tiny = build_contests(TINY, interpret=True)
    assert [c.op for c in order_contests(tiny, ())[:6]] == OPS
    assert HEAD in [c.name for c in tiny] and any(c.window for c in tiny)


def test_the_plan_of_the_minutes_says_how_many_contests_there_are_and_which_fit():
    contests = [CONTESTS[name] for name in (ATTENTION, HEAD, NORM)]
    jobs = open_jobs(contests, {HEAD: {"done": True}}, tune=True, again=False)
    lines = plan_lines(jobs, minutes=6.0)
    assert [job.tune for job in jobs] == [False, True, True, False]
    assert "2 contests at their default tiles, at most 2.5 minutes each" in lines[0]
    assert "2 tuned, at most 3.5 minutes each; 12.0 minutes in all" in lines[0]
    fits = f"2 fit in 6.0 minutes, the first {ATTENTION}, the last {ATTENTION}, tuned"
    assert fits in lines[1]
    assert plan_lines(jobs, minutes=3.0)[1].endswith(f"1 fits in 3.0 minutes: {ATTENTION}")
    assert "none fits" in plan_lines(jobs, minutes=1.0)[1]
    assert "all fit" in plan_lines(jobs, minutes=12.0)[1]
    assert not plan_lines([], minutes=6.0)

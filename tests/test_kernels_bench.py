"""The bench compares each kernel with float64 first, and no kernel can spoil another's row."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.benchmarks.first_day_results import find_left, find_problems
from jaxtrain.model.attention import ATTENTION as ATTENTION_ROUTES
from pallas_kernels import bench, bench_plan, contest_process, search_space
from pallas_kernels.bench_results import IN_TRAINING, as_row
from pallas_kernels.contest_sizes import TINY
from pallas_kernels.contests import build_contests
from pallas_kernels.correctness import compare, exact_results
from pallas_kernels.result_files import find_commit
from pallas_kernels.search_space import SHORTLIST, shortlist
from pallas_kernels.tiles import AttentionTiles, MosaicAttentionTiles, default_tiles
from pallas_kernels.torch_contests import as_tensors, measure_torch, torch_contestants

CONTESTS = {contest.name: contest for contest in build_contests(TINY, interpret=True)}
ATTENTION, HEAD, SQUARE, NORM = (
    next(name for name in CONTESTS if text in name)
    for text in ("attention both", "head", "square", "norm")
)
DOCUMENTS = next(name for name in CONTESTS if "documents" in name)


@pytest.fixture(scope="module")
def norm_case():
    contest = CONTESTS[NORM]
    arrays = contest.arrays(jax.random.key(0))
    return contest, arrays, exact_results(contest, arrays)


def check(contest, function, arrays, exact, ours=True):
    """Compares a function's results for one input."""
    return compare(contest, lambda: [function(*arrays)], [exact], ours)


@pytest.mark.parametrize("name", CONTESTS)
def test_every_implementation_is_near_float64(name):
    contest = CONTESTS[name]
    arrays = contest.arrays(jax.random.key(0))
    exact = exact_results(contest, arrays)
    assert all(x.dtype == jnp.float64 for x in exact)
    kernel = jax.jit(contest.kernel(default_tiles(contest.op, "sm_86")))
    found = check(contest, kernel, arrays, exact)
    assert not found.fault and len(found.distances) == len(contest.tolerances)
    for other in contest.others.values():
        assert not check(contest, jax.jit(other), arrays, exact, ours=False).fault


def spoil(contest, change):
    """Returns the contest's XLA implementation with its results changed."""

    def spoiled(*arrays):
        results = jax.tree.leaves(contest.exact(*arrays))
        gain = results[-1].astype(jnp.float32)
        return change([*(x.astype(jnp.bfloat16) for x in results[:-1]), gain])

    return spoiled


WRONG = {
    "one block is missing": (lambda xs: [xs[0].at[:8].set(0), *xs[1:]], "result 0 is"),
    "one number is not finite": (lambda xs: [xs[0], xs[1].at[3, 5].set(jnp.nan), *xs[2:]], "nan"),
    "a sum is imprecise": (lambda xs: [*xs[:4], xs[4] * 1.001], "result 4 is 0.001"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_has_a_fault(name, norm_case):
    contest, arrays, exact = norm_case
    change, reason = WRONG[name]
    with jax.enable_x64(True):
        right = jax.jit(spoil(contest, lambda xs: xs))
        assert not check(contest, right, arrays, exact).fault
        found = check(contest, jax.jit(spoil(contest, change)), arrays, exact)
    assert reason in found.fault


def test_a_kernel_whose_bits_change_from_call_to_call_has_a_fault(norm_case):
    contest, arrays, exact = norm_case
    calls = []

    def moving(*arrays):
        calls.append(1)
        results = [x.astype(jnp.float32) for x in exact]
        return [results[0] * (1 + 1e-6 * (len(calls) % 2)), *results[1:]]

    assert "differ in their bits" in check(contest, moving, arrays, exact).fault
    assert not check(contest, moving, arrays, exact, ours=False).fault


@pytest.mark.parametrize("name", [name for name in CONTESTS if "forward" not in name])
def test_pytorchs_contestants_return_the_same_results(name):
    pytest.importorskip("torch", reason='torch is missing: pip install "jaxtrain[crosscheck]"')
    contest = CONTESTS[name]
    arrays = contest.arrays(jax.random.key(0))
    want = jax.tree.leaves(contest.others["xla"](*arrays))
    for contestant in torch_contestants(contest).values():
        got = jax.tree.map(lambda x: x.detach().float().numpy(), contestant(*as_tensors(arrays)))
        for x, y in zip(jax.tree.leaves(got), want, strict=True):
            y = np.asarray(y, np.float32)
            assert np.linalg.norm(x - y) < 2e-2 * np.linalg.norm(y)


def test_the_reason_why_pytorch_is_unavailable_is_reported():
    ((name, reason),) = measure_torch(next(iter(CONTESTS.values())), [], "cuda")
    assert name == "torch" and ("not installed" in reason or "no CUDA device" in reason)


def timed(seconds, **values):
    return {"median_s": seconds, "low_s": 0.0, "high_s": 9.0} | values


def test_a_row_compares_the_kernel_only_with_what_training_can_run():
    contest = SimpleNamespace(op="attention", shape=(1,) * 5, documents=False, window=0)
    others = {"cudnn": timed(251.0), "xla": timed(900.0), "torch compiled": timed(150.0)}
    others |= {"tokamax": timed(200.0), "triton": timed(228.0, tiles=None)}
    row = as_row(contest, "h100", others | {"mosaic": "wrong: result 0 is nan"}, "0.11.2")
    assert (row.other, row.other_s, row.kernel_s) == ("cudnn", 251.0, 228.0)
    row = as_row(contest, "h100", others | {"cudnn": timed(1.0, fault="off by 0.5")}, "0.11.2")
    assert row.other == "xla"
    assert as_row(contest, "h100", others | {"triton": "wrong"}, "0.11.2") is None
    routes = {"cudnn": "cudnn", "xla": "reference"}  # of attention
    assert set(IN_TRAINING) == routes.keys() and ATTENTION_ROUTES.keys() >= set(routes.values())


def run_fake(monkeypatch, tmp_path, *argv, names=(ATTENTION, DOCUMENTS, HEAD, SQUARE, NORM)):
    program = str(Path(__file__).parent / "fake_contest_child.py")
    monkeypatch.setattr(contest_process, "COMMAND", (sys.executable, program))
    monkeypatch.setattr(bench_plan, "CONTEST_S", 3.0)
    monkeypatch.setattr(bench_plan, "TUNE_S", 0.5)
    monkeypatch.setattr(bench, "TUNED", tmp_path / "tuned")
    contests = [CONTESTS[name] for name in names]
    monkeypatch.setattr(bench, "contests_of", lambda tiny: contests)
    out = tmp_path / "results.json"
    bench.main([f"--out={out}", "--save", *argv])
    return json.loads(out.read_text())["contests"]


@pytest.mark.long
def test_a_kernel_that_hangs_crashes_or_is_wrong_costs_only_its_own_row(
    monkeypatch, tmp_path, capsys
):
    contests = run_fake(monkeypatch, tmp_path, "--tune")
    hung = "hung: killed after all of its 3 s, at commit"
    assert contests[DOCUMENTS]["error"].startswith(hung)
    assert contests[DOCUMENTS]["hung"]["limit_s"] == 3.0
    assert contests[SQUARE]["done"] and "all of its 3.5 s" in contests[SQUARE]["tuning_error"]
    assert "exit status -6" in contests[HEAD]["error"]
    assert "xla" in contests[HEAD]["contestants"]  # what was measured before the crash
    rows = json.loads((tmp_path / "tuned" / "h100.json").read_text())
    assert [row["op"] for row in rows] == ["attention", "norm"]
    text = capsys.readouterr().out
    assert text.index("plan: 5 contests at their default tiles") < text.index(f"{ATTENTION}\n")
    assert "wrong: result 0 is 0.5 from float64" in text
    assert text.count(f"not finished: {hung}") == 1  # it was not tuned
    assert text.count(f"{HEAD}\n") == 1 and f"{HEAD}: not tuned, it crashed" in text
    results = [json.loads((tmp_path / "results.json").read_text())]
    problems = find_problems(results)
    assert any(problem.startswith(f"{DOCUMENTS}: {hung}") for problem in problems)
    assert not find_left(results)  # the time was not up

    assert {result["commit"] for result in contests.values()} == {find_commit()}

    # Neither what has results nor what hung runs again, with or without tuning.
    names = DOCUMENTS, SQUARE, NORM
    again = run_fake(monkeypatch, tmp_path, "--resume", "--tune", names=names)
    text = capsys.readouterr().out
    assert again == contests and "us (" not in text and f"{DOCUMENTS}: hung" in text
    run_fake(monkeypatch, tmp_path, "--resume", "--only=documents", names=names)
    assert f"not finished: {hung}" in capsys.readouterr().out


def test_a_contest_that_the_calls_deadline_cut_is_not_called_hung(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.Bench, "_left_s", lambda self: 1.0)
    monkeypatch.setattr(bench_plan, "FIRST_S", 0.5)
    contests = run_fake(monkeypatch, tmp_path, names=(DOCUMENTS,))
    result = contests[DOCUMENTS]
    assert result["cut"] == "cut after 1 s, when the minutes were up"
    assert "hung" not in result and "error" not in result and "xla" in result["contestants"]
    assert "not finished: cut after 1 s" in capsys.readouterr().out
    results = [json.loads((tmp_path / "results.json").read_text())]
    assert not find_problems(results)  # the next slice measures it
    assert find_left(results) == ["1 contest at its default tiles"]


@pytest.mark.parametrize("left_s, measured", [(31.0, 2), (29.0, 0)])
def test_no_contest_starts_in_less_time_than_contests_take(
    left_s, measured, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(bench.Bench, "_left_s", lambda self: left_s)
    contests = run_fake(monkeypatch, tmp_path, "--minutes=7", names=(NORM, ATTENTION))
    assert len(contests) == measured
    why = f"{NORM}: not measured, only 29 s of the 7 minutes are left, and a contest takes 30 s\n"
    assert (why in capsys.readouterr().out) == (not measured)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["left"] == ([] if measured else ["2 contests at their default tiles"])


def test_a_contest_that_hung_or_is_tuned_is_not_taken_for_the_length_of_a_contest(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(bench_plan, "FIRST_S", 0.0)
    needed = []

    def why_no_time(taken_s, left_s, minutes):
        needed.append(max(taken_s, default=0.0))
        return ""

    monkeypatch.setattr(bench, "why_no_time", why_no_time)
    run_fake(monkeypatch, tmp_path, "--tune", names=(SQUARE, NORM))
    assert len(needed) == 3 and max(needed) < 3.0
    assert "hung: killed after all of its 3.5 s" in capsys.readouterr().out


def test_the_time_that_a_contest_needs_is_that_of_the_longest_one_so_far():
    can_start = lambda taken_s, left_s: not bench_plan.why_no_time(taken_s, left_s, 7.0)
    assert [can_start([], s) for s in (29.0, 31.0)] == [False, True]
    assert [can_start([18.0, 21.0, 12.0], s) for s in (20.0, 22.0)] == [False, True]
    assert bench_plan.why_no_time([0.1], -1.0, 7.0) == "the 7 minutes are up"


@pytest.mark.long
def test_the_interpreted_bench_compares_and_times_a_contest(tmp_path, capsys):
    out = tmp_path / "results.json"
    bench.main(["--tiny", "--minutes=2", "--only", "square", f"--out={out}"])
    results = json.loads(out.read_text())
    (contest,) = results["contests"].values()
    assert "trial" in results and contest["done"]
    assert contest["contestants"]["triton"]["median_s"] > 0
    assert max(contest["contestants"]["triton"]["distances"]) < 3e-3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and all(line.startswith("trial: ") for line in lines)
    assert any("square" in line and "times mean nothing" in line for line in lines)


@pytest.mark.parametrize("fact, value", [("device", "another"), ("jax", "0.9.9")])
def test_results_of_another_device_or_jax_are_not_continued(fact, value, monkeypatch, tmp_path):
    results = {"device": "fake", "jax": "0.0.9", "contests": {}} | {fact: value}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match=f"same device .* of .*{value}.*; this is "):
        run_fake(monkeypatch, tmp_path, "--resume")


def test_at_most_eight_tiles_of_an_op_are_tried():
    for ops in SHORTLIST.values():
        assert all(sum(map(len, kernels.values())) <= 8 for kernels in ops.values())


@pytest.mark.parametrize("arch", SHORTLIST)
def test_the_tiles_that_are_tried_for_attention_follow_the_width_of_its_heads(arch, monkeypatch):
    monkeypatch.setattr(search_space.mosaic, "USABLE", True)
    of_width = {K: set(shortlist("attention", arch, (4, 2_048, 16, 4, K))) for K in (64, 128)}
    # They spill with heads of 128, or were chosen for the occupancy that heads of 64 have.
    only_64 = {
        ("forward", MosaicAttentionTiles(256, 64, 4, variant="folded", groups=4)),
        ("dq", AttentionTiles(64, 64, 8, 2)),
    }
    assert of_width[64] - of_width[128] == (only_64 if arch == "sm_90" else set())
    assert of_width[128] and of_width[128] <= of_width[64]
    assert len(set(shortlist("square", arch, (768,)))) >= 6

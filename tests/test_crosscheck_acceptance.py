"""A part of crosscheck's acceptance that takes seconds, and its counts."""

import dataclasses
import json

import pytest

reason = 'torch or transformers is missing: pip install "jaxtrain[crosscheck]" to train with them'
pytest.importorskip("torch", reason=reason)
pytest.importorskip("transformers", reason=reason)

from tests import crosscheck_acceptance as acceptance  # noqa: E402
from tests import crosscheck_cases as cases  # noqa: E402
from tests.crosscheck_models import Fault, Variant  # noqa: E402
from tests.crosscheck_sides import one_thread_and_old_x64_setting  # noqa: E402, F401

LOOPS = {
    "transformers": Variant("transformers", "sdpa", "fused", seed=1),
    "reversed rows": Variant("plain", "eager", "foreach", "rows", seed=2),
    "reversed channels": Variant("plain", order="channels", data="uniform", seed=3),
    "jaxtrain's PyTorch model": Variant("twin", spread=False, seed=4),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A Bench on runs of 3 steps: these faults show by then, most at the first."""
    base = dataclasses.replace(cases.BASES["gpt2"], steps=3, width=32)
    with (
        pytest.MonkeyPatch.context() as patch,
        acceptance.Bench(tmp_path_factory.mktemp("acceptance")) as bench,
    ):
        patch.setitem(cases.BASES, "gpt2", base)
        yield bench


@pytest.mark.parametrize("name", LOOPS)
def test_a_correct_loop_agrees_in_float32(bench, name):
    row = bench.check_correct(cases.Correct(name, cases.BASES["gpt2"], LOOPS[name]))
    assert row["verdict"] == "agree", row


@pytest.mark.parametrize(
    ("name", "size"),
    [*(("exact gelu", size) for size in cases.SIZES), ("learning rate", 0.01), ("learning rate", 1)]
    + [("targets off by one", 1)],
)
def test_a_fault_is_reported_or_below_rounding(bench, name, size):
    row = bench.check_fault(cases.FAULTS[name], Fault(name, size), ["float32"])
    assert row["ok"], row
    if size == 1:
        assert row["float32"]["verdict"] == "differ" and row["float32"]["located"], row


def test_the_acceptance_has_200_correct_loops_and_three_sizes_of_each_fault():
    loops, faults = cases.correct_loops(), cases.planted_faults()
    names = [case[0] for case in [*loops, *faults]]
    assert (len(loops), len(faults), len(set(names))) == (200, 3 * len(cases.FAULTS), len(names))


def test_wrong_verdicts_are_counted_and_a_second_start_runs_nothing(tmp_path, capsys):
    """The results of all cases are there; one correct loop and one fault are wrong."""
    compared = {"worst": [1, "update", "w", 2e-4, 1e-4], "seconds": 1.0}
    right = compared | {"verdict": "agree", "ok": True}
    rows = {case.name: right for case in cases.correct_loops()}
    rows[next(iter(rows))] = compared | {"verdict": "differ", "ok": False}
    for name, *_ in cases.planted_faults():
        found = {"verdict": "differ", "stage": "loss", "located": True}
        rows[name] = {"float32": found, "float64": found, "ok": True}
    rows[name] = {"float32": {"verdict": "missed"}, "float64": found, "ok": False}
    lines = [json.dumps({"case": name} | row) + "\n" for name, row in rows.items()]
    (tmp_path / "cases.jsonl").write_text("".join(lines))
    assert acceptance.main([f"--out={tmp_path}"]) == 1
    printed = capsys.readouterr().out
    assert "200 correct loops, of which 1 were reported as different" in printed
    assert "0 below rounding, 1 missed" in printed
    assert (tmp_path / "cases.jsonl").read_text() == "".join(lines)

"""The bench with wrong flags, damaged files, broken children and interruptions."""

import json
import os
import signal
import stat
import sys
import threading
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, contest_child, contest_process, torch_contests
from pallas_kernels.bench_results import merge_rows
from pallas_kernels.child_process import ChildProcess
from pallas_kernels.contest_child import ContestJob, ContestRun, run_contest
from pallas_kernels.correctness import compare
from pallas_kernels.result_files import lock_file, write_json
from pallas_kernels.torch_contests import measure_torch
from tests.test_kernels_bench import ATTENTION, CONTESTS, DOCUMENTS, NORM, run_fake, timed

WINDOW = next(name for name in CONTESTS if "window" in name)


@pytest.mark.parametrize("only", [["nrm"], ["norm", "nrm"]])
def test_a_contest_that_does_not_exist_is_an_error(only):
    with pytest.raises(SystemExit, match="--only must be part of a contest's name; got nrm"):
        bench.main(["--tiny", "--only", *only])


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "x"])
def test_minutes_must_be_a_positive_number(minutes, capsys):
    with pytest.raises(SystemExit):
        bench.parse([f"--minutes={minutes}"])
    assert f"--minutes: must be a positive number; got {minutes}." in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file/results.json", "file/a/results.json", "."])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_measured(
    out, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(contest_process, "ChildProcess", None)  # no child may start
    with pytest.raises(SystemExit, match=f"error: --out .*{tmp_path}"):
        bench.main(["--tiny", f"--out={tmp_path / out}"])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"contests": 3}', '{"contests": {"a": 1}}'])
def test_a_damaged_file_cannot_be_resumed(text, tmp_path, monkeypatch):
    monkeypatch.setattr(contest_process, "ChildProcess", None)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit, match="--resume .* got .*results.json"):
        bench.main(["--tiny", "--resume", f"--out={tmp_path / 'results.json'}"])


@pytest.mark.parametrize("tiny", [False, True])
def test_a_trial_and_a_measurement_never_share_a_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(contest_process, "ChildProcess", None)
    out = tmp_path / "results.json"
    trial = {} if tiny else {"trial": "interpreted at tiny shapes; the times mean nothing"}
    out.write_text(json.dumps({"device": "H100", "contests": {}} | trial))
    kinds = "a measurement, which a trial" if tiny else "a trial, which a measurement"
    with pytest.raises(SystemExit, match=f"results.json is {kinds} cannot continue"):
        bench.main(["--resume", f"--out={out}", *["--tiny"] * tiny])


def named(*kinds):
    """Returns contests whose names make the fake child fail in these ways, and one that works."""
    contest = CONTESTS[NORM]
    return {kind: contest._replace(name=f"norm {kind}") for kind in (*kinds, "good")}


def test_a_child_whose_result_cannot_be_read_costs_only_its_own_row(monkeypatch, tmp_path):
    contests = named("silent", "half", "list", "chatty")
    monkeypatch.setattr("tests.test_kernels_bench.CONTESTS", contests)
    results = run_fake(monkeypatch, tmp_path, names=contests)
    errors = [results[f"norm {kind}"]["error"] for kind in ("silent", "half", "list", "chatty")]
    assert "result.json" in errors[0] and "No such file" in errors[0]
    assert all("must have a JSON object" in error for error in errors[1:3])
    assert errors[3].startswith("exit status 7: ") and errors[3].endswith("the last line")
    assert len(errors[3]) < 500 and results["norm good"]["done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_ends_all_its_children(number, monkeypatch, tmp_path):
    started, path = [], tmp_path / "results.json"

    class Recorded(ChildProcess):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self._process)

        def send_line(self, text):
            super().send_line(text)
            if len(started) == 3:  # the device's, the hanging one and the one that waits
                threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    monkeypatch.setattr(contest_process, "ChildProcess", Recorded)
    with pytest.raises(SystemExit) as stop:
        run_fake(monkeypatch, tmp_path, names=(DOCUMENTS, NORM))
    assert stop.value.code == 128 + number
    assert len(started) == 3 and all(process.poll() is not None for process in started)
    with lock_file(path):  # is free again
        pass


def test_two_benches_cannot_write_one_file(tmp_path):
    out = tmp_path / "new" / "results.json"
    with lock_file(out), pytest.raises(SystemExit, match="--out .*results.json is in use"):
        bench.main(["--tiny", f"--out={out}"])
    assert os.listdir(out.parent) == []


def test_a_written_file_can_be_read_by_others_and_a_failure_leaves_nothing(tmp_path):
    write_json(tmp_path / "a.json", {})
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", object())
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "plain"}


def test_what_the_time_did_not_allow_is_listed_and_done_by_the_next_call(
    monkeypatch, tmp_path, capsys
):
    names = (NORM, ATTENTION)
    assert run_fake(monkeypatch, tmp_path, "--minutes=1e-9", names=names) == {}
    left = [f"{name}: not measured, the 1e-09 minutes are up" for name in names]
    left.append("left: 2 contests at their default tiles; --resume with the same --out continues")
    assert capsys.readouterr().out.splitlines()[-3:] == left
    contests = run_fake(monkeypatch, tmp_path, "--resume", names=names)
    assert all(contests[name]["done"] for name in names)
    assert "left:" not in capsys.readouterr().out
    (tmp_path / "tuned" / "h100.json").unlink()
    assert run_fake(monkeypatch, tmp_path, "--resume", names=names) == contests
    assert len(json.loads((tmp_path / "tuned" / "h100.json").read_text())) == 2


ROW = {"op": "norm", "shape": [768], "jax": "0.11.2", "documents": False, "date": "2026-01-01"}


def test_saving_some_contests_keeps_the_rows_of_the_others():
    names = ("norm", "norm 2", "square", "norm 3")
    contests = [
        CONTESTS[NORM]._replace(op=name.split()[0], name=name, shape=(size,))
        for name, size in zip(names, (768, 1_024, 768, 2_048), strict=True)
    ]
    contests[-1] = contests[-1]._replace(in_table=False)  # measured, but adds no row
    old = [
        ROW,  # measured again
        ROW | {"jax": "0.10.2"},
        ROW | {"shape": [1_024]},  # measured again, and wrong
        ROW | {"shape": [2_048]},
        ROW | {"op": "square"},  # not measured now
        ROW | {"window": 512},  # not measured now
    ]
    right = {"contestants": {"triton": timed(1.0, tiles=None), "xla": timed(2.0)}, "done": True}
    wrong = {"contestants": {"triton": "wrong", "xla": timed(2.0)}, "done": True}
    results = {"chip": "h100", "jax": "0.11.7", "contests": {"norm": right, "norm 2": wrong}}
    results["contests"]["norm 3"] = right
    results |= {"command": ["python"], "date": "2026-02-02"}
    rows = merge_rows(old, contests, results)
    assert rows[:-1] == [old[1], *old[3:]]
    assert rows[-1]["jax"] == "0.11.7" and rows[-1]["shape"] == (768,)
    assert rows[-1]["date"] == "2026-02-02" and rows[-1]["command"] == "python"


OURS_AND_XLA = {"triton": timed(4.0, tiles=None), "xla": timed(3.0)}
ENDINGS = {  # of a contest whose fastest body, Mosaic's, has no time; and whether the row stays
    "cut before our kernel": ({"contestants": {"xla": timed(3.0)}, "cut": "after 9 s"}, True),
    "cut before Mosaic's body": ({"contestants": OURS_AND_XLA, "cut": "after 9 s"}, True),
    "crashed": ({"contestants": OURS_AND_XLA, "error": "exit status -6"}, False),
    "hung": ({"contestants": OURS_AND_XLA, "error": "hung", "hung": {"limit_s": 150}}, False),
    "no rival has a time": ({"contestants": {"triton": timed(4.0)}, "done": True}, True),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_contest_that_was_not_finished_adds_no_row_and_a_cut_one_removes_none(ending):
    result, stays = ENDINGS[ending]
    results = {"chip": "h100", "jax": "0.11.7", "contests": {"norm": result}}
    results |= {"command": ["python"], "date": "2026-02-02"}
    contest = CONTESTS[NORM]._replace(name="norm", shape=(768,))
    assert merge_rows([ROW], [contest], results) == [ROW] * stays


def test_a_damaged_table_is_an_error_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "h100.json").write_text("[{")
    with pytest.raises(SystemExit, match="h100.json must contain rows of the bench"):
        run_fake(monkeypatch, tmp_path, names=(NORM,))


def test_stored_commands_have_no_path_of_this_machine(monkeypatch, tmp_path):
    run_fake(monkeypatch, tmp_path, "--minutes=2", names=(NORM,))
    words = ["python", "-m", "pallas_kernels.bench", "--out=results.json", "--save", "--minutes=2"]
    assert json.loads((tmp_path / "results.json").read_text())["command"] == words
    [row] = json.loads((tmp_path / "tuned" / "h100.json").read_text())
    assert row["command"] == " ".join(words)


def test_resuming_says_what_is_kept_and_tunes_what_was_not(monkeypatch, tmp_path, capsys):
    old = {"done": True, "contestants": {"torch sdpa": timed(0.5), "triton": timed(9.0)}}
    results = {"device": "fake", "contests": {ATTENTION: old, NORM: old}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    contests = run_fake(monkeypatch, tmp_path, "--resume", "--tune", names=(ATTENTION, NORM))
    assert contests[NORM] == old  # its kernel has no tiles to tune
    contestants = contests[ATTENTION]["contestants"]
    assert contestants["torch sdpa"]["median_s"] == 0.5 and "xla" in contestants
    assert contestants["triton"]["median_s"] < 9.0  # measured again
    kept = f"{tmp_path / 'results.json'} has the results of 1 of 2 contests, which are kept"
    assert kept in capsys.readouterr().out


def test_tuning_measures_no_other_implementation_and_ends_without_a_correct_kernel(monkeypatch):
    contest = CONTESTS[ATTENTION]._replace(
        arrays=lambda key: [jnp.ones(4)],
        kernel=lambda tiles: lambda x: 2 * x,
        others={"xla": lambda x: 1 * x},
        exact=lambda x: x.astype(jnp.float64),
        tolerances=(1e-3,),
    )
    monkeypatch.setattr(contest_child, "contests_of", lambda tiny: [contest])
    saved = {}
    run_contest(ContestJob(contest.name, tune_s=1.0, tiny=True), saved.update)
    assert list(saved["contestants"]) == ["triton"]
    assert saved["contestants"]["triton"].startswith("wrong")
    assert saved["done"] and saved["tried"] == {}


def test_a_contestant_is_traced_once_for_all_inputs():
    traces = []

    def double(x):
        traces.append(x.shape)
        return 2 * x

    contest = CONTESTS[NORM]._replace(
        arrays=lambda key: [jax.random.normal(key, (4,))],
        exact=lambda x: 2 * x.astype(jnp.float64),
        tolerances=(1e-6,),
    )
    run = ContestRun(contest, save=lambda results: None)
    compiled: Any = run.compile_all({"ours": double})["ours"]
    assert traces == [(4,)]
    results = compiled()
    assert len(results) == len(run.inputs) == 2 and not jnp.array_equal(*results)
    assert not compare(contest, compiled, run._exact).fault


def test_all_children_share_a_cache_of_compiled_programs_beside_the_results(monkeypatch, tmp_path):
    folders = []

    class Recorded(ChildProcess):
        def __init__(self, argv, output, env: Any):
            super().__init__(argv, output, env)
            folders.append(env["JAX_COMPILATION_CACHE_DIR"])

    monkeypatch.setattr(contest_process, "ChildProcess", Recorded)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    run_fake(monkeypatch, tmp_path, names=(NORM,))
    assert folders == [str(tmp_path / "results.json.cache")] * 2
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    run_fake(monkeypatch, tmp_path, names=(NORM,))
    assert folders[2:] == ["/mine"] * 2


@pytest.mark.parametrize(
    "name, tune_s, imports",
    [(NORM, 0.0, True), (NORM, 9.0, False), (DOCUMENTS, 0.0, False), (WINDOW, 0.0, False)],
)
def test_torch_is_imported_before_the_contests_turn_and_only_where_it_takes_part(
    name, tune_s, imports, monkeypatch, tmp_path
):
    events, job = [], {"name": name, "tune_s": tune_s, "tiny": True}
    (tmp_path / "job.json").write_text(json.dumps(job))
    stdin = SimpleNamespace(readline=lambda: events.append("waits") or "9.0")
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr(torch_contests, "import_torch", lambda: events.append("torch") or "")
    monkeypatch.setattr(contest_child, "run_contest", lambda *args, **kw: events.append("runs"))
    contest_child.main(["", str(tmp_path / "job.json"), ""])
    assert events == ["torch"] * imports + ["waits", "runs"]


@pytest.mark.parametrize("name", [DOCUMENTS, WINDOW])
def test_a_contest_in_which_torch_takes_no_part_does_not_mention_it(name, monkeypatch):
    monkeypatch.setattr(torch_contests, "import_torch", lambda: "torch is not installed")
    assert not list(measure_torch(CONTESTS[name], [], "cuda"))
    assert list(measure_torch(CONTESTS[NORM], [], "cuda")) == [("torch", "torch is not installed")]


def test_a_torch_whose_libraries_are_missing_is_a_reason_and_no_crash(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: not found')")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert torch_contests.import_torch() == "OSError: libcudart.so: not found"

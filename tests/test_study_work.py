"""Two processes work on one study, while a third one dies with its claim on a run.

Nothing is trained: `invent` writes the files of a run that has ended with an invented loss.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.config import train_config as config_lib
from jaxtrain.files import write_atomic
from jaxtrain.run_directory.contents import CONFIG, SUMMARY
from jaxtrain.run_directory.lock import RunLock, RunLocked
from jaxtrain.study.plan import build_plan
from jaxtrain.study.run_records import FILE, RunRecords, write_records
from jaxtrain.study.runs import CLAIM, Result, run_trial
from jaxtrain.study.summary import format_summary, summarise
from jaxtrain.study.work import Work

NAMES = ("muon", "soap", "adamw")
HOLD = """
import sys, time
from jaxtrain.run_directory.lock import RunLock
with RunLock(sys.argv[1], name=sys.argv[2]):
    print("claimed", flush=True)
    time.sleep(300)
"""


def tiny_plan(folder):
    base = config_lib.to_config_dict(config_lib.TrainConfig())
    base.model.update(L=1, D=16, H=2, G=2, K=8, F=32)
    study = {
        "workdir": str(folder),
        "contenders": {name: {"optim": {"warmup_steps": i}} for i, name in enumerate(NAMES)},
        "grid": {name: {"optim": {"learning_rate": (0.01, 0.02, 0.04)}} for name in NAMES},
        "tune_adam": False,
        "search": "coordinates",
        "budget": (5, 3),
        "horizons": (1, 2),
        "published": {"muon": 2, "soap": 1, "adamw": 3},
    }
    return build_plan({"base": base, "study": study})


def invent(cfg, devices, quiet):
    """Writes the files of a run that has ended; its loss is lowest at a rate of 0.05."""
    folder = Path(cfg.workdir)
    loss = 3 - 0.1 * math.log(cfg.steps) + math.log(cfg.optim.learning_rate / 0.05) ** 2
    loss += 0.1 * NAMES.index(folder.parts[-3]) + 0.01 * cfg.seed
    time.sleep(0.02)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": cfg.steps, "eval/loss_nats": loss}))
    # As in a real run, another process never reads a part of these files.
    write_atomic(folder / CONFIG, json.dumps({"config": config_lib.to_dict(cfg), "data": {}}))
    summary = {"step": cfg.steps, "stopped_by": None, "eval/loss_nats": loss}
    write_atomic(folder / SUMMARY, json.dumps(summary))
    return 0


def work(folder, print_line):
    """Works on the study to its end, and prints its tables."""
    plan = tiny_plan(folder)
    process = Work(plan, None, print_line, invent)
    process.run_all()
    print_line(format_summary(plan, summarise(plan, process.finished())))


def start(*argv):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The plan, and the lines of both processes; a third one is killed while the others wait."""
    folder = tmp_path_factory.mktemp("work")
    plan = tiny_plan(folder)
    [claimed] = plan.tuning("1x", "soap", [{"optim.learning_rate": 0.02}])
    Path(claimed.config.workdir).mkdir(parents=True)
    holder = start("-c", HOLD, claimed.config.workdir, CLAIM)
    other = start(__file__, str(folder))
    try:
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(RunLocked, match=f"in use by pid {holder.pid} on .*, started "):
            run_trial(claimed, None, invent)
        theirs = [next(line for line in other.stdout if line.startswith("run "))]
        ours = []

        def print_line(line):
            ours.extend(line.splitlines())
            if line.startswith("waiting for"):
                holder.kill()
                holder.wait()

        work(folder, print_line)
        theirs += other.communicate(timeout=120)[0].splitlines()
        assert other.returncode == 0
    finally:
        for process in (holder, other):
            process.kill()
            process.communicate()
    return plan, ours, theirs


def trained(lines):
    return [tuple(line.split()[4:9]) for line in lines if line.startswith("run ")]


def test_every_run_is_trained_once_although_two_processes_share_them(outputs):
    plan, ours, theirs = outputs
    assert trained(ours) and trained(theirs)
    both = trained(ours) + trained(theirs)
    # The search at 1x ends after 4 of at most 5 runs, that at 2x after 3.
    assert len(both) == len(set(both)) == 3 * (4 + 3 + 2 * 3) == plan.runs - 3
    assert Work(plan).pending() == []


def test_a_run_that_another_process_ends_just_before_the_claim_is_not_reported_as_trained(
    tmp_path, monkeypatch
):
    plan, lines = tiny_plan(tmp_path), []
    process = Work(plan, None, lines.append, invent)
    trial = process.pending()[0]
    run_trial(trial, None, invent)
    monkeypatch.setattr("jaxtrain.study.work.is_finished", lambda trial: False)  # a moment ago
    assert process._try(trial)
    assert (lines, process.reused, process.count) == ([], 1, 1)


def test_a_claim_holds_until_its_process_dies_and_is_then_taken_over(outputs):
    plan, ours, theirs = outputs
    waited = next(i for i, line in enumerate(ours) if line.startswith("waiting for"))
    assert "soap" not in [contender for _, contender, *_ in trained(ours[:waited])]
    assert "soap" in [contender for _, contender, *_ in trained(ours[waited:] + theirs)]
    assert list(Path(plan.study.workdir).rglob(CLAIM)) == []


def test_a_run_that_ended_under_a_claim_is_read_once_the_claim_is_over(outputs):
    plan, _, _ = outputs
    process = Work(plan)
    [trial] = plan.tuning("1x", "muon", [{"optim.learning_rate": 0.02}])
    with RunLock(trial.config.workdir, name=CLAIM):
        assert [t for t in process.pending() if t.contender == "muon"] == [trial]
        with pytest.raises(RunLocked):
            run_trial(trial, None, invent)
    assert process.pending() == []


def test_both_processes_come_to_the_same_verdicts(outputs):
    _, ours, theirs = outputs
    tables = "\n".join(ours).partition("== 1x")[2]
    assert tables and tables == "\n".join(theirs).partition("== 1x")[2].rstrip("\n")
    assert (
        "soap against muon: worse in 2 of 2 cells" in tables
    )  # by 0.1 on every seed, without noise
    assert "beyond its grid, optim.learning_rate was tried at 0.08" in tables


def test_a_horizon_starts_from_the_settings_of_the_one_before(outputs):
    one = Work(outputs[0])
    assert one.pending() == []
    first, second = one.finished()
    assert (
        list(first.choices["muon"].losses)
        == [f"learning_rate={rate}" for rate in (0.02, 0.01, 0.04, 0.08)]
        and first.choices["muon"].setting == "learning_rate=0.04"
    )
    assert list(second.choices["muon"].losses)[0] == "learning_rate=0.04"


def test_a_study_continues_elsewhere_from_the_records_of_its_runs(outputs, tmp_path):
    plan = outputs[0]
    lines = (Path(plan.study.workdir) / FILE).read_text().splitlines()
    assert len(lines) == plan.runs - 3  # all that both processes trained
    kept = [line for line in lines if json.loads(line)["config"].get("seed") != 3]
    (tmp_path / FILE).write_text("\n".join(kept) + "\n")
    trained, elsewhere = [], tiny_plan(tmp_path / "new")

    def train(cfg, devices, quiet):
        trained.append(cfg.seed)
        return invent(cfg, devices, quiet)

    process = Work(elsewhere, None, print, train, RunRecords(tmp_path / FILE))
    process.run_all()
    assert trained == [3] * 2 * len(NAMES)
    tables = [
        format_summary(p, summarise(p, w.finished()))
        for p, w in ((plan, _all_read(plan)), (elsewhere, process))
    ]
    assert tables[0] == tables[1]
    assert (tmp_path / "new" / FILE).read_text().splitlines() == lines


def _all_read(plan):
    process = Work(plan)
    assert process.pending() == []
    return process


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{}\n", "line 1 of .*config"),
        ('{"config": {}, "loss_nats": "x", "seconds": 1, "compile_s": 1}', "line 1 of "),
        ("[1]", "line 1 of "),
    ],
)
def test_a_file_that_is_none_of_records_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(
        ValueError, match=f"study.earlier must be a {FILE} of this study.*{message}"
    ):
        RunRecords(tmp_path / FILE)


def test_a_run_that_diverged_is_recorded(tmp_path):
    [trial] = tiny_plan(tmp_path).tuning("1x", "muon", [{"optim.learning_rate": 0.02}])
    write_records(tmp_path / FILE, [Result(trial, math.inf, 1.0, 2.0, [(1, 0.5, 3.0)], [])])
    found = RunRecords(tmp_path / FILE).find(trial)
    assert found is not None and found.diverged and found.train == [(1.0, 0.5, 3.0)]


if __name__ == "__main__":
    work(Path(sys.argv[1]), lambda line: print(line, flush=True))

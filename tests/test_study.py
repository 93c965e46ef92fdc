import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
import runs

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed.preemption import StopListener
from jaxtrain.errors import INTERRUPTED
from jaxtrain.study.__main__ import run_study
from jaxtrain.study.plan import build_plan
from jaxtrain.study.runs import Interrupted, is_finished, read_result, run_trial

GRID = {"optim": {"adam_learning_rate": (0.003, 1e38)}}  # the second diverges


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    base = debug.get_config()
    base.compile_cache = str(folder / "cache")
    base.data.text = str(runs.write_text(folder))
    base.update(steps=8, eval_every=4, save_every=8, log_every=2, max_bad_steps=2)
    base.model.update(D=16, H=2, G=2, F=32, L=1)
    base.sample.tokens = 0
    base.optim.name = "adamw"  # compiles soonest
    study = {
        "workdir": str(folder / "runs"),
        "baseline": "adamw",
        "contenders": {"adamw": {}, "twin": {}},
        "grid": {"adamw": GRID, "twin": GRID},
    }
    return {"base": base, "study": study}


@pytest.fixture(scope="module")
def studied(values):
    """What three starts printed: one that stopped after 3 runs, one to the end, one more."""
    outs = [], [], []

    def until_the_third(line):
        outs[0].append(line)
        if line.startswith("run  3"):
            raise Stopped

    with pytest.raises(Stopped):
        run_study(values, jax.devices()[:1], until_the_third)
    for out in outs[1:]:
        run_study(values, jax.devices()[:1], out.append)
    return outs


def trained(lines):
    return [line.split()[1] for line in lines if line.startswith("run ")]


def tables(lines):
    [text] = [line for line in lines if "Verdict" in line]
    return text


def test_a_stopped_study_goes_on_where_it_was(studied):
    first, second, third = studied
    assert trained(first) == ["1", "2", "3"]
    assert trained(second) == [str(i) for i in range(4, 11)]
    assert trained(third) == [] and "10 of 10 runs were read, not trained again" in third


def test_a_finished_study_gives_the_same_tables_again(studied):
    _, second, third = studied
    assert tables(second) == tables(third)


def test_a_contender_that_is_the_baseline_ties_with_it_exactly(studied, values):
    stored = json.loads((Path(values["study"]["workdir"]) / "study.json").read_text())
    [finding] = stored["findings"]
    baseline, twin = finding["contests"]
    assert baseline["losses"] == twin["losses"] and len(set(twin["losses"])) == 3
    assert twin["paired"] == {"pairs": 3, "difference": 0, "se": 0, "t": 0, "p": 1}
    assert twin["verdict"] == "ties"
    assert (twin["reached"], baseline["reached"]) == (3, 3)
    assert "twin ties with adamw: +0.0000 +- 0.0000 (se), Holm p 1;" in tables(studied[1])


def test_a_setting_that_diverges_is_counted_and_not_chosen(studied, values):
    text = tables(studied[1])
    assert "adamw: best of 2 is adam_learning_rate=0.003" in text
    assert "1 of its tuning runs diverged" in text
    assert "AT THE EDGE of its grid: optim.adam_learning_rate=0.003" in text
    assert any("diverged" in line for line in studied[0])


def test_the_folder_holds_tables_numbers_a_picture_and_ordinary_runs(studied, values):
    plan = build_plan(values)
    build = Path(plan.study.workdir)
    assert {path.name for path in build.iterdir()} == {
        "study.txt",
        "study.json",
        "plain.png",
        "plain",
        "data",
    }
    assert tables(studied[1]).strip() in (build / "study.txt").read_text()
    stored = json.loads((build / "study.json").read_text())
    assert len(stored["runs"]) == plan.runs == 10
    for run in stored["runs"]:
        assert (build / run["folder"] / "metrics.jsonl").exists()
    assert list(build.glob("plain/adamw/*/seed*/data")) == []  # the text is encoded once


def test_a_results_loss_and_time_are_those_that_its_run_logged(studied, values):
    plan = build_plan(values)
    trial = plan.paired("plain", {"adamw": "adam_learning_rate=0.003"})[0]
    result = read_result(trial)
    folder = Path(plan.study.workdir, "plain", "adamw", "adam_learning_rate=0.003", "seed1")
    summary = json.loads((folder / "summary.json").read_text())
    assert result.loss == summary["eval/loss_nats"]
    steps = [r for r in runs.read_metrics(folder / "hosts/0.jsonl") if "event" not in r]
    steps_s = sum(line["perf/step_time_s"] for line in steps)
    assert result.seconds == pytest.approx(steps_s, rel=1e-6)
    assert [row[0] for row in result.held_out] == [4, 8]
    assert [row[0] for row in result.train] == [2, 4, 6, 8]


def test_a_folder_of_another_study_is_refused_before_any_run(studied, values):
    base = config_lib.to_dict(config_lib.freeze(values["base"])) | {"steps": 9}
    lines = []
    with pytest.raises(ValueError, match="steps=8, now 9.*--study.workdir"):
        run_study(values | {"base": base}, jax.devices()[:1], lines.append)
    assert trained(lines) == []


def _stop_of_the_run():
    """Returns the StopListener that handles SIGINT now, if one does."""
    owner = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return owner if isinstance(owner, StopListener) else None


def interrupt_when_handled():
    """Sends SIGINT once the run has taken it over; before, it may even be ignored."""
    # Until the loop serves signals, one would end the process, which runs the tests.
    while not getattr(_stop_of_the_run(), "_promise", ""):
        time.sleep(0.001)
    signal.raise_signal(signal.SIGINT)


def test_a_run_that_a_signal_stops_is_saved_and_goes_on(values, tmp_path):
    study = values["study"] | {"workdir": str(tmp_path)}
    plan = build_plan(values | {"study": study})
    trial = plan.paired("plain", {"adamw": "adam_learning_rate=0.003"})[0]
    threading.Thread(target=interrupt_when_handled, daemon=True).start()
    with pytest.raises(Interrupted) as stopped:
        run_trial(trial, jax.devices()[:1])
    assert stopped.value.status == INTERRUPTED and not is_finished(trial)
    assert run_trial(trial, jax.devices()[:1]).loss > 0 and is_finished(trial)


def test_a_bad_flag_ends_in_one_line_that_names_the_nearest():
    argv = [sys.executable, "-m", "jaxtrain.study", "--config=configs/study_quick.py"]
    argv += ["--config.base.stepz=3"]
    done = subprocess.run(argv, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Did you mean --config.base.steps?" in done.stderr

import json
import re
import signal
import threading
import time
from pathlib import Path

import jax
import pytest

import runs
from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.errors import INTERRUPTED
from jaxtrain.study.__main__ import run_study
from jaxtrain.study.plan import build_plan
from jaxtrain.study.runs import Interrupted, is_finished, read_result, run_trial

pytestmark = pytest.mark.long  # every test needs the fixture's runs

GRID = {"optim": {"adam_learning_rate": (0.003, 1e38)}}  # the second diverges


SETTING = {"optim.adam_learning_rate": 0.003}


class Stopped(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with runs.shared_steps():
        yield


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    base = debug.get_config()
    base.compile_cache = str(folder / "cache")
    base.data.text = str(runs.write_text(folder))
    base.update(steps=8, eval_every=4, save_every=8, log_every=2, max_bad_steps=2)
    base.model.update(D=16, H=2, G=2, F=32, L=1)
    base.sample.tokens = 0
    base.model.attention, base.optim.name = "reference", "adamw"  # compile fastest
    study = {
        "workdir": str(folder / "runs"),
        "baseline": "adamw",
        "contenders": {"adamw": {}, "twin": {}},
        "grid": {"adamw": GRID, "twin": GRID},
    }
    return {"base": base, "study": study}


@pytest.fixture(scope="module")
def studied(values):
    """The output of three starts: one stopped after 3 runs, one to the end, and one after it."""
    outputs = [], [], []

    def until_the_third(line):
        outputs[0].append(line)
        if line.startswith("run  3"):
            raise Stopped

    with pytest.raises(Stopped):
        run_study(values, jax.devices()[:1], until_the_third)
    for output in outputs[1:]:
        run_study(values, jax.devices()[:1], output.append)
    return outputs


def trained(lines):
    return [line.split()[1] for line in lines if line.startswith("run ")]


def tables(lines):
    [text] = [line for line in lines if "Verdict" in line]
    return text


def test_a_stopped_study_continues_with_the_runs_that_are_left(studied):
    first, second, third = studied
    assert trained(first) == ["1", "2", "3"]
    assert trained(second) == [str(i) for i in range(4, 11)]
    assert trained(third) == [] and any(
        line.startswith("10 of 10 runs had ended before") for line in third
    )


def test_a_finished_study_prints_the_same_tables_again(studied):
    _, second, third = studied
    assert tables(second) == tables(third)


def test_a_contender_identical_to_the_baseline_ties_with_it_exactly(studied, values):
    stored = json.loads((Path(values["study"]["workdir"]) / "study.json").read_text())
    [condition] = stored["findings"]
    baseline, twin = condition["contests"]
    assert baseline["losses"] == twin["losses"] and len(set(twin["losses"])) == 3
    paired = {"pairs": 3, "difference": 0, "se": 0, "t": 0, "p": 1, "degrees": 2}
    assert twin["paired"] == paired
    assert twin["verdict"] == "ties"
    assert (twin["reached"], baseline["reached"]) == (3, 3)
    assert "twin and adamw do not differ significantly: +0.0000 +- 0.0000" in tables(studied[1])


def test_a_diverged_setting_is_reported_and_not_chosen(studied, values):
    text = tables(studied[1])
    assert "adamw: best of 2 settings is adam_learning_rate=0.003" in text
    assert "1 of its tuning runs diverged" in text
    assert "AT THE EDGE of what was tried: optim.adam_learning_rate=0.003" in text
    assert any("diverged" in line for line in studied[0])


def test_the_folder_contains_tables_numbers_a_picture_and_ordinary_runs(studied, values):
    plan = build_plan(values)
    folder = Path(plan.study.workdir)
    assert {path.name for path in folder.iterdir()} == {
        "study.txt",
        "study.json",
        "study.csv",
        "runs.jsonl",
        "plain.png",
        "plain",
        "data",
    }
    assert tables(studied[1]).strip() in (folder / "study.txt").read_text()
    stored = json.loads((folder / "study.json").read_text())
    assert len(stored["runs"]) == plan.runs == 10
    for run in stored["runs"]:
        assert (folder / run["folder"] / "metrics.jsonl").exists()
    assert list(folder.glob("plain/adamw/*/seed*/data")) == []  # the text is encoded once


def test_a_result_has_the_loss_and_the_time_that_its_run_logged(studied, values):
    plan = build_plan(values)
    trial = plan.paired("plain", {"adamw": SETTING})[0]
    result = read_result(trial)
    folder = Path(plan.study.workdir, "plain", "adamw", "adam_learning_rate=0.003", "seed1")
    summary = json.loads((folder / "summary.json").read_text())
    assert result.loss == summary["eval/loss_nats"]
    steps = [r for r in runs.read_metrics(folder / "hosts/0.jsonl") if "event" not in r]
    steps_s = sum(line["perf/step_time_s"] for line in steps)
    assert result.seconds == pytest.approx(steps_s, rel=1e-6)
    assert [row[0] for row in result.held_out] == [4, 8]
    assert [row[0] for row in result.train] == [2, 4, 6, 8]


def test_the_folder_of_another_study_is_refused_before_any_run(studied, values):
    base = config_lib.to_dict(config_lib.freeze(values["base"])) | {"steps": 9}
    lines = []
    with pytest.raises(ValueError, match="steps=8, now 9.*--study.workdir"):
        run_study(values | {"base": base}, jax.devices()[:1], lines.append)
    assert trained(lines) == []


def interrupt_after_a_step(workdir):
    """Sends SIGINT once the run has logged a step; earlier, it would end this process."""
    log = workdir / "metrics.jsonl"
    while not (log.exists() and b"train/loss_nats" in log.read_bytes()):
        time.sleep(0.001)
    signal.raise_signal(signal.SIGINT)


def test_a_run_stopped_by_a_signal_is_saved_and_resumed(values, tmp_path):
    study = values["study"] | {"workdir": str(tmp_path)}
    # Enough steps that the signal arrives before the last one.
    base = config_lib.to_dict(config_lib.freeze(values["base"])) | {"steps": 300}
    plan = build_plan({"base": base | {"save_every": 300, "eval_every": 300}, "study": study})
    trial = plan.paired("plain", {"adamw": SETTING})[0]
    workdir = Path(trial.config.workdir)
    threading.Thread(target=interrupt_after_a_step, args=(workdir,), daemon=True).start()
    with pytest.raises(Interrupted) as stopped:
        run_trial(trial, jax.devices()[:1])
    assert stopped.value.status == INTERRUPTED and not is_finished(trial)
    assert run_trial(trial, jax.devices()[:1]).loss > 0 and is_finished(trial)


def test_a_dry_run_estimates_the_time_and_writes_nothing(studied, values, tmp_path):
    lines = []
    study = values["study"] | {"workdir": str(tmp_path / "dry")}
    run_study(values | {"study": study}, jax.devices()[:1], lines.append, dry_run=True)
    text = "\n".join(lines)
    assert "runs        10; every contender has the same tuning budget" in text
    assert re.search(r"time +at most \d:\d\d of steps in this process.*\n +plain +10 runs of", text)
    assert not (tmp_path / "dry").exists()

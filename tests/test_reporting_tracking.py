import json
import os
import sys
import threading
from pathlib import Path

import pytest

from jaxtrain.config.run_sections import ExportConfig
from jaxtrain.config.train_config import TrainConfig, config_hash, freeze, to_dict
from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.reporting.run_logger import RunLogger
from jaxtrain.reporting.trackers import MlflowTracker, WandbTracker
from jaxtrain.reporting.tracking import TrackerThread, create_tracker, hide_secrets

CONFIG = {"config": to_dict(TrainConfig()), "device": "cpu", "config_hash": "0123"}
METRICS = {"train/loss_nats": 2.413, "perf/step_time_s": 0.299}
SUMMARY = {"stopped_by": None, "lost_s": {"start+gc": 1.0}, "perf/wall_s": 62.0, "perf/tokens": 9}


class Recorder:
    """Records its calls; the methods that `broken` names fail."""

    def __init__(self, broken=()):
        self.calls, self.threads, self.broken = [], set(), broken

    def _record(self, name, *args):
        self.calls.append((name, *args))
        self.threads.add(threading.current_thread())
        if name in self.broken:
            raise RuntimeError(f"https://user:password@host/{name} is unreachable")

    def start(self, workdir, resume_step, config):
        self._record("start", workdir, resume_step, config)

    def write(self, step, time_s, metrics):
        self._record("write", step, time_s, metrics)

    def finish(self, summary):
        self._record("finish", summary)


def run_with(tracker, workdir, error=None, **options):
    """Logs a run of one step, which also goes to a tracker."""
    thread = TrackerThread(tracker, "recorder", print)
    with RunLogger(workdir, 1, quiet=True, tracker=thread, **options) as logger:
        logger.write_config(CONFIG)
        logger.write_config(CONFIG | {"work": 1})
        logger.write(1, METRICS)
        if error:
            raise error
        logger.write(1, {"eval/loss_nats": float("nan")})
        logger.finish(SUMMARY)


def drive(tracker, workdir, warn, first=0, summary=SUMMARY):
    """Makes the calls of a run of three steps, resumed from `first`."""
    workdir.mkdir(exist_ok=True)
    thread = TrackerThread(tracker, "recorder", warn)
    thread.start(workdir, first, CONFIG)
    for step in range(first + 1, first + 4):
        thread.write(step, 1.7e9 + step, METRICS | {"train/loss_nats": 1 / step})
    thread.write(first + 3, 1.7e9, {"eval/loss_nats": float("nan")})
    if summary:
        thread.finish({"step": first + 3} | summary)
    thread.close()


def test_a_tracker_gets_config_lines_and_summary_in_order_from_another_thread(tmp_path):
    tracker = Recorder()
    run_with(tracker, tmp_path)
    assert [name for name, *_ in tracker.calls] == ["start", "write", "write", "finish"]
    assert tracker.calls[0] == ("start", tmp_path, 0, CONFIG)
    lines = [{"step": s, "time": t} | m for _, s, t, m in tracker.calls[1:-1]]
    assert repr(lines) == repr(read_metrics(tmp_path / "metrics.jsonl"))  # NaN is not equal to NaN
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert tracker.calls[-1][1] | {"eval/loss_nats": "nan"} == summary
    assert len(tracker.threads) == 1 and threading.main_thread() not in tracker.threads


def test_a_tracker_of_a_run_that_fails_gets_no_summary(tmp_path):
    tracker = Recorder()
    with pytest.raises(ZeroDivisionError):
        run_with(tracker, tmp_path, error=ZeroDivisionError())
    assert tracker.calls[-1] == ("finish", None)


@pytest.mark.parametrize(
    ("broken", "calls"), [(("start",), 1), (("write",), 6), (("write", "finish"), 6)]
)
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(tmp_path, broken, calls):
    tracker, warnings = Recorder(broken), []
    drive(tracker, tmp_path, warnings.append)
    [warning] = warnings
    assert warning.startswith("export.tracker=recorder failed: RuntimeError: https://host/")
    assert warning.endswith("is unreachable; training goes on")
    assert len(tracker.calls) == calls


def test_a_tracker_that_hangs_delays_only_the_end_and_only_for_a_bounded_time(tmp_path):
    hang, warnings = threading.Event(), []

    class Hanging(Recorder):
        def start(self, *args):
            hang.wait(60)

    thread = TrackerThread(Hanging(), "hanging", warnings.append)
    thread.start(tmp_path, 0, CONFIG)
    for step in range(2_100):
        thread.write(step, 0.0, METRICS)
    assert "2,000 lines wait, more are lost; training goes on" in warnings[0]
    thread.close(wait_s=0.1)
    assert thread._thread.is_alive() and len(warnings) == 1
    hang.set()


def test_processes_that_do_not_log_call_no_tracker(tmp_path):
    tracker = Recorder()
    run_with(tracker, tmp_path / "run", active=False)
    assert tracker.calls == []


def test_a_class_in_a_file_or_a_module_is_a_tracker(tmp_path):
    file = tmp_path / "mine.py"
    methods = [f"    def {name}(self, *args): return NAME" for name in ("start", "write", "finish")]
    file.write_text("\n".join(["NAME = 'mine'", "class Mine:", *methods]))
    assert create_tracker(f"{file}:Mine").start() == "mine"
    assert isinstance(create_tracker(f"{__name__}:Recorder"), Recorder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("/no/such/file.py:Mine", "No such file"),
        ("json:Mine", "no attribute 'Mine'"),
        ("pathlib:PurePath", r"got pathlib:PurePath without start\(\), write\(\), finish\(\)"),
    ],
)
def test_a_tracker_that_cannot_be_created_is_an_error_before_any_work(setting, message):
    with pytest.raises(ValueError, match=message) as error:
        create_tracker(setting)
    assert "Set --export.tracker" in str(error.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_an_error_that_names_the_extra(name, monkeypatch):
    for module in (name, f"{name}.entities"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"pip install 'jaxtrain\[{name}\]'"):
        create_tracker(name)


@pytest.mark.parametrize("name", ["wandbs", "Mine", ":", ":Mine", "mine.py:"])
def test_a_name_that_is_no_tracker_is_refused_in_the_config(name):
    with pytest.raises(ValueError, match="export.tracker must be empty, wandb, mlflow, MODULE"):
        ExportConfig(tracker=name)


def test_the_tracker_does_not_change_what_a_run_trains():
    other = freeze(to_dict(TrainConfig()) | {"export": {"tracker": "wandb"}})
    assert config_hash(other) == config_hash(TrainConfig())


def test_warnings_show_no_password_and_no_value_of_a_secret_variable(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = hide_secrets("403 for key 0123456789abcdef at https://me:pass@host/path?x=1@2")
    assert text == "403 for key [WANDB_API_KEY] at https://host/path?x=1@2"


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_wandb_writes_an_offline_run_that_a_resumed_run_continues(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason='wandb is missing: pip install "jaxtrain[wandb]"')
    monkeypatch.setenv("WANDB_API_KEY", secret := "5ec4e7" * 10)
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    workdir, warnings = tmp_path / "a run", []
    drive(WandbTracker(), workdir, warnings.append)
    drive(WandbTracker(), workdir, warnings.append, first=2)
    assert not warnings
    files = files_below(workdir / "wandb")
    records = {path.stem: data for path, data in files.items() if path.suffix == ".wandb"}
    [run_id] = {stem.removeprefix("run-") for stem in records}
    folders = {path.parent.name for path in files if path.suffix == ".wandb"}
    assert len(folders) == 2 and all(name.startswith("offline-run-") for name in folders)
    assert json.loads((workdir / "trackers.json").read_text()) == {"wandb": run_id}
    for text in (b"train/loss_nats", b"0.3333333333333333", b"a run", b"parametrisation", b"62"):
        assert text in records[f"run-{run_id}"], text
    assert not any(secret.encode() in data for data in files_below(workdir).values())


def test_mlflow_writes_files_that_a_resumed_run_continues(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason='mlflow is missing: pip install "jaxtrain[mlflow]"')
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    workdir, warnings = tmp_path / "a run", []
    drive(MlflowTracker(), workdir, warnings.append)
    drive(MlflowTracker(), workdir, warnings.append, first=3)
    from mlflow.tracking import MlflowClient

    client = MlflowClient((workdir / "mlflow").as_uri())
    assert not warnings
    [run] = client.search_runs([client.get_experiment_by_name("jaxtrain").experiment_id])
    assert run.info.run_name == "a run" and run.info.status == "FINISHED"
    assert run.data.params["model.L"] == str(TrainConfig().model.L)
    assert run.data.params["run.device"] == "cpu"
    history = client.get_metric_history(run.info.run_id, "train/loss_nats")
    assert sorted((x.step, x.value) for x in history) == [(step, 1 / step) for step in range(1, 7)]
    assert run.data.metrics["summary/lost_s.start_gc"] == 1.0
    assert not os.path.exists("mlruns")
    drive(MlflowTracker(), workdir, warnings.append, first=6, summary=None)
    assert client.get_run(run.info.run_id).info.status == "FAILED"

"""The trackers that come with jaxtrain: Weights & Biases, and MLflow. Both are offline by default.

They follow the usual environment variables: WANDB_MODE=online, WANDB_PROJECT, WANDB_API_KEY;
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_TOKEN. So no secret is in a config.
"""

import importlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.files import write_atomic

PROJECT = "jaxtrain"
IDS = "trackers.json"  # in the folder of the run: {tracker: its identity of the run}
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")  # of MLflow's metrics
ABOUT = ("config_hash", "device", "devices", "processes", "hosts", "versions", "routes")


def _import(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"its package is missing ({error.name}): pip install 'jaxtrain[{extra}]'"
        ) from error


def read_run_id(workdir: Path, tracker: str, resume_step: int) -> str | None:
    """Returns the identity of a resumed run at a tracker; None if it begins."""
    path = workdir / IDS
    return json.loads(path.read_text()).get(tracker) if resume_step and path.exists() else None


def store_run_id(workdir: Path, tracker: str, run_id: str) -> None:
    """Stores the identity of a run at a tracker, for a later resume."""
    write_atomic(workdir / IDS, json.dumps({tracker: run_id}) + "\n")


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of a nested dict, with names as `model.L`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def select_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config.json that identify a run: its config, and "run" about it."""
    return config["config"] | {"run": {key: config[key] for key in ABOUT if key in config}}


class WandbTracker:
    """Writes a run of Weights & Biases into workdir/wandb, which `wandb sync` uploads.

    WANDB_MODE=online sends it at once.
    """

    def __init__(self):
        self._wandb, self._run = _import("wandb", "wandb"), None

    def start(self, workdir: Path, resume_step: int, config: dict[str, Any]) -> None:
        run_id = read_run_id(workdir, "wandb", resume_step) or secrets.token_hex(4)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or workdir.resolve().name,
            dir=os.environ.get("WANDB_DIR") or workdir,
            mode=os.environ.get("WANDB_MODE") or "offline",
            id=run_id,
            resume="allow",
            config=select_config(config),
            # It would otherwise replace stdout, on which the progress bar is drawn.
            settings=self._wandb.Settings(console="off", quiet=True),
        )
        store_run_id(workdir, "wandb", run_id)

    def write(self, step: int, time_s: float, metrics: dict[str, int | float]) -> None:
        # A resumed run repeats steps; wandb ignores those that it has.
        del time_s  # wandb records the time of the call
        self._run.log(metrics, step=step)

    def finish(self, summary: dict[str, Any] | None) -> None:
        self._run.summary.update(summary or {})
        self._run.finish(exit_code=1 if summary is None else 0)


class MlflowTracker:
    """Writes a run of MLflow into the files of workdir/mlflow, or to MLFLOW_TRACKING_URI."""

    def __init__(self):
        # MLflow's default is a database of a package that mlflow-skinny does not contain.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._entities = _import("mlflow.entities", "mlflow")
        self._tracking = _import("mlflow.tracking", "mlflow")
        self._client, self._run_id = None, ""

    def start(self, workdir: Path, resume_step: int, config: dict[str, Any]) -> None:
        local = (workdir.resolve() / "mlflow").as_uri()
        client = self._tracking.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        if run_id := read_run_id(workdir, "mlflow", resume_step):
            client.update_run(run_id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
            run_id = client.create_run(experiment, run_name=workdir.resolve().name).info.run_id
            fields = flatten(select_config(config))
            parameters = [self._entities.Param(key, str(value)) for key, value in fields]
            for first in range(0, len(parameters), 100):  # MLflow takes 100 at once
                client.log_batch(run_id, params=parameters[first : first + 100])
        self._client, self._run_id = client, run_id
        store_run_id(workdir, "mlflow", run_id)

    def write(self, step: int, time_s: float, metrics: dict[str, int | float]) -> None:
        time_ms = round(1e3 * time_s)
        rows = [self._entities.Metric(key, x, time_ms, step) for key, x in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def finish(self, summary: dict[str, Any] | None) -> None:
        if summary is None:
            return self._client.set_terminated(self._run_id, "FAILED")
        fields = dict(flatten(summary))
        is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
        name = lambda key: "summary/" + NOT_IN_NAMES.sub("_", key)
        numbers = {name(key): x for key, x in fields.items() if is_number(x)}
        self.write(summary["step"], time.time(), numbers)
        status = "KILLED" if summary.get("stopped_by") else "FINISHED"
        self._client.set_terminated(self._run_id, status)

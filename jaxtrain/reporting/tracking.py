"""Sends a run's config, metrics and summary to an experiment tracker: wandb, mlflow or your own.

A thread calls the tracker, so that a slow or unreachable server delays no step. What a tracker
raises is a warning, once; training goes on.
"""

import importlib
import importlib.util
import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.reporting.trackers import MlflowTracker, WandbTracker

TRACKERS = {"wandb": WandbTracker, "mlflow": MlflowTracker}
MOST_WAITING = 2_000  # calls that wait for the tracker
CLOSE_S = 60.0  # to wait at the end for what is not sent yet
SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET", re.I)  # of environment variables


class Tracker(Protocol):
    """What jaxtrain calls of an experiment tracker, in this order, in one thread of process 0.

    The class is created without arguments before any data are read; what it raises there ends the
    start with an error. What its methods raise is only a warning.
    """

    def start(self, workdir: Path, resume_step: int, config: dict[str, Any]) -> None:
        """Begins, or continues a run that an earlier start of it has begun.

        Args:
            workdir: folder of the run; files of the tracker may be stored in it.
            resume_step: step from which the run continues; later steps will be written again. 0 is
                a new run.
            config: contents of config.json; its "config" has all fields as {section: {field: x}}.
        """

    def write(self, step: int, time_s: float, metrics: dict[str, int | float]) -> None:
        """Records a line of metrics.jsonl; several lines may have the same step.

        Args:
            time_s: UTC.
            metrics: by name; they may be NaN or infinite.
        """

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Ends.

        Args:
            summary: contents of summary.json, whose "stopped_by" names a signal or is None; None if
                the run ended with an error.
        """


class TrackerThread:
    """Calls a tracker in a thread. It never raises, and never waits except in `close`.

    Args:
        tracker: to call.
        name: of the tracker, in warnings.
        warn: prints a line, once, when the tracker fails.
    """

    def __init__(self, tracker: Tracker, name: str, warn: Callable[[str], object]):
        self._tracker, self._name, self._warn = tracker, name, warn
        self._calls: queue.Queue[tuple[str, tuple] | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._has_warned = self._is_ended = False

    def start(self, workdir: Path, resume_step: int, config: dict[str, Any]) -> None:
        """Starts the thread; the first call counts, and nothing is sent before it."""
        if self._thread is None:
            self._calls.put_nowait(("start", (workdir, resume_step, config)))
            self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
            self._thread.start()

    def write(self, step: int, time_s: float, metrics: dict[str, int | float]) -> None:
        """Queues a line of metrics; drops it if too many lines wait."""
        self._queue("write", step, time_s, metrics)

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Queues the end of the run."""
        self._is_ended = True
        self._queue("finish", summary)

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Waits until the tracker has everything, but at most this long."""
        if self._thread is None:
            return
        if not self._is_ended:
            self.finish(None)
        try:
            self._calls.put(None, timeout=wait_s)
            self._thread.join(wait_s)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn_once(f"has not taken everything within {wait_s:g} s")

    def _queue(self, method: str, *args: Any) -> None:
        if self._thread is None:
            return
        try:
            self._calls.put_nowait((method, args))
        except queue.Full:
            self._warn_once(f"is slower than the run: {MOST_WAITING:,} lines wait, more are lost")

    def _run(self) -> None:
        for method, args in iter(self._calls.get, None):
            try:
                getattr(self._tracker, method)(*args)
            except (Exception, SystemExit) as error:
                self._warn_once(f"failed: {type(error).__name__}: {error}")
                if method == "start":
                    break

    def _warn_once(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"export.tracker={self._name} {hide_secrets(text)}; training goes on")


def hide_secrets(text: str) -> str:
    """Returns the text without passwords in addresses and without values of secret variables."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def create_tracker(setting: str) -> Tracker:
    """Returns the tracker that export.tracker names.

    Args:
        setting: a key of TRACKERS, MODULE:CLASS or FILE.py:CLASS.

    Raises:
        ValueError: there is no such class, its package is missing, or it cannot be created.
    """
    try:
        tracker = _find_class(setting)()
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"export.tracker must name a tracker that can be created; got {setting}: {kind}"
            f"{hide_secrets(str(error))}. Set --export.tracker."
        ) from error
    methods = ("start", "write", "finish")
    missing = [f"{m}()" for m in methods if not callable(getattr(tracker, m, None))]
    if missing:
        raise ValueError(
            f"export.tracker must name a class with start(), write() and finish(); got {setting} "
            f"without {', '.join(missing)}. Set --export.tracker."
        )
    return tracker


def _find_class(setting: str) -> Callable[[], Any]:
    module, _, name = setting.rpartition(":")
    if not module:
        return TRACKERS[setting]
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), name)
    path = Path(module).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader  # as the name ends in .py
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)

"""Opens what a run reports to: its metrics files and terminal, a webhook and a tracker."""

import functools
import socket
from pathlib import Path

import jax
from absl import logging

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.distributed.broadcast import run_on_all_processes
from jaxtrain.reporting.run_logger import RunLogger
from jaxtrain.reporting.tracking import TrackerThread, create_tracker
from jaxtrain.reporting.webhook import Webhook, read_url
from jaxtrain.training.run import Run


def open_webhook(cfg: TrainConfig, quiet: bool) -> Webhook:
    """Returns the webhook for a run's alerts, which only process 0 sends.

    Raises:
        ValueError: notify.url names no address.
    """
    sends = jax.process_index() == 0 and not quiet
    url = run_on_all_processes(lambda: read_url(cfg.notify.url, "notify.url") if sends else "")
    workdir, host = Path(cfg.workdir).resolve(), socket.gethostname()
    warn = functools.partial(logging.warning, "%s")
    return Webhook(url, f"{workdir.name} on {host}", warn, run=str(workdir), host=host)


def open_tracker(cfg: TrainConfig) -> TrackerThread | None:
    """Returns the tracker that export.tracker names, on process 0; None without one.

    Raises:
        ValueError: the tracker's package is missing, or the tracker cannot be created.
    """
    name = cfg.export.tracker if jax.process_index() == 0 else ""
    tracker = run_on_all_processes(lambda: create_tracker(name) if name else None)
    return (
        TrackerThread(tracker, name, functools.partial(logging.warning, "%s")) if tracker else None
    )


def open_logger(
    run: Run, first: int, quiet: bool, webhook: Webhook, tracker: TrackerThread | None
) -> RunLogger:
    """Returns the run's logger, not entered yet; it writes and prints on process 0 only.

    Args:
        first: step from which the run continues.
        quiet: prints nothing.
    """
    cfg, active = run.cfg, jax.process_index() == 0
    title = f"{Path(cfg.workdir).name}\n{run.parameters:,} parameters"
    outlets = cfg.export, webhook, tracker
    return RunLogger(cfg.workdir, cfg.steps, first, quiet, active, title, *outlets)

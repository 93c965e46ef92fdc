"""Records and prints a run's metrics, and writes its summary and its loss curve."""

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import logging

from jaxtrain.config.run_sections import ExportConfig
from jaxtrain.distributed import heartbeat
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.file_errors import keep_first_error
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.metrics.jsonl import FILE, MetricsFile, read_metrics
from jaxtrain.reporting.loss_curve import loss_curve
from jaxtrain.reporting.prometheus import PrometheusExporter
from jaxtrain.reporting.tensorboard import EventFile
from jaxtrain.reporting.terminal import (
    EVAL_LOSS,
    LOSS,
    Terminal,
    closing_lines,
    eval_text,
    score_texts,
)
from jaxtrain.reporting.tracking import TrackerThread
from jaxtrain.reporting.webhook import Webhook

NAME_WIDTH = 8  # of the header's first column; fits "FALLBACK"


class RunLogger:
    """Writes everything of a run except its checkpoints, and prints everything except log lines.

    A context manager: however the loop ends, the files and the bar are closed and the loss curve is
    drawn; an exception passes through unchanged.

    Args:
        workdir: folder of the run, created if missing.
        steps: the run's last step.
        resume_step: step from which this process resumes; metrics of later steps are removed.
        quiet: print nothing.
        active: False writes and prints nothing; it is True only on process 0.
        title: of the loss curve: the first line names the run, the next lines what it trains.
            Default: the folder's name.
        export: where Prometheus metrics are served; None serves none.
        webhook: receives the alerts; None sends none.
        tracker: also receives the config, the metrics and the summary.

    Attributes:
        evaluated_step: step of the newest evaluation, also from before a resume; None if there is
            none.
        removed_s: seconds that the removed steps took.
    """

    def __init__(
        self,
        workdir: str | Path,
        steps: int,
        resume_step: int = 0,
        quiet: bool = False,
        active: bool = True,
        title: str = "",
        export: ExportConfig | None = None,
        webhook: Webhook | None = None,
        tracker: TrackerThread | None = None,
    ):
        self.workdir = Path(workdir)
        self.steps, self.resume_step, self.active = steps, resume_step, active
        self.title = title or self.workdir.resolve().name
        self.curve_path = self.workdir / "loss_curve.png"
        self.evaluated_step: int | None = None
        self.removed_s = 0.0
        self._terminal = Terminal(steps, resume_step, quiet or not active)
        self._writers = []  # all have write(step, time_s, metrics) and close()
        self._export, self._webhook, self._tracker = export, webhook, tracker
        self._exporter: PrometheusExporter | None = None
        self._latest: dict[str, Any] = {"step": resume_step}  # newest train/ and eval/ metrics
        self._finished = False

    def __enter__(self) -> "RunLogger":
        broadcast_from_process_0(lambda: self._open() if self.active else None)
        return self

    def _open(self) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        if self._export and self._export.port:
            self._exporter = PrometheusExporter(self._export.address, self._export.port)
            self._writers.append(self._exporter)
        metrics_file = MetricsFile(self.workdir, self.resume_step)
        self._writers.append(metrics_file)
        first_step = self.resume_step + 1 if self.resume_step else 0
        self._writers.append(EventFile(self.workdir, first_step))
        if self._tracker:
            self._writers.append(self._tracker)
        self.removed_s = metrics_file.removed_s
        for record in read_metrics(self.workdir / FILE):
            self._remember(record["step"], record)
        if metrics_file.removed_lines:
            after = f"after step {self.resume_step} " if self.resume_step else ""
            self.note(
                f"{FILE}: removed {metrics_file.removed_lines} lines {after}of an earlier start"
            )

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if not self.active:
            return
        self._terminal.close()
        if isinstance(error, Exception):  # no signal and no Ctrl-C
            event = getattr(error, "alert_event", "failed")
            # A launcher sends its own alert, which names the rank that failed first.
            if event != "failed" or heartbeat.PATH not in os.environ:
                where = f"step {self._latest['step']} of {self.steps}"
                self.alert(event, f"{event} at {where}: {type(error).__name__}: {error}")
        if self._webhook:
            self._webhook.close()
        with keep_first_error(error):
            for writer in self._writers:
                writer.close()
        if self._finished:
            return
        try:
            with keep_first_error(error):
                self._draw_curve()
        except Exception:
            if error is None:
                raise
            logging.exception("%s was not drawn.", self.curve_path)

    def print_header(self, lines: Iterable[str | tuple[str, str]]) -> None:
        """Prints what the run will do: lines of text, or (name, value) pairs in two columns."""
        lines = list(lines)
        width = max([NAME_WIDTH, *(len(line[0]) for line in lines if not isinstance(line, str))])
        for line in lines:
            self.note(line if isinstance(line, str) else f"{line[0]:<{width}}  {line[1]}")

    def write_config(self, config: dict) -> None:
        """Writes workdir/config.json; the first call starts the tracker."""
        if self.active:
            write_atomic(self.workdir / "config.json", strict_json(config, indent=2) + "\n")
            if self._tracker:
                self._tracker.start(self.workdir, self.resume_step, config)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Records one step's metrics by name, and shows its progress or its evaluation.

        Raises:
            ValueError: a metric is not one number.
            OSError: the file system refuses, for example because it is full.
        """
        if not self.active:
            return
        time_s = time.time()
        plain = {name: _plain_number(name, value) for name, value in metrics.items()}
        for writer in self._writers:
            writer.write(step, time_s, plain)
        self._remember(step, plain)
        if LOSS in plain:
            self._terminal.show_step(step, plain)
        if EVAL_LOSS in plain:
            self.note(f"eval  step {step}  {eval_text(plain)}")
            for label, text in score_texts(plain).items():
                self.note(f"{label:<5} step {step}  {text}")

    def write_ranks(self, changes: Iterable[str], ratios: dict[str, list[float]]) -> None:
        """Prints which processes have become stragglers, or are none any more.

        Args:
            changes: a sentence for each of them.
            ratios: RankWatch.ratios, for Prometheus; each process writes its own to its step log.
        """
        for sentence in changes:
            self.note(sentence)
            self.alert("straggler", sentence)
        if self._exporter:
            self._exporter.write_ranks(ratios)

    def alert(self, event: str, text: str) -> None:
        """Sends an alert to the webhook, if there is one; returns at once and never fails.

        Args:
            event: diverged, failed, straggler, stopped or done.
        """
        if self.active and self._webhook:
            self._webhook.send(event, text, step=self._latest["step"], steps=self.steps)

    def advance(self, step: int) -> None:
        """Counts a step whose metrics are not written."""
        self._latest["step"] = step
        self._terminal.advance(step)

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._terminal.print(text)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json and the loss curve, and prints the closing lines.

        Args:
            summary: Collector.total(), versions and the like; summary.json adds to it `step`,
                `steps` and the newest training and evaluation metrics.
        """
        if not self.active:
            return
        summary = {"steps": self.steps} | self._latest | summary
        write_atomic(self.workdir / "summary.json", strict_json(summary, indent=2) + "\n")
        if self._tracker:
            self._tracker.finish(summary)
        drawn = self._draw_curve()
        self._finished = True
        self._terminal.close()
        for line in (lines := closing_lines(summary)):
            self.note(line)
        cause = f" by {summary['stopped_by']}" if summary.get("stopped_by") else ""
        self.alert("stopped" if cause else "done", f"{' '.join(lines[0].split())}{cause}")
        if drawn:
            self.note(f"curve {self.curve_path}")

    def _remember(self, step: int, metrics: dict[str, int | float]) -> None:
        newest = {k: v for k, v in metrics.items() if k.startswith(("train/", "eval/"))}
        self._latest |= newest | {"step": step}
        if EVAL_LOSS in metrics:
            self.evaluated_step = step

    def _draw_curve(self) -> bool:
        """Draws the loss curve from metrics.jsonl; returns whether there is a finite loss."""
        points = {LOSS: [], EVAL_LOSS: []}
        for record in read_metrics(self.workdir / FILE):
            for name in points.keys() & record.keys():
                points[name].append((record["step"], record[name]))
        finite = any(math.isfinite(loss) for name in points for _, loss in points[name])
        if finite:
            write_atomic(self.curve_path, loss_curve(points[LOSS], points[EVAL_LOSS], self.title))
        return finite


def _plain_number(name: str, value: Any) -> int | float:
    """Converts a scalar of NumPy or JAX to a Python number."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, int | float):
        raise ValueError(f"a metric must be one number; got {name}={value!r}. Reduce it first.")
    return value

"""What a run tells: metrics on disk, progress on the terminal, a summary and a loss curve."""

import logging as std_logging
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
from absl import flags, logging

import jaxtrain
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.file_errors import keep_first_error
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.metrics.jsonl import FILE, read_metrics
from jaxtrain.reporting.loss_curve import loss_curve
from jaxtrain.reporting.metrics_file import MetricsFile
from jaxtrain.reporting.progress_text import EVAL_LOSS, LOSS, closing_lines, eval_text, step_text
from jaxtrain.reporting.prometheus import PrometheusExporter

NAME_WIDTH = 8  # of the header's first column: "FALLBACK"
BAR_COLUMNS = 4  # that are left to the bar itself


class RunLogger:
    """Everything that a run writes but checkpoints, and everything that it prints but logs.

    A context manager: however the loop ends, files are closed, the bar is closed and the curve of
    what was logged is drawn; an exception passes through unchanged.

    Args:
        workdir: folder of the run, made if missing.
        steps: the run's last step.
        resume_step: the step that this process resumes from; what was logged after it is removed.
        quiet: prints nothing.
        active: False, on all processes but the first, writes and prints nothing.
        title: of the loss curve; first line the run, the next lines what it trains. Default: the
            folder's name.
        export: an ExportConfig; None serves no metrics.
    """

    def __init__(
        self, workdir, steps, resume_step=0, quiet=False, active=True, title="", export=None
    ):
        self.workdir = Path(workdir)
        self.steps, self.resume_step = steps, resume_step
        self.active, self.quiet = active, quiet or not active
        self.title = title or self.workdir.resolve().name
        self._bar = self._scalars = self._exporter = None
        self._export = export
        self._latest = {"step": resume_step}  # newest of each metric of training and evaluation
        self._first_logged = None  # (step, monotonic s)
        self._finished = False
        self.evaluated_step = None  # of the newest evaluation, an earlier start's too
        self.removed_s = 0.0  # of steps that were logged and have to be made again

    def __enter__(self):
        broadcast_from_process_0(lambda: self._open() if self.active else None)
        return self

    def _open(self) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        if self._export and self._export.port:
            self._exporter = PrometheusExporter(self._export.address, self._export.port)
        self._scalars = MetricsFile(self.workdir, self.resume_step)
        self.removed_s = self._scalars.removed_s
        for record in read_metrics(self.workdir / FILE):
            self._remember(record["step"], record)
        if self._scalars.removed_lines:
            after = f"after step {self.resume_step} " if self.resume_step else ""
            self.note(f"{FILE}: removed {self._scalars.removed_lines} lines {after}of a former run")

    def __exit__(self, kind, error, traceback):
        if not self.active:
            return
        self._close_bar()
        if self._exporter:
            self._exporter.close()
        with keep_first_error(error):
            self._scalars.close()
        if self._finished:
            return
        try:
            with keep_first_error(error):
                self._draw_curve()
        except Exception:
            if error is None:
                raise
            logging.exception("%s was not drawn.", self.curve_path)

    @property
    def curve_path(self) -> Path:
        return self.workdir / "loss_curve.png"

    def print_header(self, lines) -> None:
        """Prints what the run will do: lines of text, or (name, value) pairs in two columns."""
        lines = list(lines)
        names = [line[0] for line in lines if not isinstance(line, str)]
        width = max(NAME_WIDTH, *map(len, names), 0)
        for line in lines:
            self.note(line if isinstance(line, str) else f"{line[0]:<{width}}  {line[1]}")

    def write_config(self, config: dict) -> None:
        """Writes workdir/config.json."""
        if self.active:
            write_atomic(self.workdir / "config.json", strict_json(config, indent=2) + "\n")

    def write(self, step: int, metrics: dict) -> None:
        """Logs one step's metrics by name, and shows its progress or its evaluation.

        Raises:
            ValueError: a metric is not a scalar number.
        """
        if not self.active:
            return
        metrics = self._scalars.write(step, metrics)
        self._remember(step, metrics)
        if self._exporter:
            self._exporter.write(step, metrics)
        if LOSS in metrics and not self.quiet:
            self._show_step(step, metrics)
        if EVAL_LOSS in metrics:
            self.note(f"eval  step {step}  {eval_text(metrics)}")

    def advance(self, step: int) -> None:
        """Counts a step that is not logged, on the bar too where there is one."""
        self._latest["step"] = step
        if self._bar:
            self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar:
            self._bar.write(text, file=sys.stdout)
        elif not self.quiet:
            print(text, flush=True)

    def finish(self, summary: dict) -> None:
        """Writes summary.json and the loss curve, and prints the closing lines.

        summary.json holds `step`, `steps`, the newest training and evaluation metrics, and
        `summary`: Collector.total(), versions, whatever else there is to say.
        """
        if not self.active:
            return
        summary = {"steps": self.steps} | self._latest | summary
        write_atomic(self.workdir / "summary.json", strict_json(summary, indent=2) + "\n")
        drawn = self._draw_curve()
        self._finished = True
        self._close_bar()
        for line in closing_lines(summary):
            self.note(line)
        if drawn:
            self.note(f"curve {self.curve_path}")

    def _remember(self, step, metrics):
        kept = {k: v for k, v in metrics.items() if k.startswith(("train/", "eval/"))}
        self._latest |= kept | {"step": step}
        if EVAL_LOSS in metrics:
            self.evaluated_step = step

    def _show_step(self, step, metrics):
        now_s = time.monotonic()
        first_step, first_s = self._first_logged = self._first_logged or (step, now_s)
        step_s = metrics.get("perf/step_time_s")
        if step > first_step:  # evaluations and saves count, compilation does not
            step_s = (now_s - first_s) / (step - first_step)
        eta_s = None if step_s is None else step_s * (self.steps - step)
        if not _is_watched():
            count = f"step {step:>{len(str(self.steps))}}/{self.steps}"
            self.note(f"{count}  {step_text(metrics, eta_s)}")
            return
        if self._bar is None:
            self._bar = _build_bar(self.steps, self.resume_step)
        self._bar.n = step
        taken = len(f"step {self.steps}/{self.steps}  100 %  ") + BAR_COLUMNS
        self._bar.set_description_str(step_text(metrics, eta_s, _columns() - taken))

    def _close_bar(self):
        if self._bar:
            self._bar.close()
            self._bar = None

    def _draw_curve(self) -> bool:
        points = {LOSS: [], EVAL_LOSS: []}
        for record in read_metrics(self.workdir / FILE):
            for name in points.keys() & record.keys():
                points[name].append((record["step"], record[name]))
        finite = [loss for name in points for _, loss in points[name] if loss - loss == 0]
        if finite:
            write_atomic(self.curve_path, loss_curve(points[LOSS], points[EVAL_LOSS], self.title))
        return bool(finite)


def _is_watched() -> bool:
    """Whether a bar has a terminal to be redrawn on; mpirun's processes have one that has none."""
    return sys.stdout.isatty() and jax.process_count() == 1


def _columns(unknown: int = 80) -> int:
    """Width of the terminal; some containers' terminals state 0, and tqdm would draw nothing."""
    return os.get_terminal_size(sys.stdout.fileno()).columns or unknown


def _build_bar(steps, resume_step):
    from tqdm import tqdm

    width = len(str(steps))
    form = f"step {{n:>{width}d}}/{{total}} {{bar}} {{percentage:3.0f}} %  {{desc}}"
    size = {"dynamic_ncols": True} if _columns(0) else {"ncols": _columns()}
    return tqdm(total=steps, initial=resume_step, bar_format=form, file=sys.stdout, **size)


class _LineHandler(std_logging.StreamHandler):
    """Log lines on stderr, above a bar if one is live."""

    def emit(self, record):
        tqdm = sys.modules.get("tqdm")
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm else nullcontext():
            super().emit(record)


def set_up_logging(process_index: int = 0) -> None:
    """Log lines on stderr: ours from INFO on process 0, all others from WARNING on.

    -v or --verbosity on the command line sets one level for all, libraries included.
    """
    verbosity = flags.FLAGS["verbosity"]
    level = std_logging.INFO if process_index == 0 else std_logging.WARNING
    if verbosity.present:
        level = logging.converter.absl_to_standard(verbosity.value)
    packages = Path(jaxtrain.__file__).parent.parent
    own = tuple(f"{packages / name}/" for name in ("jaxtrain", "pallas_kernels"))
    handler = _LineHandler()
    process = f" process {process_index}" if process_index else ""
    form = f"%(asctime)s{process} %(levelname)s %(module)s: %(message)s"
    handler.setFormatter(std_logging.Formatter(form, "%H:%M:%S"))
    if not verbosity.present:  # Orbax alone logs some 15 lines a save
        handler.addFilter(lambda r: r.levelno >= std_logging.WARNING or r.pathname.startswith(own))
    root = std_logging.getLogger()
    for old in list(root.handlers):
        if old is logging.get_absl_handler() or isinstance(old, _LineHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.get_absl_logger().setLevel(std_logging.NOTSET)  # follows the root

"""Prints a run's progress, closing lines and log lines, for a terminal or for a job's log."""

import logging as std_logging
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
from absl import flags, logging
from absl.logging import converter

import jaxtrain

LOSS, EVAL_LOSS, EVAL_BITS = "train/loss_nats", "eval/loss_nats", "eval/bits_per_byte"
EVAL_TOKENS = "eval/tokens"
TASK_FIGURES = "accuracy_stderr", "accuracy_norm", "examples", "bits_per_byte"  # eval/NAME_...
PLAIN = "the parameters"  # evaluated if there are no averaged weights
BAR_COLUMNS = 4  # width reserved for the bar itself


class Terminal:
    """Prints lines and the progress of steps: as a bar on a terminal, as lines in a log.

    Args:
        steps: the run's last step.
        resume_step: step from which this process resumes.
        quiet: print nothing.
    """

    def __init__(self, steps: int, resume_step: int = 0, quiet: bool = False):
        self.steps, self.resume_step, self.quiet = steps, resume_step, quiet
        self._bar = None
        self._first_shown = None  # (step, monotonic s)

    def print(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif not self.quiet:
            print(text, flush=True)

    def show_step(self, step: int, metrics: dict[str, int | float]) -> None:
        """Shows a step's loss, its speed and the time left.

        The time left follows from the mean time of a step since the first shown step, including
        evaluations and saves but not compilation.
        """
        if self.quiet:
            return
        now_s = time.monotonic()
        first_step, first_s = self._first_shown = self._first_shown or (step, now_s)
        step_s = metrics.get("perf/step_time_s")
        if step > first_step:
            step_s = (now_s - first_s) / (step - first_step)
        eta_s = None if step_s is None else step_s * (self.steps - step)
        # Under mpirun every process has a pseudo-terminal that nobody sees: print lines there.
        if not sys.stdout.isatty() or jax.process_count() > 1:
            count = f"step {step:>{len(str(self.steps))}}/{self.steps}"
            self.print(f"{count}  {step_text(metrics, eta_s)}")
            return
        if self._bar is None:
            self._bar = _build_bar(self.steps, self.resume_step)
        self._bar.n = step
        taken = len(f"step {self.steps}/{self.steps}  100 %  ") + BAR_COLUMNS
        self._bar.set_description_str(step_text(metrics, eta_s, _terminal_columns() - taken))

    def advance(self, step: int) -> None:
        """Moves the bar to a step whose metrics are not shown."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Ends the bar; later lines are printed below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _terminal_columns(unknown: int = 80) -> int:
    """Returns the width of the terminal; `unknown` if it reports 0, as in some containers."""
    return os.get_terminal_size(sys.stdout.fileno()).columns or unknown


def _build_bar(steps: int, resume_step: int):
    from tqdm import tqdm

    width = len(str(steps))
    bar_format = f"step {{n:>{width}d}}/{{total}} {{bar}} {{percentage:3.0f}} %  {{desc}}"
    # tqdm draws nothing on a terminal that reports 0 columns, so it is given a width there.
    width_known = _terminal_columns(0) > 0
    return tqdm(
        total=steps,
        initial=resume_step,
        bar_format=bar_format,
        file=sys.stdout,
        dynamic_ncols=width_known,
        ncols=None if width_known else _terminal_columns(),
    )


def step_text(metrics: dict, eta_s: float | None, columns: int | None = None) -> str:
    """Returns loss, tokens/s, median step time and time left, aligned from step to step.

    Args:
        columns: available width; entries are left out if the text is longer. None: unlimited.
    """
    tokens_per_s, step_s = metrics.get("perf/tokens_per_s"), metrics.get("perf/step_time_s")
    speed = "-" if tokens_per_s is None else format_grouped(tokens_per_s)
    step_ms = "-"
    if step_s is not None:
        step_ms = f"{1e3 * step_s:.1f}" if step_s < 9.95e-3 else format_grouped(1e3 * step_s)
    eta = "-" if eta_s is None else format_duration(eta_s)
    loss = f"loss {metrics[LOSS]:6.3f}"
    texts = [
        f"{loss}  {speed:>9} tok/s  {step_ms:>6} ms/step  eta {eta}",
        f"{loss}  {speed} tok/s  eta {eta}",
        f"{loss}  eta {eta}",
    ]
    return next((text for text in texts if columns is None or len(text) <= columns), texts[-1])


def eval_text(metrics: dict) -> str:
    """Returns `loss 1.702 nats/token  2.456 bits/byte  of 65,536 tokens`, without unknown parts."""
    bits = f"  {metrics[EVAL_BITS]:.3f} bits/byte" if EVAL_BITS in metrics else ""
    tokens = f"  of {metrics[EVAL_TOKENS]:,} tokens" if EVAL_TOKENS in metrics else ""
    return f"loss {metrics[EVAL_LOSS]:.3f} nats/token{bits}{tokens}"


def score_texts(metrics: dict) -> dict[str, str]:
    """Returns the scores by name, as {"held-out": text, "tasks": text} without those that are "".

    "held-out" has the texts of a mixture's sources and of eval.tasks, `wiki 1.234 bits/byte`;
    "tasks" the other tasks, `arc 27.1 ± 1.9 % (norm 29.5) of 570`.
    """
    texts, tasks = [], []
    for key, value in metrics.items():
        match = re.fullmatch(r"eval/(\w+)_(accuracy|loss_nats)", key)
        if not match:
            continue
        own = {what: metrics.get(f"eval/{match[1]}_{what}") for what in TASK_FIGURES}
        text = f"{value:.3f} nats/token"
        if match[2] == "accuracy":
            error, norm = own["accuracy_stderr"], own["accuracy_norm"]
            text = f"{100 * value:.1f}{f' ± {100 * error:.1f}' if error is not None else ''} %"
            text += f" (norm {100 * norm:.1f})" if norm is not None else ""
            text += f" of {own['examples']:,}"
        elif own["bits_per_byte"] is not None:
            text = f"{own['bits_per_byte']:.3f} bits/byte"
        (tasks if match[2] == "accuracy" else texts).append(f"{match[1]} {text}")
    found = {"held-out": "  ".join(texts), "tasks": "  ".join(tasks)}
    return {label: text for label, text in found.items() if text}


def closing_lines(summary: dict) -> list[str]:
    """Returns lines on the outcome of a run; entries missing from its summary.json are left out."""
    step, steps = summary["step"], summary["steps"]
    outcome = "done " if step >= steps and not summary.get("stopped_by") else "stopped"
    loss = f"  loss {summary[LOSS]:.3f} nats/token" if LOSS in summary else ""
    lines = [f"{outcome} step {step}/{steps}{loss}"]
    if EVAL_LOSS in summary:
        weights = summary.get("eval_at", PLAIN)
        suffix = "" if weights == PLAIN else f"  at {weights}"
        lines.append(f"eval  {eval_text(summary)}{suffix}")
        lines += [f"{label:<5} {text}" for label, text in score_texts(summary).items()]
    if "perf/step_time_s" in summary:
        names = {"p50": "_s", "p95": "_p95_s", "p99": "_p99_s"}
        times_s = {label: summary.get(f"perf/step_time{name}") for label, name in names.items()}
        times = "  ".join(f"{label} {format_seconds(s)}" for label, s in times_s.items() if s)
        lines.append(f"steps {times}  {format_grouped(summary['perf/tokens_per_s'])} tok/s")
    if "perf/wall_s" in summary:
        goodput = summary.get("perf/goodput")
        share = "" if goodput is None else f", {goodput:.0%} of it in steps"
        tokens = format_grouped(summary["perf/tokens"])
        lines.append(f"time  {format_duration(summary['perf/wall_s'])} for {tokens} tokens{share}")
    if "lost_s" in summary:
        longest_first = sorted(summary["lost_s"].items(), key=lambda item: -item[1])
        lost = [f"{cause} {seconds:.1f} s" for cause, seconds in longest_first if seconds >= 0.05]
        lines.append(f"lost  {'  '.join(lost) or 'nothing'}")
    return lines


def format_grouped(number: float) -> str:
    """Returns `6 842`: groups of three digits; `0.13` below 10."""
    return f"{number:.2g}" if number < 9.5 else f"{number:,.0f}".replace(",", " ")


def format_seconds(seconds: float) -> str:
    """Returns `8.67 ms`, `720 ms`, `3.41 s`: three digits, as launch.summary prints them."""
    value, unit = (1e3 * seconds, "ms") if seconds < 0.9995 else (seconds, "s")
    if value <= 0:
        return f"0 {unit}"
    value = float(f"{value:.3g}")  # first, as rounding may add a digit: 99.96 is 100
    decimals = max(0, 2 - math.floor(math.log10(value) + 1e-9))
    return f"{value:.{decimals}f} {unit}"


def format_duration(seconds: float) -> str:
    """Returns `0:54`, `1:02:03` or `2d 01:02:03`."""
    minutes, s = divmod(round(max(seconds, 0)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def describe_time_left(steps: int, step_s: float) -> str:
    """Returns a line on how long further steps take; "" if it is less than 10 s."""
    if step_s * steps < 10:
        return ""
    return (
        f"about {format_duration(step_s * steps)} for {steps:,} more steps of "
        f"{format_seconds(step_s)}, without evaluations and saves"
    )


class _LineHandler(std_logging.StreamHandler):
    """Writes log lines to stderr, above the bar if there is one."""

    def emit(self, record: std_logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # if it is not imported, there is no bar
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm else nullcontext():
            super().emit(record)


def set_up_logging(process_index: int = 0) -> None:
    """Logs to stderr: our own lines from INFO on process 0, all other lines from WARNING.

    -v or --verbosity on the command line sets one level for everything, libraries included.
    """
    verbosity = flags.FLAGS["verbosity"]
    level = std_logging.INFO if process_index == 0 else std_logging.WARNING
    if verbosity.present:
        level = converter.absl_to_standard(verbosity.value)
    packages = Path(jaxtrain.__file__).parent.parent
    own = tuple(f"{packages / name}/" for name in ("jaxtrain", "pallas_kernels"))
    handler = _LineHandler()
    process = f" process {process_index}" if process_index else ""
    line_format = f"%(asctime)s{process} %(levelname)s %(module)s: %(message)s"
    handler.setFormatter(std_logging.Formatter(line_format, "%H:%M:%S"))
    if not verbosity.present:  # Orbax logs some 15 lines at INFO for each save
        handler.addFilter(lambda r: r.levelno >= std_logging.WARNING or r.pathname.startswith(own))
    root = std_logging.getLogger()
    for old in list(root.handlers):
        if old is logging.get_absl_handler() or isinstance(old, _LineHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.get_absl_logger().setLevel(std_logging.NOTSET)  # follows the root logger

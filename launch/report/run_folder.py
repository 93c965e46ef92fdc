"""Reads a run directory: config.json, metrics.jsonl, hosts/<process>.jsonl and summary.json.

This is the only file of launch that knows their contents. What an older run, or one without a GPU,
did not write is absent here too.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launch.host.run_files import CONFIG, METRICS, SUMMARY, process_files
from launch.report.stats import mean, percentile

NOT_JSON = ("nan", "inf", "-inf")
PEAK_OF = {"bfloat16": "bfloat16", "float32": "tf32"}  # XLA multiplies float32 in TF32
LOSS, EVAL_LOSS, STEP_TIME = "train/loss_nats", "eval/loss_nats", "perf/step_time_s"


@dataclass(frozen=True)
class RunFolder:
    """What a run wrote, in the order written; `summary` is {} until the run ends."""

    folder: Path
    config: dict
    metrics: list[dict]
    hosts: dict[str, list[dict]]  # process -> its lines: steps and events
    summary: dict

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def settings(self) -> dict:
        return self.config["config"]

    @property
    def chip(self) -> dict | None:
        """{"name", "peak_flops_per_s", "hbm_bytes_per_s", "hbm_bytes", "source"}; None on a CPU."""
        return self.config.get("chip")

    @property
    def device(self) -> str:
        """The chip's name, or JAX's name of the device where the chip is not known."""
        return self.chip["name"] if self.chip else self.config["device"]

    @property
    def devices(self) -> int:
        return self.config["devices"]

    @property
    def config_hash(self) -> str:
        return self.config["config_hash"]

    @property
    def hosts_count(self) -> int:
        """The number of hosts; older runs do not record it and had one."""
        return count(self.config.get("hosts", 1))

    @property
    def work(self) -> dict:
        return self.config.get("work") or {}

    @property
    def tokens_per_step(self) -> int:
        data = self.settings["data"]
        return self.work.get("tokens_per_step") or data["batch"] * data["seq_len"]

    @property
    def peak_flops_per_s(self) -> float | None:
        """The chip's peak for the type that the run multiplies in; None if it is not known."""
        dtype = self.settings["model"]["dtype"]
        return self.chip["peak_flops_per_s"].get(PEAK_OF.get(dtype)) if self.chip else None

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of each line of metrics.jsonl that has a finite value."""
        values = ((record["step"], record.get(metric)) for record in self.metrics)
        return [(step, x) for step, x in values if x is not None and math.isfinite(x)]

    @cached_property
    def step_times(self) -> tuple[list[tuple[int, float]], str]:
        """((step, seconds) of each step, or the mean of each log window; a description).

        The first step after each start is left out, since it includes one-time work of the device.
        The trainer's closing lines leave it out too
        (jaxtrain.metrics.step_log.read_step_times).
        """
        lines = self.hosts.get("0", [])
        timed = sorted({r["step"]: r[STEP_TIME] for r in lines if STEP_TIME in r}.items())
        if timed:
            first = {r["step"] for r in lines if r.get("first")} | {timed[0][0]}
            later = [(step, value) for step, value in timed if step not in first]
            return later, "each step, hosts/0.jsonl"
        every = self.settings["log_every"]
        if every == 1:
            return self.points(STEP_TIME)[1:], "each step, metrics.jsonl"
        means = [(s, self.tokens_per_step / rate) for s, rate in self.points("perf/tokens_per_s")]
        return means[1:], f"means of {every} steps, metrics.jsonl"

    @cached_property
    def lost_s(self) -> dict[str, float]:
        """Wall-clock seconds that were not spent in steps, by cause, the largest first."""
        lost = self.summary.get("lost_s")
        if lost is None:
            sources = [self.summary] if self.summary else self.metrics
            lost = {}
            for record in sources:
                for key, value in record.items():
                    if key.startswith("perf/pause_"):
                        cause = key.removeprefix("perf/pause_").removesuffix("_s")
                        lost[cause] = lost.get(cause, 0.0) + value
        return dict(sorted(lost.items(), key=lambda pair: -pair[1]))

    @cached_property
    def figures(self) -> dict[str, float]:
        """The run's figures by metric name; those of steps are computed from step_times."""
        times = [seconds for _, seconds in self.step_times[0]]
        figures = {}
        if times:
            rate = self.tokens_per_step / mean(times)
            p50, p95, p99 = (percentile(times, share) for share in (0.5, 0.95, 0.99))
            figures = {
                "perf/tokens_per_s": rate,
                "perf/tokens_per_s_per_device": rate / self.devices,
                STEP_TIME: p50,
                "perf/step_time_p95_s": p95,
                "perf/step_time_p99_s": p99,
                "perf/step_time_max_s": max(times),
            }
        for metric in ("perf/mfu", "perf/mfu_6n", "perf/mbu", "data/wait_s", *COMM):
            values = [value for _, value in self.points(metric)]
            if values:
                figures[metric] = mean(values)
        for metric in ("perf/hbm_peak_bytes", "perf/hbm_bytes"):
            values = [value for _, value in self.points(metric)]
            if values:
                figures[metric] = max(values)
        goodput = self.summary.get("perf/goodput", self._goodput())
        return figures | ({} if goodput is None else {"perf/goodput": goodput})

    def _goodput(self) -> float | None:
        """Returns the share of the time so far that was spent in steps, for a run in progress."""
        steps = sum(seconds for _, seconds in self.step_times[0])
        every = 1 if self.step_times[1].startswith("each") else self.settings["log_every"]
        wall = every * steps + sum(self.lost_s.values())
        return every * steps / wall if wall and steps else None

    @property
    def step(self) -> int:
        """The last step. Process files have every step, metrics.jsonl only the logged ones."""
        timed = (r["step"] for r in self.hosts.get("0", []) if STEP_TIME in r)
        logged = (record["step"] for record in self.metrics)
        return max((*timed, *logged), default=0)

    @property
    def state(self) -> str:
        """`done` or `stopped by SIGTERM`; without an end `running` or `silent for ...`."""
        if self.summary:
            stopped = self.summary.get("stopped_by")
            return f"stopped by {stopped}" if stopped else "done"
        if not self.metrics:
            return "no step yet"
        silent_s = max(0.0, time.time() - self.metrics[-1]["time"])
        return "running" if silent_s < 60 else f"silent for {duration(silent_s)}"


class NoRun(ValueError):
    """Raised if a folder contains no run, or not yet."""


COMM = (
    "comm/wire_bytes",
    "comm/wire_sent_bytes",
    "comm/wire_received_bytes",
    "comm/effective_bytes_per_s",
    "comm/overhead",
)


def count(value: int | list | dict) -> int:
    """Returns the number of hosts, given as a number or as the host of each process."""
    return len(set(value)) if isinstance(value, list | dict) else value


def read_run(folder: Path | str) -> RunFolder:
    """Returns the run in a folder.

    Raises:
        NoRun: the folder contains no run.
        ValueError: a line of a file is damaged; the message names it.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    if config is None:
        raise NoRun(
            f"DIR must be a run directory, with config.json; got {str(folder)!r}. "
            "It is what the run was given as --config.workdir."
        )
    _check_config(folder / CONFIG, config)
    metrics = _read_lines(folder / METRICS)
    paths = sorted(process_files(folder), key=lambda path: (len(path.stem), path.stem))
    hosts = {path.stem: _read_lines(path) for path in paths}
    summary = _read_summary(folder / SUMMARY)
    if metrics and summary.get("step", 0) < max(record["step"] for record in metrics):
        summary = {}  # it is from before the run was resumed
    return RunFolder(folder, config, metrics, hosts, summary)


def find_runs(path: Path | str) -> list[RunFolder]:
    """Returns the run in a folder, or all runs in its direct subfolders.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    inner = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
    if (path / CONFIG).exists() or not inner:
        return [read_run(path)]
    return [read_run(folder) for folder in inner]


def _check_config(path: Path, config) -> None:
    """Raises ValueError if config.json lacks what every run writes."""
    settings = config.get("config") if isinstance(config, dict) else None
    sections = ("model", "data")
    if (
        not isinstance(settings, dict)
        or not all(isinstance(settings.get(key), dict) for key in sections)
        or type(settings.get("log_every")) is not int
    ):
        raise ValueError(
            f"{path} must hold a run's config and data; got something else. "
            "The training command writes it again."
        )


def _read_summary(path: Path) -> dict:
    """Returns summary.json, {} with a warning if it is damaged; other files have the steps."""
    try:
        return _numbers(_read_json(path) or {})
    except (ValueError, AttributeError):
        print(f"warning: {path} is not a run's summary, so it is left out", file=sys.stderr)
        return {}


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read; got {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; got: {error}. Is it of a run?") from None


def _read_lines(path: Path) -> list[dict]:
    """Returns the objects of a JSON-lines file without an incomplete last line; [] without file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read; got {error.strerror}.") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(_numbers(json.loads(line)))
        except (ValueError, AttributeError):
            if number == len(lines):  # it has no newline yet: it is being written
                break
            raise ValueError(
                f"{path}, line {number} must be a JSON object; got {line[:80]!r}. Remove it."
            ) from None
    return records


def _numbers(record: dict) -> dict:
    return {k: float(v) if v in NOT_JSON else v for k, v in record.items()}


def duration(seconds: float) -> str:
    """Formats seconds as `54 s`, `3 min 20 s`, `2 h 05 min` or `3 d 04 h`."""
    seconds = round(seconds)
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02} h"
    if hours:
        return f"{hours} h {m:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"

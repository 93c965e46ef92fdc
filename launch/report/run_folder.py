"""A run directory read back: config.json, metrics.jsonl, hosts/<process>.jsonl, summary.json.

What an older run or one without a GPU did not write is absent here too; nothing is made up for it.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launch.host.run_files import CONFIG, METRICS, SUMMARY, process_files
from launch.report.stats import mean, percentile

NOT_JSON = ("nan", "inf", "-inf")
PEAK_OF = {"bfloat16": "bfloat16", "float32": "tf32"}  # as XLA makes them on tensor cores
LOSS, EVAL_LOSS, STEP_TIME = "train/loss_nats", "eval/loss_nats", "perf/step_time_s"


@dataclass(frozen=True)
class Run:
    """One run; `metrics` and `hosts` are in the order written, `summary` is {} until it ends."""

    folder: Path
    config: dict
    metrics: list[dict]
    hosts: dict[str, list[dict]]  # process -> what it wrote, events among it
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
        """The chip's name, else what JAX calls the device."""
        return self.chip["name"] if self.chip else self.config["device"]

    @property
    def devices(self) -> int:
        return self.config["devices"]

    @property
    def config_hash(self) -> str:
        return self.config["config_hash"]

    @property
    def hosts_count(self) -> int:
        """Hosts of the run; a run that did not say so had one process."""
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
        """Of the type that its products are made in."""
        dtype = self.settings["model"]["dtype"]
        return self.chip["peak_flops_per_s"].get(PEAK_OF.get(dtype)) if self.chip else None

    def points(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of each line that has it and a finite number."""
        found = ((record["step"], record.get(metric)) for record in self.metrics)
        return [(step, value) for step, value in found if value is not None and value - value == 0]

    @cached_property
    def step_times(self) -> tuple[list[tuple[int, float]], str]:
        """((step, s) of each step or window; what they are, in words).

        The first step after each start is left out, since it also pays for what the device does
        once. The trainer's closing lines leave it out too
        (jaxtrain.metrics.step_log.read_step_times).
        """
        lines = self.hosts.get("0", [])
        timed = sorted({r["step"]: r[STEP_TIME] for r in lines if STEP_TIME in r}.items())
        if timed:
            first = {r["step"] for r in lines if r.get("first")} | {timed[0][0]}
            kept = [(step, value) for step, value in timed if step not in first]
            return kept, "each step, hosts/0.jsonl"
        every = self.settings["log_every"]
        if every == 1:
            return self.points(STEP_TIME)[1:], "each step, metrics.jsonl"
        means = [(s, self.tokens_per_step / rate) for s, rate in self.points("perf/tokens_per_s")]
        return means[1:], f"means of {every} steps, metrics.jsonl"

    @cached_property
    def lost_s(self) -> dict[str, float]:
        """Wall seconds by what they went to instead of steps, the most first."""
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
        """What is known of the run by metric name, of the steps in step_times."""
        times = [seconds for _, seconds in self.step_times[0]]
        found = {}
        if times:
            rate = self.tokens_per_step / mean(times)
            p50, p95, p99 = (percentile(times, share) for share in (0.5, 0.95, 0.99))
            found = {
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
                found[metric] = mean(values)
        for metric in ("perf/hbm_peak_bytes", "perf/hbm_bytes"):
            values = [value for _, value in self.points(metric)]
            if values:
                found[metric] = max(values)
        goodput = self.summary.get("perf/goodput", self._goodput())
        return found | ({} if goodput is None else {"perf/goodput": goodput})

    def _goodput(self) -> float | None:
        """Of a run that has not ended: the share of the time so far that was not lost."""
        steps = sum(seconds for _, seconds in self.step_times[0])
        every = 1 if self.step_times[1].startswith("each") else self.settings["log_every"]
        wall = every * steps + sum(self.lost_s.values())
        return every * steps / wall if wall and steps else None

    @property
    def step(self) -> int:
        """The newest one: processes write each step, metrics.jsonl has the logged ones alone."""
        timed = (r["step"] for r in self.hosts.get("0", []) if STEP_TIME in r)
        logged = (record["step"] for record in self.metrics)
        return max((*timed, *logged), default=0)

    @property
    def state(self) -> str:
        """`done`, `stopped by SIGTERM`, or what the last line says of a run without an end."""
        if self.summary:
            stopped = self.summary.get("stopped_by")
            return f"stopped by {stopped}" if stopped else "done"
        if not self.metrics:
            return "no step yet"
        silent_s = max(0.0, time.time() - self.metrics[-1]["time"])
        return "running" if silent_s < 60 else f"silent for {duration(silent_s)}"


class NoRun(ValueError):
    """The folder holds no run, or none yet."""


COMM = (
    "comm/wire_bytes",
    "comm/wire_sent_bytes",
    "comm/wire_received_bytes",
    "comm/effective_bytes_per_s",
    "comm/overhead",
)


def count(value) -> int:
    """A number of hosts, given as itself or by the host of each process."""
    return len(set(value)) if isinstance(value, list | dict) else value


def read_run(folder) -> Run:
    """The run in a folder.

    Raises:
        NoRun: it holds none.
        ValueError: a line of it is damaged; says which.
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
        summary = {}  # of what came before a resume
    return Run(folder, config, metrics, hosts, summary)


def find_runs(path) -> list[Run]:
    """The run in a folder, or all those in the folders directly in it.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    inner = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
    if (path / CONFIG).exists() or not inner:
        return [read_run(path)]
    return [read_run(folder) for folder in inner]


def _check_config(path: Path, config) -> None:
    """Raises ValueError where config.json lacks what every run's has."""
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
    """Returns the figures of summary.json; {} with a warning where it is damaged.

    The figures of steps are computed from the other files.
    """
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
    """Objects of a file of JSON lines; none where there is no file, and not a torn last one."""
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
            if number == len(lines):  # no newline: it is being written
                break
            raise ValueError(
                f"{path}, line {number} must be a JSON object; got {line[:80]!r}. Remove it."
            ) from None
    return records


def _numbers(record: dict) -> dict:
    return {k: float(v) if v in NOT_JSON else v for k, v in record.items()}


def duration(seconds: float) -> str:
    """`54 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    seconds = round(seconds)
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02} h"
    if hours:
        return f"{hours} h {m:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"

"""Reads a run directory: config.json, metrics.jsonl, hosts/<process>.jsonl and summary.json.

A figure that a run did not write, because it is older or has no GPU, is absent here too.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from launch.host.run_files import CLOCK, CONFIG, METRICS, SUMMARY, process_files
from launch.report.formats import duration
from launch.report.json_files import read_json
from launch.report.run_shapes import check_config, is_number, read_records, read_summary
from launch.report.stats import percentile
from launch.report.step_tokens import StepTokens

PEAK_OF = {"bfloat16": "bfloat16", "float32": "tf32"}  # XLA multiplies float32 in TF32
LOSS, EVAL_LOSS, STEP_TIME = "train/loss_nats", "eval/loss_nats", "perf/step_time_s"
DATA_WAIT, GOODPUT = "data/wait_s", "perf/goodput"
MEANS = (  # metrics of which a run's figure is the mean
    *("perf/mfu", "perf/mfu_6n", "perf/mbu", DATA_WAIT, "comm/wire_bytes"),
    *("comm/wire_sent_bytes", "comm/wire_received_bytes", "comm/effective_bytes_per_s"),
    "comm/overhead",
)
PROBE = "probe"  # the event that compares the ranks, see jaxtrain.metrics.rank_watch
MAXIMA = ("perf/hbm_peak_bytes", "perf/hbm_bytes")


@dataclass(frozen=True)
class RunFolder:
    """The records of a run, in the order in which they were written."""

    folder: Path
    config: dict
    metrics: list[dict]
    hosts: dict[str, list[dict]]  # process -> its records: steps and events
    summary: dict  # empty until the run ends
    clock_lead_s: float | None = None  # of the host that a job's run was fetched from, over ours

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
    def device_kind(self) -> str:
        """JAX's name of the device."""
        return self.config["device"]

    @property
    def device(self) -> str:
        """The chip's name, or JAX's name of the device if the chip is unknown."""
        return self.chip["name"] if self.chip else self.device_kind

    @property
    def devices(self) -> int:
        return self.config["devices"]

    @property
    def config_hash(self) -> str:
        return self.config["config_hash"]

    @property
    def hosts_count(self) -> int:
        """The number of hosts. Older runs did not record it and had one."""
        hosts = self.config.get("hosts", 1)  # a number, or the host of each process
        return len(set(hosts)) if isinstance(hosts, list | dict) else hosts

    @property
    def processes(self) -> int:
        return self.config.get("processes", 1)

    @property
    def versions(self) -> dict[str, str]:
        return self.config["versions"]

    @property
    def routes(self) -> dict[str, str]:
        """The implementation that was chosen for each operation, with the reason."""
        return self.config.get("routes") or {}

    @property
    def data_fingerprint(self) -> str:
        return self.config["data"]["fingerprint"]

    @property
    def work(self) -> dict:
        """The counts of a step, such as `params` and `roofline_s`; {} if they were not recorded."""
        return self.config.get("work") or {}

    @cached_property
    def step_tokens(self) -> StepTokens:
        return StepTokens.from_config(self.config)

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step, their mean over the whole run if its steps differ in size."""
        return self.step_tokens.mean(self.settings)

    @property
    def peak_flops_per_s(self) -> float | None:
        """The chip's peak for the type that the run multiplies in; None if unknown."""
        dtype = self.settings["model"]["dtype"]
        return self.chip["peak_flops_per_s"].get(PEAK_OF.get(dtype)) if self.chip else None

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of each line of metrics.jsonl that has a finite value."""
        if metric not in self._points:  # the page asks for some metrics several times
            self._points[metric] = [
                (record["step"], x) for record in self.metrics if is_number(x := record.get(metric))
            ]
        return self._points[metric]

    @cached_property
    def _points(self) -> dict[str, list[tuple[int, float]]]:
        """What `points` has returned so far, by metric."""
        return {}

    def process_points(self, process: str, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) of each record of a process that has the metric."""
        records = (r for r in self.hosts.get(process, []) if r.get("step") is not None)
        return [(r["step"], x) for r in records if is_number(x := r.get(metric))]

    @property
    def events(self) -> list[tuple[int, str]]:
        """(step, description) of the last event at each step, such as `step 20: stall, data`."""
        found = {}
        for record in self.hosts.get("0", []):
            if record.get("event") not in (None, PROBE) and record.get("step") is not None:
                cause = f", {record['cause']}" if "cause" in record else ""
                found[record["step"]] = f"step {record['step']}: {record['event']}{cause}"
        return sorted(found.items())

    @cached_property
    def step_times(self) -> tuple[list[tuple[int, float]], str]:
        """((step, seconds) of each step, or the mean of each log window; a description).

        The first step after each start is left out, since it includes one-time work of the device.
        The trainer's closing lines leave it out too (jaxtrain.metrics.step_log.read_step_times).
        """
        timed = sorted(dict(self.process_points("0", STEP_TIME)).items())
        if timed:
            first = {r["step"] for r in self.hosts["0"] if r.get("first")} | {timed[0][0]}
            later = [(step, value) for step, value in timed if step not in first]
            return later, "each step, hosts/0.jsonl"
        every = self.settings["log_every"]
        if every == 1:
            return self.points(STEP_TIME)[1:], "each step, metrics.jsonl"
        means = [(s, self.step_tokens.of([s]) / r) for s, r in self.points("perf/tokens_per_s")]
        return means[1:], f"means of {every} steps, metrics.jsonl"

    @property
    def seconds(self) -> list[float]:
        """The values of step_times, in order."""
        return [value for _, value in self.step_times[0]]

    @cached_property
    def lost_s(self) -> dict[str, float]:
        """Wall-clock seconds that were not spent in steps, by cause, the largest first."""
        lost = self.summary.get("lost_s")
        if lost is None:
            lost, records = {}, [self.summary] if self.summary else self.metrics
            for key in dict.fromkeys(key for record in records for key in record):
                if key.startswith("perf/pause_"):
                    cause = key.removeprefix("perf/pause_").removesuffix("_s")
                    lost[cause] = sum(x for record in records if is_number(x := record.get(key)))
        return dict(sorted(lost.items(), key=lambda pair: -pair[1]))

    @property
    def wall_s(self) -> float | None:
        """The seconds from start to end; None until the run ends."""
        return self.summary.get("perf/wall_s")

    @property
    def outliers(self) -> dict[str, int]:
        """The number of unusually long steps by cause; {} until the run ends."""
        return self.summary.get("outliers") or {}

    @cached_property
    def figures(self) -> dict[str, float]:
        """The run's figures by metric name; those of steps are computed from step_times."""
        figures, times = {}, self.seconds
        if times:
            rate = self.step_tokens.of([step for step, _ in self.step_times[0]]) / sum(times)
            p50, p95, p99 = (percentile(times, share) for share in (0.5, 0.95, 0.99))
            figures = {
                "perf/tokens_per_s": rate,
                "perf/tokens_per_s_per_device": rate / self.devices,
                STEP_TIME: p50,
                "perf/step_time_p95_s": p95,
                "perf/step_time_p99_s": p99,
                "perf/step_time_max_s": max(times),
            }
        for metrics, reduce in ((MEANS, fmean), (MAXIMA, max)):
            for metric in metrics:
                values = [value for _, value in self.points(metric)]
                if values:
                    figures[metric] = reduce(values)
        goodput = self.summary.get(GOODPUT, self._goodput())
        return figures | ({} if goodput is None else {GOODPUT: goodput})

    def _goodput(self) -> float | None:
        """Returns the share of the time so far that was spent in steps; None without steps."""
        every = 1 if self.step_times[1].startswith("each") else self.settings["log_every"]
        steps_s = every * sum(self.seconds)
        return steps_s / (steps_s + sum(self.lost_s.values())) if steps_s else None

    @property
    def step(self) -> int:
        """The last step. Process files have every step, metrics.jsonl only the logged ones."""
        timed = (step for step, _ in self.process_points("0", STEP_TIME))
        logged = (record["step"] for record in self.metrics)
        return max((*timed, *logged), default=0)

    @property
    def state(self) -> str:
        """`done` or `stopped by SIGTERM`; before the end `running` or `silent for 3 min 20 s`.

        Hosts' clocks differ, so a record's time is compared with the clock of the host that wrote
        it. Where that is unknown, the time of the file's last change is used.
        """
        if self.summary:
            stopped = self.summary.get("stopped_by")
            return f"stopped by {stopped}" if stopped else "done"
        if not self.metrics:
            return "no step yet"
        if self.clock_lead_s is None:
            written = (self.folder / METRICS).stat().st_mtime
        else:
            times = (t for r in reversed(self.metrics) if is_number(t := r.get("time")))
            written = next(times, 0.0) - self.clock_lead_s
        silent_s = max(0.0, time.time() - written)
        return "running" if silent_s < 60 else f"silent for {duration(silent_s)}"


class NoRun(ValueError):
    """Raised if a folder contains no run, or no run yet."""


def read_run(folder: Path | str) -> RunFolder:
    """Returns the run in a folder.

    Raises:
        NoRun: the folder contains no run.
        ValueError: a file is damaged; the message names it, and the line.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config is None:
        raise NoRun(
            f"DIR must be a run directory, with config.json; got {str(folder)!r}. "
            "It is the --config.workdir of the run."
        )
    check_config(folder / CONFIG, config)
    metrics = read_records(folder / METRICS)
    paths = sorted(process_files(folder), key=lambda path: (len(path.stem), path.stem))
    hosts = {path.stem: read_records(path) for path in paths}
    summary = read_summary(folder / SUMMARY)
    if metrics and summary.get("step", 0) < max(record["step"] for record in metrics):
        summary = {}  # it is from before the run was resumed
    clock = read_json(folder / CLOCK)
    lead_s = clock.get("lead_s") if isinstance(clock, dict) else None
    lead_s = lead_s if is_number(lead_s) else None
    return RunFolder(folder, config, metrics, hosts, summary, lead_s)


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

"""Suite first-day: everything to measure on a new card, in stages that resume.

Each stage is a child process with a time limit, a log and a result file in one folder, so that the
others still run if one hangs, crashes or is killed. The stages are data: a command, its limit and
its result; --stages chooses, orders and limits them. A call works for one slice of time; the next
call with the same folder continues. What each stage has done is in first_day.json, which is written
before and after every stage.

This process never uses the GPU.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.benchmarks import processor
from jaxtrain.benchmarks.child import run_process_group
from jaxtrain.benchmarks.first_day_results import (
    RECORD,
    FirstDayError,
    find_left,
    find_problems,
    lock_folder,
    read_record,
    read_rows,
    summarize,
)
from jaxtrain.benchmarks.first_day_stages import STAGES, Stage, build_argv, choose_stages
from jaxtrain.benchmarks.gpu_training import NoGpu
from jaxtrain.benchmarks.step_timing import gpu_clocks
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.reporting.table import format_table
from pallas_kernels.child_process import exit_on_sigterm, last_lines
from pallas_kernels.quiet import has_gpu

COMMAND = "python -m jaxtrain.bench --suite=first-day"
# A stage's state. The next call runs those that are `waiting` or `unfinished`.
WAITING, UNFINISHED, DONE, SKIPPED = "waiting", "unfinished", "done", "skipped"
FAILED, STOPPED = "failed", "stopped"  # crashed, or used all its minutes: run only if named
# A stage is killed this long after the limit in its command, to let it write what it has.
END_MINUTES, END_SHARE = 0.5, 0.2


class FirstDay:
    """One call of the suite: the folder, its record, and the time that is left.

    Args:
        folder: where all results are; made if it is missing.
        minutes: the time of this slice.
        tiny: whether this is a trial without a card, whose figures mean nothing.
        show: prints a text.

    Raises:
        FirstDayError: only one of the folder and this call is a trial, or the folder has another
            card's results.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        tiny: bool,
        show: Callable[[str], None],
        stages: Sequence[Stage] = STAGES,
    ):
        self.folder, self.minutes, self.tiny = folder.absolute(), minutes, tiny
        self.stages, self._show = stages, show
        self._until_s = time.monotonic() + 60 * minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RECORD
        card = "no card: a trial" if tiny else gpu_clocks().partition(",")[0]
        new = {"tiny": tiny, "card": card, "stages": {}}
        self.record = read_record(folder) if path.exists() else new
        if self.record["tiny"] != tiny:
            kind = "a trial, which --tiny continues" if self.record["tiny"] else "no trial"
            raise FirstDayError(f"--out {folder} is {kind}. Set another --out.")
        if has_gpu() and not tiny and self.record["card"] != card:
            raise FirstDayError(
                f"--out must have results of this card, {card}; got {folder} of "
                f"{self.record['card']}. Set another --out."
            )
        for stage in stages:
            new = {"state": WAITING, "reason": "", "used_s": 0.0, "calls": []}
            entry = self.record["stages"].setdefault(stage.name, new)
            if entry["state"] == UNFINISHED and not self._can_go_on(stage):
                entry["state"] = STOPPED

    @property
    def _left_minutes(self) -> float:
        return (self._until_s - time.monotonic()) / 60

    def _save(self) -> None:
        write_atomic(self.folder / RECORD, strict_json(self.record, indent=1) + "\n")

    def state(self, stage: Stage) -> dict[str, Any]:
        """Returns a stage's entry in the record."""
        return self.record["stages"][stage.name]

    def _can_go_on(self, stage: Stage) -> bool:
        """Returns whether a stage has enough of its minutes left to be started."""
        return stage.minutes - self.state(stage)["used_s"] / 60 >= stage.least_minutes

    def retry(self, names: Sequence[str]) -> None:
        """Gives stages that failed, were stopped or were skipped their whole time again."""
        for stage in self.stages:
            if stage.name in names and self.state(stage)["state"] in (FAILED, STOPPED, SKIPPED):
                self.state(stage).update(state=UNFINISHED, used_s=0.0, reason="named in --stages")

    def is_open(self, stage: Stage) -> bool:
        """Returns whether this call would run a stage."""
        needs_no_gpu = bool(stage.reads) and self._has_input(stage)
        is_open = self.state(stage)["state"] in (WAITING, UNFINISHED)
        return is_open and (has_gpu() or self.tiny or needs_no_gpu)

    def _has_input(self, stage: Stage) -> bool:
        """Returns whether the result that a stage reads exists; an earlier stage may write it."""
        return (self.folder / stage.reads).exists()

    def allotted_minutes(self, stage: Stage, left: float) -> float:
        """Returns the minutes for a stage if `left` are left: 0.0 if they are too few to start."""
        minutes = stage.minutes - self.state(stage)["used_s"] / 60
        minutes = min(minutes, stage.call_minutes, left)
        return minutes if minutes >= stage.least_minutes else 0.0

    def plan_text(self, chosen: Sequence[Stage]) -> str:
        """Returns the plan of this slice's minutes as a table, in the order of the call."""
        left, rows, names = self.minutes, [], [stage.name for stage in chosen]
        for stage in [*chosen, *(stage for stage in self.stages if stage.name not in names)]:
            runs = self.is_open(stage) and stage.name in names
            minutes = self.allotted_minutes(stage, left) if runs else 0.0
            left -= minutes
            used = self.state(stage)["used_s"] / 60
            planned = f"{minutes:.1f}" if minutes else "-"
            state = self.state(stage)["state"]
            rows.append((stage.name, state, f"{used:.1f}", f"{stage.minutes:g}", planned))
        table = format_table(rows, ("stage", "state", "used", "limit", "at most now"))
        return f"Minutes of this slice ({self.minutes:g} in all), in {self.folder}:\n{table}"

    def run(self, chosen: Sequence[Stage]) -> None:
        """Runs the chosen stages that are open, one after the other, while time is left."""
        for stage in chosen:
            if not (self.is_open(stage) and self._has_input(stage)):
                continue
            if self.tiny and stage.tiny is None:
                self.state(stage).update(state=SKIPPED, reason="it has no trial without a card")
            elif minutes := self.allotted_minutes(stage, self._left_minutes):
                self._run_stage(stage, minutes)
        self._save()

    def _run_stage(self, stage: Stage, minutes: float) -> None:
        """Runs a stage for at most some minutes and records how it ended."""
        entry, used_s = self.state(stage), self.state(stage)["used_s"]
        child_minutes = minutes - min(END_MINUTES, END_SHARE * minutes)
        argv = build_argv(stage, self.folder, child_minutes, self.tiny)
        # Recorded first: if this process is killed too, the next call knows that the time is gone.
        entry.update(state=UNFINISHED, reason="the suite was killed", used_s=used_s + 60 * minutes)
        self._save()
        log = self.folder / f"{stage.name}.log"
        self._show(f"{stage.name}: at most {minutes:.1f} minutes; its output goes to {log}")
        env = os.environ | ({"JAX_PLATFORMS": "cpu"} if self.tiny else {})
        start_s, start_time = time.monotonic(), time.time()
        try:
            with open(log, "a") as output:
                print(f"\n$ {shlex.join(argv)}", file=output, flush=True)
                log_start = output.tell()
                status = run_process_group(argv, output, 60 * minutes, env)
        finally:
            taken_s = time.monotonic() - start_s
            entry.update(reason="interrupted", used_s=used_s + taken_s)
            self._save()
        time_was_up = taken_s >= 60 * child_minutes
        entry["state"], entry["reason"] = self._judge(stage, status, log_start, time_was_up)
        call = processor.provenance() | {"command": argv, "status": status, "seconds": taken_s}
        entry["calls"].append(call | {"tiny": self.tiny})
        if stage.collect:
            self._collect(stage.collect, start_time)
        if self.tiny:
            self._mark_trial(stage)
        self._save()
        ending = f": {entry['reason']}" if entry["reason"] else ""
        lines = [f"  {line}" for line in summarize(stage.name, self._rows(stage))]
        headline = f"{stage.name}: {entry['state']} after {taken_s:.0f} s{ending}"
        self._show("\n".join([headline, *lines]))

    def _judge(
        self, stage: Stage, status: int | None, log_start: int, time_was_up: bool
    ) -> tuple[str, str]:
        """Returns (state, reason) of a stage that ended; status is None if its time was up.

        Its output begins at the byte `log_start` of its log.
        """
        if status:
            log = self.folder / f"{stage.name}.log"
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            return FAILED, f"{name}: {last_lines(log, 500, log_start)}"
        path = self.folder / stage.result
        try:
            rows = read_rows(path)
        except (OSError, ValueError) as error:
            if status is not None:
                return FAILED, f"it must write {path}; got {type(error).__name__}: {error}"
            rows = []
        if skipped := [row["skipped"] for row in rows if row.get("skipped")]:
            return SKIPPED, skipped[0]
        left = find_left(rows)
        if status == 0 and not left and not time_was_up:
            return DONE, ""
        what = f"; left: {', '.join(left)}" if left else ""
        if self._can_go_on(stage):
            return UNFINISHED, f"its time in this call was up{what}"
        return STOPPED, f"it used all of its {stage.minutes:g} minutes{what}"

    def _collect(self, source: Path, since: float) -> None:
        """Copies the JSON files that a stage wrote outside DIR to DIR/tuned."""
        for path in source.glob("*.json"):
            if path.stat().st_mtime >= since:
                (self.folder / "tuned").mkdir(exist_ok=True)
                shutil.copy(path, self.folder / "tuned")

    def _mark_trial(self, stage: Stage) -> None:
        """Adds to every row of a result that it is a trial's."""
        path = self.folder / stage.result
        if texts := [strict_json(row | {"tiny": True}) for row in self._rows(stage)]:
            write_atomic(path, "\n".join(texts) + "\n")

    def _rows(self, stage: Stage) -> list[dict[str, Any]]:
        """Returns a stage's rows; [] if it has none that can be read."""
        with contextlib.suppress(OSError, ValueError):
            return read_rows(self.folder / stage.result)
        return []

    def report_text(self, command: str, named: Sequence[Stage]) -> str:
        """Returns what is measured, what failed and why, and what is left with its command.

        Args:
            named: the stages that --stages names, which the command continues first.
        """
        measured, failed, left, stuck, results = [], [], [], [], set()
        for stage in self.stages:
            # Two stages may share a result, which is reported once.
            rows = [] if stage.result in results else self._rows(stage)
            entry = self.state(stage)
            results.add(stage.result)
            lines = summarize(stage.name, rows)
            measured += [f"  {stage.name}: {line}" for line in lines]
            if entry["state"] in (FAILED, STOPPED, SKIPPED):
                failed.append(f"  {stage.name}: {entry['state']}: {entry['reason']}")
                stuck += [stage.name] if entry["state"] != SKIPPED else []
            failed += [f"  {stage.name}: {problem}" for problem in find_problems(rows)]
            if entry["state"] in (WAITING, UNFINISHED):
                left.append(f"  {stage.name}: {entry['reason'] or 'not started'}")
        lines = ["Measured:", *(measured or ["  nothing"]), "Failed or skipped:"]
        lines += [*(failed or ["  nothing"]), "Left:", *(left or ["  nothing"])]
        if left:
            flags = [s.flag for s in named if self.is_open(s) and self._has_input(s)]
            lines.append(f"Continue: {command}{' --stages=' * bool(flags)}{','.join(flags)}")
        if stuck:
            lines.append(f"Try what failed again: {command} --stages={','.join(stuck)}")
        return "\n".join(lines)

    @property
    def has_failed(self) -> bool:
        """Returns whether a stage failed or was stopped, or one of its rows is an error."""
        return any(
            self.state(stage)["state"] in (FAILED, STOPPED) or find_problems(self._rows(stage))
            for stage in self.stages
        )


def run_suite(
    args: argparse.Namespace, show: Callable[[str], None], stages: Sequence[Stage] = STAGES
) -> int:
    """Runs one slice of the suite; returns the exit status, 1 if anything failed.

    Raises:
        NoGpu: no stage can run here without one.
        FirstDayError: see FirstDay, lock_folder and choose_stages.
    """
    chosen = choose_stages(args.stages or (), stages)
    with exit_on_sigterm(), lock_folder(args.out):
        day = FirstDay(args.out, args.minutes, args.tiny, show, stages)
        named = chosen if args.stages else []
        day.retry([stage.name for stage in named])
        if not (has_gpu() or args.tiny or any(map(day.is_open, stages))):
            raise NoGpu("suite first-day needs a GPU; got none. Set --tiny to try it here.")
        show(day.plan_text(chosen))
        day.run(chosen)
        tiny = " --tiny" if args.tiny else ""
        command = f"{COMMAND} --minutes={args.minutes:g} --out={args.out}{tiny}"
        show(day.report_text(command, named))
        return int(day.has_failed)

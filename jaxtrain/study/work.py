"""Works through the runs of a study, together with other processes on the same folder."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.reporting.terminal import format_duration
from jaxtrain.run_directory.lock import RunLocked
from jaxtrain.study.plan import StudyPlan, Trial
from jaxtrain.study.run_records import FILE, RunRecords, write_records
from jaxtrain.study.runs import (
    CLAIM,
    Result,
    check_folder,
    is_finished,
    read_result,
    run_trial,
)
from jaxtrain.study.search import ChosenSetting, Pending, Setting, name_setting
from jaxtrain.train import train

WAIT_S = 2.0  # between two looks at runs that other processes work on


class CellRuns(NamedTuple):
    """The runs of a cell in which every contender has been tuned and has all its paired runs."""

    cell: str
    choices: dict[str, ChosenSetting]
    paired: dict[str, list[Result]]  # contender -> one result for each seed, in their order
    tuning: dict[str, list[Result]]  # contender -> in the order of the search


class Work:
    """All results of a study that exist, and the runs that are left.

    Everything follows from the finished runs in the study's folder. So a study can be stopped and
    continued, and any number of processes can run the same command at once: each takes the first
    run that no other process works on.

    Args:
        devices: to train on; None uses all.
        print_line: prints one line.
        train: trains a run, as for run_trial.
        records: of runs that ended elsewhere.

    Attributes:
        reused: number of runs that were only read.
    """

    def __init__(
        self,
        plan: StudyPlan,
        devices: Sequence[Any] | None = None,
        print_line: Callable[[str], object] = print,
        train: Callable[..., int] = train,
        records: RunRecords | None = None,
    ):
        self.plan, self._devices, self._print_line = plan, devices, print_line
        self._train, self._records = train, records or RunRecords()
        self._results: dict[tuple, Result] = {}  # by cell, contender, setting and seed
        self._trials: dict[tuple, list[Trial]] = {}  # that were built, by their arguments
        self._choices: dict[tuple[str, str], ChosenSetting] = {}  # by cell and contender
        self._costs = {cell: _cost(plan, cell) for cell in plan.cells}
        self._seconds_per_cost: list[float] = []  # of the runs that this process has trained
        self._waits = False
        self.reused = 0

    @property
    def count(self) -> int:
        """Number of runs that have ended."""
        return len(self._results)

    def run_all(self, on_cell: Callable[[list[CellRuns]], object] = lambda cells: None) -> None:
        """Trains what is left until every run of the study has ended.

        Args:
            on_cell: called with all finished cells whenever there is one more.
        """
        reported = 0
        while pending := self.pending():
            if len(finished := self.finished()) > reported:
                reported = len(finished)
                on_cell(finished)
            if not any(self._try(trial) for trial in pending):
                self._wait(len(pending))
        on_cell(self.finished())
        self.write_records()

    def write_records(self) -> None:
        """Writes all results that this process knows of to runs.jsonl in the study's folder."""
        write_records(Path(self.plan.study.workdir) / FILE, self._results.values())

    def pending(self) -> list[Trial]:
        """Returns the runs that can be trained now, those that should come first, first."""
        plan, trials = self.plan, []
        for cell in plan.cells:
            chosen = {}
            for contender in plan.study.contenders:
                try:
                    choice = self._choose(cell, contender)
                except Pending as pending:
                    trials += [self._tuning(cell, contender, s) for s in pending.settings]
                    continue
                if choice:
                    chosen[contender] = choice.values
            trials += [trial for trial in self._paired(cell, chosen) if not self._find(trial)]
        return trials

    def finished(self) -> list[CellRuns]:
        """Returns the cells in which every contender has all its runs, in their order."""
        cells, plan = [], self.plan
        contenders = plan.study.contenders
        for cell in plan.cells:
            if any((cell, name) not in self._choices for name in contenders):
                continue
            choices = {name: self._choices[cell, name] for name in contenders}
            paired: dict[str, list] = {name: [] for name in contenders}
            for trial in self._paired(cell, {name: c.values for name, c in choices.items()}):
                paired[trial.contender].append(self._results.get(_key(trial)))
            if any(None in results for results in paired.values()):
                continue
            seed = plan.study.tuning_seed
            tuning = {
                name: [self._results[cell, name, setting, seed] for setting in choice.losses]
                for name, choice in choices.items()
            }
            cells.append(CellRuns(cell, choices, paired, tuning))
        return cells

    def _choose(self, cell: str, contender: str) -> ChosenSetting | None:
        """Returns a contender's setting; None if it waits for that of another cell.

        Raises:
            Pending: tuning runs are missing.
        """
        if found := self._choices.get((cell, contender)):
            return found
        plan, start = self.plan, None
        if plan.study.search == "coordinates" and (before := plan.cells[cell].starts_from):
            if (before, contender) not in self._choices:
                return None
            start = self._choices[before, contender].values
        losses: dict[str, float] = {}
        while True:
            try:
                choice = plan.tune(cell, contender, losses, start)
            except Pending as pending:
                missing = []
                for setting in pending.settings:
                    trial = self._tuning(cell, contender, setting)
                    if result := self._find(trial):
                        losses[trial.setting] = result.loss
                    else:
                        missing.append(setting)
                if missing:
                    raise Pending(missing) from None
            else:
                self._choices[cell, contender] = choice
                return choice

    def _tuning(self, cell: str, contender: str, setting: Setting) -> Trial:
        """Returns a tuning run; it is built once only, because its config is checked each time."""
        key = cell, contender, name_setting(setting)
        if key not in self._trials:
            self._trials[key] = self.plan.tuning(cell, contender, [setting])
        return self._trials[key][0]

    def _paired(self, cell: str, chosen: Mapping[str, Setting]) -> list[Trial]:
        """Returns the paired runs of some contenders, which are built once only, too."""
        key = cell, *((name, name_setting(setting)) for name, setting in chosen.items())
        if key not in self._trials:
            self._trials[key] = self.plan.paired(cell, chosen)
        return self._trials[key]

    def _find(self, trial: Trial) -> Result | None:
        """Returns the result of a run that has ended, else None."""
        key = _key(trial)
        if key not in self._results:
            if result := self._records.find(trial):
                self._results[key] = result
                self.reused += 1
                return result
            check_folder(trial)
            # A process that still has its claim may not have written all of the result yet.
            if (Path(trial.config.workdir) / CLAIM).exists() or not is_finished(trial):
                return None
            self._results[key] = read_result(trial)
            self.reused += 1
        return self._results[key]

    def _try(self, trial: Trial) -> bool:
        """Trains a run; returns False if another process works on it."""
        if self._find(trial):  # another process has ended it in the meantime
            return True
        start_s, begun = time.monotonic(), []

        def begin(*args: Any, **options: Any) -> int:
            begun.append(trial)
            return self._train(*args, **options)

        try:
            result = run_trial(trial, self._devices, begin)
        except RunLocked:
            return False
        self._waits = False
        self._results[_key(trial)] = result
        if not begun:  # another process has ended it since the look above
            self.reused += 1
            return True
        self.write_records()
        seconds = time.monotonic() - start_s
        self._seconds_per_cost.append(seconds / self._costs[trial.condition])
        eta_s = self._remaining_cost() * statistics.mean(self._seconds_per_cost)
        count, runs = self.count, self.plan.runs
        outcome = "diverged" if result.diverged else f"{result.loss:.4f} nats/token"
        self._print_line(
            f"run {count:>{len(str(runs))}} of {runs}  {trial.condition}  "
            f"{trial.contender}  {trial.setting}  seed {trial.seed}  {outcome}  "
            f"{seconds:.1f} s  eta {format_duration(eta_s)}"
        )
        return True

    def _remaining_cost(self) -> float:
        """Returns the cost of the runs that are left, if every search spends its whole budget."""
        plan, done = self.plan, dict.fromkeys(self._costs, 0)
        for cell, *_ in self._results:
            done[cell] += 1
        for (cell, _), choice in self._choices.items():
            done[cell] += plan.budget(cell) - len(choice.losses)  # runs that are not needed
        runs = {
            cell: (plan.budget(cell) + len(plan.study.seeds)) * len(plan.study.contenders)
            for cell in plan.cells
        }
        return sum(self._costs[cell] * max(0, runs[cell] - done[cell]) for cell in runs)

    def _wait(self, runs: int) -> None:
        if not self._waits:
            self._waits = True
            self._print_line(f"waiting for {runs} runs that other processes work on")
        time.sleep(WAIT_S)


def _key(trial: Trial) -> tuple:
    return trial.condition, trial.contender, trial.setting, trial.seed


def _cost(plan: StudyPlan, cell: str) -> float:
    """Returns the cost of a run in a cell, in a unit that is the same for all cells."""
    cfg = plan.trial(cell, plan.study.baseline, {}, plan.study.tuning_seed).config
    return plan.cells[cell].parameters * cfg.data.tokens_before(cfg.steps)

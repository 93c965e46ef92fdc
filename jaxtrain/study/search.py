"""Tunes a contender: tries every combination of a grid, or descends along one field at a time.

A search is a pure function of the losses that are known. It raises `Pending` with the settings
that it needs next, so that any process can continue it from the runs in the study's folder.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from jaxtrain.config.fields import list_sections
from jaxtrain.config.train_config import TrainConfig

FIRST = "optim.learning_rate", "optim.adam_learning_rate"  # fields that are tuned before others
Setting = dict[str, Any]  # {"optim.learning_rate": 0.02, ...}


class Pending(Exception):
    """A search cannot go on before the runs of some settings have ended."""

    def __init__(self, settings: Sequence[Setting]):
        self.settings = list(settings)
        super().__init__(f"{len(self.settings)} runs are missing")


class ChosenSetting(NamedTuple):
    """A contender's best setting of its tuning runs; these fields are keys of study.json."""

    setting: str  # its name
    values: Setting
    losses: dict[str, float]  # setting's name -> held-out loss of its tuning run
    edges: dict[str, float]  # field -> chosen value, if no lower or no higher one was tried
    extended: dict[str, list[float]]  # field -> values tried beyond the grid in the config
    stopped: str  # why the search ended


def name_setting(setting: Mapping[str, Any]) -> str:
    """Returns a setting's name, which is also that of its folder: `learning_rate=0.02`."""
    parts = (f"{name.removeprefix('optim.')}={value}" for name, value in setting.items())
    return ",".join(parts).replace("/", "_") or "as_given"


class Ladder:
    """The values of one field to try, and those beyond both of their ends.

    Numbers are continued by the ratio of the last two: (0.01, 0.02) goes on to 0.04. For a decay,
    which is a field whose upper bound is just below 1, it is the ratio of 1 - value: (0.9, 0.95)
    goes on to 0.975. The field's own bounds end the ladder. Names, switches and a single number are
    not continued.

    Args:
        name: a field, such as "optim.momentum".
        values: the values of the grid.
    """

    def __init__(self, name: str, values: Sequence[Any]):
        self.name, self.declared = name, tuple(values)
        self.numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        self.values = sorted(values) if self.numeric else list(values)
        self._low, self._high = _bounds(name)
        self._is_decay = 0.9 <= self._high < 1

    def is_edge(self, value: Any, tried: Collection[Any]) -> bool:
        """Returns whether a value is the lowest or highest of those tried, but not of all valid."""
        if not self.numeric or len(tried) < 2:
            return False
        return value == min(tried) > self._low or value == max(tried) < self._high

    def neighbour(self, value: Any, direction: int) -> Any | None:
        """Returns the next lower (-1) or higher (+1) value, or None at the end of the ladder."""
        i = self.values.index(value) + direction
        if 0 <= i < len(self.values):
            return self.values[i]
        added = self._continue(direction)
        if added is not None:
            self.values.insert(max(i, 0), added)
        return added

    def reach(self, value: Any) -> None:
        """Continues the ladder, if necessary, until it contains a value of an earlier search."""
        if value in self.values:
            return
        direction = 1 if self.numeric and value > self.values[-1] else -1
        while value not in self.values:
            added = self._continue(direction)
            if added is None or (added - value) * direction > 0:
                break
            self.values.insert(len(self.values) if direction > 0 else 0, added)
        if value not in self.values:  # of another grid
            self.values = sorted([*self.values, value]) if self.numeric else [*self.values, value]

    def _continue(self, direction: int) -> float | None:
        if not self.numeric or len(self.values) < 2:
            return None
        last, before = (self.values[-1], self.values[-2]) if direction > 0 else self.values[:2]
        if self._is_decay:
            last, before = 1 - last, 1 - before
        if min(last, before) <= 0:
            return None
        added = last * last / before
        added = float(f"{1 - added if self._is_decay else added:.4g}")
        if all(type(v) is int for v in self.declared):
            added = round(added)
        return added if self._low <= added <= self._high and added not in self.values else None


def _bounds(name: str) -> tuple[float, float]:
    """Returns the lowest and highest value that a field may have."""
    for prefix, section in list_sections(TrainConfig):
        for f in fields(section):
            if prefix + f.name == name:
                low, high = f.metadata.get("low"), f.metadata.get("high")
                return -math.inf if low is None else low, math.inf if high is None else high
    return -math.inf, math.inf


def expand_grid(grid: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Returns every combination of a grid {field: values}, in order."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def search_grid(
    contender: str, grid: Mapping[str, Sequence[Any]], losses: Mapping[str, float]
) -> ChosenSetting:
    """Returns the best of all combinations of a grid.

    Args:
        losses: setting's name -> loss, of the tuning runs that have ended.

    Raises:
        Pending: runs are missing.
        ValueError: every setting diverged.
    """
    search = _Search(losses, math.inf)
    search.evaluate(expand_grid(grid))
    ladders = [Ladder(name, values) for name, values in grid.items()]
    return search.choose(contender, ladders, "every combination of the grid was tried")


def search_coordinates(
    contender: str,
    grid: Mapping[str, Sequence[Any]],
    losses: Mapping[str, float],
    budget: int,
    start: Setting | None = None,
) -> ChosenSetting:
    """Returns the best setting that coordinate descent finds with at most `budget` runs.

    One field after another is changed while the others keep their best values. The first round
    tries all values of the grid, later rounds the next lower and the next higher one. While the
    best value is the lowest or highest of those tried, the next step of the Ladder is tried, too.
    The search ends after a round without an improvement, or with the budget.

    Args:
        grid: field -> values. Rates are tuned first, the other fields in this order.
        losses: setting's name -> loss, of the tuning runs that have ended.
        start: setting to start from, of a smaller size or horizon. Only values next to it are
            tried then. None starts from the middle of each field's values.

    Raises:
        Pending: runs are missing; those that it names do not depend on one another.
        ValueError: every setting diverged.
    """
    names = sorted(grid, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    ladders = [Ladder(name, grid[name]) for name in names]
    search = _Search(losses, budget)
    first = start or {name: values[len(values) // 2] for name, values in grid.items()}
    for ladder in ladders:
        ladder.reach(first[ladder.name])
    search.evaluate([first])
    sweeps_grid = start is None
    while not search.is_spent:
        before = search.best
        for ladder in ladders:
            if sweeps_grid:
                search.evaluate([search.best | {ladder.name: v} for v in ladder.declared])
            _climb(search, ladder)
        if search.best == before and not sweeps_grid:
            break
        sweeps_grid = False
    spent = f"its budget of {budget} runs was spent"
    return search.choose(
        contender, ladders, spent if search.is_spent else "no change of one field improved it"
    )


def _climb(search: "_Search", ladder: Ladder) -> None:
    """Tries the neighbours of the best value, and goes on from there while the loss falls.

    As long as every setting has diverged, it goes on to lower values.
    """
    if not ladder.numeric:
        search.evaluate([search.best | {ladder.name: v} for v in ladder.values])
        return
    while not search.is_spent:
        before = search.best
        near = (ladder.neighbour(before[ladder.name], direction) for direction in (-1, 1))
        search.evaluate([before | {ladder.name: v} for v in near if v is not None])
        lower = ladder.neighbour(before[ladder.name], -1)
        if search.diverged and lower is not None:
            search.best = before | {ladder.name: lower}
        if search.best == before:
            return


class _Search:
    """The settings that a search has tried, and the best of them."""

    def __init__(self, losses: Mapping[str, float], budget: float):
        self._known, self._budget = losses, budget
        self.tried: dict[str, Setting] = {}  # by name, in the order of the search
        self.best: Setting = {}

    @property
    def is_spent(self) -> bool:
        return len(self.tried) >= self._budget

    @property
    def diverged(self) -> bool:
        """Whether every setting has diverged."""
        return all(not math.isfinite(self._known[name]) for name in self.tried)

    def evaluate(self, settings: Sequence[Setting]) -> None:
        """Tries settings, as far as the budget allows; raises Pending if a loss is not known."""
        new = {name_setting(s): s for s in settings if name_setting(s) not in self.tried}
        left = self._budget - len(self.tried)
        new = {name: s for i, (name, s) in enumerate(new.items()) if i < left}
        missing = [setting for name, setting in new.items() if name not in self._known]
        if missing:
            raise Pending(missing)
        self.tried |= new
        for name, setting in new.items():
            if not self.best or self._known[name] < self._known[name_setting(self.best)]:
                self.best = setting

    def choose(self, contender: str, ladders: Sequence[Ladder], stopped: str) -> ChosenSetting:
        """Returns the best setting with the record of the search.

        Raises:
            ValueError: every setting diverged.
        """
        losses = {name: self._known[name] for name in self.tried}
        best = name_setting(self.best)
        if not math.isfinite(losses[best]):
            raise ValueError(
                f"a contender must have a setting that trains; all {len(losses)} of {contender} "
                f"diverged. Lower the learning rates in study.grid.{contender}."
            )
        edges, extended = {}, {}
        for ladder in ladders:
            tried = {setting[ladder.name] for setting in self.tried.values()}
            value = self.best[ladder.name]
            if ladder.is_edge(value, tried):
                edges[ladder.name] = value
            if beyond := sorted(tried - set(ladder.declared)) if ladder.numeric else []:
                extended[ladder.name] = beyond
        return ChosenSetting(best, self.best, losses, edges, extended, stopped)

"""Plans a study: which runs with which settings, all checked before the first one starts.

A study config's get_config() returns a ConfigDict with `base`, the values of a TrainConfig, and
`study`, the values of a StudyConfig. Overrides and grids are nested like the config:
{"optim": {"name": "adamw"}}.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.train_config import freeze
from jaxtrain.study.cells import Cell, apply_overrides, build_cells, flatten_overrides
from jaxtrain.study.search import (
    ChosenSetting,
    Setting,
    expand_grid,
    name_setting,
    search_coordinates,
    search_grid,
)
from jaxtrain.study.study_config import (
    StudyConfig,
    check_budget,
    check_study,
    read_grid,
    read_horizons,
    read_study,
)


class Trial(NamedTuple):
    """One run of a study."""

    condition: str  # the name of its Cell
    contender: str
    setting: str  # tuned values, as a folder's name: `learning_rate=0.02,momentum=0.9`
    seed: int
    config: config_lib.TrainConfig


class StudyPlan(NamedTuple):
    """All settings of a study; builds the trials of its runs."""

    study: StudyConfig
    base: config_lib.TrainConfig
    cells: dict[str, Cell]
    grids: dict[str, dict[str, tuple]]  # contender -> {"optim.learning_rate": (0.01, 0.02), ...}

    def budget(self, cell: str) -> int:
        """Returns the largest number of tuning runs of each contender in a cell."""
        if self.study.search == "coordinates":
            return self.cells[cell].budget
        runs = math.prod(map(len, self.grids[self.study.baseline].values()))
        return runs if runs > 1 else 0  # a single setting needs no tuning

    @property
    def runs(self) -> int:
        """Largest number of runs of the study; coordinate descent may need fewer."""
        study = self.study
        runs = sum(self.budget(cell) + len(study.seeds) for cell in self.cells)
        return runs * len(study.contenders)

    def trial(self, cell: str, contender: str, setting: Setting, seed: int) -> Trial:
        """Returns the run of one setting with one seed, in its own folder.

        Raises:
            ValueError: an override or a value of the grid is not valid in a TrainConfig.
        """
        name = name_setting(setting)
        folder = Path(self.study.workdir) / cell / contender / name / f"seed{seed}"
        overrides = self.cells[cell].overrides
        overrides = overrides | flatten_overrides(self.study.contenders[contender]) | setting
        overrides |= {"seed": seed, "workdir": str(folder)}
        return Trial(cell, contender, name, seed, apply_overrides(self.base, overrides))

    def tuning(self, cell: str, contender: str, settings: Sequence[Setting]) -> list[Trial]:
        """Returns the tuning runs of settings."""
        return [self.trial(cell, contender, s, self.study.tuning_seed) for s in settings]

    def declared_settings(self, contender: str) -> list[Setting]:
        """Returns settings that contain every value of a contender's grid at least once."""
        grid = self.grids[contender]
        if self.study.search == "grid":
            return expand_grid(grid)
        middle = {name: values[len(values) // 2] for name, values in grid.items()}
        return [middle | {name: v} for name, values in grid.items() for v in values] or [{}]

    def tune(
        self, cell: str, contender: str, losses: Mapping[str, float], start: Setting | None
    ) -> ChosenSetting:
        """Returns a contender's chosen setting in a cell.

        Args:
            losses: setting's name -> loss, of its tuning runs that have ended.
            start: its setting in the cell that this one starts from; None if there is none.

        Raises:
            Pending: runs are missing.
            ValueError: every setting diverged.
        """
        grid, budget = self.grids[contender], self.budget(cell)
        if not budget:
            origin = f"taken over from {self.cells[cell].starts_from}" if start else "as given"
            setting = start or {name: values[0] for name, values in grid.items()}
            return ChosenSetting(name_setting(setting), setting, {}, {}, {}, f"{origin}, not tuned")
        if self.study.search == "grid":
            return search_grid(contender, grid, losses)
        return search_coordinates(contender, grid, losses, budget, start)

    def paired(self, cell: str, chosen: Mapping[str, Setting]) -> list[Trial]:
        """Returns the runs of the chosen settings on the fresh seeds.

        Contenders alternate within each seed, so that drift of the machine affects all equally.

        Args:
            chosen: contender -> its chosen setting.
        """
        return [
            self.trial(cell, contender, setting, seed)
            for seed in self.study.seeds
            for contender, setting in chosen.items()
        ]


def build_plan(values: Mapping[str, Any]) -> StudyPlan:
    """Returns the plan of a study config, with every run's config checked; nothing is trained.

    Raises:
        ValueError: budgets are not equal, seeds are not fresh, or a field is unknown.
    """
    if set(values) != {"base", "study"}:
        raise ValueError(
            "a study config must contain `base` and `study`; got "
            f"{', '.join(list(map(str, values))[:4])}, ... See configs/study_quick.py."
        )
    study, base = read_study(values["study"]), freeze(values["base"])
    grids = {name: read_grid(name, study.grid.get(name, {})) for name in study.contenders}
    check_study(study, grids)
    cells = build_cells(
        base,
        study.conditions,
        study.sizes,
        read_horizons(study),
        study.tokens_per_parameter,
        study.budget,
    )
    check_budget(study, cells)
    plan = StudyPlan(study, base, {cell.name: cell for cell in cells}, grids)
    for cell, contender in itertools.product(plan.cells, study.contenders):
        # Raises now, not at run 17, if a value is not valid.
        plan.tuning(cell, contender, plan.declared_settings(contender))
    return plan

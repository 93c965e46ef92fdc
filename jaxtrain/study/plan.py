"""Plans a study: which runs with which settings, all checked before the first one starts.

A study config's get_config() returns a ConfigDict with `base`, the values of a TrainConfig, and
`study`, the values of a StudyConfig. Overrides and grids are nested like the config:
{"optim": {"name": "adamw"}}.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.fields import Section, knob
from jaxtrain.config.train_config import freeze
from jaxtrain.study.statistics import FEWEST_PAIRS

# Learning rate of the parameters that a matrix optimizer leaves to Adam. Left untuned, it decides
# comparisons of matrix optimizers.
AUXILIARY = "optim.adam_learning_rate"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class StudyConfig(Section):
    """What is compared, with which settings, seeds and conditions."""

    PREFIX = "study."

    workdir: str = knob("runs/study", "folder of all runs and of the results")
    baseline: str = knob("muon", "contender that the others are compared with")
    tuning_seed: int = knob(0, "seed of every tuning run", low=0)
    level: float = knob(0.05, "significance level, after Holm's correction", low=1e-6, high=0.5)
    target: float = knob(
        0.0, "loss for the track-3 statistic; 0: the baseline's mean", unit="nats/token", low=0.0
    )
    tune_adam: bool = knob(True, "require at least two optim.adam_learning_rate in each grid")
    seeds: tuple = field(default=(1, 2, 3), metadata={"text": "seeds of the paired runs"})
    contenders: dict = field(default_factory=dict, metadata={"text": "name -> overrides"})
    grid: dict = field(default_factory=dict, metadata={"text": "contender -> values to try"})
    conditions: dict = field(
        default_factory=lambda: {"plain": {}},
        metadata={"text": "name -> overrides for all contenders; each has its own table"},
    )


class Trial(NamedTuple):
    """One run of a study."""

    condition: str
    contender: str
    setting: str  # values in the grid, as a folder's name: `learning_rate=0.02,momentum=0.9`
    seed: int
    config: config_lib.TrainConfig


class StudyPlan(NamedTuple):
    """All settings of a study; builds the trials of its runs."""

    study: StudyConfig
    base: config_lib.TrainConfig
    # contender -> {setting's name: {"optim.learning_rate": 0.02, ...}}
    settings: dict[str, dict[str, dict[str, Any]]]

    @property
    def budget(self) -> int:
        """Number of tuning runs of each contender in each condition."""
        return len(self.settings[self.study.baseline])

    @property
    def runs(self) -> int:
        """Number of all runs of the study."""
        study = self.study
        runs_each = self.budget + len(study.seeds)
        return runs_each * len(study.contenders) * len(study.conditions)

    def trial(self, condition: str, contender: str, setting: str, seed: int) -> Trial:
        """Returns the run of one setting with one seed, in its own folder.

        Raises:
            ValueError: an override or a value of the grid is not valid in a TrainConfig.
        """
        study = self.study
        folder = Path(study.workdir) / condition / contender / setting / f"seed{seed}"
        values = config_lib.to_dict(self.base)
        overrides = flatten_overrides(study.conditions[condition])
        overrides |= flatten_overrides(study.contenders[contender])
        overrides |= self.settings[contender][setting] | {"seed": seed, "workdir": str(folder)}
        if "steps" in overrides and self.base.optim.total_steps == self.base.steps:
            # The learning-rate schedule follows the number of steps unless it is set as well.
            overrides = {"optim.total_steps": overrides["steps"]} | overrides
        for name, value in overrides.items():
            *sections, last = name.split(".")
            inner = values
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return Trial(condition, contender, setting, seed, freeze(values))

    def tuning(self, condition: str, contender: str) -> list[Trial]:
        """Returns a contender's tuning runs, one for each setting."""
        seed = self.study.tuning_seed
        return [
            self.trial(condition, contender, setting, seed) for setting in self.settings[contender]
        ]

    def paired(self, condition: str, chosen: Mapping[str, str]) -> list[Trial]:
        """Returns the runs of the chosen settings on the fresh seeds.

        Contenders alternate within each seed, so that drift of the machine affects all equally.

        Args:
            chosen: contender -> its chosen setting.
        """
        return [
            self.trial(condition, contender, setting, seed)
            for seed in self.study.seeds
            for contender, setting in chosen.items()
        ]


def flatten_overrides(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names nested values as flags do: {"optim": {"name": "adamw"}} -> {"optim.name": "adamw"}."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten_overrides(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _expand_grid(contender: str, grid: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {setting's name: values} for every combination in a contender's grid, in order."""
    axes = {}
    for name, values in flatten_overrides(grid).items():
        if not isinstance(values, list | tuple) or not values or len(set(values)) < len(values):
            raise ValueError(
                "a grid must list distinct values to try; got "
                f"study.grid.{contender}.{name}={values!r}. Set it to (0.01, 0.02), for example."
            )
        axes[name] = tuple(values)
    settings = {}
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values, strict=True))
        parts = (f"{name.removeprefix('optim.')}={value}" for name, value in setting.items())
        settings[",".join(parts).replace("/", "_") or "as_given"] = setting
    return settings


def _check_study(study: StudyConfig, settings: Mapping[str, dict]) -> None:
    """Raises ValueError unless the study is fair: equal budgets, fresh seeds, tuned baselines."""
    names = list(study.contenders)
    if study.baseline not in names or len(names) < 2:
        study.fail("baseline", f"must be one of at least two contenders ({', '.join(names)})")
    if set(study.grid) != set(names):
        raise ValueError(
            f"study.grid must have an entry for each contender and no other; got "
            f"{sorted(study.grid)} for contenders {sorted(names)}. Set study.grid."
        )
    for kind in ("contenders", "conditions"):
        invalid = [name for name in getattr(study, kind) if not FOLDER_NAME.fullmatch(name)]
        if invalid or not getattr(study, kind):
            study.fail(kind, "must be names of folders, at least one")
    seeds = study.seeds
    if len(set(seeds)) < max(len(seeds), FEWEST_PAIRS) or study.tuning_seed in seeds:
        study.fail("seeds", f"must be {FEWEST_PAIRS} or more fresh seeds, not the tuning seed")
    counts = {name: len(settings[name]) for name in names}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"every contender must have the same number of tuning runs; got {listed}. "
            "Set study.grid so that the products of its lists are equal."
        )
    for name in names if study.tune_adam else ():
        if len(flatten_overrides(study.grid[name]).get(AUXILIARY, ())) < 2:
            raise ValueError(
                f"every contender must tune {AUXILIARY} too: left untuned, it decides comparisons "
                f"of matrix optimizers; got fewer than two values in study.grid.{name}. Add "
                "values, or set --study.tune_adam=false."
            )


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
    fields = {name: _to_plain(value) for name, value in values["study"].items()}
    unknown = set(fields) - set(StudyConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"study has no field {', '.join(sorted(unknown))}; "
            f"it has {', '.join(StudyConfig.__dataclass_fields__)}."
        )
    study = StudyConfig(**fields)
    settings = {name: _expand_grid(name, study.grid.get(name, {})) for name in study.contenders}
    _check_study(study, settings)
    plan = StudyPlan(study, freeze(values["base"]), settings)
    for condition, contender in itertools.product(study.conditions, study.contenders):
        plan.tuning(condition, contender)  # raises now, not at run 17, if a value is not valid
    return plan


def _to_plain(value: Any) -> Any:
    """Converts ConfigDicts to dicts and lists to tuples."""
    if hasattr(value, "items"):
        return {name: _to_plain(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def describe_study_flags() -> str:
    """Returns the table of the study's flags for --help."""
    lines = [
        "Fields of the study, set with --study.NAME=VALUE. --base.NAME=VALUE sets a field of all",
        "runs; `jaxtrain train --help` lists those.",
        "",
    ]
    for f in dataclasses.fields(StudyConfig):
        shown = f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
        unit = f" [{f.metadata['unit']}]" if f.metadata.get("unit") else ""
        lines.append(f"  {shown:<32} {f.metadata['text']}{unit}.")
    return "\n".join(lines)

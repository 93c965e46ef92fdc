"""The plan of a study: which runs, under which settings, checked before the first one.

A study config's get_config() returns a ConfigDict of `base`, a TrainConfig's, and `study`, a
StudyConfig's. Overrides and grids are nested as the config is: {"optim": {"name": "adamw"}}.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jaxtrain.config.train_config as config_lib
from jaxtrain.config.fields import Section, knob
from jaxtrain.config.train_config import freeze
from jaxtrain.study.statistics import FEWEST_PAIRS

AUXILIARY = "optim.adam_learning_rate"
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class StudyConfig(Section):
    PREFIX = "study."

    workdir: str = knob("runs/study", "folder of all runs and of the result")
    baseline: str = knob("muon", "contender that the others are compared with")
    tuning_seed: int = knob(0, "seed of every tuning run", low=0)
    level: float = knob(0.05, "of significance, after Holm's correction", low=1e-6, high=0.5)
    target: float = knob(
        0.0, "of the track-3 statistic; 0 is the baseline's mean", unit="nats/token", low=0.0
    )
    tune_adam: bool = knob(True, "refuse a grid with one optim.adam_learning_rate only")
    seeds: tuple = field(default=(1, 2, 3), metadata={"text": "seeds of the paired runs"})
    contenders: dict = field(default_factory=dict, metadata={"text": "name -> overrides"})
    grid: dict = field(default_factory=dict, metadata={"text": "contender -> values to try"})
    conditions: dict = field(
        default_factory=lambda: {"plain": {}},
        metadata={"text": "name -> overrides of all contenders; each has a table of its own"},
    )


class Trial(NamedTuple):
    """One run of a study."""

    condition: str
    contender: str
    setting: str  # its values in the grid, as its folder's name
    seed: int
    config: config_lib.TrainConfig


class Plan(NamedTuple):
    study: StudyConfig
    base: config_lib.TrainConfig
    settings: dict  # contender -> {setting's name: {"optim.learning_rate": 0.02, ...}}

    @property
    def budget(self) -> int:
        """Tuning runs of a contender in a condition."""
        return len(self.settings[self.study.baseline])

    @property
    def runs(self) -> int:
        study = self.study
        each = self.budget + len(study.seeds)
        return each * len(study.contenders) * len(study.conditions)

    def trial(self, condition, contender, setting, seed) -> Trial:
        """The run of a setting with a seed, in its own folder of the study's.

        Raises:
            ValueError: an override or a value of the grid is not one of a TrainConfig.
        """
        study = self.study
        folder = Path(study.workdir) / condition / contender / setting / f"seed{seed}"
        values = config_lib.to_dict(self.base)
        given = flat(study.conditions[condition]) | flat(study.contenders[contender])
        given |= self.settings[contender][setting] | {"seed": seed, "workdir": str(folder)}
        if "steps" in given and self.base.optim.total_steps == self.base.steps:
            given = {"optim.total_steps": given["steps"]} | given
        for name, value in given.items():
            *sections, last = name.split(".")
            inner = values
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return Trial(condition, contender, setting, seed, freeze(values))

    def tuning(self, condition, contender) -> list[Trial]:
        seed = self.study.tuning_seed
        return [
            self.trial(condition, contender, setting, seed) for setting in self.settings[contender]
        ]

    def paired(self, condition, chosen) -> list[Trial]:
        """Fresh runs of each contender's chosen setting, seed by seed, so that drift meets all."""
        return [
            self.trial(condition, contender, setting, seed)
            for seed in self.study.seeds
            for contender, setting in chosen.items()
        ]


def flat(nested, prefix="") -> dict:
    """{"optim": {"name": "adamw"}} -> {"optim.name": "adamw"}"""
    found = {}
    for name, value in nested.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _expand(contender, grid) -> dict:
    """{setting's name: values} of every combination in a contender's grid, in order."""
    axes = {}
    for name, values in flat(grid).items():
        if not isinstance(values, list | tuple) or not values or len(set(values)) < len(values):
            raise ValueError(
                "a grid must list distinct values to try; got "
                f"study.grid.{contender}.{name}={values!r}. Set it to (0.01, 0.02), say."
            )
        axes[name] = tuple(values)
    settings = {}
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values, strict=True))
        parts = (f"{name.removeprefix('optim.')}={value}" for name, value in setting.items())
        settings[",".join(parts).replace("/", "_") or "as_given"] = setting
    return settings


def _check_study(study: StudyConfig, settings) -> None:
    names = list(study.contenders)
    if study.baseline not in names or len(names) < 2:
        study.fail("baseline", f"must be one of at least two contenders ({', '.join(names)})")
    if set(study.grid) != set(names):
        raise ValueError(
            f"study.grid must have an entry for each contender and no other; got "
            f"{sorted(study.grid)} for contenders {sorted(names)}. Set study.grid."
        )
    for kind in ("contenders", "conditions"):
        bad = [name for name in getattr(study, kind) if not NAME.fullmatch(name)]
        if bad or not getattr(study, kind):
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
        if len(flat(study.grid[name]).get(AUXILIARY, ())) < 2:
            raise ValueError(
                f"every contender must tune {AUXILIARY} too, which decides comparisons of matrix "
                f"optimizers; got fewer than two values in study.grid.{name}. Add values, or set "
                "--study.tune_adam=false."
            )


def build_plan(values) -> Plan:
    """The plan of a study config, every run's config checked; nothing is run.

    Raises:
        ValueError: budgets are not equal, seeds are not fresh, or a field is unknown.
    """
    if set(values) != {"base", "study"}:
        raise ValueError(
            "a study config must hold `base` and `study`; got "
            f"{', '.join(list(map(str, values))[:4])}, ... See configs/study_quick.py."
        )
    given = {name: _plain(value) for name, value in values["study"].items()}
    unknown = set(given) - set(StudyConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"study has no field {', '.join(sorted(unknown))}; "
            f"it has {', '.join(StudyConfig.__dataclass_fields__)}."
        )
    study = StudyConfig(**given)
    settings = {name: _expand(name, study.grid.get(name, {})) for name in study.contenders}
    _check_study(study, settings)
    plan = Plan(study, freeze(values["base"]), settings)
    for condition, contender in itertools.product(study.conditions, study.contenders):
        plan.tuning(condition, contender)  # unknown fields and bad values end here, not at run 17
    return plan


def _plain(value):
    """ConfigDicts as dicts, lists as tuples."""
    if hasattr(value, "items"):
        return {name: _plain(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def describe() -> str:
    """The table of the study's flags for --help."""
    lines = [
        "Fields of the study, set with --study.NAME=VALUE. --base.NAME=VALUE sets a field of all",
        "runs, as `jaxtrain train --help` lists them.",
        "",
    ]
    for f in dataclasses.fields(StudyConfig):
        shown = f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
        unit = f" [{f.metadata['unit']}]" if f.metadata.get("unit") else ""
        lines.append(f"  {shown:<32} {f.metadata['text']}{unit}.")
    return "\n".join(lines)

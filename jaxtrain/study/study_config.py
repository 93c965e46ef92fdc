"""Declares and checks the fields of a study: what is compared, how it is tuned, for how long."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtrain.config.fields import Section, knob
from jaxtrain.study.cells import Cell, flatten_overrides
from jaxtrain.study.statistics import FEWEST_PAIRS

# Learning rate of the parameters that a matrix optimizer leaves to Adam. Left untuned, it decides
# comparisons of matrix optimizers.
AUXILIARY = "optim.adam_learning_rate"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class StudyConfig(Section):
    """What is compared, with which settings, seeds, sizes and horizons."""

    PREFIX = "study."

    workdir: str = knob("runs/study", "folder of all runs and of the results")
    earlier: str = knob(
        "",
        "runs.jsonl of another folder of this study: the runs in it are not trained again; their "
        "data must have had the same text",
    )
    baseline: str = knob("muon", "contender that the others are compared with")
    tuning_seed: int = knob(0, "seed of every tuning run", low=0)
    level: float = knob(0.05, "significance level, after Holm's correction", low=1e-6, high=0.5)
    target: float = knob(
        0.0,
        "loss to reach: reports the earliest evaluated step at which all runs together have "
        "reached it; 0: only the track-3 statistic against the baseline's mean",
        unit="nats/token",
        low=0.0,
    )
    target_margin: float = knob(
        0.004,
        "the target is reached if (target - mean) * sqrt(runs) is at least this: 3.09 times the "
        "run-to-run sigma, which is 0.0013 on modded-nanogpt's track 3",
        unit="nats/token",
        low=0.0,
    )
    tune_adam: bool = knob(True, "require at least two optim.adam_learning_rate in each grid")
    search: str = knob(
        "grid",
        "how settings are tuned: grid tries every combination; coordinates changes one field at a "
        "time, with at most study.budget runs",
        choices=("grid", "coordinates"),
    )
    tokens_per_parameter: float = knob(20.0, "tokens for each parameter at horizon 1", low=1e-3)
    budget: tuple = field(
        default=(0,),
        metadata={
            "text": "search=coordinates: most tuning runs of each contender in each condition, "
            "size and horizon, in this order; one number is for all; 0 takes the setting over"
        },
    )
    seeds: tuple = field(default=(1, 2, 3), metadata={"text": "seeds of the paired runs"})
    contenders: dict = field(default_factory=dict, metadata={"text": "name -> overrides"})
    grid: dict = field(default_factory=dict, metadata={"text": "contender -> values to try"})
    conditions: dict = field(
        default_factory=lambda: {"plain": {}},
        metadata={"text": "name -> overrides for all contenders; each has its own table"},
    )
    sizes: dict = field(
        default_factory=dict, metadata={"text": "name -> overrides of the model; {}: the base's"}
    )
    horizons: tuple | dict = field(
        default=(),
        metadata={
            "text": "lengths of the runs, in multiples of tokens_per_parameter for each parameter "
            "of the model; or size -> lengths; (): the base's steps"
        },
    )
    published: dict = field(
        default_factory=dict,
        metadata={
            "text": "contender -> steps in a published comparison; their order is compared with "
            "the study's by Kendall's tau"
        },
    )


def read_study(values: Mapping[str, Any]) -> StudyConfig:
    """Returns the StudyConfig of a study config's `study`.

    Raises:
        ValueError: a field is unknown or its value is not valid.
    """
    fields = {name: _to_plain(value) for name, value in values.items()}
    unknown = set(fields) - set(StudyConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"study has no field {', '.join(sorted(unknown))}; "
            f"it has {', '.join(StudyConfig.__dataclass_fields__)}."
        )
    return StudyConfig(**fields)


def _to_plain(value: Any) -> Any:
    """Converts ConfigDicts to dicts and lists to tuples."""
    if hasattr(value, "items"):
        return {name: _to_plain(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def read_grid(contender: str, grid: Mapping[str, Any]) -> dict[str, tuple]:
    """Returns {field: values} of a contender's grid, checked."""
    flat = flatten_overrides(grid)
    for name, values in flat.items():
        if not isinstance(values, list | tuple) or not values or len(set(values)) < len(values):
            raise ValueError(
                "a grid must list distinct values to try; got "
                f"study.grid.{contender}.{name}={values!r}. Set it to (0.01, 0.02), for example."
            )
    return {name: tuple(values) for name, values in flat.items()}


def check_study(study: StudyConfig, grids: Mapping[str, dict]) -> None:
    """Raises ValueError unless the study is fair: equal budgets, fresh seeds, tuned baselines."""
    names = list(study.contenders)
    fewest = 1 if study.target else 2
    if study.baseline not in names or len(names) < fewest:
        study.fail("baseline", f"must be one of at least {fewest} contenders ({', '.join(names)})")
    if set(study.grid) != set(names):
        raise ValueError(
            f"study.grid must have an entry for each contender and no other; got "
            f"{sorted(study.grid)} for contenders {sorted(names)}. Set study.grid."
        )
    for kind in ("contenders", "conditions", "sizes"):
        invalid = [name for name in getattr(study, kind) if not FOLDER_NAME.fullmatch(name)]
        if invalid or not getattr(study, kind) and kind != "sizes":
            study.fail(kind, "must be names of folders, at least one")
    seeds, fewest = study.seeds, 1 if study.target else FEWEST_PAIRS
    if len(set(seeds)) < max(len(seeds), fewest) or study.tuning_seed in seeds:
        study.fail("seeds", f"must be {fewest} or more fresh seeds, not the tuning seed")
    if unknown := set(study.published) - set(names):
        study.fail("published", f"must name contenders only, not {', '.join(sorted(unknown))}")
    if study.search == "grid":
        counts = {name: math.prod(map(len, grids[name].values())) for name in names}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"every contender must have the same number of tuning runs; got {listed}. Set "
                "study.grid so that the products of its lists are equal, or set "
                "--study.search=coordinates with a study.budget."
            )
    for name in names if study.tune_adam else ():
        if len(grids[name].get(AUXILIARY, ())) < 2:
            raise ValueError(
                f"every contender must tune {AUXILIARY} too: left untuned, it decides comparisons "
                f"of matrix optimizers; got fewer than two values in study.grid.{name}. Add "
                "values, or set --study.tune_adam=false."
            )


def read_horizons(study: StudyConfig) -> dict[str, tuple]:
    """Returns size -> horizons, checked and in rising order; the size is "" without sizes."""
    sizes = list(study.sizes) or [""]
    given = study.horizons
    by_size = dict(given) if isinstance(given, dict) else dict.fromkeys(sizes, tuple(given))
    for values in by_size.values():
        if list(values) != sorted(set(values)) or not all(v > 0 for v in values):
            study.fail("horizons", "must be positive numbers in rising order")
    if set(by_size) != set(sizes):
        study.fail("horizons", f"must name each size and no other ({', '.join(sizes)})")
    return by_size


def check_budget(study: StudyConfig, cells: Sequence[Cell]) -> None:
    numbers = all(type(runs) is int and runs >= 0 for runs in study.budget)
    if not numbers or 1 in study.budget or len(study.budget) not in (1, len(cells)):
        study.fail(
            "budget",
            "must be one number, or one for each condition, size and horizon "
            f"({', '.join(cell.name for cell in cells)}): 0, or 2 and more, since one run chooses "
            "nothing",
        )
    first = next((cell.name for cell in cells if not cell.starts_from and not cell.budget), None)
    if study.search == "coordinates" and first:
        study.fail("budget", f"must be 2 or more in {first}, which has no setting to take over")


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

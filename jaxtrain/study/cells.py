"""Lists the cells of a study: every condition at every size and every horizon."""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.config.train_config import TrainConfig, freeze, to_dict
from jaxtrain.model.layer_parts import letter_sizes
from jaxtrain.model.transformer import build_model, count_params
from jaxtrain.ops.routes import choose_routes


class Cell(NamedTuple):
    """One condition at one size and horizon: what all contenders have in common."""

    name: str  # "plain", "0.3M-1x", "heavy_tails-0.3M-1x"; also that of its folder
    condition: str
    group: str  # condition and size: the cells of a group differ only in their horizon
    overrides: dict[str, Any]  # {"model.D": 96, ...}
    horizon: float  # in multiples of tokens_per_parameter; 0 without study.horizons
    parameters: int
    budget: int  # most tuning runs of each contender; 0 does not tune
    starts_from: str  # cell whose settings each contender starts from; "" for none


def flatten_overrides(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names nested values as flags do: {"optim": {"name": "adamw"}} -> {"optim.name": "adamw"}."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten_overrides(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def apply_overrides(base: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """Returns the config with some fields replaced; the schedule follows the number of steps.

    Raises:
        ValueError: a field is unknown or its value is not valid.
    """
    values = to_dict(base)
    if "steps" in overrides and base.optim.total_steps == base.steps:
        # The learning-rate schedule follows the number of steps unless it is set as well.
        overrides = {"optim.total_steps": overrides["steps"], **overrides}
    for name, value in overrides.items():
        *sections, last = name.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return freeze(values)


def count_parameters(cfg: ModelConfig) -> int:
    """Returns the number of all parameters of a model, embedding and head included."""
    model = build_model(cfg, choose_routes(cfg, False, "cpu", False))
    return count_params(model.axes, letter_sizes(cfg))


def build_cells(
    base: TrainConfig,
    conditions: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, Mapping[str, Any]],
    horizons: Mapping[str, Sequence[float]],
    tokens_per_parameter: float,
    budgets: Sequence[int],
) -> list[Cell]:
    """Returns all cells, in the order in which they are run.

    With horizons, a cell trains horizon * tokens_per_parameter tokens for each of its model's
    parameters (all of them, embedding and head included), rounded to whole steps. A contender
    starts the search of a cell from its setting at the horizon before, and that of the first
    horizon from its setting at the first horizon of the size before.

    Args:
        sizes: name -> overrides.
        horizons: size -> multiples, empty if the base decides the number of steps. The size is ""
            without sizes.
        budgets: most tuning runs in each cell, in this order; one number is for all cells.

    Raises:
        ValueError: an override is not valid.
    """
    cells, first = [], {}  # first: condition -> first cell of the newest size
    for condition, (size, override) in itertools.product(conditions, (sizes or {"": {}}).items()):
        is_named = sizes or any(horizons.values())  # by its size or horizon
        parts = [condition] if len(conditions) > 1 or not is_named else []
        parts += [size] if size else []
        overrides = flatten_overrides(conditions[condition]) | flatten_overrides(override)
        cfg = apply_overrides(base, overrides)
        parameters = count_parameters(cfg.model)
        before, first[condition] = first.get(condition, ""), ""
        for horizon in horizons[size] or (0.0,):
            name, steps = "-".join(parts), {}
            if horizon:
                name = "-".join([*parts, f"{horizon:g}x"])
                tokens = horizon * tokens_per_parameter * parameters
                sequences = Fraction(tokens) / cfg.data.seq_len
                steps = {"steps": max(1, cfg.data.sizes.step_at(sequences))}
            budget = budgets[min(len(cells), len(budgets) - 1)]
            group = "-".join(parts) or condition
            cells.append(
                Cell(name, condition, group, overrides | steps, horizon, parameters, budget, before)
            )
            before, first[condition] = name, first[condition] or name
    return cells

"""The cells of a ladder: model sizes and horizons, and the configs of their runs."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtrain.config.train_config import TrainConfig, freeze, to_dict

LEAST_CELLS = 6  # to fit 5 coefficients


class Cell(NamedTuple):
    """A size trained to a horizon."""

    size: str  # WIDTHxDEPTH, such as "128x4"
    horizon: int  # last step, with the decay

    def __str__(self) -> str:
        return f"{self.size}@{self.horizon}"


class Plan(NamedTuple):
    """A ladder.

    Attributes:
        base: config of every run; its model is that of no size yet.
        sizes: WIDTHxDEPTH, as given.
        horizons: in steps, ascending.
        decay: steps of a decay as a share of those before it.
        held_out: the cell whose loss is predicted first; None predicts none.
        folder: of the ladder.
    """

    base: TrainConfig
    sizes: list[str]
    horizons: list[int]
    decay: float
    held_out: Cell | None
    folder: Path

    @property
    def cells(self) -> list[Cell]:
        """The cells that the fit uses, size by size."""
        return [Cell(size, horizon) for size in self.sizes for horizon in self.horizons]

    @property
    def all_cells(self) -> list[Cell]:
        """The cells that the fit uses, and the one to predict."""
        return [*self.cells, *([self.held_out] if self.held_out else [])]

    @property
    def all_sizes(self) -> list[str]:
        """The sizes of all cells, each once."""
        return list(dict.fromkeys(cell.size for cell in self.all_cells))

    def trunk_folder(self, size: str) -> Path:
        """Returns the folder of a size's stable run."""
        return self.folder / size

    def branch_folder(self, cell: Cell) -> Path:
        """Returns the folder of the branch that decays to a horizon."""
        return self.folder / str(cell)

    def branch_step(self, horizon: int) -> int:
        """Returns the step of the stable run from which the decay to a horizon starts."""
        return round(horizon / (1 + self.decay))

    def loss_weights(self) -> dict[str, float]:
        """Returns the sources' weights in the loss: those of the last stage; {} without a mixture.

        The held-out loss of a run weighs them by what that run read, which differs between
        horizons if the mixture has stages.
        """
        stages = self.base.data.mixture_stages
        return {name: float(x) for name, x in stages[-1].weights.items()} if stages else {}

    def tokens(self, horizon: int) -> int:
        """Returns the tokens that a horizon trains on."""
        return self.base.data.tokens_before(horizon)

    def trunk_config(self, size: str, steps: int) -> TrainConfig:
        """Returns the config of a size's stable run, up to a step."""
        return size_config(self.base, size, self.trunk_folder(size), steps)


def size_config(base: TrainConfig, size: str, workdir: Path, steps: int) -> TrainConfig:
    """Returns the config of a stable run of WIDTHxDEPTH.

    Heads keep their width model.K; the feed-forward layer and the number of key heads keep their
    ratio to the model's width and to its heads.

    Raises:
        ValueError: the size is malformed, or its width does not divide as the base's does.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not match:
        raise ValueError(f"a size must be WIDTHxDEPTH, such as 128x4; got {size!r}. Set --sizes.")
    width, depth = int(match[1]), int(match[2])
    model = base.model
    scaled = {"H": model.H, "G": model.G, "F": model.F}
    for name, value in scaled.items():
        if value * width % model.D:
            raise ValueError(
                f"a width must scale model.{name}={value} of model.D={model.D} to a whole number; "
                f"got {width}. Set --sizes."
            )
        scaled[name] = value * width // model.D
    values = to_dict(base) | {"workdir": str(workdir), "steps": steps, "weights": ""}
    values["model"] |= {"D": width, "L": depth} | scaled
    values["optim"] |= {"schedule": "constant"}
    values |= {"eval_every": 0, "sample": values["sample"] | {"tokens": 0}}
    return freeze(values)


def build_plan(
    base: TrainConfig,
    sizes: Sequence[str],
    horizons: Sequence[int],
    decay: float,
    predict: str,
    folder: Path,
) -> Plan:
    """Returns the checked plan.

    Args:
        predict: SIZE@HORIZON, or "".

    Raises:
        ValueError: a size or a horizon is invalid or repeated, there are too few, the cell to
            predict is one of the ladder's, or the horizons would end on different mixtures.
    """
    for flag, values in (("sizes", sizes), ("horizons", horizons)):
        if len(set(values)) < max(2, len(values)):
            raise ValueError(
                f"a ladder needs two or more different {flag}; got {list(values)}. Set --{flag}."
            )
    if len(sizes) * len(horizons) < LEAST_CELLS:
        raise ValueError(
            f"a fit of 5 coefficients needs {LEAST_CELLS} or more cells; got {len(sizes)} sizes x "
            f"{len(horizons)} horizons. Add to --sizes or --horizons."
        )
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1]; got {decay:g}. Set --decay.")
    held_out = _parse_cell(predict) if predict else None
    base = dataclasses.replace(
        base, optim=dataclasses.replace(base.optim, total_steps=max(horizons))
    )
    plan = Plan(base, list(sizes), sorted(horizons), decay, held_out, folder)
    if held_out and held_out.size in sizes and held_out.horizon <= plan.horizons[-1]:
        raise ValueError(
            f"--predict must be a cell that the fit does not use: another size, or a horizon above "
            f"{plan.horizons[-1]}; got {predict}."
        )
    _check_stages(plan)
    for cell in plan.all_cells:
        start = plan.branch_step(cell.horizon)
        if not max(1, base.optim.warmup_steps) <= start < cell.horizon:
            raise ValueError(
                f"a decay must start after the warm-up and before the horizon; that of "
                f"{cell.horizon} steps would start at {start} (optim.warmup_steps="
                f"{base.optim.warmup_steps}). Set --horizons or --decay."
            )
        plan.trunk_config(cell.size, start)
    return plan


def _check_stages(plan: Plan) -> None:
    """Raises ValueError if the horizons would train on other mixtures.

    The fit assumes that a longer horizon has only more tokens of the same kind.
    """
    first = plan.tokens(min(plan.branch_step(cell.horizon) for cell in plan.all_cells))
    for stage in plan.base.data.mixture_stages[:-1]:
        if stage.tokens is None or stage.tokens > first:
            end = (
                f"{stage.tokens:,} tokens"
                if stage.tokens
                else f"{float(100 * (stage.share or 0)):.3g}%"
            )
            raise ValueError(
                f"every stage of data.stages but the last must end, in tokens, before the first "
                f"decay at {first:,} tokens, so that all horizons end on the same mixture; got a "
                f"stage until {end}. Set --data.stages or --horizons."
            )


def _parse_cell(text: str) -> Cell:
    match = re.fullmatch(r"(\d+x\d+)@([1-9]\d*)", text)
    if not match:
        raise ValueError(f"--predict must be SIZE@HORIZON, such as 256x4@800; got {text!r}.")
    return Cell(match[1], int(match[2]))

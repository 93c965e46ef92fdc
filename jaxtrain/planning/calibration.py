"""Efficiencies that turn a plan's lower bound into a time, fitted to steps measured on a card.

A plan knows the least time of a step's matrix products, of attention and of what memory limits. On
a card each class reaches some share of the data sheet's peak. Suite first-day computes these shares
from the traces of the steps that it measured, or without traces fits them to the steps' times, and
stores them in a JSON file, which `jaxtrain plan --calibrated` reads.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.optimize import lsq_linear

from jaxtrain.metrics.work_kinds import CLASSES, KINDS, MEMORY
from pallas_kernels.chip import Chip
from pallas_kernels.kernel_choice import minor_series

LEAST_EFFICIENCY = 0.02  # a lower one is not a class' speed but time that no class explains


class Calibration(NamedTuple):
    """Measured efficiencies of one kind of chip.

    Attributes:
        chip: its name in the chip table.
        efficiency: {class: share of the data sheet's peak that it reaches}, in (0, 1].
        largest_error: of a fitted row, relative to its measured time.
        notes: what the rows do not determine.
        steps: number of rows.
        about: jax, card, date, commit and command of the measurement.
    """

    chip: str
    efficiency: dict[str, float]
    largest_error: float
    notes: tuple[str, ...]
    steps: int
    about: dict[str, Any]

    def seconds(self, class_s: Mapping[str, float]) -> float:
        """Returns the predicted time of a step, from its least time by class."""
        return sum(s / self.efficiency.get(name, 1.0) for name, s in class_s.items())

    def describe(self) -> str:
        """Returns the efficiencies, their source and their error as one sentence."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.efficiency.items())
        notes = "".join(f"; {note}" for note in self.notes)
        version = f" with jax {self.about['jax']}" if "jax" in self.about else ""
        if minor_series(self.about.get("jax", jax.__version__)) != minor_series(jax.__version__):
            notes += f"; this is jax {jax.__version__}, whose programs may take another time"
        return (
            f"of the data sheet's peak: {shares}; fitted to {self.steps:d} step"
            f"{'s' * (self.steps != 1)} measured on {self.about.get('card', self.chip)}{version}, "
            f"{self.about.get('date', 'without a date')}, to {self.largest_error:.0%}{notes}"
        )


def classes_of_causes(by_cause_s: Mapping[str, float], step_s: float) -> dict[str, float]:
    """Returns a step's measured seconds by class.

    The rest of the step, when the device was idle or did what has no cause, is shared by all
    classes in proportion.

    Args:
        by_cause_s: a trace's seconds by cause, as `jaxtrain profile --json` writes them, of any
            number of steps.
        step_s: the time of one step.
    """
    seconds = dict.fromkeys(CLASSES, 0.0)
    for cause, cause_s in by_cause_s.items():
        if (kind := cause.partition(",")[0]) in KINDS:
            seconds[kind if kind in CLASSES else MEMORY] += cause_s
    known_s = sum(seconds.values())
    return {name: s * step_s / known_s for name, s in seconds.items()} if known_s else {}


def calibrate_by_traces(
    chip: str,
    classes_s: Sequence[Mapping[str, float]],
    traced_s: Sequence[Mapping[str, float]],
    about: dict[str, Any],
) -> Calibration:
    """Returns the shares of the peak that each class reached in all traced steps together.

    Args:
        classes_s: the least time of each step by class, in seconds; at least one step.
        traced_s: the measured time of each step by class, from classes_of_causes.
    """
    total = lambda steps, name: sum(step.get(name, 0.0) for step in steps)
    efficiency = {
        name: min(total(classes_s, name) / total(traced_s, name), 1.0)
        for name in CLASSES
        if total(classes_s, name) and total(traced_s, name)
    }
    missing = [name for name in CLASSES if name not in efficiency]
    notes = [f"not in these steps, so taken at the peak: {', '.join(missing)}"] if missing else []
    found = Calibration(chip, efficiency, 0.0, (), len(classes_s), dict(about))
    errors = [
        abs(found.seconds(least) / sum(traced.values()) - 1)
        for least, traced in zip(classes_s, traced_s, strict=True)
    ]
    return found._replace(notes=("from traces by cause", *notes), largest_error=max(errors))


def fit_calibration(
    chip: str,
    classes_s: Sequence[Mapping[str, float]],
    measured_s: Sequence[float],
    about: dict[str, Any],
) -> Calibration:
    """Fits the efficiencies by least squares of the relative errors of the step times.

    The unknowns are the inverses 1/e >= 1 of the efficiencies, in which the time is linear. If
    there are fewer steps than classes, all classes share one efficiency.

    Args:
        classes_s: the least time of each step by class, in seconds; at least one step.
        measured_s: the measured time of each step.

    Raises:
        ValueError: there is no step, or a time is not positive.
    """
    pairs = zip(measured_s, classes_s, strict=True)
    if not len(measured_s) or any(s <= 0 or not sum(step.values()) for s, step in pairs):
        raise ValueError(
            f"a calibration needs steps with positive times; got {list(measured_s)} s. Measure "
            "some: jaxtrain bench --suite=gpu."
        )
    measured = np.array(measured_s)
    names = [name for name in CLASSES if any(step.get(name, 0.0) for step in classes_s)]
    least_NC = np.array([[step.get(name, 0.0) for name in names] for step in classes_s])
    notes = []
    together = len(measured) < len(names)
    if together:
        notes.append(f"fewer steps than classes ({len(measured)}), so that all share one figure")
        least_NC = least_NC.sum(1, keepdims=True)
    bounds = 1.0, 1 / LEAST_EFFICIENCY
    inverse = lsq_linear(least_NC / measured[:, None], np.ones(len(measured)), bounds).x
    errors = np.abs(least_NC @ inverse / measured - 1)
    if together:
        inverse = np.repeat(inverse, len(names))
    if missing := [name for name in CLASSES if name not in names]:
        notes.append(f"not in these steps, so taken at the peak: {', '.join(missing)}")
    near = lambda x: min(abs(x - bound) for bound in bounds) < 1e-6
    if limits := [name for name, x in zip(names, inverse, strict=True) if near(x)]:
        notes.append(f"at the limit of the fit, so not determined: {', '.join(limits)}")
    efficiency = {name: float(1 / x) for name, x in zip(names, inverse, strict=True)}
    return Calibration(
        chip, efficiency, float(errors.max()), tuple(notes), len(measured), dict(about)
    )


def read_calibration(path: str | Path, chip: Chip) -> Calibration:
    """Returns the calibration in a file.

    Raises:
        ValueError: the file is not one, is of a trial, or is of another chip.
    """
    try:
        values = json.loads(Path(path).read_text())
        trial = values.pop("tiny", False)
        found = Calibration(**values | {"notes": tuple(values["notes"])})
        found.describe()
        if unknown := set(found.efficiency) - set(CLASSES):
            raise ValueError(f"classes {', '.join(unknown)}, which are not of {CLASSES}")
        valid = all(0 < share <= 1 for share in found.efficiency.values()) and found.efficiency
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--calibrated must be the calibration.json of suite first-day; got {path}: "
            f"{type(error).__name__} {error}."
        ) from None
    if trial or not valid or found.chip != chip.name:
        kind = "a trial's, which measured nothing" if trial else f"of {found.chip}"
        raise ValueError(
            f"--calibrated must have efficiencies measured on {chip.name}; got {path}, {kind}: "
            f"{found.efficiency}. Set --chip or --calibrated."
        )
    return found

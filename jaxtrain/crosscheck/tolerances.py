"""Chooses the tolerance of each compared value: measured if a trace has it, else a formula."""

from typing import NamedTuple

import numpy as np

from jaxtrain.crosscheck.trace import StepRecord, Trace

EPS = {"float64": 2.0**-52, "float32": 2.0**-23}
# A difference of this many times our own rounding error is accepted: four standard deviations of
# errors three times as large, as sums in another order and other kernels have. With 4, two of 47
# correct PyTorch loops were called different.
SIGMAS = 12.0
# The least tolerance. Digests of float64 tensors have rounding errors themselves, and no difference
# below this is a fault.
LEAST = {"float64": 1e-12, "float32": 0.0}
UNDECIDED = 1.0  # from this relative tolerance on, rounding decides all of a tensor
DEEP_LAYERS = 12  # float32 models from this depth on get five times the fixed tolerance
COMPOUNDING_STEPS = 50  # after these, differences grow faster than the number of steps


class Tolerance(NamedTuple):
    """The largest accepted difference of one value. The loss is in nats, all else is relative."""

    limit: float
    rounding: float  # about the difference that rounding errors cause


def fixed_tolerance(precision: str, quantity: str, step: int, layers: int = 0) -> float:
    """Returns a tolerance for traces that did not measure their rounding: ten times tiny models'.

    Rounding errors grow with the steps. After COMPOUNDING_STEPS training amplifies them, on some
    processors more than on others: at step 185 of 200 steps of Muon, gradients differed by less
    than 2e-3 on an AVX2 processor and by 1e-2 on one with AMX, while the losses still agreed.
    """
    if precision == "float64":
        return 1e-10
    later = max(step, 1) - 1
    factor = 5.0 if layers >= DEEP_LAYERS else 1.0
    factor *= max(1.0, step / COMPOUNDING_STEPS) ** 2
    return {
        "activations": factor * (1e-5 + 1e-6 * later),
        "loss": factor * (1e-6 + 5e-6 * later),
        "grad_norm": factor * 1e-5 * (later + 1),
        "gradient": factor * 1e-5 * (later + 1),
        "update": factor * 1e-4 * (later + 1),
        "parameter": 1e-7 if not step else factor * 5e-6 * step,
    }[quantity]


class Tolerances:
    """The tolerances of the steps of two traces.

    Args:
        precision: the lower of the traces' precisions.
    """

    def __init__(self, first: Trace, second: Trace, precision: str):
        self._precision = precision
        # A trace in float64 that is compared with one in float32 measured too little rounding.
        self._measured = [
            {record["step"]: record["tolerance"] for record in trace.steps if "tolerance" in record}
            for trace in (first, second)
            if trace.header["precision"] == precision
        ]

    @property
    def are_measured(self) -> bool:
        return any(self._measured)

    def of(self, quantity: str, name: str, record: StepRecord) -> Tolerance:
        """Returns the tolerance of a value of a step; name is empty for loss and grad_norm."""
        found = []
        for steps in self._measured:
            value = steps.get(record["step"], {}).get(quantity)
            value = value.get(name) if isinstance(value, dict) else value
            if value is not None:
                found.append(float(value))
        if found:
            return Tolerance(max(*found, LEAST[self._precision]), max(found) / SIGMAS)
        return self._fixed(quantity, name, record)

    def _fixed(self, quantity: str, name: str, record: StepRecord) -> Tolerance:
        eps, step, stored = EPS[self._precision], record["step"], 0.0
        layers = sum(name.startswith("blocks.") for name in record.get("activations", {}))
        limit = fixed_tolerance(self._precision, quantity, step, layers)
        if quantity == "loss":
            return Tolerance(limit, eps * abs(record["loss"]))
        if quantity == "update" and "parameter" in record:  # a difference of rounded parameters
            norm, size = record["parameter"][name][0], record["update"][name][0]
            stored = float(eps * norm / max(size, 1e-300))
        rounding = eps * (1 if quantity == "parameter" else 8) + stored
        return Tolerance(limit + 4 * stored, rounding)

    def undecided(self, first: list[StepRecord], second: list[StepRecord]) -> set[str]:
        """Returns the tensors whose gradients are only rounding errors, at every step.

        The bias of the keys is one: softmax ignores it, so its true gradient is zero. Adam divides
        the rounding error by its own size, so that its updates are noise of full size.
        """
        small = []
        for records in zip(first, second, strict=True):
            a, b = (record.get("gradient", {}) for record in records)
            if not records[0]["step"]:
                continue
            if self.are_measured:
                of = lambda name: self.of("gradient", name, records[0]).limit  # noqa: B023
                small.append({name for name in a.keys() & b.keys() if of(name) >= UNDECIDED})
                continue
            whole = max(sum(d[0] ** 2 for d in digests.values()) ** 0.5 for digests in (a, b))
            limit = 16 * EPS[self._precision] * whole
            size = {name: max(a[name][0], b[name][0]) for name in a.keys() & b.keys()}
            small.append({name for name, norm in size.items() if 0 < norm <= limit})
        return set.intersection(*small) if small else set()


def describe_range(limits: list[float]) -> str:
    """Returns a range of tolerances in words, as in `2e-06 to 4e-05`."""
    low, high = f"{min(limits):.0e}", f"{max(limits):.0e}"
    return low if low == high or not np.isfinite(max(limits)) else f"{low} to {high}"

"""Compares two traces: how much they differ, from which step on, and in which stage of the step."""

from typing import NamedTuple

import numpy as np

from jaxtrain.crosscheck.tolerances import EPS, StepRecord, Tolerances
from jaxtrain.crosscheck.trace import QUANTITIES, Trace, TraceError

# What a difference in each stage means; an earlier stage can cause the later ones to differ.
STAGES = {
    "start": "the parameters differ before the first step: load the same weights on both sides",
    "batch": "the batches differ: check the shards, the seed and the order of the data",
    "forward": "the weights and the batch are equal, but the forward pass gives other activations",
    "loss": "the logits agree, but the loss differs: check the targets, the mask and the mean",
    "forward or loss": "the weights and the batch are equal, but the loss differs: record "
    "activations on both sides to tell whether the forward pass is the cause",
    "gradient": "the loss agrees, but the gradients differ: check the backward pass",
    "optimizer": "the gradients agree, but the update differs: check the optimizer's settings",
}


class Difference(NamedTuple):
    """The difference between two values of one step."""

    step: int
    quantity: str  # one of QUANTITIES, or "batch", "loss", "grad_norm"
    tensor: str  # empty for loss, grad_norm and batch
    size: float  # tensors: relative L2; loss: nats; grad_norm: relative; batch: 0 or 1
    tolerance: float
    rounding: float  # about the difference that rounding errors cause

    @property
    def exceeds(self) -> bool:
        return not self.size <= self.tolerance  # true for a NaN


class Divergence(NamedTuple):
    """The first stage of the first step in which two traces differ."""

    stage: str  # a key of STAGES
    first: Difference  # the one to look at first
    all: list[Difference]  # those of that stage that exceed their tolerance, the worst first


class Comparison(NamedTuple):
    names: tuple[str, str]
    precision: str
    steps: list[int]
    losses: np.ndarray  # [steps, 2] nats
    differences: dict[int, list[Difference]]  # by step
    divergence: Divergence | None
    rounding_only: set[str]  # tensors left out because their gradients are rounding errors only
    missing: list[str]  # quantities left out because only one trace has them
    measured: bool  # a trace measured its rounding; otherwise the tolerances are fixed


def digest_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Estimates the relative L2 distance of two tensors from their digests.

    The projections estimate it; the norms and the largest entries bound it from below.
    """
    largest = max(a[0], b[0])
    if not largest > 0:
        return 0.0 if largest == 0 else np.nan
    projected = np.sqrt(np.mean(np.square(a[3:] - b[3:])))
    return float(max(projected, abs(a[0] - b[0]), abs(a[2] - b[2])) / largest)


def compare_traces(first: Trace, second: Trace) -> Comparison:
    """Compares everything that both traces contain, step by step.

    Raises:
        TraceError: the traces share no step, name their tensors differently or have different
            seeds, or one is in bfloat16, which needs `compare_bfloat16`.
    """
    precision = _common_precision(first, second)
    a, b = shared_steps(first, second)
    tolerances = Tolerances(first, second, precision)
    rounding_only = tolerances.undecided(a, b)
    names = first.name, second.name
    missing = _check_names(a[-1], b[-1], names)
    differences, divergence = {}, None
    for x, y in zip(a, b, strict=True):
        found = _step_differences(x, y, tolerances, rounding_only)
        differences[x["step"]] = found
        divergence = divergence or _find_divergence(found, x["step"], missing)
    steps = [step for step in differences if step]
    losses = np.array([[x["loss"], y["loss"]] for x, y in zip(a, b, strict=True) if x["step"]])
    measured = tolerances.are_measured
    return Comparison(
        names, precision, steps, losses, differences, divergence, rounding_only, missing, measured
    )


def shared_steps(*traces: Trace) -> list[list[StepRecord]]:
    """Returns each trace's records of the steps that all traces have.

    Raises:
        TraceError: the traces share no step after step 0.
    """
    tables = [{record["step"]: record for record in trace.steps} for trace in traces]
    steps = sorted(set.intersection(*map(set, tables)))
    if not any(steps):
        got = " and ".join(
            f"{list(table)[:9]} of {trace.name}"
            for table, trace in zip(tables, traces, strict=True)
        )
        raise TraceError(f"traces must share a step other than 0; got steps {got}.")
    return [[table[step] for step in steps] for table in tables]


def _common_precision(*traces: Trace) -> str:
    """Returns the lower precision of two traces, or raises TraceError if they are not comparable.

    They are not if their seeds differ or one is in bfloat16.
    """
    precisions = {trace.header["precision"] for trace in traces}
    seeds = {trace.header["seed"] for trace in traces}
    if len(seeds) > 1:
        raise TraceError(f"traces must have the same seed of projections; got {sorted(seeds)}.")
    if "bfloat16" in precisions:
        raise TraceError(
            "traces in bfloat16 are compared with a float32 trace; got none. Set --truth."
        )
    return max(precisions, key=EPS.__getitem__)


def _check_names(x: StepRecord, y: StepRecord, names: tuple[str, str]) -> list[str]:
    """Returns the quantities that only one of two steps has.

    Raises:
        TraceError: the two name their tensors differently.
    """
    for quantity in QUANTITIES[1:]:
        a, b = x.get(quantity), y.get(quantity)
        if a is not None and b is not None and a.keys() != b.keys():
            raise TraceError(
                f"both traces must name their tensors alike; {quantity} has "
                f"{sorted(a.keys() - b.keys())[:4]} only in {names[0]} and "
                f"{sorted(b.keys() - a.keys())[:4]} only in {names[1]}. Set --names."
            )
    present = [{q for q in (*QUANTITIES, "grad_norm") if record.get(q)} for record in (x, y)]
    return sorted(present[0] ^ present[1])


def _step_differences(
    x: StepRecord, y: StepRecord, tolerances: Tolerances, rounding_only: set[str]
) -> list[Difference]:
    """Returns the differences of all values that both records of a step have."""
    step, found = x["step"], []

    def add(quantity: str, name: str, size: float) -> None:
        found.append(Difference(step, quantity, name, size, *tolerances.of(quantity, name, x)))

    if "batch" in x and "batch" in y:
        found.append(Difference(step, "batch", "", float(x["batch"] != y["batch"]), 0.0, 0.0))
        add("loss", "", abs(x["loss"] - y["loss"]))
    if "grad_norm" in x and "grad_norm" in y:
        a, b = x["grad_norm"], y["grad_norm"]
        add("grad_norm", "", abs(a - b) / max(a, b, 1e-300))
    for quantity in QUANTITIES:
        a, b = x.get(quantity, {}), y.get(quantity, {})
        for name in b:
            if name in a and name not in rounding_only:
                add(quantity, name, digest_distance(a[name], b[name]))
    return found


def _find_divergence(
    differences: list[Difference], step: int, missing: list[str]
) -> Divergence | None:
    """Returns the first stage of a step with a difference that exceeds its tolerance."""

    def exceeding(quantity: str) -> list[Difference]:
        return [d for d in differences if d.exceeds and d.quantity == quantity]

    def severity(d: Difference) -> float:
        return np.inf if np.isnan(d.size) else d.size / max(d.tolerance, 1e-300)

    for stage, found in (
        ("start", exceeding("parameter") if not step else []),
        ("batch", exceeding("batch")),
        ("forward", exceeding("activations")),
        ("forward or loss" if "activations" in missing else "loss", exceeding("loss")),
        ("gradient", exceeding("gradient") or exceeding("grad_norm")),
        ("optimizer", exceeding("update") or exceeding("parameter")),
    ):
        if found:
            worst_first = sorted(found, key=severity, reverse=True)
            # Tensors are in the order of the network. The first that differs is nearest to a fault
            # of the forward pass, the last to one of the backward pass, which runs in reverse.
            first = {"forward": found[0], "gradient": found[-1]}.get(stage, worst_first[0])
            return Divergence(stage, first, worst_first)
    return None


def largest_parameter_difference(comparison: Comparison, step: int) -> float:
    """Returns the largest relative difference of a parameter after a step; 0 if there is none."""
    found = comparison.differences[step]
    return max((d.size for d in found if d.quantity == "parameter"), default=0.0)


def growth_exponent(comparison: Comparison) -> float | None:
    """Fits p in difference ~ step^p to the largest parameter difference of each step.

    Returns None with fewer than 4 steps.
    """
    sizes = {step: largest_parameter_difference(comparison, step) for step in comparison.steps}
    points = [(step, size) for step, size in sizes.items() if 0 < size < np.inf]
    if len(points) < 4:
        return None
    x, y = np.log(points).T
    return float(np.polyfit(x, y, 1)[0])


def compare_bfloat16(truth: Trace, first: Trace, second: Trace) -> dict[str, tuple[float, float]]:
    """Returns {quantity: (error of first, error of second)} of bfloat16 traces against the truth.

    An error is the root mean square, over steps and tensors, of the relative distance to the truth.

    Raises:
        TraceError: the three share no step or name their tensors differently, or the truth is in
            bfloat16.
    """
    if truth.header["precision"] == "bfloat16":
        raise TraceError(f"the truth must be float32 or float64; {truth.name} is in bfloat16.")
    exact_records, *others = shared_steps(truth, first, second)
    for records in others:
        _check_names(exact_records[-1], records[-1], ("the truth", "a trace"))
    rounding_only = Tolerances(truth, truth, "float32").undecided(exact_records, exact_records)
    errors = {}
    for quantity in QUANTITIES:
        pairs = []
        for step_records in zip(exact_records, *others, strict=True):
            if not step_records[0]["step"]:  # only what training changed
                continue
            exact, a, b = (record.get(quantity, {}) for record in step_records)
            pairs += [
                [digest_distance(exact[name], digests[name]) for digests in (a, b)]
                for name in a
                if name in exact and name in b and name not in rounding_only
            ]
        if pairs:
            errors[quantity] = tuple(np.sqrt(np.mean(np.square(pairs), 0)).tolist())
    return errors

"""Two traces compared: how far apart, since when, and in which part of the step."""

from typing import NamedTuple

import numpy as np

from jaxtrain.crosscheck.trace import QUANTITIES, TraceError

EPS = {"float64": 2.0**-52, "float32": 2.0**-23}
DEEP = 12  # layers from which on float32 activations get five times the room
COMPOUNDS = 50  # steps after which rounding grows faster than they do
# What each part of a step is judged by, in the order in which one causes the next.
STAGES = {
    "start": "the parameters before the first step differ",
    "batch": "the batch differs: look at the shards, the seed and the order of the data",
    "forward": "same weights and batch, but the forward pass differs",
    "loss": "the logits agree, but the loss does not: look at targets, masks and means",
    "forward or loss": "same weights and batch, but not the same loss; no activations to tell more",
    "gradient": "the loss agrees, but the gradient does not: look at the backward pass",
    "optimizer": "the gradients agree, but the optimizer's step does not",
}


class Gap(NamedTuple):
    """How far two values are apart at one step."""

    step: int
    quantity: str  # a key of QUANTITIES, or "batch", "loss", "grad_norm"
    tensor: str  # empty for loss and batch
    size: float  # tensors: relative L2 distance; loss: nats; batch: 0 or 1
    tolerance: float
    rounding: float  # about what rounding alone makes of it

    @property
    def beyond(self) -> bool:
        return not self.size <= self.tolerance  # a nan is beyond


class Divergence(NamedTuple):
    stage: str  # a key of STAGES
    gap: Gap  # the one to look at first
    gaps: list[Gap]  # all that are beyond, of that step and quantity; the worst first


class Comparison(NamedTuple):
    names: tuple[str, str]
    precision: str
    steps: list[int]
    losses: np.ndarray  # [steps, 2] nats
    gaps: dict[int, list[Gap]]
    divergence: Divergence | None
    rounding_only: set[str]  # tensors whose gradient is rounding alone: not judged
    absent: list[str]  # quantities that only one trace has


def distance(a, b) -> float:
    """Relative L2 distance of two tensors, estimated from their digests.

    The projections estimate it; the norms, means and largest sizes bound it from below.
    """
    largest = max(a[0], b[0])
    if not largest > 0:
        return 0.0 if largest == 0 else np.nan
    projected = np.sqrt(np.mean(np.square(a[3:] - b[3:])))
    return float(max(projected, abs(a[0] - b[0]), abs(a[2] - b[2])) / largest)


def tolerance(precision, quantity, step, layers=0) -> float:
    """What a gap may be at a step: some ten times what tiny models were measured to differ by.

    Activations, gradients, updates, parameters: relative L2. Loss and gradient norm: absolute and
    relative. Rounding grows with the steps at first; past COMPOUNDS steps training itself spreads
    it, faster on some processors than on others (gradients at step 185 of 200 steps of Muon:
    below 2e-3 apart on an AVX2 one, 1e-2 on one with AMX), while the losses stay together.
    """
    if precision == "float64":
        return 1e-10
    later = max(step, 1) - 1
    spread = (5.0 if layers >= DEEP else 1.0) * max(1.0, step / COMPOUNDS) ** 2
    return {
        "activations": spread * (1e-5 + 1e-6 * later),
        "loss": spread * (1e-6 + 5e-6 * later),
        "grad_norm": spread * 1e-5 * (later + 1),
        "gradient": spread * 1e-5 * (later + 1),
        "update": spread * 1e-4 * (later + 1),
        "parameter": 1e-7 if not step else spread * 5e-6 * step,
    }[quantity]


def rounding_only(a, b, precision) -> set[str]:
    """Tensors whose gradient is, at every step and on both sides, less than rounding of the whole.

    A key's bias is one, as softmax ignores it. Adam divides such a gradient by its own size, so
    that its steps are noise of full size.
    """
    noise = None
    for x, y in zip(a, b, strict=True):
        both = [line.get("gradient", {}) for line in (x, y)]
        whole = max(sum(d[0] ** 2 for d in table.values()) ** 0.5 for table in both)
        limit = 16 * EPS[precision] * whole
        shared = both[0].keys() & both[1].keys()
        here = {name for name in shared if 0 < max(t[name][0] for t in both) <= limit}
        if shared:
            noise = here if noise is None else noise & here
    return noise or set()


def compare(first, second) -> Comparison:
    """Compares what two traces both hold, step by step.

    Raises:
        TraceError: they share no step, have tensors of other names or other seeds, or one is in
            bfloat16, which `compare_narrow` judges.
    """
    precision = _precision(first, second)
    tables = [{line["step"]: line for line in trace.steps} for trace in (first, second)]
    steps = sorted(tables[0].keys() & tables[1].keys())
    if not any(steps):
        raise TraceError(
            f"two traces must share a step; got {sorted(tables[0])[:9]} of {first.name} and "
            f"{sorted(tables[1])[:9]} of {second.name}."
        )
    a, b = ([table[step] for step in steps] for table in tables)
    noise = rounding_only(a, b, precision)
    absent = _check_names(a[-1], b[-1], (first.name, second.name))
    gaps = {x["step"]: _gaps(x, y, precision, noise) for x, y in zip(a, b, strict=True)}
    divergence = next(
        (found for x in a if (found := _divergence(gaps[x["step"]], x, absent))), None
    )
    later = [step for step in steps if step]
    losses = np.array([[table[step]["loss"] for table in tables] for step in later])
    names = (first.name, second.name)
    return Comparison(names, precision, later, losses, gaps, divergence, noise, absent)


def _precision(*traces) -> str:
    found = {trace.header["precision"] for trace in traces}
    seeds = {trace.header["seed"] for trace in traces}
    if len(seeds) > 1:
        raise TraceError(f"traces must have one seed of projections; got {sorted(seeds)}.")
    if "bfloat16" in found:
        raise TraceError(
            "traces in bfloat16 are judged against one in float32; got none. Set --truth."
        )
    return max(found, key=EPS.__getitem__)


def _check_names(x, y, names) -> list[str]:
    """Quantities that only one of two steps has. Raises TraceError where tensors' names differ."""
    for quantity in QUANTITIES[1:]:
        mine, yours = x.get(quantity), y.get(quantity)
        if mine is not None and yours is not None and mine.keys() != yours.keys():
            raise TraceError(
                f"both traces must name their tensors alike; {quantity} has "
                f"{sorted(mine.keys() - yours.keys())[:4]} only in {names[0]} and "
                f"{sorted(yours.keys() - mine.keys())[:4]} only in {names[1]}. Set --names."
            )
    held = [{q for q in (*QUANTITIES, "grad_norm") if line.get(q)} for line in (x, y)]
    return sorted(held[0] ^ held[1])


def _gaps(x, y, precision, noise) -> list[Gap]:
    """Every gap of one step that both lines hold."""
    step, eps, gaps = x["step"], EPS[precision], []
    layers = sum(name.startswith("blocks.") for name in x.get("activations", {}))
    add = lambda quantity, tensor, size, rounding, limit=None: gaps.append(
        Gap(step, quantity, tensor, size, limit, rounding)
    )
    if "batch" in x and "batch" in y:
        add("batch", "", float(x["batch"] != y["batch"]), 0.0, 0.0)
        limit = tolerance(precision, "loss", step, layers)
        add("loss", "", abs(x["loss"] - y["loss"]), eps * abs(x["loss"]), limit)
    if "grad_norm" in x and "grad_norm" in y:
        norms = x["grad_norm"], y["grad_norm"]
        limit = tolerance(precision, "grad_norm", step, layers)
        add("grad_norm", "", abs(norms[0] - norms[1]) / max(*norms, 1e-300), 8 * eps, limit)
    for quantity in QUANTITIES:
        mine, yours = x.get(quantity, {}), y.get(quantity, {})
        judged = [name for name in yours if name in mine and name not in noise]
        for name in judged:
            stored = 0.0
            if quantity == "update":  # the difference of two parameters, each rounded
                size = x["parameter"][name][0] if "parameter" in x else 0.0
                stored = float(eps * size / max(mine[name][0], 1e-300))
            limit = tolerance(precision, quantity, step, layers) + 4 * stored
            rounding = eps * (1 if quantity == "parameter" else 8) + stored
            add(quantity, name, distance(mine[name], yours[name]), rounding, limit)
    return gaps


def _divergence(gaps, line, absent) -> Divergence | None:
    """The first part of a step in which it parts, or None."""
    beyond = [gap for gap in gaps if gap.beyond]
    at = lambda quantity: [gap for gap in beyond if gap.quantity == quantity]
    causes = [
        ("start", at("parameter") if not line["step"] else []),
        ("batch", at("batch")),
        ("forward", at("activations")),
        ("forward or loss" if "activations" in absent else "loss", at("loss")),
        ("gradient", at("gradient") or at("grad_norm")),
        ("optimizer", at("update") or at("parameter")),
    ]
    for stage, found in causes:
        if not found:
            continue
        # The forward pass goes wrong first at the front, the backward pass at the end.
        first = {"forward": found[0], "gradient": found[-1]}.get(stage, max(found, key=_badness))
        return Divergence(stage, first, sorted(found, key=_badness, reverse=True))
    return None


def _badness(gap) -> float:
    return np.inf if np.isnan(gap.size) else gap.size / max(gap.tolerance, 1e-300)


def growth(comparison) -> float | None:
    """p of gap ~ step^p, over the largest parameter gap of each step; None before 4 steps."""
    points = []
    for step in comparison.steps:
        sizes = [g.size for g in comparison.gaps[step] if g.quantity == "parameter"]
        if sizes and 0 < max(sizes) < np.inf:
            points.append((np.log(step), np.log(max(sizes))))
    if len(points) < 4:
        return None
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


def compare_narrow(truth, ours, theirs) -> dict[str, tuple[float, float]]:
    """{quantity: (our error, theirs)} of two bfloat16 traces against a float32 one.

    An error is the root mean square, over steps and tensors, of the relative distance to the truth.

    Raises:
        TraceError: the three share no step, or name other tensors.
    """
    if truth.header["precision"] == "bfloat16":
        raise TraceError(f"the truth must be float32 or float64; {truth.name} is in bfloat16.")
    tables = [
        {line["step"]: line for line in t.steps if line["step"]} for t in (truth, ours, theirs)
    ]
    steps = sorted(set.intersection(*map(set, tables)))
    if not steps:
        raise TraceError("the three traces must share a step; they share none. Set --truth.")
    lines = [[table[step] for table in tables] for step in steps]
    for x, *others in lines[:1]:
        for y in others:
            _check_names(x, y, ("the truth", "a trace"))
    noise = rounding_only([x for x, _, _ in lines], [x for x, _, _ in lines], "float32")
    errors = {}
    for quantity in QUANTITIES:
        pairs = [
            [distance(x[quantity][name], y[quantity][name]) for y in others]
            for x, *others in lines
            if all(quantity in line for line in (x, *others))
            for name in others[0][quantity]
            if name in x[quantity] and name in others[1][quantity] and name not in noise
        ]
        if pairs:
            errors[quantity] = tuple(np.sqrt(np.mean(np.square(pairs), 0)).tolist())
    return errors

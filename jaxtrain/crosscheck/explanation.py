"""Explains a comparison: a table by step, where the traces differ, how the difference grows."""

from collections.abc import Iterable

from jaxtrain.crosscheck.comparison import (
    STAGES,
    Comparison,
    Difference,
    Divergence,
    growth_exponent,
    largest_parameter_difference,
)
from jaxtrain.crosscheck.tolerances import EPS, describe_range
from jaxtrain.crosscheck.trace import QUANTITIES
from jaxtrain.reporting.table import format_table

MOST_ROWS = 20  # steps in the table, evenly spaced; the diverging step is always among them
MOST_NAMES = 4  # tensors that a message lists
SUSPECT = 2.0  # PyTorch's error in bfloat16, relative to ours, from which on it is named
BFLOAT16_RATIO = 1.1  # the most that our error may be, relative to PyTorch's


def steps_table(comparison: Comparison) -> str:
    """Returns a table with the losses and the largest difference of each quantity by step.

    A cell above its tolerance ends in "!".
    """
    steps = comparison.steps
    shown = {steps[round(i * (len(steps) - 1) / max(MOST_ROWS - 1, 1))] for i in range(MOST_ROWS)}
    if comparison.divergence:
        shown.add(comparison.divergence.first.step)
    losses = {0: ()} | dict(zip(steps, comparison.losses, strict=True))

    def cells(step: int) -> list[object]:
        both = [f"{x:.6f}" for x in losses[step]] or ["", ""]
        differences = comparison.differences[step]
        worst = [_worst(d for d in differences if d.quantity == q) for q in ("loss", *QUANTITIES)]
        return [step, *both, *worst]

    losses_of = (f"{name} nats" for name in comparison.names)
    headers = ("step", *losses_of, "loss difference", *QUANTITIES)
    return format_table(map(cells, sorted(shown)), headers)


def _worst(differences: Iterable[Difference]) -> str:
    differences = list(differences)
    if not differences:
        return ""
    mark = "!" if any(d.exceeds for d in differences) else " "
    return f"{max(d.size for d in differences):.1e}{mark}"


def explain(comparison: Comparison) -> str:
    """Returns whether two traces agree or, if not, where they differ first and what to check."""
    lines = []
    if comparison.rounding_only:
        names = sorted(comparison.rounding_only)
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        lines.append(
            "Not compared, because their gradients are rounding errors only: "
            f"{', '.join(names[:MOST_NAMES])}{more}"
        )
    if comparison.missing:
        missing = ", ".join(comparison.missing)
        lines.append(f"Not compared, because only one trace has them: {missing}")
    lines += comparison.notes
    if comparison.divergence:
        lines += _divergence_lines(comparison.divergence)
        label = "" if comparison.divergence.stage == "batch" else "likely cause: "
        lines += [f"  {label}{cause}" for cause in comparison.causes]
    else:
        first, last = comparison.steps[0], comparison.steps[-1]
        lines.append(
            f"AGREE: {' and '.join(comparison.names)} are within the tolerances of "
            f"{comparison.precision} at all {len(comparison.steps)} steps ({first} to {last})"
        )
        lines += _limits_lines(comparison)
    exponent = growth_exponent(comparison)
    if exponent is not None:
        lines.append(_growth_line(comparison, exponent))
    return "\n".join(lines)


def _limits_lines(comparison: Comparison) -> list[str]:
    """Returns how small a fault may be and still be seen, and where the tolerances come from."""
    all_of = [d for step in comparison.steps for d in comparison.differences[step]]
    limits = {q: [d.tolerance for d in all_of if d.quantity == q] for q in ("loss", *QUANTITIES)}
    ranges = [f"{q} {describe_range(found)}" for q, found in limits.items() if found]
    lines = [f"  below rounding, and so not seen, are differences up to: {', '.join(ranges)}"]
    if not comparison.measured:
        lines.append(
            "  these tolerances are a fixed formula, as neither trace measured its rounding: false "
            "alarms are likely in float32. `jaxtrain crosscheck record` measures it"
        )
    if comparison.precision == "float32":
        lines.append("  float64 on both sides would show smaller ones")
    return lines


def _divergence_lines(divergence: Divergence) -> list[str]:
    first = divergence.first
    name = f"{first.quantity} of {first.tensor}" if first.tensor else first.quantity
    lines = [
        f"DIFFER at step {first.step}, stage {divergence.stage}: {STAGES[divergence.stage]}",
    ]
    if divergence.stage == "batch":
        return lines
    lines += [
        f"  look first at: {name}, which differs by {first.size:.1e} (tolerance "
        f"{first.tolerance:.1e}; rounding causes about {first.rounding:.0e})",
    ]
    others = [d for d in divergence.all if d != first]
    for other in others[:MOST_NAMES]:
        lines.append(f"  also: {other.quantity} of {other.tensor}, by {other.size:.1e}")
    if len(others) > MOST_NAMES:
        lines.append(f"  and {len(others) - MOST_NAMES} more at this step")
    return lines


def _growth_line(comparison: Comparison, exponent: float) -> str:
    first = comparison.steps[0]
    eps_count = largest_parameter_difference(comparison, first) / EPS[comparison.precision]
    line = (
        f"After step {first} the parameters differ by {eps_count:.2g} times the epsilon of "
        f"{comparison.precision}. The difference grows as step^{exponent:.1f}"
    )
    if comparison.measured:  # the tolerances contain how rounding starts and grows
        return line
    # Rounding errors start at a few eps and grow about linearly. A fault starts larger or grows
    # faster.
    is_rounding = eps_count < 100 and exponent < 2.5
    return f"{line}, which {'looks' if is_rounding else 'does not look'} like rounding"


def bfloat16_table(errors: dict[str, tuple[float, float]]) -> tuple[str, bool]:
    """Returns a table of errors against the truth, and whether ours are small enough."""
    rows = []
    for quantity, (ours, theirs) in errors.items():
        is_small = ours <= BFLOAT16_RATIO * theirs  # false for a NaN
        note = "" if is_small else f"! must be at most {BFLOAT16_RATIO}"
        rows.append((quantity, f"{ours:.2e}", f"{theirs:.2e}", f"{ours / theirs:.2f}", note))
    table = format_table(rows, ("error against float32", "jaxtrain", "pytorch", "ratio", ""))
    limit = f"{BFLOAT16_RATIO} times PyTorch's"
    if any(note for *_, note in rows):
        return f"{table}\nDIFFER: some of jaxtrain's errors are more than {limit}", False
    lines = [table, f"AGREE: all of jaxtrain's errors are at most {limit}"]
    if larger := [q for q, (ours, theirs) in errors.items() if not theirs <= SUSPECT * ours]:
        lines.append(
            f"  not judged: pytorch's errors, which are more than {SUSPECT:g} times jaxtrain's in "
            f"{', '.join(larger)}. Weights in bfloat16 cause that in update and parameter; a fault "
            "causes it too. Record both sides in float32 to find one"
        )
    return "\n".join(lines), True

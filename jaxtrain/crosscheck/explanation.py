"""A comparison in words: a table by step, where the two part, and how the gap grows."""

from jaxtrain.crosscheck.comparison import EPS, STAGES, growth
from jaxtrain.crosscheck.trace import QUANTITIES

ROWS = 20  # steps shown, evenly spaced; the one where they part is always among them
NARROW_RATIO = 1.1


def table(comparison) -> str:
    """One line a step: both losses, and the largest gap of each quantity; ! is past tolerance."""
    steps = comparison.steps
    shown = {steps[round(i * (len(steps) - 1) / max(ROWS - 1, 1))] for i in range(ROWS)}
    if comparison.divergence:
        shown.add(comparison.divergence.gap.step)
    losses = dict(zip(comparison.steps, comparison.losses, strict=True))
    names = [name[:12] for name in comparison.names]
    head = f"{'step':>6} {names[0]:>12} {names[1]:>12} {'apart':>10}"
    lines = [head + "".join(f" {quantity:>12}" for quantity in QUANTITIES)]
    for step in sorted(shown):
        a, b = losses.get(step, (None, None))
        cells = f"{a:12.6f} {b:12.6f} " if a is not None else " " * 26
        gaps = comparison.gaps[step]
        cells += _cell([g for g in gaps if g.quantity == "loss"], 10)
        cells += "".join(
            " " + _cell([g for g in gaps if g.quantity == quantity], 12) for quantity in QUANTITIES
        )
        lines.append(f"{step:6} {cells}".rstrip())
    return "\n".join(lines)


def _cell(gaps, width) -> str:
    if not gaps:
        return " " * width
    worst = max(gap.size for gap in gaps)
    mark = "!" if any(gap.beyond for gap in gaps) else " "
    return f"{worst:.1e}{mark}".rjust(width)


def explain(comparison) -> str:
    """Whether two traces agree; where they part first, how far, and what to look at."""
    lines = []
    if comparison.rounding_only:
        names = sorted(comparison.rounding_only)
        lines.append(
            f"not judged, as their gradient is rounding alone: {', '.join(names[:4])}"
            + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        )
    if comparison.absent:
        lines.append(f"not judged, as one trace lacks them: {', '.join(comparison.absent)}")
    found = comparison.divergence
    if found is None:
        last = comparison.steps[-1]
        lines.append(
            f"AGREE: {' and '.join(comparison.names)}, {len(comparison.steps)} steps to step "
            f"{last}, {comparison.precision}"
        )
    else:
        lines += _parting(found)
    rate = growth(comparison)
    if rate is not None:
        lines.append(_growth(comparison, rate))
    return "\n".join(lines)


def _parting(found):
    gap = found.gap
    what = f"{gap.quantity} of {gap.tensor}" if gap.tensor else gap.quantity
    yield f"PART at step {gap.step}, {found.stage}: {STAGES[found.stage]}"
    yield (
        f"  first: {what}, apart by {gap.size:.1e}; tolerance {gap.tolerance:.1e}, rounding would "
        f"make {gap.rounding:.0e}"
    )
    others = [other for other in found.gaps if other != gap]
    for other in others[:4]:
        yield f"  also:  {other.quantity} of {other.tensor}, apart by {other.size:.1e}"
    if len(others) > 4:
        yield f"  and {len(others) - 4} more of this step"


def _growth(comparison, rate) -> str:
    first = comparison.steps[0]
    gaps = [gap for gap in comparison.gaps[first] if gap.quantity == "parameter"]
    start = max(gap.size for gap in gaps) / EPS[comparison.precision]
    like = start < 100 and rate < 2.5
    return (
        f"parameters are {start:.2g} roundings apart after step {first} and the gap grows as "
        f"step^{rate:.1f}: {'like rounding' if like else 'not like rounding'}"
    )


def narrow_table(errors) -> tuple[str, bool]:
    """Errors of two bfloat16 traces against the truth; whether ours are at most 1.1 of theirs."""
    lines = [f"{'error against float32':24} {'jaxtrain':>10} {'pytorch':>10} {'ratio':>7}"]
    passed = True
    for quantity, (ours, theirs) in errors.items():
        good = ours <= NARROW_RATIO * theirs
        passed = passed and good
        mark = "" if good else f"  ! at most {NARROW_RATIO}"
        lines.append(f"{quantity:24} {ours:10.2e} {theirs:10.2e} {ours / theirs:7.2f}{mark}")
    lines.append("AGREE" if passed else "PART: bfloat16 costs us more than PyTorch")
    return "\n".join(lines), passed

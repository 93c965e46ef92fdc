"""The figures of suite first-day's stages, each with its own date, commit and stages."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxtrain.benchmarks.first_day_results import (
    Row,
    ceilings_figure,
    contests,
    kernel_figure,
    profile_figure,
    row_name,
)
from jaxtrain.benchmarks.gpu_results import SHARE_TOKENS
from pallas_kernels.targets import read_targets


class Figure(NamedTuple):
    """A figure for a table; what and text are Markdown."""

    what: str
    text: str
    source: Row  # what was measured, with its own date and commit
    stages: str  # that measure it, as --stages takes them


def machine_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """Yields the card's ceilings, beside which the shares of other figures are computed."""
    for row in rows:
        text = f"{ceilings_figure(row)}; clocks as found: {row['clocks']}"
        yield Figure("ceilings of a plain product and a plain copy", text, row, "machine")


def fastest_steps(rows: Sequence[Row]) -> dict[str, Row]:
    """Returns {case: the fastest of our steps, at any micro-batch size}."""
    fastest: dict[str, Row] = {}
    for row in rows:
        if row.get("variant") == "jaxtrain" and row.get("what") == "step" and "step_s" in row:
            fastest[row["case"]] = max(
                fastest.get(row["case"], row), row, key=lambda row: row["tokens_per_s"]
            )
    return fastest


def profile_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """Yields the time by cause of each step in the table of the training, if it was traced.

    A trace's folder has the name of its step's row, which has the date and the commit.
    """
    steps = {row_name(row).replace(" ", "_"): row for row in fastest_steps(rows).values()}
    for row in rows:
        if "by_cause_s" in row and row["trace"] in steps:
            what = f"time by cause of {row['trace'].removesuffix('_half')}"
            yield Figure(what, profile_figure(row), steps[row["trace"]], "training,profile")


def training_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """Yields a figure for each size: our fastest step beside PyTorch's fastest."""
    ours = [row for row in rows if row.get("variant") == "jaxtrain" and "step_s" in row]
    ratios = {row["case"]: row for row in rows if row.get("what") == "ratio"}
    warm = {row["case"]: row for row in ours if row["what"] == "warm start"}
    steps = [row for row in ours if row["what"] == "step"]
    for case, best in fastest_steps(rows).items():

        def verdict(name: str, targets: dict[str, str] = best["targets"]) -> str:
            return f" ({targets[name]})" if name in targets else ""

        parts = [f"{best['tokens_per_s']:,.0f} tokens/s"]
        if best["mfu"] is not None:
            parts.append(f"MFU {best['mfu']:.1%}{verdict('mfu')}")
        if ratio := ratios.get(case):
            text = ratio["targets"].get("ratio", "")
            parts.append(f"{ratio['value']:.2f}x compiled PyTorch ({text})")
        if best["optimizer_share_at_524288"] is not None:
            share = f"{best['optimizer_share_at_524288']:.1%} at {SHARE_TOKENS:,} tokens a step"
            parts.append(f"optimizer {share}{verdict('optimizer_share_at_524288')}")
        if best.get("idle_share") is not None:
            parts.append(f"device idle {best['idle_share']:.1%}{verdict('idle_share')}")
        if best["peak_bytes"] is not None:
            parts.append(f"peak {best['peak_bytes'] / 2**30:.1f} GiB")
        first = next(row for row in steps if row["case"] == case)
        starts = f"first step after {first['first_step_s']:.0f} s"
        if case in warm:
            starts += f", {warm[case]['first_step_s']:.0f} s with the compile cache"
        text = "; ".join([*parts, starts])
        yield Figure(case.replace(" ", " with "), text, best, "training")


def kernel_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """Yields a figure for each finished contest in which a correct kernel of ours was timed.

    A contest that was cut or crashed may lack the time of our fastest body. The stage `tune`
    measures our kernels again, so that a tuned contest's figure is its own.
    """
    chips = {row["chip"] for row in rows if "chip" in row}
    targets = read_targets().get(chips.pop(), {}) if len(chips) == 1 else {}
    for name, result in contests(rows).items():
        if not result.get("done"):
            continue
        stages = "kernels,tune" if "tried" in result else "kernels"
        if text := kernel_figure(result, trial=False, target=targets.get(name)):
            yield Figure(name, text, result, stages)


def plan_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """Yields the figures of the plan beside each measured step, and of the calibration."""
    for plan in rows:
        for row in plan["rows"]:
            figure = f"{row['measured_s']:.4f} s, bound {row['bound_s']:.4f} s"
            if "calibrated_s" in row:
                figure += f", calibrated {row['calibrated_s']:.4f} s"
            if row["measured_bytes"]:
                gib = [row[key] / 2**30 for key in ("measured_bytes", "planned_bytes")]
                figure += f"; peak {gib[0]:.1f} GiB, planned {gib[1]:.1f}"
            yield Figure(f"plan of {row['case']}", figure, plan, "plan")
        if "calibration" in plan:
            what = "efficiencies for `jaxtrain plan --calibrated`"
            yield Figure(what, plan["calibration"], plan, "plan")


FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Row]], Iterator[Figure]]]] = {
    # the table's name: the results that it needs, and its figures
    "machine": (("machine.json",), machine_figures),
    "training": (("training.jsonl",), training_figures),
    "kernels": (("kernels.json",), kernel_figures),
    "plan": (("plan.json",), plan_figures),
    "profile": (("profile.jsonl", "training.jsonl"), profile_figures),
}

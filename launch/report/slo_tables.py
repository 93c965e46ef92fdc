"""Prints baselines, checks and prices as tables."""

import time
from pathlib import Path

from launch.report.baseline import NOT_ENFORCED, NOT_JUDGED
from launch.report.power import confidence_of_each, describe_detection, describe_power
from launch.report.run_folder import RunFolder
from launch.report.slo_figures import FIGURES, Figure

LOOSE = 0.2  # a relative tolerance above this would miss what an operator must see
UNENFORCED = "recorded but not enforced"
STATES = {
    "ok": "",
    "BREACH": "BREACH",
    NOT_ENFORCED: f"{UNENFORCED}: {{how}}",
    NOT_JUDGED: "not judged: the run has too few steps ({how})",
}


def show_record(baseline: dict, path: Path) -> str:
    """Formats a baseline as a table."""
    lines = [f"{'figure':20} {'baseline':>14} {'bound':>16} {'tolerance':>10}  derived from"]
    for name, entry in baseline["figures"].items():
        figure, bound = FIGURES[name], entry["bound"]
        cells = [figure.form(entry["value"]), "-", "-"]
        note = f"{UNENFORCED}: {entry['how']}"
        if bound is not None:
            tolerance = abs(bound / entry["value"] - 1)
            cells[1:] = [bound_text(figure, bound), f"{tolerance:.1%}"]
            loose = "; LOOSE: longer or more runs tighten it" if tolerance > LOOSE else ""
            note = entry["how"] + loose
        lines.append(f"{figure.words:20} {cells[0]:>14} {cells[1]:>16} {cells[2]:>10}  {note}")
    absent = [figure.words for name, figure in FIGURES.items() if name not in baseline["figures"]]
    if absent:
        lines.append(f"not recorded, as not every run measured it: {', '.join(absent)}")
    confidence, count = baseline["confidence"], baseline["power"]["figures"]
    lines.append(
        f"tolerance: one more run meets all {count} bounds together with a confidence of "
        f"{confidence:.4g} (Bonferroni: {confidence_of_each(confidence, count):.4g} each), by "
        "Student's t on logarithms"
    )
    lines += describe_power(baseline["power"])
    return "\n".join([*lines, f"baseline {path}"])


def bound_text(figure: Figure, bound: float) -> str:
    """Returns a figure's bound, as ">= 1,000"."""
    return f"{'>=' if figure.sign > 0 else '<='} {figure.form(bound)}"


def show_check(rows: list[dict], run: RunFolder, baseline: dict, path: str) -> str:
    """Formats the rows of `check` as a table, with the verdict in the last line."""
    day = time.strftime("%Y-%m-%d", time.gmtime(baseline["recorded"]))
    lines = [
        f"{run.name} against {path}, recorded {day} from {', '.join(baseline['runs'])}",
        f"{'figure':20} {'baseline':>14} {'bound':>16} {'run':>14} {'margin':>9}",
    ]
    for row in rows:
        figure = FIGURES[row["figure"]]
        cells = [figure.form(row["baseline"]), "-", "-", "-"]
        if row["bound"] is not None:
            cells[1] = bound_text(figure, row["bound"])
        if row["run"] is not None:
            cells[2] = figure.form(row["run"])
        if row["margin"] is not None:
            cells[3] = f"{row['margin']:+.1%}"
        words = f"  {STATES[row['state']].format(how=row['how'])}".rstrip()
        words += " (not measured)" if row["run"] is None else ""
        lines.append(
            f"{figure.words:20} {cells[0]:>14} {cells[1]:>16} {cells[2]:>14} {cells[3]:>9}{words}"
        )
    if baseline.get("provisional"):
        lines.append("provisional: recorded from one run, so a breach may be the usual difference")
    if power := baseline.get("power"):
        lines.append(f"of runs as long as the baseline's: {describe_detection(power)}")
    else:
        lines.append(
            "an earlier version recorded this baseline: each bound has its confidence by itself, "
            "so false alarms over all figures are more frequent. `slo record` it again"
        )
    return "\n".join([*lines, verdict(rows)])


def verdict(rows: list[dict]) -> str:
    """Returns which bounds are broken, and which could not be judged."""
    named = lambda state: [FIGURES[r["figure"]].words for r in rows if r["state"] == state]
    met, broken, unjudged = named("ok"), named("BREACH"), named(NOT_JUDGED)
    if not unjudged:
        return f"BREACH: {', '.join(broken)}" if broken else "all bounds are met"
    count = len(met) + len(broken) + len(unjudged)
    text = f"BREACH: {', '.join(broken)}" if broken else f"{len(met)} of {count} bounds are met"
    return f"{text}; not judged: {', '.join(unjudged)}"


def show_price(found: dict) -> str:
    """Formats the cost, the capacity and their assumptions."""
    money = found["currency"]
    lines = [
        f"{found['cost_per_1e9_tokens']:,.2f} {money} per 1e9 tokens",
        f"{found['tokens_per_month']:.4g} tokens a month, "
        f"{found['tokens_per_month_per_gpu']:.4g} per GPU",
    ]
    if "gpus" in found:
        lines.append(
            f"{found['tokens']:.4g} tokens in {found['deadline_s'] / 86_400:g} days: "
            f"{found['gpus']} GPUs, {found['cost']:,.2f} {money}"
        )
    return "\n".join([*lines, "assumptions:", *(f"  {a}" for a in found["assumptions"])])

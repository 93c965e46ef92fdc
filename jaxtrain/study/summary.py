"""Summarises a study over all its cells, and writes its files: texts, numbers and pictures."""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxtrain.config.train_config as config_lib
from jaxtrain.data.sources import AnyCorpus
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.reporting.table import format_table
from jaxtrain.study import statistics as st
from jaxtrain.study.picture import horizon_curves, study_curves
from jaxtrain.study.plan import StudyPlan
from jaxtrain.study.result import ConditionResult, compare, format_result
from jaxtrain.study.runs import Result
from jaxtrain.study.scaling import RankCorrelation, Speedup, rank_correlations, speedups
from jaxtrain.study.work import CellRuns
from jaxtrain.training.startup import library_versions


class Summary(NamedTuple):
    """Everything that a study has found in the cells that are finished."""

    results: list[ConditionResult]
    speedups: list[Speedup]
    ranks: list[RankCorrelation]


def summarise(plan: StudyPlan, cells: Sequence[CellRuns]) -> Summary:
    """Compares the contenders in all finished cells, and over them."""
    results, study = compare(plan, cells), plan.study
    groups = {name: cell.group for name, cell in plan.cells.items()}
    return Summary(
        results,
        speedups(results, groups, study.level),
        rank_correlations(results, study.published, study.level),
    )


def format_summary(plan: StudyPlan, summary: Summary) -> str:
    """Returns the tables and verdicts of every cell, and those over all cells."""
    texts = [format_result(plan, result) for result in summary.results]
    if summary.speedups:
        texts.append("\n".join(_speedup_lines(plan, summary.speedups)))
    if summary.ranks:
        texts.append("\n".join(_rank_lines(plan, summary.ranks)))
    if len(summary.results) > 1:
        texts.append("\n".join(_overall_lines(plan, summary)))
    if len(summary.results) < len(plan.cells):
        texts.append(f"so far: {len(summary.results)} of {len(plan.cells)} cells are finished")
    return "\n\n".join(texts)


def _speedup_lines(plan: StudyPlan, found: Sequence[Speedup]) -> list[str]:
    study = plan.study
    cells = list(dict.fromkeys(s.condition for s in found))
    by_key = {(s.contender, s.condition): s for s in found}

    def cell_text(contender: str, cell: str) -> str:
        s = by_key[contender, cell]
        if math.isnan(s.ratio):
            return "-"
        mark = "*" if s.extrapolated else ""
        return f"{s.ratio:.2f} ({s.low:.2f}-{s.high:.2f}){mark}"

    columns = {"contender": lambda name: name}
    columns |= {cell: lambda name, cell=cell: cell_text(name, cell) for cell in cells}
    return [
        f"== Speed-up in tokens over {study.baseline}",
        f"how many times as many tokens {study.baseline} needs for a contender's end-of-run loss "
        f"({1 - study.level:.0%} interval)",
        "",
        format_table(list(dict.fromkeys(s.contender for s in found)), columns),
        "",
        f"The end-of-run losses of {study.baseline} are joined by straight lines over log(tokens).",
        "*: not between its losses; the outer line is continued, which understates the ratio.",
        "Intervals: parametric bootstrap; every mean is redrawn with its standard error. They are "
        "not Holm-corrected.",
    ]


def _rank_lines(plan: StudyPlan, ranks: Sequence[RankCorrelation]) -> list[str]:
    study, count = plan.study, len(ranks[0].contenders)
    columns = {
        "cell": lambda r: r.condition,
        "tau-b": lambda r: f"{r.tau:+.2f}",
        f"{1 - study.level:.0%} interval": lambda r: f"{r.low:+.2f} to {r.high:+.2f}",
        "p": lambda r: f"{r.p:.3g}",
        "lowest to highest loss": lambda r: ", ".join(r.contenders),
    }
    order = sorted(ranks[0].contenders, key=lambda name: study.published[name])
    pairs = list(itertools.combinations([study.published[name] for name in order], 2))
    tied = sum(a == b for a, b in pairs)
    most = math.sqrt(1 - tied / len(pairs))
    listed = ", ".join(f"{name} {study.published[name]:g}" for name in order)
    return [
        f"== Does it rank {count} contenders as the published comparison does?",
        f"published: {listed}",
        "",
        format_table(ranks, columns),
        "",
        "tau-b: Kendall's rank correlation: 1 is the same order, 0 is no relation, -1 is the "
        "reverse.",
        f"It is at most {most:.2f} here, since {tied} of {len(pairs)} pairs of published figures "
        "are tied and the study's losses are not.",
        "interval: parametric bootstrap of the run-to-run noise, for these contenders only. p: "
        f"two-sided, over all permutations of {count} contenders.",
        "all: contenders in the order of their mean difference from the baseline over all cells.",
        f"What this cannot show: n = {count} contenders is a small sample, and another choice of "
        "contenders may give another tau.",
        "Published figures that are close have no certain order. The model, data, batch and tuning "
        "differ from the published",
        "ones, so a low tau does not say which of the two rankings is right.",
        "",
        f"Verdict: {_rank_verdict(ranks[-1], study.level)}",
    ]


def _rank_verdict(rank: RankCorrelation, level: float) -> str:
    """Returns what a tau says, as a sentence that needs no legend."""
    where = "over all cells" if rank.condition == "all" else f"in {rank.condition}"
    figures = f"tau-b {rank.tau:+.2f} ({rank.low:+.2f} to {rank.high:+.2f}), p = {rank.p:.3g}"
    if not rank.p <= level:
        return (
            f"{where}, {len(rank.contenders)} contenders do not show whether the study ranks "
            f"them as the published comparison does: {figures}"
        )
    relation = "as" if rank.tau > 0 else "in reverse of what"
    return (
        f"{where}, the study ranks contenders {relation} the published comparison does: {figures}"
    )


def _overall_lines(plan: StudyPlan, summary: Summary) -> list[str]:
    study, count = plan.study, len(summary.results)
    lines = [f"== Over all {count} cells, at significance level {study.level:g} (Holm-corrected)"]
    for name in (name for name in study.contenders if name != study.baseline):
        contests = [c for r in summary.results for c in r.contests if c.contender == name]
        verdicts = [c.verdict for c in contests]
        tally = {
            "better": verdicts.count(st.WINS),
            "worse": verdicts.count(st.LOSES),
            "no significant difference": verdicts.count(st.TIES),
            "undecided": verdicts.count(st.UNDECIDED),
        }
        listed = ", ".join(f"{text} in {n}" for text, n in tally.items() if n)
        edges = sum(bool(c.choice.edges) for c in contests)
        line = f"  {name} against {study.baseline}: {listed} of {count} cells"
        ratios = [s.ratio for s in summary.speedups if s.contender == name]
        ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
        if ratios:
            line += f"; speed-up in tokens {min(ratios):.2f} to {max(ratios):.2f}"
        if edges:
            line += f"; its best values are at an edge of what was tried in {edges} of {count}"
        lines.append(line)
    return lines


def write_summary(
    plan: StudyPlan,
    corpus: AnyCorpus,
    header: Sequence[str],
    cells: Sequence[CellRuns],
    summary: Summary,
) -> None:
    """Writes study.txt, study.json, study.csv and the pictures into the study's folder."""
    folder = Path(plan.study.workdir)
    text = "\n".join(header) + "\n\n" + format_summary(plan, summary) + "\n"
    for cell, result in zip(cells, summary.results, strict=True):
        paired = {c.contender: cell.paired[c.contender] for c in result.contests}
        if any(math.isfinite(run.loss) for runs in paired.values() for run in runs):
            picture = study_curves(f"{folder.name}, {cell.cell}", paired)
            write_atomic(folder / f"{cell.cell}.png", picture)
    groups = {name: cell.group for name, cell in plan.cells.items()}
    if any(result.horizon for result in summary.results):
        picture = horizon_curves(folder.name, summary.results, groups, plan.study.level)
        write_atomic(folder / "horizons.png", picture)
    write_atomic(folder / "study.csv", _format_csv(summary))
    numbers = {
        "study": vars(plan.study),
        "base": config_lib.to_dict(plan.base),
        "data": corpus.fingerprint,
        "versions": library_versions(),
        "device": jax.devices()[0].device_kind,
        "cells": _as_dict(list(plan.cells.values())),
        "findings": _as_dict(summary.results),
        "speedups": _as_dict(summary.speedups),
        "rank_correlations": _as_dict(summary.ranks),
        "runs": [_describe_run(run, folder) for cell in cells for run in _all_runs(cell)],
    }
    write_atomic(folder / "study.json", strict_json(numbers, indent=2) + "\n")
    write_atomic(folder / "study.txt", text)


def _all_runs(cell: CellRuns) -> list[Result]:
    runs = [*cell.tuning.values(), *cell.paired.values()]
    return [run for results in runs for run in results]


def _describe_run(run: Result, folder: Path) -> dict[str, Any]:
    cfg = run.trial.config
    return {
        "condition": run.trial.condition,
        "contender": run.trial.contender,
        "setting": run.trial.setting,
        "seed": run.trial.seed,
        "tokens": cfg.data.tokens_before(cfg.steps),
        "folder": str(Path(cfg.workdir).relative_to(folder)),
        "loss_nats": run.loss,
        "seconds": run.seconds,
        "compile_s": run.compile_s,
    }


def _format_csv(summary: Summary) -> str:
    """Returns a row for each contender in each cell; empty fields are unknown."""
    ratios = {(s.condition, s.contender): s for s in summary.speedups}
    output = io.StringIO()
    columns = (
        "cell,parameters,tokens,contender,setting,tuning_runs,at_edge,runs,mean,sd,difference,se,t,"
        "degrees,p,holm_p,verdict,speedup,speedup_low,speedup_high,extrapolated"
    )
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(columns.split(","))
    for r in summary.results:
        for c in r.contests:
            p, s = c.paired, ratios.get((r.condition, c.contender))
            row = [r.condition, r.parameters, r.tokens, c.contender, c.choice.setting]
            row += [len(c.choice.losses), ";".join(c.choice.edges), p.pairs, c.mean, c.sd]
            against = [p.difference, p.se, p.t, p.degrees, p.p, c.p_corrected, c.verdict]
            row += against if c.verdict else [""] * len(against)
            row += [s.ratio, s.low, s.high, s.extrapolated] if s else [""] * 4
            writer.writerow("" if x != x else x for x in row)  # nan: unknown
    return output.getvalue()


def _as_dict(value: Any) -> Any:
    """Converts nested NamedTuples to dicts by field."""
    if hasattr(value, "_asdict"):
        return {name: _as_dict(inner) for name, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _as_dict(inner) for name, inner in value.items()}
    return [_as_dict(inner) for inner in value] if isinstance(value, list) else value

"""Writes the results of suite first-day into the tables of README.md and docs/results.md.

A table lies between two marks. A row's first cell says what was measured, its third the card: a new
row replaces the row of the same thing on the same card, and the row that called it unmeasured. Rows
of other cards stay.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtrain.benchmarks.first_day_results import (
    Row,
    contests,
    kernel_figure,
    read_record,
    read_rows,
)
from jaxtrain.benchmarks.gpu_results import SHARE_TOKENS
from pallas_kernels import kernel_choice
from pallas_kernels.targets import read_targets

ROOT = Path(__file__).parent.parent.parent
START, END = "<!-- first day: {} -->\n", "<!-- end of first day: {} -->\n"
HEADER = "| what | figure | card, versions, date, commit | command |\n|---|---|---|---|\n"
COMMAND = "`jaxtrain bench --suite=first-day --stages={} --out=DIR`"
NO_CARD = "-"  # the third cell of a row that was not measured
PAGES = {"training": ("README.md", "docs/results.md"), "kernels": ("docs/results.md",)}
PAGES |= {"plan": ("docs/results.md",)}


class TableError(ValueError):
    """The results of a folder cannot be written into the pages."""


class TableRow(NamedTuple):
    """A row of a table; its cells are Markdown."""

    what: str
    figure: str
    source: str  # card, versions, date, commit
    command: str

    @property
    def card(self) -> str:
        return self.source.partition(",")[0]

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |\n"


def parse_table(block: str) -> list[TableRow]:
    """Returns the rows of a block; a block without a table has none."""
    lines = [line.strip("| ").split(" | ") for line in block.splitlines() if line[:2] == "| "]
    return [TableRow(*cells) for cells in lines[1:] if len(cells) == len(TableRow._fields)]


def merge_rows(old: Sequence[TableRow], new: Sequence[TableRow]) -> list[TableRow]:
    """Returns the old rows with the new ones in place of those that they supersede.

    The row of a thing that was not measured is superseded by any row that begins with its name.
    """
    replaced = {(row.what, row.card) for row in new}
    measured = tuple(row.what for row in new)

    def stays(row: TableRow) -> bool:
        if row.card == NO_CARD:
            return not any(what.startswith(row.what) for what in measured)
        return (row.what, row.card) not in replaced

    return [*new, *filter(stays, old)]


def update_page(text: str, block: str, rows: Sequence[TableRow]) -> str:
    """Returns a page with rows merged into one of its blocks.

    Raises:
        TableError: the page has no such block.
    """
    start, end = START.format(block), END.format(block)
    before, found, rest = text.partition(start)
    inside, ended, after = rest.partition(end)
    if not (found and ended):
        raise TableError(f"the page must have the marks {start.strip()} and {end.strip()}")
    table = HEADER + "".join(map(str, merge_rows(parse_table(inside), rows)))
    return f"{before}{start}\n{table}\n{end}{after}"


@contextlib.contextmanager
def _name_result(path: Path) -> Iterator[None]:
    """Turns an error about a missing or damaged result into a TableError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(
            f"--write needs the results of the suite; got {path}: {type(error).__name__} {error}. "
            "Run its stage again: --stages."
        ) from None


def _describe_machine(machine: Row) -> str:
    """Returns the card and the versions of a result of the stage machine."""
    versions = [f"driver {machine['driver']}"]
    if machine.get("cudnn"):
        versions.append(f"cuDNN {machine['cudnn']}")
    versions += [f"{name} {version}" for name, version in machine["versions"].items()]
    return f"{machine['device']}, {', '.join(versions)}"


def training_figures(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yields (what, figure) for each size: our fastest step beside PyTorch's fastest."""
    ours = [row for row in rows if row.get("variant") == "jaxtrain" and "step_s" in row]
    ratios = {row["case"]: row for row in rows if row.get("what") == "ratio"}
    warm = {row["case"]: row for row in ours if row["what"] == "warm start"}
    steps = [row for row in ours if row["what"] == "step"]
    for case in dict.fromkeys(row["case"] for row in steps):
        best = max((r for r in steps if r["case"] == case), key=lambda row: row["tokens_per_s"])

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
        yield case.replace(" ", " with "), "; ".join([*parts, starts])


def kernel_figures(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yields (what, figure) for each contest in which a correct kernel of ours was timed."""
    chips = {row["chip"] for row in rows if "chip" in row}
    targets = read_targets().get(chips.pop(), {}) if len(chips) == 1 else {}
    for name, result in contests(rows).items():
        if figure := kernel_figure(result, trial=False, target=targets.get(name)):
            yield name, figure


def plan_figures(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yields (what, figure) of the plan beside each measured step, and of the calibration."""
    for plan in rows:
        for row in plan["rows"]:
            figure = f"{row['measured_s']:.4f} s, bound {row['bound_s']:.4f} s"
            if "calibrated_s" in row:
                figure += f", calibrated {row['calibrated_s']:.4f} s"
            if row["measured_bytes"]:
                gib = [row[key] / 2**30 for key in ("measured_bytes", "planned_bytes")]
                figure += f"; peak {gib[0]:.1f} GiB, planned {gib[1]:.1f}"
            yield f"plan of {row['case']}", figure
        if "calibration" in plan:
            yield "efficiencies for `jaxtrain plan --calibrated`", plan["calibration"]


class Figures(NamedTuple):
    """Where a table's figures come from."""

    stage: str
    result: str
    compute: Callable[[Sequence[Row]], Iterator[tuple[str, str]]]


FIGURES = {
    "training": Figures("training", "training.jsonl", training_figures),
    "kernels": Figures("kernels", "kernels.json", kernel_figures),
    "plan": Figures("plan", "plan.json", plan_figures),
}


def write_tables(folder: Path, root: Path = ROOT) -> list[Path]:
    """Writes a folder's results into the pages of a checkout; returns the files that it changed.

    Args:
        folder: --out of the suite.
        root: of the checkout.

    Raises:
        OSError: the checkout has no docs.
        FirstDayError: see read_record.
        TableError: the folder is a trial's, a result is missing or damaged, or a page has no marks
            for a table.
    """
    record = read_record(folder)
    if record["tiny"]:
        raise TableError(f"--write needs measurements; got --out={folder}, which is a trial's.")
    with _name_result(folder / "machine.json"):
        card = _describe_machine(read_rows(folder / "machine.json")[0])
    pages, changed = {}, []
    for block, (stage, result, compute) in FIGURES.items():
        calls = record["stages"].get(stage, {}).get("calls", [])
        if not calls or not (folder / result).exists():
            continue
        when = f"{calls[-1]['date'][:10]}, {calls[-1]['commit'][:7]}"
        source, command = f"{card}, {when}", COMMAND.format(stage)
        with _name_result(folder / result):
            rows = [row for row in read_rows(folder / result) if not is_trial(row)]
            table = [TableRow(what, figure, source, command) for what, figure in compute(rows)]
        for name in PAGES[block] if table else ():
            text = pages.get(name) or (root / name).read_text()
            try:
                pages[name] = update_page(text, block, table)
            except TableError as error:
                raise TableError(f"{name}: {error}") from None
    tuned = sorted((folder / "tuned").glob("*.json"))
    if tuned:
        with _name_result(folder / "tuned"):  # before anything is written
            kernel_choice.read_rows(folder / "tuned")
    for path in tuned:
        target = root / "pallas_kernels" / "tuned" / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
        changed.append(target)
    for name, text in pages.items():
        (root / name).write_text(text)
        changed.append(root / name)
    return changed


def is_trial(row: Row) -> bool:
    """Returns whether a row is of a trial or of interpreted kernels."""
    return bool(row.get("tiny") or row.get("trial"))

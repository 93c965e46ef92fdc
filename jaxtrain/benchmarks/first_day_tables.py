"""Writes the results of suite first-day into the tables of README.md and docs/results.md.

A table lies between two marks. A row's first cell says what was measured, its third the card: a new
row replaces the row of the same thing on the same card, and the row that called it unmeasured. Rows
of other cards stay.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtrain.benchmarks.first_day_figures import FIGURES, Figure
from jaxtrain.benchmarks.first_day_results import Row, read_record, read_rows
from pallas_kernels import kernel_choice

ROOT = Path(__file__).parent.parent.parent
START, END = "<!-- first day: {} -->\n", "<!-- end of first day: {} -->\n"
HEADER = "| what | figure | card, versions, date, commit | command |\n|---|---|---|---|\n"
COMMAND = "`jaxtrain bench --suite=first-day --stages={} --out=DIR`"
NO_CARD = "-"  # the third cell of a row that was not measured
PAGES = {"training": ("README.md", "docs/results.md"), "kernels": ("docs/results.md",)}
PAGES |= dict.fromkeys(("machine", "plan", "profile"), ("docs/results.md",))


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


def make_row(card: str, figure: Figure) -> TableRow:
    """Returns the row of a figure, with the date and the commit at which it was measured."""
    date, commit = (figure.source.get(key, "unknown") for key in ("date", "commit"))
    source = f"{card}, {date[:10]}, {commit[:7] if commit != 'unknown' else 'commit unknown'}"
    return TableRow(figure.what, figure.text, source, COMMAND.format(figure.stages))


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
def _name_result(*paths: Path) -> Iterator[None]:
    """Turns an error about a missing or damaged result into a TableError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(
            f"--write needs the results of the suite; got {' and '.join(map(str, paths))}: "
            f"{type(error).__name__} {error}. Run its stage again: --stages."
        ) from None


def _describe_machine(machine: Row) -> str:
    """Returns the card and the versions of a result of the stage machine."""
    versions = [f"driver {machine['driver']}"]
    if number := machine.get("cudnn"):  # 91900 is 9.19.0
        versions.append(f"cuDNN {number // 10_000}.{number // 100 % 100}.{number % 100}")
    versions += [f"{name} {version}" for name, version in machine["versions"].items()]
    return f"{machine['device']}, {', '.join(versions)}"


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
    for block, (results, compute) in FIGURES.items():
        paths = [folder / result for result in results]
        if not all(path.exists() for path in paths):
            continue
        with _name_result(*paths):
            rows = [row for path in paths for row in read_rows(path) if not is_trial(row)]
            table = [make_row(card, figure) for figure in compute(rows)]
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

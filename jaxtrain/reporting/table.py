"""Formats tables as plain text, the same on a terminal, in a pipe and in a file."""

import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_NUMBER = re.compile(r"[+-]?\.?\d|nan\b|[+-]?inf\b")


def format_table(
    rows: Iterable[Any],
    columns: Mapping[str, Callable[[Any], object]] | Sequence[str],
    indent: int = 0,
    left: Collection[str] = (),
) -> str:
    """Returns a table as lines of text, without colours and never wrapped.

    A column is right-aligned if at least half of its non-empty cells start with a number.

    Args:
        rows: records of any kind, or sequences of cells if `columns` only names them.
        columns: header -> function of a record that returns its cell; or headers only.
        indent: spaces before each line.
        left: headers of columns that are left-aligned even if they contain numbers.
    """
    if isinstance(columns, Mapping):
        cells = [[str(cell_of(row)) for cell_of in columns.values()] for row in rows]
    else:
        cells = [[str(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for i, header in enumerate(columns):
        filled = [row[i] for row in cells if row[i] not in ("", "-")]
        numbers = sum(bool(_NUMBER.match(cell)) for cell in filled)
        right = header not in left and filled and 2 * numbers >= len(filled)
        table.add_column(Text(header), justify="right" if right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))  # Text: a str would lose [brackets] to rich's markup
    # rich shrinks a table that is wider than its console. A character takes two columns at most.
    width = sum(2 * max(map(len, column)) + 2 for column in zip(columns, *cells, strict=True))
    output = io.StringIO()
    Console(file=output, width=width, color_system=None, _environ={}).print(table)
    return "\n".join((" " * indent + line).rstrip() for line in output.getvalue().splitlines())

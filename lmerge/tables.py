"""Tables as Markdown, and as a terminal shows them whatever its width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

Line = Sequence[str]

EDGE = 3
"""Characters that a column needs beside its content: two blanks and a line."""


def markdown_table(heading: Line, lines: Sequence[Line]) -> str:
    """Return a Markdown table, without a line break at its end."""
    table = [heading, ["---"] * len(heading), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def print_columns(
    title: str,
    heading: Line,
    lines: Sequence[Line],
    *,
    num_keys: int = 1,
    sections: Sequence[int] = (),
    console: Console | None = None,
) -> None:
    """Print a table; one too wide for the terminal goes on below, with its first columns repeated.

    Args:
        title: Stands above the table.
        heading: Names of the columns.
        lines: Rows of the table.
        num_keys: Columns that name a row: they are aligned to the left and repeated.
        sections: Rows before which a line is drawn.
        console: Where to print.
    """
    console = console or Console()
    natural = [max(map(cell_len, column)) for column in zip(heading, *lines, strict=True)]
    least = _folded(heading, lines)
    shown = range(num_keys, len(heading))
    whole = _width(natural, range(len(heading))) <= console.width
    parts = [list(shown)] if whole else split_columns(least, console.width, num_keys)
    for number, part in enumerate(parts):
        columns = [*range(num_keys), *part]
        widths = _widened(least, natural, columns, console.width)
        table = Table(title=None if number else escape(title), title_justify="left")
        for i in columns:
            side: JustifyMethod = "left" if i < num_keys else "right"
            table.add_column(escape(heading[i]), justify=side, width=widths.get(i))
        for row, line in enumerate(lines):
            if row in sections:
                table.add_section()
            table.add_row(*(escape(line[i]) for i in columns))
        console.print(table)


def _widened(
    least: Sequence[int], natural: Sequence[int], columns: Sequence[int], width: int
) -> dict[int, int]:
    """Return each column's width with what is left of the terminal's; none if they do not fit."""
    left, widths = width - _width(least, columns), {}
    for i in columns if left >= 0 else ():
        more = min(left, natural[i] - least[i])
        widths[i] = least[i] + more
        left -= more
    return widths


def split_columns(widths: Sequence[int], width: int, num_keys: int) -> list[list[int]]:
    """Return which columns stand side by side in each of several tables.

    Args:
        widths: Characters that each column needs.
        width: Characters of the terminal.
        num_keys: First columns that every table has; the result leaves them out.
    """
    parts: list[list[int]] = [[]]
    for i in range(num_keys, len(widths)):
        if parts[-1] and _width(widths, [*range(num_keys), *parts[-1], i]) > width:
            parts.append([])
        parts[-1].append(i)
    return parts


def _width(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[i] + EDGE for i in shown) + 1


def _folded(heading: Line, lines: Sequence[Line]) -> list[int]:
    """Return the characters of each column where its name is broken between words."""
    longest = [max(map(cell_len, name.split() or [""])) for name in heading]
    return [max([least, *(cell_len(line[i]) for line in lines)]) for i, least in enumerate(longest)]

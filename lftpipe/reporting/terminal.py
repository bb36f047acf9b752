"""Tables for a terminal of any width: a number is never cut. No torch."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

#: Narrowest column that texts are folded into.
NARROWEST = 10

#: Characters between two columns.
GAP = 2


@dataclass(frozen=True)
class Column:
    """One column of a `FittedTable`."""

    heading: str
    justify: Literal["left", "right"] = "right"
    folds: bool = False
    """Whether its texts may be folded into several lines; numbers never are."""
    needed: bool = True
    """Whether it stays when the terminal is too narrow for all columns."""


class FittedTable:
    """A table that folds texts, then leaves out whole columns, then lists row by row, until it fits.

    `columns`: in their order. Of those that are not needed the last one is left out first.
    `complete`: where all columns are, for the line that says what was left out.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        rows: Sequence[Sequence[str]],
        *,
        title: str = "",
        caption: str = "",
        complete: str = "--json has all",
    ) -> None:
        self.columns, self.rows = list(columns), [list(row) for row in rows]
        self.title, self.caption, self.complete = title, caption, complete

    @property
    def row_count(self) -> int:
        """Rows, without the heading."""
        return len(self.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        """The table as it fits into the width at hand."""
        kept = list(range(len(self.columns)))
        while self._width(kept, folded=True) > options.max_width:
            spare = [index for index in kept if not self.columns[index].needed]
            if not spare:
                break
            kept.remove(spare[-1])
        if self.title:
            yield Text(self.title, style="bold", overflow="fold")
        if self._width(kept, folded=True) <= options.max_width:
            yield self._table(kept, options.max_width)
        else:
            kept = list(range(len(self.columns)))
            yield from self._records()
        if left_out := [column.heading for index, column in enumerate(self.columns) if index not in kept]:
            words = f"too narrow for {', '.join(left_out)}: {self.complete}"
            yield Text(words, style="italic", overflow="fold")
        if self.caption:
            yield Text(self.caption, overflow="fold")

    def _cells(self, index: int) -> list[int]:
        """Widths of a column's heading and cells."""
        texts = [self.columns[index].heading, *(row[index] for row in self.rows)]
        return [max(map(cell_len, text.splitlines() or [""])) for text in texts]

    def _width(self, kept: Sequence[int], *, folded: bool) -> int:
        widths = [max(self._cells(index)) for index in kept]
        if folded:
            widths = [
                min(width, NARROWEST) if self.columns[index].folds else width
                for index, width in zip(kept, widths, strict=True)
            ]
        return sum(widths) + GAP * max(len(widths) - 1, 0)

    def _table(self, kept: Sequence[int], width: int) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, GAP - 1, 0, 0),
            pad_edge=False,
            show_edge=False,
            show_header=any(column.heading for column in self.columns),
        )
        spare = width - self._width(kept, folded=True)
        for index in kept:
            column, natural = self.columns[index], max(self._cells(index))
            own = natural
            if column.folds and natural > NARROWEST:
                own = min(natural, NARROWEST + spare)
                spare -= own - NARROWEST
            table.add_column(
                Text(column.heading), justify=column.justify, overflow="fold", min_width=own, max_width=own
            )
        for row in self.rows:
            table.add_row(*(Text(row[index], overflow="fold") for index in kept))
        return table

    def _records(self) -> Iterator[Text]:
        """Every row as lines of heading and cell."""
        for row in self.rows:
            if not any(column.heading for column in self.columns):
                yield Text(": ".join(row), overflow="fold")
                continue
            for column, cell in zip(self.columns, row, strict=True):
                yield Text(f"{column.heading}: {cell}", overflow="fold")
            yield Text("")


def print_plainly(shown: Any) -> None:
    """Print a text as it is, or a table; without a terminal no line is padded, nor folded without COLUMNS.

    `shown`: what rich prints. The folding of a text's lines is left to the terminal.
    """
    console = Console(soft_wrap=isinstance(shown, str), highlight=False, markup=False)
    if console.is_terminal:
        console.print(shown)
        return
    if "COLUMNS" not in os.environ:
        console.width = 10_000
    with console.capture() as captured:
        console.print(shown)
    for line in captured.get().splitlines():
        print(line.rstrip())

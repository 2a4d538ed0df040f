"""How lists are laid out on a terminal: as a table where it is wide enough, else as a block for each row."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NOTHING: Final = "–"  # in a cell
FOLDED_WIDTH_MIN: Final = 20  # of a column whose cells may break
GAP: Final = 3  # between columns


def lay_out(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, folding: Container[str]
) -> Iterator[RenderableType]:
    """What to print. Columns of `folding` may break their cells over lines; half an id or half a time is no use."""
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    least = (
        min(natural, FOLDED_WIDTH_MIN) if column in folding else natural
        for column, natural in zip(columns, widths, strict=True)
    )
    if sum(least) + GAP * (len(columns) - 1) <= width:
        yield _table(columns, rows, folding)
    else:
        yield from (_block(columns, row) for row in rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], folding: Container[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in folding)
    for row in rows:
        table.add_row(*row)
    return table


def _block(columns: Sequence[str], row: Sequence[str]) -> Group:
    told = [
        Text.assemble((f"{column} ", "bright_black"), value)
        for column, value in zip(columns[1:], row[1:], strict=True)
        if value not in ("", NOTHING)
    ]
    return Group(Text(row[0], style="bold"), Padding(Text("   ").join(told), (0, 0, 0, 2)))

"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], texts: Sequence[str] = ()
) -> None:
    """Print a table as wide as it needs to be; the columns named in `texts` are aligned left."""
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="left" if name in texts else "right")
    for row in rows:
        table.add_row(*(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console(highlight=False)
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    Console(highlight=False, width=max(width, console.width)).print(table)

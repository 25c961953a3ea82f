"""The verb ``report``: runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from p2pfl.cli.options import Format

if TYPE_CHECKING:
    from p2pfl.results.runs import Run


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the plots.", show_default="plots/ in the first run"),
    ] = None,
    format: Annotated[Format, typer.Option(help="How the tables are written.")] = Format.text,
    plots: Annotated[bool, typer.Option(help="Draw PNG files.")] = True,
) -> None:
    """Compare runs: a table, and plots of accuracy, loss, consensus, bytes and time.

    Of runs with churn it says what happened to their peers and what came of it, and marks it
    in the plots. A single run is also told node by node. A run that was broken off is told as
    far as it came.

    Example: p2pfl report runs/digits runs/digits-2
    """
    from p2pfl.results.report import as_json, unmeasured
    from p2pfl.results.runs import read_run

    read = [read_run(path) for path in runs]
    paths: list[Path] = []
    if plots:
        from p2pfl.results.plots import draw_runs  # brings matplotlib

        paths = draw_runs(read, out or read[0].folder / "plots")
    if format is Format.json:
        found = {"runs": as_json(read), "plots": [str(path) for path in paths]}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        return
    show(read)
    typer.echo()
    if missing := unmeasured(read):
        typer.echo(f"not measured: {', '.join(missing)}")
    for path in paths:
        typer.echo(f"drawn: {path}")


def show(runs: list[Run]) -> None:
    """Print the comparison of runs, what happened to their peers, a single run node by node."""
    from p2pfl.results.churned import churn_table
    from p2pfl.results.report import NODES_SHOWN, compare, node_table

    console = Console()
    table = compare(runs)
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if not console.is_terminal:  # a file has room
        console = Console(width=max(needed, console.width))
    elif needed > console.width:
        table = compare(runs, upright=True)
    console.print(table)
    if churn := churn_table(runs):
        console.print()
        console.print(churn)
    if len(runs) == 1 and (runs[0].summary.get("nodes") or 0) <= NODES_SHOWN:
        console.print()
        console.print(node_table(runs[0]))
    for run in runs:
        if run.summary.get("error"):
            said = f"{run.folder}: {run.summary['error']}"
            console.print(said, style="red", markup=False, emoji=False)

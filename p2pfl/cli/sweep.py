"""``p2pfl sweep``: many runs of one experiment, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from p2pfl.cli.options import DataOption, DeviceOption, Format
from p2pfl.cli.terminal import heed_requests, perhaps_closed, tidy_up_first
from p2pfl.errors import RunError

if TYPE_CHECKING:
    from p2pfl.sweep import Sweep

NAMED = 5  # failed runs up to which each is named


def sweep(  # noqa: PLR0913 - every parameter is an option of the command
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="A sweep file.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder to write, or to go on with; default: a new one."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time.", show_default="the cores; 1 for local"),
    ] = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    format: Annotated[Format, typer.Option(help="How the tables are printed.")] = Format.text,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run every combination of a plan with every seed, and compare them.

    With --out and the folder of a sweep that was broken off, runs that finished are skipped.

    Example:  p2pfl sweep scripts/sweeps/topologies.toml --jobs 4
    """
    from p2pfl.sweep import SweepWatch, run_sweep

    tidy_up_first()
    heed_requests()
    with SweepView(quiet) as view:
        watch = SweepWatch(view.opened, view.ended, view.note)
        found = run_sweep(sweep, out, jobs, data=data, device=device, watch=watch)
    if format is Format.json:
        told = {"folder": str(found.folder), "runs": found.table, "summary": found.summary}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _show(found)
    if found.failed:
        names = [row["run"] for row in found.failed]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise RunError(
            f"{len(names)} of {len(found.table)} runs failed: {', '.join(names[:NAMED])}{more}"
            f" (the errors are in {found.folder / 'results.csv'})"
        )


class SweepView:
    """Show progress on standard error: a bar on a terminal, else a line for each run."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._folder: Path | None = None
        self._bar = Progress(
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=None)
        self._done, self._to_do = 0, 0

    def __enter__(self) -> SweepView:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with perhaps_closed():
            self._bar.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self._folder:
            self.note(f"interrupted; the same command with --out {self._folder} goes on")

    def opened(self, folder: Path, to_do: int, finished: int) -> None:
        """Take note of how much there is to do."""
        self._folder, self._to_do = folder, to_do
        skipped = f"; {finished} finished before and are skipped" if finished else ""
        self.note(f"{to_do} runs to do in {folder}{skipped}")
        self._bar.update(self._task, total=to_do)

    def ended(self, row: Mapping[str, Any]) -> None:
        """Take note of a run that has ended."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if row["status"] != "finished":
            self.note(f"[{self._done}/{self._to_do}] {row['run']}: {row['status']}: {row['error']}")
        elif not self._console.is_terminal:
            self.note(f"[{self._done}/{self._to_do}] {row['run']}: finished{_score(row)}")

    def note(self, text: str) -> None:
        """Say something."""
        with perhaps_closed():
            self._console.print(text, markup=False)


def _score(row: Mapping[str, Any]) -> str:
    for key, name in (("eval_acc_mean", "accuracy"), ("eval_loss_mean", "loss")):
        if row[key] is not None:
            return f", {name} {row[key]:.4f}"
    return ""


def _show(found: Sweep) -> None:
    from p2pfl.sweep.table import summary_table

    console, table = Console(), summary_table(found.summary)
    if not console.is_terminal:  # a file has room
        options = console.options.update(max_width=1000)
        console = Console(width=max(console.measure(table, options=options).maximum, console.width))
    console.print(table)
    typer.echo(f"\n± is the standard deviation over n seeds; runs and plots are in {found.folder}")

"""``p2pfl run``: a whole experiment."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from p2pfl.cli.live import LiveView
from p2pfl.cli.options import (
    DataOption,
    DeviceOption,
    Format,
    SeedOption,
    SetOption,
    changes,
)
from p2pfl.cli.terminal import heed_requests, perhaps_closed, tidy_up_first
from p2pfl.errors import RunError, UserError

if TYPE_CHECKING:
    from p2pfl.experiment.experiment import Experiment
    from p2pfl.launch.books import On as RunsOn
    from p2pfl.launch.session import Place
    from p2pfl.results.runs import Result


class On(StrEnum):
    """Where an experiment runs."""

    simulate = "simulate"
    emulate = "emulate"
    local = "local"


def run(  # noqa: PLR0913 - every parameter is an option of the command
    experiment: Annotated[
        str | None,
        typer.Argument(metavar="EXPERIMENT", help="A .toml file, or the name of a shipped one."),
    ] = None,
    on: Annotated[
        On | None,
        typer.Option(
            help="simulate (the default): all nodes in one block; emulate: under a virtual clock"
            " and a modelled network; local: a real process for each peer, on this machine."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder; default: a new one.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Instead of EXPERIMENT: go on with the run in this folder, from its newest"
            " checkpoint. Only pace.rounds, pace.seconds, output and checkpoint may be changed.",
        ),
    ] = None,
    set_: SetOption = None,
    seed: SeedOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    join_timeout: Annotated[
        float, typer.Option(help="Seconds peers wait for each other at the start (local).")
    ] = 60.0,
    bind: Annotated[
        bool,
        typer.Option(
            help="Keep each peer on cores of its own, where there are as many as peers (local)."
        ),
    ] = True,
    format: Annotated[Format, typer.Option(help="How the summary is printed.")] = Format.text,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what memory it needs and how it is done.")
    ] = False,
) -> None:
    """Run an experiment and leave a folder with its metrics, models and summary.

    Example:  p2pfl run digits --on local --set pace.rounds=10 --seed 1
    """
    from p2pfl.launch.books import Watch, Where
    from p2pfl.launch.joining import joined
    from p2pfl.launch.session import run_checked

    tidy_up_first()
    # Whoever ends us politely gets what Ctrl-C gets: peers that are ended, and a valid folder.
    heed_requests()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with joined((on or On.simulate).value, device) as ranks:
            asked, first = (experiment, resume, on, out), ranks.rank == 0
            checked, runs_on, place = _what(*asked, changes(set_, seed))
            for note in checked.notes if first and not quiet else []:
                console.print(f"note: {note}", markup=False)
            title = f"{checked.name} on {runs_on}"
            with LiveView(checked.nodes, checked.rounds, title, quiet or not first) as view:
                tell = view.note if verbose else lambda text: None
                watch = Watch(view.rows, view.phase, tell, lambda text: view.note(f"note: {text}"))
                where = Where(data, device, join_timeout, bind)
                result = run_checked(checked, runs_on, place, where, watch, ranks)
    except KeyboardInterrupt:
        with perhaps_closed():
            console.print("p2pfl: interrupted", markup=False)
        raise typer.Exit(130) from None
    if first:
        _tell(result, format, console)


def _what(
    experiment: str | None,
    resume: Path | None,
    on: On | None,
    out: Path | None,
    changes: list[str],
) -> tuple[Experiment, RunsOn, Place]:
    """Return what is to be run, on what, and where it is written."""
    from p2pfl.experiment.experiment import Experiment
    from p2pfl.launch.resuming import unfinished
    from p2pfl.launch.session import Place

    if resume is not None:
        if experiment is not None or out is not None:
            extra = "--out" if experiment is None else experiment
            raise UserError(
                f"--resume {resume} takes the experiment from that folder, and writes there:"
                f" leave out {extra}"
            )
        checked, runs_on = unfinished(resume, on.value if on else None, changes)
        return checked, runs_on, Place(resume, resume=True)
    if experiment is None:
        raise UserError("give an EXPERIMENT, as in p2pfl run digits, or --resume DIR")
    checked = Experiment.load(experiment, changes)
    place = Place(out) if out else Place(Path(checked.output.dir), make=True)
    return checked, (on or On.simulate).value, place


def _tell(result: Result, format: Format, console: Console) -> None:
    """Print what a run has come to; raise what it failed of."""
    from p2pfl.cli.report import show
    from p2pfl.results.runs import read_run, read_summary

    folder = result.folder
    assert folder is not None
    with perhaps_closed():
        if format is Format.json:
            typer.echo(json.dumps(read_summary(folder)))
        else:
            show([read_run(folder)])
            typer.echo(f"\nresults in {folder}  (p2pfl report {folder} draws them)")
    status = result.summary["status"]
    if status == "failed":
        raise RunError(f"{result.summary['error']} (the others' results are in {folder})")
    if status == "interrupted":
        with perhaps_closed():
            console.print("p2pfl: interrupted; the folder holds what there was", markup=False)
        raise typer.Exit(130)

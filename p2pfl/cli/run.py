"""``p2pfl run``: a whole experiment."""

from __future__ import annotations

import json
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p2pfl.cli.live import LiveView
from p2pfl.cli.options import (
    DataOption,
    DeviceOption,
    ExperimentArgument,
    Format,
    SeedOption,
    SetOption,
    changes,
)
from p2pfl.errors import RunError


class On(StrEnum):
    """Where an experiment runs."""

    simulate = "simulate"
    emulate = "emulate"
    local = "local"


def run(  # noqa: PLR0913 - every parameter is an option of the command
    experiment: ExperimentArgument,
    on: Annotated[
        On,
        typer.Option(
            help="simulate: all nodes in one block; emulate: under a virtual clock and a"
            " modelled network; local: a real process for each peer, on this machine."
        ),
    ] = On.simulate,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder; default: a new one.")
    ] = None,
    set_: SetOption = None,
    seed: SeedOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    join_timeout: Annotated[
        float, typer.Option(help="Seconds peers wait for each other at the start (local).")
    ] = 60.0,
    format: Annotated[Format, typer.Option(help="How the summary is printed.")] = Format.text,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run an experiment and leave a folder with its metrics, models and summary.

    Example:  p2pfl run digits --on local --set pace.rounds=10 --seed 1
    """
    from p2pfl.cli.report import show
    from p2pfl.experiment.experiment import Experiment
    from p2pfl.launch.books import Watch, Where
    from p2pfl.launch.session import Place, run_checked
    from p2pfl.results.runs import read_run, read_summary

    # Whoever ends us politely gets what Ctrl-C gets: peers that are ended, and a valid folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    checked = Experiment.load(experiment, changes(set_, seed))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for note in [] if quiet else checked.notes:
        console.print(f"note: {note}", markup=False)
    place = Place(out) if out else Place(Path(checked.output.dir), make=True)
    view = LiveView(checked.nodes, checked.rounds, f"{checked.name} on {on.value}", quiet)
    with view:
        watch = Watch(view.rows, view.phase)
        where = Where(data, device, join_timeout)
        result = run_checked(checked, on.value, place, where, watch)
    folder = result.folder
    assert folder is not None
    if format is Format.json:
        typer.echo(json.dumps(read_summary(folder)))
    else:
        show([read_run(folder)])
        typer.echo(f"\nresults in {folder}  (p2pfl report {folder} draws them)")
    status = result.summary["status"]
    if status == "failed":
        raise RunError(f"{result.summary['error']} (the others' results are in {folder})")
    if status == "interrupted":
        console.print("p2pfl: interrupted; the folder holds what there was", markup=False)
        raise typer.Exit(130)

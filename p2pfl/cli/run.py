"""``p2pfl run``: a whole experiment."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p2pfl.cli.live import LiveView
from p2pfl.cli.peer import (
    DataOption,
    DeviceOption,
    ExperimentArgument,
    Format,
    SeedOption,
    SetOption,
)


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
    from p2pfl.experiment import Experiment
    from p2pfl.record import new_folder
    from p2pfl.report import node_table
    from p2pfl.session import Watch, run_checked

    changes = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    checked = Experiment.load(experiment, changes)
    folder = out or new_folder(Path(checked.output.dir), checked.name)
    title = f"{checked.name} on {on.value}"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not quiet:
        for note in checked.notes:
            console.print(f"note: {note}", markup=False)
    view = None if quiet else LiveView(checked.nodes, checked.rounds, title)
    watch = Watch() if view is None else Watch(view.rows, view.phase)
    with view or _nothing():
        result = run_checked(
            checked, on.value, folder, data=data, device=device,
            join_timeout=join_timeout, watch=watch,
        )
    if format is Format.json:
        typer.echo(json.dumps(result.summary))
    else:
        Console(highlight=False).print(node_table(result))
        typer.echo(f"results in {folder}   (p2pfl report {folder} draws them)")
    if result.summary["status"] != "finished":
        raise typer.Exit(130 if result.summary["status"] == "interrupted" else 1)

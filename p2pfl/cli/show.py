"""The verbs that only look: ``partition show`` and ``--version``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from p2pfl import __version__
from p2pfl.cli.options import (
    DataOption,
    ExperimentArgument,
    Format,
    SeedOption,
    SetOption,
    changes,
)
from p2pfl.cli.tables import print_table


def partition_show(
    experiment: ExperimentArgument,
    set_: SetOption = None,
    seed: SeedOption = None,
    data: DataOption = None,
    format: Annotated[Format, typer.Option(help="How it is printed.")] = Format.text,
) -> None:
    """Show how many training examples of which label every node of an experiment holds.

    Example:  p2pfl partition show digits --set partition.alpha=0.1
    """
    from p2pfl.data import counts_by_label
    from p2pfl.experiment.experiment import Experiment

    checked = Experiment.load(experiment, changes(set_, seed))
    federation = checked.federation(data)
    header, rows = counts_by_label(federation)
    if format is Format.json:
        table = [dict(zip(header, row, strict=True)) for row in rows]
        test = 0 if federation.test is None else len(federation.test.y)
        typer.echo(json.dumps({"nodes": table, "test_examples": test}))
        return
    print_table(header, rows)
    if federation.test is not None:
        typer.echo(f"test examples: {len(federation.test.y)}")


def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Decentralised learning: peers train on their own data and average, with no server."""
    if show:
        typer.echo(f"p2pfl {__version__}")

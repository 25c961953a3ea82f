"""The verbs that only look: ``topology show``, ``partition show``, ``experiments``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pfl import __version__
from p2pfl.cli.options import (
    DataOption,
    ExperimentArgument,
    Format,
    SeedOption,
    SetOption,
    changes,
)
from p2pfl.errors import UserError

if TYPE_CHECKING:
    import networkx as nx

    from p2pfl.topology import Network, Topology


def topology_show(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A network file, or name[:key=value,...].")
    ],
    nodes: Annotated[int | None, typer.Option(min=1, help="How many nodes.")] = None,
    mixing: Annotated[str, typer.Option(help="The mixing rule.")] = "metropolis",
    format: Annotated[Format, typer.Option(help="How it is printed.")] = Format.text,
    draw: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
) -> None:
    """Analyse a topology: its size, and how fast averaging over it makes all agree.

    rho is what one round leaves of a disagreement at worst, gap is 1 - rho.

    Example:  p2pfl topology show torus:rows=4,cols=6 --draw torus.png
    """
    from p2pfl.experiment.config import read
    from p2pfl.experiment.nodes import as_topology, topology_of
    from p2pfl.experiment.sections import SECTIONS
    from p2pfl.topology import analyse

    found = topology_of(spec, nodes)
    rule = read("mixing", mixing, SECTIONS["mixing"]).build("mixing")
    told = _analysis(analyse(as_topology(found, spec), rule)._asdict())
    if draw is not None:
        _draw(found, draw, spec)
    if format is Format.json:
        typer.echo(json.dumps({"topology": spec, "mixing": mixing, **told}))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in {"topology": spec, "mixing": mixing, **told}.items():
        table.add_row(key, "-" if value is None else _text(value))
    Console(highlight=False).print(table)
    if draw is not None:
        typer.echo(f"drawn: {draw}")


def _draw(found: nx.Graph | Network | Topology, path: Path, spec: str) -> None:
    from p2pfl.topology import Network, Topology, draw

    if isinstance(found, Topology):
        raise UserError(f"{spec} changes from round to round, and cannot be drawn as one graph")
    if isinstance(found, Network):
        draw(found.graph, path, dict(enumerate(found.names)))
    else:
        draw(found, path)


def _analysis(found: dict[str, Any]) -> dict[str, Any]:
    return {("rounds_to_1e-6" if key == "rounds_to_1e_6" else key): v for key, v in found.items()}


def _text(value: object) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


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
    _print(header, rows)
    if federation.test is not None:
        typer.echo(f"test examples: {len(federation.test.y)}")


def experiments() -> None:
    """List the experiments that ship with the package; their names work wherever a file does.

    Example:  p2pfl experiments
    """
    from p2pfl.experiment.files import shipped

    for name, path in shipped().items():
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("# "))
        typer.echo(f"{name:24s} {' '.join(comment)}")


def _print(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console(highlight=False)
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    Console(highlight=False, width=max(width, console.width)).print(table)


def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Decentralised learning: peers train on their own data and average, with no server."""
    if show:
        typer.echo(f"p2pfl {__version__}")

"""The verbs that look at topologies: ``topology show`` and ``topology compare``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pfl.cli.options import Format
from p2pfl.cli.tables import print_table
from p2pfl.errors import UserError

if TYPE_CHECKING:
    import networkx as nx

    from p2pfl.topology import Mixing, Network, Topology
    from p2pfl.topology.comparison import Compared

FormatOption = Annotated[Format, typer.Option(help="How it is printed.")]
NodesOption = Annotated[int | None, typer.Option(min=1, help="How many nodes.")]


def show(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="A network file, or name[:key=value,...].")
    ],
    nodes: NodesOption = None,
    mixing: Annotated[str, typer.Option(help="The mixing rule.")] = "metropolis",
    format: FormatOption = Format.text,
    draw: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
) -> None:
    """Analyse a topology: its size, and how fast averaging over it makes all agree.

    rho is what one round, or period, leaves of a disagreement at worst, gap is 1 - rho.

    Example:  p2pfl topology show torus:rows=4,cols=6 --draw torus.png
    """
    from p2pfl.experiment.nodes import as_topology, topology_of
    from p2pfl.topology import analyse

    found, rule = topology_of(spec, nodes), _rule(mixing)
    with _mistakes(spec, mixing):
        topology = as_topology(found, spec)
        _check_use(topology, rule)
        told = _analysis(analyse(topology, rule)._asdict())
    if draw is not None:
        _draw(found, draw, spec)
    if format is Format.json:
        typer.echo(json.dumps({"topology": spec, "mixing": mixing, **told}))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in {"topology": spec, "mixing": mixing, **told}.items():
        table.add_row(key, _text(value))
    Console(highlight=False).print(table)
    if draw is not None:
        typer.echo(f"drawn: {draw}")


def compare(
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC...", help="Network files, or name[:key=value,...].")
    ],
    nodes: NodesOption = None,
    mixing: Annotated[
        list[str] | None,
        typer.Option(help="The mixing rule; may be repeated.", show_default="metropolis"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are drawn and listed.")] = 50,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the errors, round by round.")
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Compare topologies: how fast each makes all agree, and for how many models sent.

    Rounds are those in which the distance from the mean shrinks to 1e-6; accelerated are those with
    Chebyshev's polynomials; models are what a node sends in the first. rho is of a whole period.

    Example:  p2pfl topology compare ring torus one_peer_exponential --nodes 64 --plot them.png
    """
    rules = mixing or ["metropolis"]
    several = len(rules) > 1
    found = [_compared(spec, rule, nodes, rounds, several) for spec in specs for rule in rules]
    if plot is not None:
        from p2pfl.topology.comparison import draw_errors

        draw_errors(found, plot)
    told = [_told(one) for one in found]
    if format is Format.json:
        typer.echo(json.dumps([a | {"errors": b.errors} for a, b in zip(told, found, strict=True)]))
        return
    cells = [["-" if value is None else value for value in row.values()] for row in told]
    print_table(list(told[0]), cells, texts=["topology"])
    if plot is not None:
        typer.echo(f"drawn: {plot}")


def _compared(spec: str, mixing: str, nodes: int | None, rounds: int, several: bool) -> Compared:
    from p2pfl.experiment.nodes import as_topology, topology_of
    from p2pfl.topology.comparison import compare

    rule, label = _rule(mixing), f"{spec} {mixing}" if several else spec
    topology = as_topology(topology_of(spec, nodes), spec)
    with _mistakes(spec, mixing):
        _check_use(topology, rule)
        return compare(label, topology, rule, rounds)


def _told(one: Compared) -> dict[str, Any]:
    known = one.analysis
    return {
        "topology": one.label,
        "nodes": known.nodes,
        "rho": known.rho,
        "gap": known.gap,
        "exact_after": known.exact_after,
        "rounds_to_1e-6": known.rounds_to_1e_6,
        "accelerated": one.accelerated,
        "messages_per_round": one.messages,
        "models_to_1e-6": one.models,
    }


def _rule(mixing: str) -> Mixing:
    from p2pfl.experiment.config import read
    from p2pfl.experiment.sections import SECTIONS

    rule: Mixing = read("mixing", mixing, SECTIONS["mixing"]).build("mixing")
    return rule


@contextmanager
def _mistakes(spec: str, mixing: str) -> Iterator[None]:
    """Tell what a rule cannot do as a mistake of the user's."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{spec} with --mixing {mixing}: {error}") from error


def _check_use(topology: Topology, rule: Mixing) -> None:
    if rule.of_graph is not None and topology.links(0).weights is not None:
        raise ValueError("its links come with weights of their own")


def _draw(found: nx.Graph | Network | Topology, path: Path, spec: str) -> None:
    import networkx as nx

    from p2pfl.topology import Network, Topology, draw

    if isinstance(found, Topology) and found.period == 1:
        senders, receivers = (ends.tolist() for ends in found.links(0)[:2])
        kind = nx.Graph if found.is_symmetric else nx.DiGraph
        draw(kind(list(zip(senders, receivers, strict=True))), path)
    elif isinstance(found, Topology):
        raise UserError(f"{spec} changes from round to round, and cannot be drawn as one graph")
    elif isinstance(found, Network):
        draw(found.graph, path, dict(enumerate(found.names)))
    else:
        draw(found, path)


def _analysis(found: dict[str, Any]) -> dict[str, Any]:
    return {("rounds_to_1e-6" if key == "rounds_to_1e_6" else key): v for key, v in found.items()}


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6f}" if isinstance(value, float) else str(value)

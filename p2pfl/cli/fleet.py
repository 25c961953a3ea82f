"""``p2pfl up``, ``status``, ``logs`` and ``down``: peers on several machines, over SSH."""

from __future__ import annotations

import asyncio
import contextlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pfl.cli.live import LiveView
from p2pfl.cli.options import ExperimentArgument, SeedOption, SetOption, changes
from p2pfl.cli.terminal import tidy_up_first
from p2pfl.errors import RunError

if TYPE_CHECKING:
    from p2pfl.fleet.control import PeerStatus
    from p2pfl.fleet.launch import Ended

WIDE = 1000  # columns of what is no terminal

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder of `p2pfl up`.", show_default=False)
]


class OnFailure(StrEnum):
    """What happens to the others when a peer fails."""

    stop = "stop"
    go_on = "go-on"


def up(  # noqa: PLR0913 - every parameter is an option of the command
    experiment: ExperimentArgument,
    hosts: Annotated[Path, typer.Option("--hosts", metavar="FILE", help="TOML with the machines.")],
    set_: SetOption = None,
    seed: SeedOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder; default: a new one.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave as soon as all peers have started.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Talk in clear between machines, without keys.")
    ] = False,
    on_failure: Annotated[
        OnFailure, typer.Option(help="What happens to the others when a peer fails.")
    ] = OnFailure.stop,
    max_skew: Annotated[
        float, typer.Option(min=1.0, help="Seconds that the clock of a host may be off.")
    ] = 5.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Start a peer on every port of every host, follow them, and collect what they leave.

    All hosts are checked before anything starts. Ctrl-C stops all peers; when the terminal
    is closed they go on, and `p2pfl status`, `logs` and `down` work from any other.

    Example:  p2pfl up digits --hosts hosts.toml --set nodes=3
    """
    from p2pfl.experiment.experiment import Experiment
    from p2pfl.fleet.hosts import read_hosts
    from p2pfl.fleet.launch import Launch
    from p2pfl.fleet.launch import up as launch_and_follow
    from p2pfl.results.record import new_folder

    tidy_up_first()
    checked = Experiment.load(experiment, changes(set_, seed))
    launch = Launch(checked, read_hosts(hosts), insecure, max_skew, on_failure.value, detach)

    def make() -> Path:
        return out or new_folder(Path(checked.output.dir), checked.name)

    if launch.warning:
        typer.echo(launch.warning, err=True)
    title = f"{checked.name} on {len(launch.fleet.hosts)} hosts"
    view = LiveView(checked.nodes, checked.rounds, title, quiet)
    with view:
        for note in checked.notes:
            view.note(f"note: {note}")
        ended = asyncio.run(launch_and_follow(launch, make, view))
    _tell(ended)


def status(run: RunArgument) -> None:
    """Say of every peer what it does, or how it has ended.

    Example:  p2pfl status runs/digits
    """
    from p2pfl.fleet.control import status as ask

    tidy_up_first()
    table = Table(box=None, padding=(0, 1))
    for heading in ("peer", "host", "phase", "round", "last news", ""):
        table.add_column(heading, justify="right" if heading in ("peer", "round") else "left")
    for peer in asyncio.run(ask(run)):
        table.add_row(*_cells(peer))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a line each, however long, for other programs
        console.width = WIDE
    console.print(table, soft_wrap=True)


def logs(
    run: RunArgument,
    peer: Annotated[int | None, typer.Option(metavar="K", help="Only this peer.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until all peers have ended.")
    ] = False,
) -> None:
    """Print what the peers have said, and what went wrong with them.

    Example:  p2pfl logs runs/digits --peer 2 -f
    """
    from p2pfl.fleet.control import logs as read

    def say(news: dict[str, Any]) -> None:
        typer.echo(f"{news['node']:>3}  {news['log' if 'log' in news else 'line']}")

    tidy_up_first()
    asyncio.run(read(run, say, lambda fault: typer.echo(fault, err=True), peer, follow))


def down(run: RunArgument) -> None:
    """Stop all peers that still run, and collect what they have left.

    Example:  p2pfl down runs/digits
    """
    from p2pfl.fleet.down import down as stop

    tidy_up_first()
    _tell(asyncio.run(stop(run)), asked=True)


def _tell(ended: Ended, asked: bool = False) -> None:
    """Print what a launch has come to; raise what it failed of."""
    folder = ended.folder
    rest = f"`p2pfl down {folder}` ends and fetches the rest" if ended.away else ""
    with contextlib.suppress(OSError):  # the terminal may be gone
        _show(ended)
    if ended.status == "failed":
        raise RunError(f"{ended.error} (what there was is in {folder}{rest and '; '}{rest})")
    if ended.status == "interrupted" and ended.away and asked:
        raise RunError(f"{ended.away}; {rest}")
    if ended.status == "interrupted" and not asked:
        with contextlib.suppress(OSError):
            typer.echo("p2pfl: interrupted; the folder holds what there was", err=True)
            if ended.away:
                typer.echo(f"p2pfl: {ended.away}; {rest}", err=True)
        raise typer.Exit(130)


def _show(ended: Ended) -> None:
    from p2pfl.cli.report import show
    from p2pfl.results.runs import read_run

    folder = ended.folder
    if ended.status == "running":
        typer.echo(f"the peers go on:  p2pfl status {folder}  tells how, and")
        typer.echo(f"p2pfl down {folder}  ends them and collects what they have left")
        return
    show([read_run(folder)])
    typer.echo(f"\nresults in {folder}  (p2pfl report {folder} draws them)")


def _cells(peer: PeerStatus) -> list[str]:
    age = "-" if peer.age is None else f"{peer.age:.0f} s ago"
    why = "" if peer.why == peer.phase else peer.why
    return [str(peer.node), peer.host, peer.phase, str(peer.round), age, why]

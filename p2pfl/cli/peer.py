"""``p2pfl peer``: one peer in the foreground."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from p2pfl.cli.options import (
    DataOption,
    DeviceOption,
    ExperimentArgument,
    Format,
    SeedOption,
    SetOption,
    changes,
)
from p2pfl.cli.terminal import perhaps_closed, requests
from p2pfl.errors import UserError


def peer(  # noqa: PLR0913 - every parameter is an option of the command
    experiment: ExperimentArgument,
    id: Annotated[
        int | None, typer.Option("--id", metavar="K", help="Which node this is; or its key says.")
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option("--peers", metavar="FILE", help="Who takes part: addresses and keys."),
    ] = None,
    contact: Annotated[
        str | None,
        typer.Option(metavar="K@ADDR", help="Ask this peer where the others listen."),
    ] = None,
    discover: Annotated[
        bool, typer.Option("--discover", help="Find the others on the local network, by mDNS.")
    ] = False,
    bind: Annotated[
        str | None,
        typer.Option("--bind", metavar="ADDR", help="Listen here; default: as in --peers."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Our keys; default: those of `p2pfl keys`, if listed."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder; default: a new one.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Come back: go on in DIR, if this peer ran there before."),
    ] = False,
    set_: SetOption = None,
    seed: SeedOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    threads: Annotated[int, typer.Option(help="Threads to compute with; 0: all.")] = 0,
    join_timeout: Annotated[float, typer.Option(help="Seconds to wait for the others.")] = 60.0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Talk in clear beyond this machine.")
    ] = False,
    format: Annotated[Format, typer.Option(help="What is printed.")] = Format.text,
) -> None:
    """Run one peer in the foreground, until the experiment is done.

    FILE lists every peer under [[peers]], with its id, address and public key; a peer whose
    key is not there, or is revoked while it runs, is kept out. Without addresses in it, one
    peer is asked for them (--contact), or the local network (--discover). If the others are
    in training already, it is given their model and takes part from the next round on.

    Example:  p2pfl peer digits --id 0 --peers peers.toml
    """
    from p2pfl.experiment.experiment import Experiment
    from p2pfl.launch.books import check_device, check_threads
    from p2pfl.launch.leavings import check_home, has_finished
    from p2pfl.launch.local import peer_run
    from p2pfl.launch.membership import Membership
    from p2pfl.results.record import new_folder
    from p2pfl.results.runs import read_summary

    if resume and out is None:
        raise UserError("--resume: in which folder did it run before? Give --out")
    if not join_timeout >= 0:  # nor what is no number
        raise UserError(f"--join-timeout {join_timeout}: seconds are a number from 0 on")
    check_device(device)
    check_threads("--threads", threads)
    checked = Experiment.load(experiment, changes(set_, seed))
    members = Membership.read(peers, keys, insecure)
    place = members.post(id, bind, contact, discover)
    post = replace(place, data_dir=data, device=device, join_timeout=join_timeout, resume=resume)
    if insecure and members.warning:
        typer.echo(members.warning, err=True)
    folder = out or new_folder(Path(checked.output.dir), f"{checked.name}-peer-{post.node:03d}")
    if resume:
        check_home(folder, checked, post.node)
        if has_finished(folder):
            told = f"peer {post.node} has finished, results in {folder}"
            typer.echo(json.dumps(read_summary(folder)) if format is Format.json else told)
            return
    stop = _Stop()
    say = _print_json if format is Format.json else _print_text
    summary = peer_run(checked, post, folder, say, go_on=stop.go_on, threads=threads)
    about = f"peer {post.node}: {summary['status']} ({summary['reason']}), results in {folder}"
    with perhaps_closed():
        typer.echo(json.dumps(summary) if format is Format.json else about)
    if summary["status"] != "finished":
        raise typer.Exit(128 + stop.signal)  # as a shell has it


class _Stop:
    """Hears Ctrl-C, SIGTERM and SIGHUP, which ask us to end; another Ctrl-C ends us at once.

    Another SIGTERM does not: two may ask us, as `p2pfl up` and `p2pfl down` do.
    """

    def __init__(self) -> None:
        self.signal = 0  # none yet
        for number in (signal.SIGINT, *requests()):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def go_on(self) -> bool:
        return not self.signal


@perhaps_closed()
def _print_text(news: dict[str, Any]) -> None:
    if "phase" in news:
        typer.echo(f"{news['phase']} ...")
    elif "row" in news:
        row = news["row"]
        scores = "".join(
            f"  {name} {row[name]:.4f}"
            for name in ("train_loss", "eval_loss", "eval_acc")
            if row[name] is not None
        )
        typer.echo(f"round {row['round'] + 1}{scores}")
    elif "refused" in news:
        typer.echo("peer {peer} turns us away: {reason}".format(**news["refused"]), err=True)


@perhaps_closed()
def _print_json(news: dict[str, Any]) -> None:
    typer.echo(json.dumps(news))

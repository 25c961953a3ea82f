"""``p2pfl peer``: one peer in the foreground."""

from __future__ import annotations

import ipaddress
import json
import signal
import tomllib
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

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
from p2pfl.errors import UserError


def peer(  # noqa: PLR0913 - every parameter is an option of the command
    experiment: ExperimentArgument,
    id: Annotated[int, typer.Option("--id", metavar="K", help="Which node this is.")],
    peers: Annotated[
        Path, typer.Option("--peers", metavar="FILE", help="TOML with everybody's address.")
    ],
    bind: Annotated[
        str | None,
        typer.Option("--bind", metavar="ADDR", help="Listen here; default: as in --peers."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder.")] = None,
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

    FILE lists the address of every peer: either lines such as  0 = "tcp://10.0.0.1:7000"
    or a network file with [[nodes]] that have addresses.

    Example:  p2pfl peer digits --id 0 --peers peers.toml
    """
    from p2pfl.experiment.experiment import Experiment
    from p2pfl.launch.local import peer_run
    from p2pfl.launch.serving import Post

    checked = Experiment.load(experiment, changes(set_, seed))
    addresses = read_addresses(peers)
    listen = bind or addresses.get(id)
    if listen is None:
        raise UserError(f"{peers} has no address for peer {id}; give it one, or --bind")
    if not insecure:
        check_loopback([listen, *addresses.values()])
    post = Post(id, listen, addresses, data, device, join_timeout)
    folder = out or Path(checked.output.dir) / f"{checked.name}-peer-{id:03d}"
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop.hear)
    signal.signal(signal.SIGINT, stop.hear)
    say = _print_json if format is Format.json else _print_text
    summary = peer_run(checked, post, folder, say, go_on=stop.go_on, threads=threads)
    if format is Format.json:
        typer.echo(json.dumps(summary))
    else:
        typer.echo(f"peer {id}: {summary['status']} ({summary['reason']}), results in {folder}")
    if summary["status"] != "finished":
        raise typer.Exit(1)


class _Stop:
    """Remembers that a signal has asked us to end."""

    def __init__(self) -> None:
        self._asked = False

    def hear(self, number: int, frame: object) -> None:
        self._asked = True

    def go_on(self) -> bool:
        return not self._asked


def read_addresses(path: Path) -> dict[int, str]:
    """Read everybody's address from a file.

    Raises:
        UserError: the file is missing or malformed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    if "nodes" in table:
        from p2pfl.topology import read_network

        return read_network(path).addresses
    addresses = {}
    for key, value in table.items():
        if not key.isdecimal() or not isinstance(value, str) or "://" not in value:
            raise UserError(f'{path}: {key} = {value!r}: expected 0 = "tcp://HOST:PORT"')
        addresses[int(key)] = value
    return addresses


def check_loopback(addresses: list[str]) -> None:
    """Refuse to talk in clear beyond this machine.

    Raises:
        UserError: an address is not on loopback.
    """
    for address in addresses:
        parts = urlsplit(address)
        if parts.scheme in ("ipc", "inproc") or parts.hostname == "localhost":
            continue
        try:
            inside = ipaddress.ip_address(parts.hostname or "").is_loopback
        except ValueError:
            inside = False
        if not inside:
            raise UserError(
                f"{address} is beyond this machine, and links are neither encrypted nor"
                " authenticated yet: anybody on the network could read and change models."
                " Use an encrypted tunnel to loopback, or accept this with --insecure"
            )


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


def _print_json(news: dict[str, Any]) -> None:
    typer.echo(json.dumps(news))

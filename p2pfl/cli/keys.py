"""``p2pfl keys``: make keys, and say whose are allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from p2pfl.cli.options import Format
from p2pfl.errors import UserError

KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="FILE",
        help="The key file.",
        show_default="$P2PFL_KEYS, or ~/.config/p2pfl/keys.toml",
    ),
]
PeersArgument = Annotated[
    Path, typer.Argument(metavar="PEERS", help="The peers file.", show_default=False)
]
FormatOption = Annotated[Format, typer.Option(help="How it is printed.")]


def new(
    keys: KeysOption = None,
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Keep the keys that are there already.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Make a key pair for this machine, and print the public key.

    Example:  p2pfl keys new
    """
    from p2pfl.security.keys import default_path, new_keys, read_keys

    path = keys or default_path()
    try:
        there = if_missing and path.exists()
    except OSError as error:  # a folder that is closed to us, a name that is too long
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    _print((read_keys if there else new_keys)(path).public, path, format)


def show(keys: KeysOption = None, format: FormatOption = Format.text) -> None:
    """Print the public key of this machine.

    Example:  p2pfl keys show
    """
    from p2pfl.security.keys import default_path, read_keys

    path = keys or default_path()
    _print(read_keys(path).public, path, format)


def allow(
    peers: PeersArgument,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Its public key, in '...'.", show_default=False)
    ],
    id: Annotated[int, typer.Option("--id", metavar="K", help="Which node it is.")],
    name: Annotated[str | None, typer.Option(help="What people call it.")] = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Where it listens, as tcp://10.0.0.1:7000.")
    ] = None,
) -> None:
    """Add a peer and its key to a peers file, or allow a revoked one again.

    Example:  p2pfl keys allow peers.toml 'KEY' --id 0 --address tcp://10.0.0.1:7000
    """
    from p2pfl.addresses import is_wildcard
    from p2pfl.security.roster import Member, allow

    if address and is_wildcard(address):
        raise UserError(f"others cannot dial {address}: give an address of its machine")
    allow(peers, Member(id, name, address, key))
    typer.echo(f"{peers}: peer {id} is allowed")


def revoke(
    peers: PeersArgument,
    who: Annotated[
        str, typer.Argument(metavar="WHO", help="Its id, name or key.", show_default=False)
    ],
) -> None:
    """Let a peer in no more; it stays listed.

    Example:  p2pfl keys revoke peers.toml ward-a
    """
    from p2pfl.security.roster import revoke

    typer.echo(f"{peers}: peer {revoke(peers, who).id} is revoked")


def _print(public: str, path: Path, format: Format) -> None:
    if format is Format.json:
        typer.echo(json.dumps({"public": public, "file": str(path)}))
    else:
        typer.echo(public)

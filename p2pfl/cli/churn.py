"""``p2pfl churn``: look at what a churn script does before anything runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import Format
from p2pfl.errors import UserError

if TYPE_CHECKING:
    from p2pfl.churn import Script


def show(
    script: Annotated[
        Path, typer.Argument(metavar="SCRIPT", help="A churn script.", show_default=False)
    ],
    nodes: Annotated[int, typer.Option(min=1, help="How many peers.", show_default=False)],
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Draws what is left to chance.")
    ] = 0,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Where the picture ends, as 10m.", show_default="the last event"
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How it is printed.")] = Format.text,
    draw: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
) -> None:
    """Check a churn script, and show who is there when and what is broken.

    Example:  p2pfl churn show scripts/churn/sessions.toml --nodes 16 --draw churn.png
    """
    from p2pfl.churn import load
    from p2pfl.churn.text import as_text

    end = _until(until)
    found = load(script, nodes, seed)
    if draw is not None:
        from p2pfl.churn.draw import draw as draw_script

        draw_script(found, draw, end)
    if format is Format.json:
        typer.echo(json.dumps(_told(found, seed)))
        return
    typer.echo(as_text(found, end))
    if draw is not None:
        typer.echo(f"drawn: {draw}")


def _until(text: str | None) -> float | None:
    from p2pfl.churn.values import lasting

    try:
        return None if text is None else lasting(text)
    except ValueError as error:
        raise UserError(f"--until: {error}") from None


def _told(found: Script, seed: int) -> dict[str, Any]:
    return {
        "script": found.source,
        "nodes": found.nodes,
        "seed": seed,
        "founders": found.founders,
        "happenings": [asdict(one) for one in found.happenings],
        "remarks": found.remarks,
    }

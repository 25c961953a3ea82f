"""Options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"


ExperimentArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A .toml file, or the name of a shipped one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the experiment; may be repeated."),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Where relative data paths start.")
]
SeedOption = Annotated[int | None, typer.Option(help="Instead of the experiment's seed.")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute, as in cpu or cuda:0.")]


def changes(settings: list[str] | None, seed: int | None) -> list[str]:
    """Return what ``--set`` and ``--seed`` change."""
    return [*(settings or []), *([f"seed={seed}"] if seed is not None else [])]

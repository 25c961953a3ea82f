"""The verb ``predict``: use a trained model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pfl.errors import UserError

if TYPE_CHECKING:
    from p2pfl.results.predictor import Prediction


class Format(StrEnum):
    """How predictions are written."""

    TEXT = "text"
    CSV = "csv"
    JSON = "json"


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    input_csv: Annotated[
        Path, typer.Argument(help="Examples; the first line names the columns.", show_default=False)
    ],
    node: Annotated[
        int | None, typer.Option(help="Whose model.", show_default="the mean model")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write to.", show_default="standard output")
    ] = None,
    format: Annotated[
        Format | None, typer.Option(help="How to write.", show_default="text, in a file csv")
    ] = None,
) -> None:
    """Predict for every line of a CSV file with a model that a run has left.

    For a model of a table the columns are those of the training data, in any order; others
    are left alone. For images there is one column per pixel, row by row, with values as the
    data set has them (digits and MNIST: 0 to 1).

    Example: p2pfl predict runs/heart patients.csv --format csv
    """
    from p2pfl.results.saved import load

    found = load(run, node).predict_csv(input_csv)
    text = _WRITERS[format or (Format.CSV if out else Format.TEXT)](found)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def _as_text(found: Sequence[Prediction]) -> str:
    """Write the number of the row, what is predicted, and how likely that is."""
    lines = [("row", "prediction", *(["probability"] if len(found[0]) > 1 else []))]
    for number, (label, *chances) in enumerate((row.values() for row in found), start=1):
        told = label if isinstance(label, str) else f"{label:.6g}"
        sure = [f"{100 * max(float(chance) for chance in chances):.1f} %"] if chances else []
        lines.append((str(number), told, *sure))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + "\n"
        for line in lines
    )


def _as_csv(found: Sequence[Prediction]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


def _as_json(found: Sequence[Prediction]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


_WRITERS = {Format.TEXT: _as_text, Format.CSV: _as_csv, Format.JSON: _as_json}

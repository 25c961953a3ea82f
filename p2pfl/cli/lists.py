"""The verbs that list what there is: ``experiments``, ``topologies``, ``algorithms``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import Format
from p2pfl.cli.tables import print_table
from p2pfl.errors import UserError

if TYPE_CHECKING:
    from p2pfl.algorithm import Algorithm

FormatOption = Annotated[Format, typer.Option(help="How it is printed.")]
# Of keys that have no default in some algorithm; rpel needs more models for more attackers.
EXAMPLES = {"theta": 1.0, "rho": 0.9, "share": 0.1, "rounds": 10, "nodes": 16}
EXAMPLES |= {"attackers": 1, "s": 8}
CHOSEN = {"codec": "codec", "share": "codec", "rank": "rank"}  # keys by which messages shrink
MEASURED = 4096  # parameters of a model whose message is measured, and of one twice as large


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


def topologies(format: FormatOption = Format.text) -> None:
    """List the topologies: graphs, schedules that change from round to round, and files.

    Example:  p2pfl topologies --format json
    """
    from p2pfl.experiment.sections import TOPOLOGIES
    from p2pfl.topology import SCHEDULES

    kinds = {"file": "file", **dict.fromkeys(SCHEDULES, "schedule")}
    told = [
        {
            "name": name,
            "kind": kinds.get(name, "graph"),
            "arguments": _arguments(factory),
            "about": _about(factory),
        }
        for name, factory in sorted(TOPOLOGIES.items())
    ]
    _tell(told, told, format)


def algorithms(format: FormatOption = Format.text) -> None:
    """List the algorithms: what each sends to a neighbour, and what it needs.

    A message is so many bytes for a model of d parameters in float32; "codec" or "rank" where that
    is chosen.

    Example:  p2pfl algorithms --format json
    """
    from p2pfl.algorithms import ALGORITHMS

    told, short = [], []
    for name, factory in sorted(ALGORITHMS.items()):
        built, about = _built(name), _about(factory)
        chosen = next((word for key, word in CHOSEN.items() if key in _arguments(factory)), "")
        size = None if chosen else _message(built)
        told.append(
            {
                "name": name,
                "message_bytes": size,
                "needs": built and built.needs._asdict(),
                "overlap": built and built.carry is not None,
                "arguments": _arguments(factory),
                "about": about,
            }
        )
        unknown = chosen or "-"
        message = unknown if size is None else _polynomial(**size)
        needs = ", ".join(_words(built)) if built else "-"
        short.append({"name": name, "message": message, "needs": needs, "about": about})
    _tell(told, short, format)


def _built(name: str) -> Algorithm[Any, Any, Any] | None:
    """Return an algorithm, with the first codec that does; None: its library is not there."""
    from p2pfl.algorithms import ALGORITHMS
    from p2pfl.codec import CODECS
    from p2pfl.experiment.config import read
    from p2pfl.experiment.sections import SECTIONS
    from p2pfl.learning.judging import unjudged
    from p2pfl.learning.optim import sgd
    from p2pfl.learning.spec import Spec

    told = {"n": EXAMPLES["nodes"], "spec": Spec((), (), ()), "judge": unjudged}
    known = _arguments(ALGORITHMS[name])
    given = {key: value for key, value in EXAMPLES.items() if key in known}
    for codec in CODECS if "codec" in known else ("",):
        table = {"name": name, **given} | ({"codec": codec} if codec else {})
        try:
            section = read("algorithm", table, SECTIONS["algorithm"])
            built: Algorithm[Any, Any, Any] = section.build("algorithm", sgd(0.1), **told)
        except UserError:
            continue
        return built
    return None


def _message(built: Algorithm[Any, Any, Any] | None) -> dict[str, int] | None:
    """Return the bytes of a message: for every parameter, and besides."""
    import torch

    from p2pfl.algorithm import Rows

    if built is None or built.needs.weights == "none":
        return None
    from p2pfl.peer.addressed import variant

    rows, sizes = Rows(torch.tensor([0]), torch.tensor([1]), torch.tensor([[1]])), []
    for d in (MEASURED, 2 * MEASURED):
        message = built.send(built.init(torch.zeros(1, d), rows))
        message = variant(message, 0) if built.needs.addressed else message
        sizes.append(sum(field.nbytes for field in message))
    each = (sizes[1] - sizes[0]) // MEASURED
    return {"per_parameter": each, "besides": sizes[0] - each * MEASURED}


def _polynomial(per_parameter: int, besides: int) -> str:
    return f"{per_parameter} d + {besides}" if besides else f"{per_parameter} d"


def _words(built: Algorithm[Any, Any, Any]) -> list[str]:
    """Return what an algorithm needs in a few words each."""
    needs = built.needs
    found = {
        "shares of a mass": needs.weights == "mass",
        "no neighbours": needs.weights == "none",
        "a complete graph": needs.graph == "complete",
        "links both ways": needs.graph == "symmetric",
        "a tree": needs.graph == "tree",
        "neighbours that stay": needs.static,
        "every message": needs.every_message,
        "eigenvalues above -1/3": needs.positive,
        "one step a round": needs.one_step,
        "rounds": needs.rounds,
        "weights above 0": needs.convex,
        "several models": needs.models > 1,
    }
    return [words for words, needed in found.items() if needed]


def _arguments(factory: Callable[..., Any]) -> list[str]:
    """Return the keys of a section, without what the program supplies itself."""
    from p2pfl.experiment.config import parameters
    from p2pfl.experiment.sections import SECTIONS

    return list(parameters(factory, given=1, told=SECTIONS["algorithm"].told))


def _about(factory: Callable[..., Any]) -> str:
    return (inspect.getdoc(factory) or "").partition("\n")[0].replace("``", "`")


def _tell(told: list[dict[str, Any]], short: list[dict[str, Any]], format: Format) -> None:
    if format is Format.json:
        typer.echo(json.dumps(told))
        return
    header = list(short[0])
    cells = [
        [", ".join(cell) if isinstance(cell, list) else cell for cell in row.values()]
        for row in short
    ]
    print_table(header, cells, texts=header)

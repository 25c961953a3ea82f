"""Topologies side by side: how fast each agrees, by the round and by the model sent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

from p2pfl.errors import UserError
from p2pfl.topology.chebyshev import accelerated
from p2pfl.topology.iterate import LIMIT, spread
from p2pfl.topology.mixing import Mixing, weights
from p2pfl.topology.schedule import Topology
from p2pfl.topology.spectral import Analysis, analyse

TOLERANCE = 1e-6
NONE_LEFT = 1e-16  # is drawn of what is less, as zero has no place on the axis
# Okabe and Ito (2008): told apart by colour-blind people too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")


class Compared(NamedTuple):
    """One topology among others.

    Attributes:
        label: what it is called.
        analysis: what is known of it.
        messages: that a node sends in a round, on average over the nodes and the period.
        accelerated: rounds to 1e-6 with Chebyshev's polynomials, None where they do not apply: they
            ask for a static symmetric matrix, and are of no use to one that is exact at once.
        models: that a node sends until the error is 1e-6; None if that takes for ever.
        errors: what is left after 0, 1, ... rounds of ‖x - x̄‖, from x_i = i, as a part of it.
    """

    label: str
    analysis: Analysis
    messages: float
    accelerated: int | None
    models: float | None
    errors: list[float]


def compare(label: str, topology: Topology, mixing: Mixing, rounds: int) -> Compared:
    """Return what there is to say of one topology, its errors for so many rounds included.

    Raises:
        ValueError: the rule cannot be worked out for this topology.
    """
    analysis = analyse(topology, mixing)
    sent = [len(links.senders) for links in topology.rounds()]
    messages = sum(sent) / len(sent) / topology.n
    needed = analysis.rounds_to_1e_6
    models = None if needed is None else messages * needed
    faster = _accelerated(topology, mixing, analysis)
    return Compared(label, analysis, messages, faster, models, errors(topology, mixing, rounds))


def errors(topology: Topology, mixing: Mixing, rounds: int) -> list[float]:
    """Return how much of ‖x - x̄‖ is left after 0, 1, ... rounds, from x_i = i: ``rounds + 1``.

    Where a mass is conserved x are the quotients, as of push-sum.
    """
    if topology.n == 1:
        return [0.0] * (rounds + 1)
    ramp = torch.arange(topology.n, dtype=torch.float64)[:, None]
    block = torch.cat([ramp, torch.ones_like(ramp)], 1)
    began, left = spread(block), [1.0]
    period = topology.period
    if period is not None:
        again = cycle([weights(links, mixing) for links in topology.rounds()])
    for round in range(rounds):
        block = (next(again) if period else weights(topology.links(round), mixing)) @ block
        left.append(spread(block) / began)
    return left


def draw_errors(compared: Sequence[Compared], path: str | Path) -> None:
    """Draw the errors of several topologies per round and per model sent into a PNG file.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'p2pfl-gossip[plots]'") from None
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory and needs no display
    left, right = figure.subplots(1, 2, sharey=True)
    for i, one in enumerate(compared):
        rounds = range(len(one.errors))
        shown = [max(error, NONE_LEFT) for error in one.errors]
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % 4]}
        left.plot(rounds, shown, label=one.label, **style)
        right.plot([one.messages * round for round in rounds], shown, **style)
    for axes, name in ((left, "round"), (right, "models sent per node")):
        axes.set(xlabel=name, yscale="log")
        axes.grid(color="#d9e0e7", linewidth=0.8)
    left.set_ylabel("consensus error")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    try:
        figure.savefig(path, format="png", facecolor="white")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _accelerated(topology: Topology, mixing: Mixing, analysis: Analysis) -> int | None:
    rho = analysis.rho
    if analysis.lambda_min is None or rho is None or not 0 < rho < 1 or analysis.approximate:
        return None
    matrix = weights(topology.links(0), mixing)
    ramp = torch.arange(topology.n, dtype=torch.float64)[:, None]
    goal = TOLERANCE * float((ramp - ramp.mean()).norm())
    for round, x in enumerate(accelerated(matrix, ramp, rho, LIMIT), 1):
        if float((x - x.mean()).norm()) <= goal:
            return round
    return None

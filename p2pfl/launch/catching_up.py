"""Coming late: models are asked of a few neighbours, and training goes on in their round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl.data.statistics import Affine
from p2pfl.errors import RunError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.averaging import Interrupted
from p2pfl.learning.tree import wide
from p2pfl.peer.events import PeerId, Position, Received
from p2pfl.peer.joining import Offer
from p2pfl.runtime import chunks
from p2pfl.runtime.links import Links
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.wire import OFFERS

MORE = 1.0  # seconds to wait for further models, once there is one
HELLO = 2.0  # seconds to hear who else is there
NAP = 100  # milliseconds between two looks at whether to go on


class Given(NamedTuple):
    """What who comes late is given, where every peer standardises by itself, or not at all."""

    params: Tensor  # [1, d]


class GivenConstants(NamedTuple):
    """The same, where all standardise by constants that were agreed on."""

    params: Tensor  # [1, d]
    shift: Tensor  # [1, f]
    scale: Tensor  # [1, f]


class Patience(NamedTuple):
    """How long to wait: so many seconds, or until we are asked to end."""

    seconds: float
    go_on: Callable[[], bool]


def constants(experiment: Experiment, affine: Affine | None) -> tuple[Tensor, ...]:
    """Return what who comes late needs to know besides a model."""
    return tuple(affine) if affine is not None and experiment.standardise == "pooled" else ()


def catch_up(
    setup: Setup,
    links: Links,
    node: int,
    features: int,
    own: Position | None,
    patience: Patience,
) -> tuple[Position | None, Affine | None, float]:
    """Ask the friends that let us in for their models, and make ourselves known to all.

    Args:
        setup: what is run.
        links: to the others.
        node: who we are.
        features: how many are standardised by constants that all have agreed on.
        own: where we stood when we were last here, if that is known.
        patience: how long to wait for a first model.

    Returns:
        where to begin, those constants, and for how many seconds the run has been going on.

    Raises:
        RunError: nobody gave us a model in time.
        Interrupted: we were asked to end.
    """
    example: Given | GivenConstants = Given(setup.task.init(torch.tensor([node])))
    if features:
        exact = torch.zeros(1, features, dtype=wide(example.params))
        example = GivenConstants(example.params, exact, exact)
    offered = _offers(links, node, example, patience)
    told = [one.score for one in offered if 0 <= one.score < math.inf]
    elapsed = statistics.median(told or [0.0])  # one alone may lie
    affine = Affine(*offered[0].message[1:]) if features else None
    offers = [Offer(one.round, one.message[0]) for one in offered]
    begin = setup.joined(node, offers, own)
    links.look_out()
    deadline = time.monotonic() + HELLO
    while len(_live(links)) < 2 and time.monotonic() < deadline and patience.go_on():
        links.wait(deadline, NAP)
        links.events()
    return begin, affine, elapsed


def _live(links: Links) -> tuple[PeerId, ...]:
    return links.lookout.live if links.lookout else ()


def _offers(
    links: Links, node: int, example: Given | GivenConstants, patience: Patience
) -> list[Received]:
    friends = links.friends
    links.expect(OFFERS, chunks.schema(example), heard=len(friends))
    links.pull(friends)
    offered: dict[PeerId, Received] = {}
    deadline = time.monotonic() + patience.seconds
    while len(offered) < len(friends) and time.monotonic() < deadline:
        if not patience.go_on():
            raise Interrupted
        links.wait(deadline, NAP)
        for event in links.events():
            if isinstance(event, Received):
                offered[event.sender] = event
                deadline = min(deadline, time.monotonic() + MORE)
    if not offered:
        raise RunError(f"peer {node}: none of peers {list(friends)} gave us its model in time")
    return [offered[peer] for peer in sorted(offered)]

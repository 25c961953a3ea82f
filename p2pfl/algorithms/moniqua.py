"""Moniqua: models modulo a range, for neighbours that are close to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.compressed import QuantisedState, check_gamma
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.codec.bits import pack, unpack
from p2pfl.learning.checks import above_zero
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class Residues(NamedTuple):
    """Where models stand in a range that repeats itself; packed as they travel."""

    levels: Tensor  # [rows, d], or [rows, bytes] on its way; uint8


def moniqua(
    opt: Optimiser, theta: float, bits: int = 8, gamma: float = 1.0, seed: int = 0
) -> Algorithm[QuantisedState, Residues, Residues]:
    """Send models modulo a range, in a few bits each (Moniqua, Lu and De Sa 2020).

    A parameter travels as the nearest of ``2^bits`` levels around a circle of circumference
    ``B = 2 theta / (1 - 2^(1 - bits))``; a receiver takes what is nearest to its own. Then
    ``x <- x + gamma (W x' - x')``. As long as no parameter differs by `theta` between two
    neighbours, each is right to ``B / 2^bits``, whatever its magnitude, and the mean is kept. Where
    one differs by more, it is taken for another number, and nobody notices: choose `theta` well
    above the largest difference. No state between peers, so neighbours may change. Messages are
    ``bits d / 8`` bytes.

    Args:
        opt: the optimiser.
        theta: a bound on the difference between neighbours in any parameter.
        bits: of a parameter, 2 to 8.
        gamma: consensus step, in (0, 1].
        seed: draws how levels are rounded, the same for all nodes so that their errors cancel.
    """
    check_gamma(gamma)
    above_zero("theta", theta)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits} is not in 2..8")
    count = 2**bits
    level = 2 * theta / (1 - 2 / count) / count

    def init(x: Tensor, rows: Rows) -> QuantisedState:
        return QuantisedState(x, rng.keys(seed, torch.zeros_like(rows.nodes)), opt.init(x))

    def send(s: QuantisedState) -> Residues:
        drawn = (s.x.double() / level + rng.uniform(s.keys, s.x.shape[1])).floor_()
        # Where training has diverged the loss will say so; here any level will do.
        return Residues(pack(drawn.remainder_(count).nan_to_num_().to(torch.uint8), bits))

    def absorb(known: Residues | None, message: Residues, d: int) -> Residues:
        return Residues(unpack(message.levels, bits, d))

    def receive(s: QuantisedState, inbox: Inbox[Residues]) -> QuantisedState:
        own = s.x.to(wide(s.x))
        levels, _ = inbox.gather(inbox.heard.levels)
        offsets = _nearest(levels.to(own.dtype) * level - own.unsqueeze(1), level * count)
        mine = _nearest(inbox.mine(inbox.heard.levels).to(own.dtype) * level - own, level * count)
        pull = (inbox.shares().to(own.dtype).unsqueeze(1) @ offsets).squeeze(1)
        x = (own + gamma * (pull - mine)).to(s.x.dtype)
        return s._replace(x=x, keys=rng.fold(s.keys, 1))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        absorb,
        Needs(every_message=True),
        factor=plain_factor(opt),
        columnwise=True,
        restart=lambda s: s,  # messages say all there is
        keeps_mean=True,
    )


def _nearest(offset: Tensor, around: float) -> Tensor:
    """Return offsets on a circle of the given circumference, the short way."""
    return offset - around * torch.round(offset / around)

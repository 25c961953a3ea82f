"""BEER: gradient tracking over compressed differences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.algorithm import Algorithm, Inbox, M, Needs, Rows, by_column
from p2pfl.algorithms.compressed import check_gamma
from p2pfl.algorithms.corrected import Track
from p2pfl.codec import Codec
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import tree_map, wide


class BeerState(NamedTuple):
    """A model and the tracked gradient, and what the neighbours believe both to be."""

    x: Tensor
    before: Tensor  # the model as it was before the local steps of this round
    y: Tensor
    grads: Tensor  # the last local gradient
    public: Track
    keys: Tensor
    opt: Any


def beer(
    opt: Optimiser, codec: Codec[M], gamma: float = 0.2, seed: int = 0
) -> Algorithm[BeerState, M, Track]:
    """Track the average gradient under compression (BEER, Zhao et al. 2022).

    ``x <- x + gamma (W h - h) - lr y`` and ``y <- y + gamma (W u - u) + g_new - g_old``, where h
    and u are public copies of x and y, which move by decoded differences as in `choco`. Reaches
    the optimum of the mean loss in spite of unlike data and of the codec. `gamma` in (0, 1]: as
    for `choco`, or smaller. Messages are twice what the codec says. Asks for a fixed set of
    neighbours and for every message, in order.
    """
    check_gamma(gamma)

    def init(x: Tensor, rows: Rows) -> BeerState:
        nothing = torch.zeros_like(x, dtype=wide(x))
        keys, y = rng.keys(seed, rows.nodes), torch.zeros_like(x)
        return BeerState(x, x, y, y, Track(nothing, nothing), keys, opt.init(x))

    def step(s: BeerState, grads: Tensor) -> BeerState:
        y = s.y + grads - s.grads
        update, state = opt.update(y, s.opt, s.x)
        return s._replace(x=s.x + update, y=y, grads=grads, opt=state)

    def send(s: BeerState) -> M:
        # Both differences are rows for the codec, side by side in the message.
        changes = torch.stack([s.before - s.public.x, s.y - s.public.y], dim=1)
        keys = torch.stack([s.keys, rng.fold(s.keys, 2)], dim=1)
        packed = codec.encode(changes.flatten(0, 1).to(s.x.dtype), keys.flatten())
        return tree_map(lambda field: field.view(-1, 2, *field.shape[1:]), packed)

    def absorb(known: Track | None, message: M, d: int) -> Track:
        rows = codec.decode(tree_map(lambda field: field.flatten(0, 1), message), d)
        changes = rows.to(wide(rows)).view(-1, 2, d)
        x, y = changes[:, 0].contiguous(), changes[:, 1].contiguous()
        return Track(x, y) if known is None else Track(known.x + x, known.y + y)

    def receive(s: BeerState, inbox: Inbox[Track]) -> BeerState:
        public = Track(*map(inbox.mine, inbox.heard))
        pull = Track(*(inbox.mix(f) - own for f, own in zip(inbox.heard, public, strict=True)))
        x = (s.x + gamma * pull.x).to(s.x.dtype)
        y = (s.y + gamma * pull.y).to(s.y.dtype)
        return s._replace(x=x, before=x, y=y, public=public, keys=rng.fold(s.keys, 1))

    return Algorithm(
        init,
        lambda s: s.x,
        by_column(step, opt.columnwise),
        send,
        receive,
        absorb,
        Needs(graph="symmetric", static=True, every_message=True),
        columnwise=True,
        keeps_mean=True,
    )

"""JWINS: share the wavelet coefficients that have changed most."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.codec.sparse import Indices, Kept, keeper, kept_columns, listed, spread
from p2pfl.codec.wavelet import check_levels, haar, inverse_haar, padded
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class JwinsState(NamedTuple):
    """A model, its coefficients as they were when they were last shared, the optimiser."""

    x: Tensor
    shared: Tensor  # [rows, coefficients]
    opt: Any


class Partial(NamedTuple):
    """Some coefficients of a model, zero where there is none, and which there are."""

    values: Tensor  # [rows, coefficients]
    there: Tensor  # [rows, coefficients], 1 or 0


def jwins(
    opt: Optimiser,
    k: int | None = None,
    share: float | None = None,
    levels: int = 4,
    indices: Indices = "bitmap",
) -> Algorithm[JwinsState, Kept, Partial]:
    """Average the wavelet coefficients that have changed most (JWINS, Dhasade et al. 2023).

    Every peer sends the `k` coefficients, or the `share` of them, of its model's Haar transform
    that have changed most since it last sent them; in place of those that a neighbour did not
    send, a receiver takes its own. Agreed models stay agreed, but the mean moves a little, as not
    all send the same coefficients. No state between peers, so neighbours may change. Messages are
    ``4 k + d/8`` bytes (float32), or ``8 k`` with a list of indices, where d is rounded up to a
    multiple of 2^levels.

    The paper draws the share anew in every round, which the fixed size of messages here does not
    allow; it also uses other wavelets, and an entropy code for the indices.
    """
    keep = keeper(k, share)
    check_levels(levels)

    def init(x: Tensor, rows: Rows) -> JwinsState:
        return JwinsState(x, haar(x.to(wide(x)), levels), opt.init(x))

    def send(s: JwinsState) -> Kept:
        now = haar(s.x.to(s.shared.dtype), levels)
        kept = listed(now, keep((now - s.shared).abs()), indices)
        return kept._replace(values=kept.values.to(s.x.dtype))

    def absorb(known: Partial | None, message: Kept, d: int) -> Partial:
        width, values = padded(d, levels), message.values.to(wide(message.values))
        columns = kept_columns(message, width)
        there = spread(torch.ones_like(values), columns, width)
        return Partial(spread(values, columns, width), there)

    def receive(s: JwinsState, inbox: Inbox[Partial]) -> JwinsState:
        now, (values, there) = haar(s.x.to(s.shared.dtype), levels), inbox.heard
        pull = inbox.mix(values) - inbox.mix(there) * now
        change = inverse_haar(pull, levels)[:, : s.x.shape[1]]
        shared = torch.where(inbox.mine(there) > 0, now, s.shared)
        return s._replace(x=(s.x + change).to(s.x.dtype), shared=shared)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        absorb,
        Needs(every_message=True),
        factor=plain_factor(opt),
        restart=lambda s: s,  # messages say all there is
    )

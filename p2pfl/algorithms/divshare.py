"""DivShare: every neighbour is sent another part of a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.steps import plain_factor, plain_step
from p2pfl.learning.checks import require
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.spec import Spec
from p2pfl.learning.tree import wide


class DivShareState(NamedTuple):
    """A model, its optimiser and the keys by which it is cut up."""

    x: Tensor
    opt: Any
    keys: Tensor


class Fragment(NamedTuple):
    """Some entries of a model: which of its fragments, and the key by which it was cut up."""

    key: Tensor  # [rows, F, 1], int64
    number: Tensor  # [rows, F, 1], int32
    values: Tensor  # [rows, F, w]


def divshare(
    opt: Optimiser, fragments: int = 4, seed: int = 0, spec: Spec | None = None
) -> Algorithm[DivShareState, Fragment, Fragment]:
    """DivShare: send every neighbour another fragment (Biswas et al. 2024; Shatter, the same year).

    In every round a model is cut into so many fragments, at random: each takes one of every F
    consecutive parameters, and every parameter is in exactly one. The t-th neighbour is sent
    fragment ``t % F``. A receiver takes for every parameter the mean of its own value and of all
    that came. Nobody is told more than one fragment of a model in a round: with more neighbours
    than fragments several are told the same one, and each still one. Over the rounds a neighbour
    that stays sees all parameters, of models of different age.

    Messages are ``4 d / F + 12`` bytes (float32). On ``el_local`` with ``s = F s'`` it costs what
    whole models cost with s'; with ``fragments = 1`` it is `dpsgd` with uniform weights. The mixing
    weights only say who was heard. Any graph, and any message may be lost. The mean of all models
    moves a little, as not all parameters come to all as often.

    Args:
        fragments: how many, F.
        seed: of the cuts; by default that of the experiment.
        spec: the parameters of the model, if it is known; an experiment tells them.
    """
    require(fragments >= 1, "fragments", fragments, "at least 1")
    if spec and spec.size:
        most = f"at most the model's {spec.size} parameters"
        require(fragments <= spec.size, "fragments", fragments, most)

    def init(x: Tensor, rows: Rows) -> DivShareState:
        return DivShareState(x, opt.init(x), rng.keys(seed, rows.nodes))

    def send(s: DivShareState) -> Fragment:
        numbers = torch.arange(fragments, device=s.x.device).expand(len(s.x), -1)
        columns = _columns(s.keys.unsqueeze(1), numbers, _width(s.x, fragments), fragments)
        values = _padded(s.x, fragments).unsqueeze(1).expand(-1, fragments, -1).gather(2, columns)
        key = s.keys.view(-1, 1, 1).expand(-1, fragments, -1)
        return Fragment(key, numbers.int().unsqueeze(2), values)

    def receive(s: DivShareState, inbox: Inbox[Fragment]) -> DivShareState:
        keys, numbers, values = (inbox.gather(field)[0] for field in inbox.heard)
        others = inbox.others()
        total = _padded(s.x.to(wide(s.x)), fragments)
        count = torch.ones_like(total)
        # One after the other, so that all add up in the order of the ids.
        for j in range(others.shape[1]):
            columns = _columns(keys[:, j, 0], numbers[:, j, 0], values.shape[2], fragments)
            told = others[:, j : j + 1].to(total.dtype)
            total = total.scatter_add(1, columns, values[:, j].to(total.dtype) * told)
            count = count.scatter_add(1, columns, told.expand(-1, columns.shape[1]))
        x = (total / count)[:, : s.x.shape[1]].to(s.x.dtype)
        return s._replace(x=x, keys=rng.fold(s.keys, 1))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        needs=Needs(rounds=True, rule="divshare", addressed=True),
        factor=plain_factor(opt),
    )


def _width(x: Tensor, fragments: int) -> int:
    """Return how many parameters a fragment has, the last of which may be none."""
    return -(-x.shape[1] // fragments)


def _padded(x: Tensor, fragments: int) -> Tensor:
    """Return rows with zeros behind them, so that all fragments are as wide."""
    return torch.nn.functional.pad(x, (0, _width(x, fragments) * fragments - x.shape[1]))


def _columns(keys: Tensor, numbers: Tensor, width: int, fragments: int) -> Tensor:
    """Return where the parameters of fragments lie, ``[...] -> [..., width]`` int64, ascending.

    Of every F consecutive ones fragment 0 has one, drawn by the key, 1 the next, and so on around.
    """
    first = (rng.uniform(keys, width) * fragments).long()
    inside = (first + numbers.long().unsqueeze(-1)) % fragments
    return inside + fragments * torch.arange(width, device=keys.device)

"""Train locally, then average: all-to-all, with neighbours, or not at all."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.aggregation import Aggregation, combined, mean
from p2pfl.algorithm import Algorithm, Inbox, Needs, Rows
from p2pfl.algorithms.steps import carry_model, plain_factor, plain_step
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.tree import wide


class Params(NamedTuple):
    """A message which is a model and nothing else."""

    x: Tensor  # [rows, d]


class Counted(NamedTuple):
    """A model and the number of training examples behind it."""

    x: Tensor  # [rows, d]
    examples: Tensor  # [rows, 1]


class LocalState(NamedTuple):
    """A model, its optimiser, and the keys of the lots that a rule draws, if it does."""

    x: Tensor
    opt: Any
    keys: Tensor


class CountedState(NamedTuple):
    """A model, its optimiser and the number of examples it is trained on."""

    x: Tensor
    opt: Any
    examples: Tensor


def fedavg(
    opt: Optimiser, weight: Literal["examples", "uniform"] = "examples"
) -> Algorithm[CountedState, Counted, Counted]:
    """Average everybody's model, in proportion to their examples (McMahan et al. 2017).

    The server's mean, computed by every peer for itself: all hear all, so all hold the same
    model after each round. Messages are ``4 d + 4`` bytes to each other peer (float32). The
    weights follow the counts and not the mixing rule, which is right on a complete graph
    only: elsewhere "neighbours weighted by their counts" has a biased limit.
    """

    def init(x: Tensor, rows: Rows) -> CountedState:
        examples = rows.examples if weight == "examples" else torch.ones_like(rows.examples)
        return CountedState(x, opt.init(x), examples.to(wide(x)).unsqueeze(1))

    def send(s: CountedState) -> Counted:
        return Counted(s.x, s.examples)

    def receive(s: CountedState, inbox: Inbox[Counted]) -> CountedState:
        return s._replace(x=inbox.mean(inbox.heard.x, by=inbox.heard.examples))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        send,
        receive,
        needs=Needs(graph="complete", counts=("examples",)),
        factor=plain_factor(opt),
        columnwise=True,
        carry=carry_model,
        keeps_mean=weight == "uniform",
    )


def dpsgd(
    opt: Optimiser,
    order: Literal["adapt_then_combine", "combine_then_adapt"] = "adapt_then_combine",
    aggregate: Aggregation | None = None,
    seed: int = 0,
) -> Algorithm[Any, Params, Params]:
    """Decentralised SGD: local steps and averaging with the neighbours (Lian et al. 2017).

    ``adapt_then_combine`` steps, then mixes: ``x <- W (x - lr g(x))``; on a complete graph
    it is exactly SGD on everybody's batches. ``combine_then_adapt`` is the order of the
    paper, ``x <- W x - lr g(x)``: the models exchanged are those from before the local
    steps, at the price of a larger bias. With ``pace.overlap`` the first exchanges what the second
    would, while the local steps run. Messages are ``4 d`` bytes (float32).

    Args:
        order: what is exchanged.
        aggregate: what takes the place of the mean, so that neighbours may lie; the `mean` with
            the mixing weights if none is given. Takes the memory of all models heard.
        seed: of the lots that a rule may draw; by default that of the experiment.
    """
    rule = mean() if aggregate is None else aggregate
    if order == "combine_then_adapt":
        return _combine_then_adapt(opt, rule, seed)

    def init(x: Tensor, rows: Rows) -> LocalState:
        return LocalState(x, opt.init(x), _keys(rule, seed, x, rows))

    def receive(s: LocalState, inbox: Inbox[Params]) -> LocalState:
        x = combined(rule, inbox, inbox.heard.x, s.keys)
        return s._replace(x=x, keys=_next(rule, s.keys))

    def carry(before: LocalState, trained: LocalState, mixed: LocalState) -> LocalState:
        carried: LocalState = carry_model(before, trained, mixed)
        return carried._replace(keys=mixed.keys)

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        lambda s: Params(s.x),
        receive,
        needs=_needs(rule),
        factor=plain_factor(opt),
        columnwise=rule.columnwise,
        carry=carry,
        keeps_mean=rule.linear,
    )


class WhileState(NamedTuple):
    """A model, its optimiser, the model before the local steps of this round, and keys."""

    x: Tensor
    opt: Any
    before: Tensor
    keys: Tensor


def _combine_then_adapt(
    opt: Optimiser, rule: Aggregation, seed: int
) -> Algorithm[WhileState, Params, Params]:
    def init(x: Tensor, rows: Rows) -> WhileState:
        return WhileState(x, opt.init(x), x, _keys(rule, seed, x, rows))

    def receive(s: WhileState, inbox: Inbox[Params]) -> WhileState:
        x = combined(rule, inbox, inbox.heard.x, s.keys) + (s.x - s.before)
        return s._replace(x=x, before=x, keys=_next(rule, s.keys))

    return Algorithm(
        init,
        lambda s: s.x,
        plain_step(opt),
        lambda s: Params(s.before),
        receive,
        needs=_needs(rule),
        factor=plain_factor(opt),
        columnwise=rule.columnwise,
        keeps_mean=rule.linear,
    )


def _needs(rule: Aggregation) -> Needs:
    return Needs() if rule.linear else Needs(models=rule.needs, rule=rule.title)


def _keys(rule: Aggregation, seed: int, x: Tensor, rows: Rows) -> Tensor:
    """Return the keys of the rows, or nothing for each where no lots are drawn."""
    if rule.draws:
        return rng.keys(seed, rows.nodes)
    return torch.empty(len(x), 0, dtype=torch.int64, device=x.device)


def _next(rule: Aggregation, keys: Tensor) -> Tensor:
    return rng.fold(keys, 1) if rule.draws else keys


def local(opt: Optimiser) -> Algorithm[Any, Params, Params]:
    """Train alone and hear nobody: what a peer reaches on its own data."""
    needs = Needs(weights="none")
    return dpsgd(opt)._replace(
        receive=lambda s, inbox: s,
        needs=needs,
        carry=lambda before, trained, mixed: trained,
    )


class Plain(NamedTuple):
    """A vector to be averaged and nothing else."""

    x: Tensor


def average() -> Algorithm[Plain, Params, Params]:
    """Average vectors by mixing alone, without training; used to agree on statistics."""
    return Algorithm(
        lambda x, rows: Plain(x),
        lambda s: s.x,
        lambda s, grads: s,
        lambda s: Params(s.x),
        lambda s, inbox: Plain(inbox.mix(inbox.heard.x)),
        columnwise=True,
        keeps_mean=True,
    )

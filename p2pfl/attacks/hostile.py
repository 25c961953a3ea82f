"""Attackers in any algorithm: some rows send something else than they should."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.algorithm import Algorithm, ByColumn, Inbox, M, R, Rows, by_column, newest, on_inner
from p2pfl.attacks.attack import Attack, Known
from p2pfl.attacks.refusal import without_non_finite
from p2pfl.learning.pieces import stacked
from p2pfl.learning.tree import take, tree_map

T = TypeVar("T")

PROBE = 1 << 16  # parameters of the model by which an algorithm's messages are judged


class Hostile(NamedTuple):
    """The state of the algorithm inside, and what attackers remember.

    All rows have the memory, so that they are alike; only that of attackers is made use of.
    """

    inner: Any
    memory: tuple[Any, ...]  # for each field of a message that is a model
    keys: Tensor  # [rows]
    lies: Tensor  # [rows, 1], bool: who is an attacker


def hostile(
    algorithm: Algorithm[Any, M, R],
    attack: Attack,
    who: Collection[int],
    seed: int = 0,
    whole: Algorithm[Any, Any, Any] | None = None,
) -> Algorithm[Hostile, M, R]:
    """Let some nodes attack; what the others do is not changed, bit for bit.

    Attackers train and mix like everybody else, with their own true model. In what they send, every
    field which is as wide as the model is replaced. What they know of the others is what they heard
    in the last exchange, so they are one round late; at first they send their first model. Rows
    have not heard a sender whose numbers are not finite.

    Args:
        algorithm: what all of them would do.
        attack: what the attackers do.
        who: their ids.
        seed: of the noise.
        whole: where `algorithm` shares only a part of a model, the one inside, which shares all.

    Raises:
        ValueError: the attack makes no sense in this algorithm.
    """
    if attack.labels:  # it is in their data
        return algorithm
    inner, ids = algorithm, torch.tensor(sorted(who), dtype=torch.int64)
    models = _models(algorithm if whole is None else whole, attack)

    def init(x: Tensor, rows: Rows) -> Hostile:
        state = inner.init(x, rows)
        message = inner.send(state)
        lies = torch.isin(rows.nodes, ids.to(rows.nodes.device)).unsqueeze(1)
        memory = tuple(attack.init(message[k]) for k in models)
        return Hostile(state, memory, rng.keys(seed, rows.nodes), lies)

    def send(s: Hostile) -> M:
        message = inner.send(s.inner)
        if not bool(s.lies.any()):
            return message
        fields: list[Tensor] = list(message)
        for k, memory in zip(models, s.memory, strict=True):
            lie = attack.lie(memory, fields[k], rng.fold(s.keys, k))
            fields[k] = torch.where(s.lies, lie.to(fields[k].dtype), fields[k])
        return type(message)(*fields)

    def receive(s: Hostile, inbox: Inbox[R]) -> Hostile:
        inbox = without_non_finite(inbox, back=inner.needs.weights != "mass")
        after, memory = inner.receive(s.inner, inbox), s.memory
        rows = s.lies[:, 0].nonzero()
        if len(rows):
            truth = inner.send(s.inner)
            lines = [_line(inbox, row, truth) for row in rows]
            each = list(zip(rows, lines, strict=True))
            states = [inner.receive(take(s.inner, row), line) for row, line in each]
            after = _with_rows(after, rows, states)
            heard = [_heard(attack, models, take(memory, row), line) for row, line in each]
            memory = _with_rows(memory, rows, heard)
        return Hostile(after, memory, rng.fold(s.keys, 1), s.lies)

    return Algorithm(
        init,
        lambda s: inner.model(s.inner),
        by_column(_inner_step(inner), isinstance(inner.step, ByColumn)),
        send,
        receive,
        inner.absorb,
        inner.needs,
        carry=on_inner(inner.carry),
        settle=on_inner(inner.settle),
    )


def _inner_step(inner: Algorithm[Any, M, R]) -> Callable[[Hostile, Tensor], Hostile]:
    return lambda s, grads: s._replace(inner=inner.step(s.inner, grads))


def _models(algorithm: Algorithm[Any, Any, Any], attack: Attack) -> tuple[int, ...]:
    """Return which fields of a message are models.

    Raises:
        ValueError: none is, or the attack makes no sense.
    """
    needs = algorithm.needs
    if needs.weights == "none":
        raise ValueError("nobody hears anybody: only attack = 'label_flip' does anything")
    if needs.addressed:
        raise ValueError("every neighbour is sent something else: use dpsgd, or 'label_flip'")
    if attack.listens and needs.weights == "mass":
        raise ValueError("shares of models are sent, not models: use dpsgd, or 'sign_flip'")
    if not attack.finite and needs.every_message:
        raise ValueError("every message is needed, and those of this attack are refused")
    one = Rows(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    message = algorithm.send(algorithm.init(torch.zeros(1, PROBE), one))
    wide = (1, PROBE)
    found = tuple(k for k, field in enumerate(message) if tuple(field.shape) == wide)
    if algorithm.absorb is not newest or not found:
        raise ValueError("no models are sent, but changes: use dpsgd, or attack = 'label_flip'")
    return found


def _line(inbox: Inbox[R], row: Tensor, truth: M) -> Inbox[R]:
    """Return what one row, ``[1]``, has heard, as a peer holds it; of itself it knows the truth."""
    places, mask = inbox.places()
    heard = mask[row][0]
    senders = places[row][0][heard]
    own = (senders == inbox.own[row]).nonzero()[0]
    fields = []
    for field, true in zip(inbox.heard, truth, strict=True):
        whole = field if isinstance(field, Tensor) else stacked(field)
        fields.append(whole[senders].index_copy(0, own, true[row].to(whole.dtype)))
    weights = inbox.shares()[row][:, heard]
    return Inbox(weights, type(inbox.heard)(*fields), own)


def _heard(
    attack: Attack, models: tuple[int, ...], memory: tuple[Any, ...], line: Inbox[R]
) -> tuple[Any, ...]:
    """Return what one attacker remembers after an exchange."""
    weights = line.weights[0]
    others = torch.arange(len(weights), device=weights.device) != line.own
    if not bool(others.any()):
        return memory
    fields = [line.heard[k] for k in models]
    return tuple(
        attack.hear(one, Known(field[~others], field[others], weights[others], weights[~others]))
        for one, field in zip(memory, fields, strict=True)
    )


def _with_rows(tree: T, rows: Tensor, parts: list[T]) -> T:
    """Return a tree in which some rows, ``[k, 1]``, are others."""

    def put(whole: Tensor, *new: Tensor) -> Tensor:
        return whole.index_copy(0, rows.flatten(), torch.cat(new).to(whole.dtype))

    return tree_map(put, tree, *parts)

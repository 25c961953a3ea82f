"""FedPer: share some parameters of a model, and keep the others at home."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox, M, R, S, newest
from p2pfl.learning.spec import Spec
from p2pfl.learning.tree import columns, has_columns, tree_map

T = TypeVar("T")


class Alone(Inbox[R]):
    """The inbox of rows each of which has heard nobody but itself."""

    __slots__ = ()

    def mix(self, field: Tensor, by: Tensor | None = None) -> Tensor:
        """Return what each row has said itself; as of `Inbox`."""
        return field

    def mean(self, field: Tensor, by: Tensor) -> Tensor:
        """Return what each row has said itself; as of `Inbox`."""
        return field

    def largest(self, field: Tensor) -> Tensor:
        """Return what each row has said itself; as of `Inbox`."""
        return field

    def mine(self, field: Tensor) -> Tensor:
        """Return what each row has said itself; as of `Inbox`."""
        return field

    def gather(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Return every row's only sender, ``[rows, 1, d]``; as of `Inbox`."""
        return field.unsqueeze(1), torch.ones_like(field[:, :1], dtype=torch.bool)

    def places(self) -> tuple[Tensor, Tensor]:
        """Return that each row's only sender is itself; as of `Inbox`."""
        own = self.own.unsqueeze(1)
        return own, torch.ones_like(own, dtype=torch.bool)

    def shares(self) -> Tensor:
        """Return that each row makes everything of what it says, ``[rows, 1]``; as of `Inbox`."""
        return torch.ones_like(self.own, dtype=self.weights.dtype).unsqueeze(1)


def partial(algorithm: Algorithm[S, M, R], shared: Tensor) -> Algorithm[S, M, R]:
    """Let only some columns travel and be mixed (Arivazhagan et al. 2019, FedPer).

    The other columns are trained as by a node that hears nobody. Messages, and what is
    remembered of the senders, shrink to the columns shared.

    Args:
        algorithm: what is made of the columns shared; see `check_partial`.
        shared: which parameters travel, int64, ascending.
    """
    check_partial(algorithm)
    if not len(shared):
        raise ValueError("no parameters are shared")

    def send(s: S) -> M:
        return algorithm.send(columns(s, algorithm.model(s).shape[1], shared))

    def absorb(known: R | None, message: M, d: int) -> R:
        return algorithm.absorb(known, message, len(shared))

    def receive(s: S, inbox: Inbox[R]) -> S:
        d = algorithm.model(s).shape[1]
        if len(shared) == d:
            return algorithm.receive(s, inbox)
        kept = torch.ones(d, dtype=torch.bool).index_fill(0, shared.cpu(), False).nonzero()[:, 0]
        mixed, own = algorithm.receive(columns(s, d, shared), inbox), columns(s, d, kept)
        said = algorithm.absorb(None, algorithm.send(own), len(kept))
        alone = algorithm.receive(own, Alone(inbox.weights, said, inbox.own))
        return _joined(s, d, (shared, mixed), (kept, alone))

    return algorithm._replace(
        send=send,
        receive=receive,
        # Runtimes ask whether it is this very function: then older messages need not be kept.
        absorb=newest if algorithm.absorb is newest else absorb,
        columnwise=False,
    )


def check_partial(algorithm: Algorithm[Any, Any, Any]) -> None:
    """Refuse what cannot share a part of a model.

    Raises:
        ValueError: the algorithm does not treat every parameter by itself, its models are
            quotients, it merges after its local steps, or it hears nobody.
    """
    if not algorithm.columnwise:
        raise ValueError("this algorithm needs whole models and cannot share a part of them")
    if algorithm.needs.weights == "mass":
        raise ValueError("a mass is shared out in whole: take an algorithm that averages")
    if algorithm.settle is not None:
        raise ValueError("models are merged after their local steps, in whole: take another order")
    if algorithm.needs.weights == "none":
        raise ValueError("this algorithm hears nobody and has nothing to share")


def shared_columns(spec: Spec, patterns: Sequence[str]) -> Tensor:
    """Return where the parameters lie whose names match, int64, ascending.

    Args:
        spec: of the model.
        patterns: of names, as in a shell: ``["body.*"]``.

    Raises:
        ValueError: a pattern matches no parameter; it names those there are.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in spec.names):
            raise ValueError(f"no parameter matches {pattern!r}; there are {', '.join(spec.names)}")
    shared = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in spec.names]
    return torch.tensor(shared).repeat_interleave(torch.tensor(spec.sizes)).nonzero().flatten()


def _joined(s: S, d: int, shared: tuple[Tensor, S], kept: tuple[Tensor, S]) -> S:
    """Return a state of d columns; what is not cut into columns is that of those shared."""

    def join(old: Tensor, new: Tensor, own: Tensor) -> Tensor:
        if not has_columns(old, d):
            return new
        joined = torch.empty_like(old)
        joined[:, shared[0].to(old.device)] = new
        joined[:, kept[0].to(old.device)] = own
        return joined

    return tree_map(join, s, shared[1], kept[1])
